"""Tests of mup_groups.py and of ./train_gdn -mup_table json: python3 scripts/test_mup_groups.py"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import unittest
from pathlib import Path

import mup_groups
from testing import TRAIN_GDN, InFolder, needs_train_gdn

needs_torch = unittest.skipUnless(
    all(map(importlib.util.find_spec, ("torch", "safetensors"))), "torch or safetensors is missing"
)
MODEL = "-w 64 -w0 32 -heads 2 -L 2 -L0 1 -depth_alpha 1/2 -wd_mode sqrt -eps_mode scaled".split()


def train_gdn(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([TRAIN_GDN, *map(str, words)], capture_output=True, text=True, timeout=300)


def modules(table: dict, skip: str = "") -> "torch.nn.Module":
    """A module with a parameter for each row of the table, but those whose name ends in skip."""
    import torch

    model = torch.nn.Module()
    for row in table["tensors"]:
        *path, last = row["name"].split(".")
        if skip and row["name"].endswith(skip):
            continue
        at = model
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(last, torch.nn.Parameter(torch.zeros(row["shape"])))
    return model


@needs_train_gdn
class Tables(InFolder):
    def table(self) -> dict:
        done = train_gdn(*MODEL, "-vocab_size", 256, "-mup_table", "json")
        self.assertEqual(done.returncode, 0, done.stderr)
        (self.folder / "mup.json").write_text(done.stdout)
        return mup_groups.read(self.folder / "mup.json")

    def test_the_table_alone_is_printed(self) -> None:
        table = self.table()
        self.assertEqual((table["width"], table["base_width"], table["layers"], table["base_layers"]), (64, 32, 2, 1))
        self.assertEqual(len({row["name"] for row in table["tensors"]}), len(table["tensors"]))
        self.assertAlmostEqual(table["forward"]["branches"], 2**-0.5)
        self.assertEqual(list(self.folder.iterdir()), [self.folder / "mup.json"])
        wrong = train_gdn("-mup_table", "xml")
        self.assertEqual(wrong.returncode, 1)
        self.assertIn("expected json", wrong.stderr)

    def test_a_file_of_something_else(self) -> None:
        (self.folder / "x.json").write_text("[]")
        with self.assertRaisesRegex(ValueError, "expected what ./train_gdn -mup_table json prints"):
            mup_groups.read(self.folder / "x.json")

    @needs_torch
    def test_parameters_that_do_not_match_are_listed(self) -> None:
        import torch

        table = self.table()
        model = modules(table, skip="layers.1.attn.q_proj.weight")
        model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
        model.model.norm.weight = torch.nn.Parameter(torch.zeros(63))
        with self.assertRaises(ValueError) as error:
            mup_groups.param_groups(model, table, 1e-3)
        for words in ("not in the table: extra", "model.norm.weight [63], the table has [64]",
                      "not in the model: model.layers.1.attn.q_proj.weight"):
            self.assertIn(words, str(error.exception))
        with self.assertRaisesRegex(ValueError, "expected adamw or sgd"):
            mup_groups.param_groups(modules(table), table, 1e-3, optimizer="adam")

    @needs_torch
    def test_initial_values(self) -> None:
        table = self.table()
        model = modules(table)
        mup_groups.initialize(model, table)
        for row, parameter in mup_groups.matched(model, table):
            init = row["init"]
            if init is None:
                self.assertEqual(float(parameter.detach().abs().max()), 0)
            elif "normal" in init and parameter.numel() > 2000:
                self.assertAlmostEqual(float(parameter.detach().std()) / init["normal"], 1, delta=0.1)
            elif "uniform" in init:
                self.assertLessEqual(float(parameter.detach().abs().max()), init["uniform"])
                self.assertGreater(float(parameter.detach().abs().max()), 0.9 * init["uniform"])

    @needs_torch
    def test_multipliers(self) -> None:
        import torch

        table = self.table()
        model = torch.nn.Module()
        for name in ("lm_head", "o_proj", "down_proj"):
            model.add_module(name, torch.nn.Linear(4, 4))
        model.add_module("o_norm", torch.nn.Module())
        model.o_norm.eps = 1e-6
        x = torch.ones(1, 4)
        before = {name: getattr(model, name)(x) for name in ("lm_head", "o_proj", "down_proj")}
        mup_groups.multiply(model, table)
        for name, factor in (("lm_head", "logits"), ("o_proj", "branches"), ("down_proj", "branches")):
            torch.testing.assert_close(getattr(model, name)(x), before[name] * table["forward"][factor])
        self.assertAlmostEqual(model.o_norm.eps * (table["forward"]["readout"] ** 2 * table["head_dim_k"]), 1e-6)
        with self.assertRaisesRegex(ValueError, "no module named"):
            mup_groups.multiply(torch.nn.Module(), table)

    @needs_torch
    def test_a_step_of_pytorch_is_one_of_train_gdn(self) -> None:
        """From a checkpoint of the first step PyTorch's optimizer makes the second, with the gradient that the moments hold."""
        import torch
        from safetensors.torch import load_file

        table = self.table()
        for kind, lr, words in (("adamw", 0.01, []), ("sgd", 0.05, ["-mom", "0.9"])):
            with self.subTest(kind):
                out = self.folder / kind
                done = train_gdn("-d", "cpu", *MODEL, "-T", 32, "-B", 4, "-n", 2, "-warmup", 0, "-lr", lr, "-min_lr", lr, "-wd", 0.1,
                                 "-clip", 0, "-eps", 1e-5, "-opt", kind, "-save", 1, "-keep", 0, "-s", 0, "-v", 0, "-o", out, *words)
                self.assertEqual(done.returncode, 0, done.stderr)
                first, second = (load_file(step / "training_state.safetensors") for step in sorted(Path(out).glob("step_*")))
                model = modules(table)
                groups = mup_groups.param_groups(model, table, lr, 0.1, 1e-5, kind)
                optimizer = (torch.optim.AdamW(groups, betas=(0.9, 0.95)) if kind == "adamw"
                             else torch.optim.SGD(groups, momentum=0.9, nesterov=True))
                # PyTorch's SGD takes the decay into the gradient, as train_gdn does.
                decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p.copy_(first[f"master.{name}"].reshape(p.shape))
                        m1, m2 = (state[f"moment1.{name}"].reshape(p.shape) for state in (first, second))
                        if kind == "adamw":
                            p.grad = (m2 - 0.9 * m1) / 0.1
                            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": m1.clone(),
                                                  "exp_avg_sq": first[f"moment2.{name}"].reshape(p.shape).clone()}
                        else:
                            p.grad = m2 - 0.9 * m1 - decay[id(p)] * p
                            optimizer.state[p] = {"momentum_buffer": m1.clone()}
                optimizer.step()
                for name, p in model.named_parameters():
                    start = first[f"master.{name}"].reshape(p.shape)
                    wanted = second[f"master.{name}"].reshape(p.shape)
                    moved = float((wanted - start).abs().max())
                    self.assertGreater(moved, 0, name)
                    self.assertLess(float((p.detach() - wanted).abs().max()) / moved, 1e-3, name)


if __name__ == "__main__":
    unittest.main()
