"""Tests of the scripts in dev/torch; no GPU.

    python3 dev/torch/test_scripts.py

What needs PyTorch is skipped where that is missing.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
SCRIPTS = ["accuracy", "compare", "golden", "perplexity", "reference", "train_reference"]
PACKAGES = ["numpy", "safetensors", "torch"]
PEERS = HERE.parent / "peers"
needs_torch = unittest.skipUnless(all(map(importlib.util.find_spec, PACKAGES)), "PyTorch is missing")


def call(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


class Scripts(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_one_line_error(self, done: subprocess.CompletedProcess, *words: str) -> None:
        self.assertNotEqual(done.returncode, 0)
        self.assertNotIn("Traceback", done.stderr)
        for word in words:
            self.assertIn(word, done.stderr.strip().splitlines()[-1])

    def test_a_missing_package_is_named(self) -> None:
        for script in SCRIPTS:  # -S: without the packages that are installed
            words = [sys.executable, "-S", "-E", str(HERE / f"{script}.py"), "-h"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            self.assert_one_line_error(done, f"{script}.py: needs the package numpy", "dev/torch/requirements.txt")

    def test_every_script_is_pinned_the_same(self) -> None:
        def pins(path: Path) -> dict[str, str]:
            lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
            return dict(line.split("==") for line in lines)

        ours, scripts = pins(HERE / "requirements.txt"), pins(HERE.parents[1] / "scripts" / "requirements.txt")
        for package in ours.keys() & scripts.keys():
            self.assertEqual(ours[package], scripts[package], package)

    @needs_torch
    def test_help(self) -> None:
        for script in SCRIPTS:
            done = call(script, "-h")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"usage: {script}.py", done.stdout)

    @needs_torch
    def test_reference_agrees_with_itself(self) -> None:
        done = call("reference", "check")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @needs_torch
    def test_every_key_of_a_configuration_is_known(self) -> None:
        """Those that gdn/model_checkpoint.h writes and the values that gdn/mup_names.h names; others are an error."""
        sys.path.insert(0, str(HERE))
        import reference

        source = (HERE.parents[1] / "gdn" / "model_checkpoint.h").read_text()
        keys = re.findall(r'{"(\w+)",', source[source.index('{"train_gdn", Json::Object{'):source.index("}}}};")])[1:]
        self.assertIn("readout", keys)
        values = dict(vocab=64, base_width=16, fixed_head_size=False, parametrization="mup", gains="vector", gates="independent",
                      readout="param", logit_factor=1.0, base_layers=1, depth_alpha="1")
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_heads=2, num_v_heads=2, head_dim=16, expand_v=2.0,
                     intermediate_size=256, vocab_size=64, tie_word_embeddings=True, allow_neg_eigval=False)

        def config(**changed: object):
            return reference.config_of(dict(sizes, train_gdn={**{key: values[key] for key in keys}, **changed}))

        self.assertEqual({key: getattr(config(), key) for key in keys}, values)
        with self.assertRaisesRegex(ValueError, "unknown key 'no_such_key'"):
            config(no_such_key=1)
        with self.assertRaisesRegex(ValueError, "readout 'no_such_rule'"):
            config(readout="no_such_rule")
        names = (HERE.parents[1] / "gdn" / "mup_names.h").read_text()
        for rule, key in dict(Parametrization="parametrization", VectorRule="gains", GateRule="gates", ReadoutRule="readout",
                              DepthRule="depth_alpha").items():
            written = re.search(rf"struct Names<{rule}> {{.*?\*names\[\] = {{(.*?)}}", names, re.S)[1]
            self.assertEqual(set(re.findall(r'"([\w/]+)"', written)), set(reference.CHOICES[key]))

        scales = {(rule, readout): config(parametrization=rule, readout=readout).readout_scale * 16**0.5
                  for rule in ("mup", "mup0", "sp") for readout in ("param", "mup", "sp")}
        self.assertEqual(scales, {(rule, readout): 2.0 if readout == "mup" or (rule, readout) == ("mup", "param") else 1.0
                                  for rule, readout in scales})
        (self.folder / "config.json").write_text(json.dumps(dict(sizes, train_gdn=dict(values, no_such_key=1))))
        self.assert_one_line_error(call("compare", self.folder), "config.json", "unknown key 'no_such_key'")

    @needs_torch
    def test_initial_sizes_follow_the_fan_in(self) -> None:
        sys.path.insert(0, str(HERE))
        import reference

        c = reference.make_config(1024, 1)  # I = 2816 where the base has 768
        self.assertEqual(c.fan_in_ratio("mlp.down_proj.weight"), 2816 / 768)
        for name in ("mlp.up_proj.weight", "attn.o_proj.weight", "attn.a_proj.weight"):
            self.assertEqual(c.fan_in_ratio(name), 4)
        self.assertEqual(c.initial_std("mlp.down_proj.weight"), 0.02 / (2816 / 768) ** 0.5)
        self.assertAlmostEqual(c.learning_rate_scale("mlp.down_proj.weight"), 768 / 2816, 15)
        c.parametrization = "sp"
        self.assertEqual(c.initial_std("mlp.down_proj.weight"), 0.02)

    @needs_torch
    @unittest.skipUnless((HERE.parents[1] / "train_gdn").exists(), "train_gdn is not built")
    def test_initial_values_are_those_of_train_gdn(self) -> None:
        sys.path.insert(0, str(HERE))
        import reference

        rules = (["-w", 128, "-w0", 64, "-heads", 4], ["-w", 128, "-w0", 64, "-head_dim", 16, "-gates", "aligned"],
                 ["-w", 192, "-w0", 64, "-heads", 4, "-gates", "output"], ["-w", 128, "-w0", 64, "-heads", 4, "-gains", "hidden"],
                 ["-w", 128, "-w0", 64, "-heads", 4, "-param", "sp", "-readout", "mup"])
        for n, options in enumerate(rules):
            words = [HERE.parents[1] / "train_gdn", "-d", "cpu", "-L", 1, "-T", 16, "-B", 1, "-n", 1, "-lr", 0, "-v", 0, "-s", 0,
                     "-seed", 5, "-o", self.folder / f"run{n}", *options]
            done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
            self.assertEqual(done.returncode, 0, done.stderr)
            c, weights = reference.load_checkpoint(str(self.folder / f"run{n}"))
            mine = reference.initialize(c, 5)
            for name, x in weights.items():
                error = reference.relative(mine[name].double(), x.double())
                self.assertLessEqual(error, 1e-6, f"{options}: {name}")

    @needs_torch
    @unittest.skipUnless(importlib.util.find_spec("transformers"), "transformers is missing")
    def test_golden_files_are_these_numbers(self) -> None:
        done = call("golden", "--check")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @needs_torch
    def test_files_that_are_missing_or_wrong(self) -> None:
        self.assert_one_line_error(call("compare", self.folder / "none"), "none: no checkpoint there")
        self.assert_one_line_error(call("perplexity", self.folder, "x.bin"), "has no config.json")
        self.assert_one_line_error(call("train_reference", "--data", self.folder), "no file matches")
        (self.folder / "config.json").write_text("{}")
        self.assert_one_line_error(call("compare", self.folder), "config.json: not a configuration of train_gdn")
        self.assert_one_line_error(call("perplexity", self.folder, "x.bin", "--with", "torch"), "config.json")
        (self.folder / "a_train_0.bin").write_bytes(b"no shard")
        self.assert_one_line_error(call("train_reference", "--data", self.folder), "expected a token shard")
        sys.path.insert(0, str(HERE))
        from reference import read_safetensors

        for path in (self.folder / "none", self.folder / "a_train_0.bin"):
            with self.assertRaisesRegex(SystemExit, "No such file|not a safetensors file"):
                read_safetensors(str(path))

    @needs_torch
    def test_what_no_kernel_wrote_is_called_not_written(self) -> None:
        sys.path.insert(0, str(HERE))
        import torch

        import written

        class Double(torch.autograd.Function):
            launched = True

            @staticmethod
            def forward(ctx, x):
                return torch.empty_like(x).copy_(2 * x)

            @staticmethod
            def backward(ctx, d_y):
                d_x = d_y.new_empty(d_y.shape)
                return d_x.copy_(2 * d_y) if Double.launched else d_x  # as a kernel that was not launched

        def call(backwards: float = 1.0) -> dict:
            x = torch.linspace(-1, 1, 12).requires_grad_()
            y = Double.apply(x)
            (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, backwards))
            return dict(y=y, gradient=gradient)

        self.assertTrue(written.checked(call)["gradient"].eq(2).all())
        # a NaN of the peer's own is a result, and no fault of ours
        self.assertTrue(written.checked(lambda: call(float("nan")))["gradient"].isnan().all())
        Double.launched = False
        with self.assertRaisesRegex(written.NotWritten, "^not written: 100% of gradient$"):
            written.checked(call)
        # a part alone, and what is computed from it
        def half() -> dict:
            x = torch.empty(8)
            x[:6] = 1
            return dict(x=x, total=x.sum().reshape(1), whole=torch.empty_strided((2,), (1,)).zero_())

        with self.assertRaisesRegex(written.NotWritten, "^not written: 25% of x, 100% of total$"):
            written.checked(half)
        with written.poisoned(7.0):
            self.assertTrue(torch.empty(3).eq(7).all())
        self.assertEqual(torch.empty.__name__, "empty")  # PyTorch's own again

    @needs_torch
    @unittest.skipUnless(importlib.util.find_spec("triton"), "Triton is missing")
    def test_a_process_that_compiled_ahead_launches_nothing(self) -> None:
        code = """
import threading, triton, triton_ahead
from triton.runtime import _async_compile

@triton.jit
def kernel(x):
    pass

seen, refused = [], []

def fake(self, *args, grid, warmup, **options):  # Triton's launch, without a GPU
    seen.append((warmup, _async_compile.active_mode.get() is not None))
    _async_compile.active_mode.get().submit("key", lambda: None, None)

def launch():
    try:
        kernel[(1,)](1)
    except RuntimeError as e:
        refused.append(str(e))

def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()

triton_ahead.run_kernel, jobs = fake, {}
with triton_ahead.collecting(jobs):
    launch()
    in_a_thread(launch)  # as autograd's backward
assert seen == [(True, True)] * 2 and list(jobs) == ["key"] and not refused, (seen, jobs, refused)
launch()
in_a_thread(launch)
assert len(seen) == 2 and refused == [triton_ahead.REFUSAL] * 2, (seen, refused)
"""
        path = self.folder / "launches.py"  # Triton reads a kernel's source from its file
        path.write_text(code)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertEqual(done.returncode, 0, done.stderr)

    @needs_torch
    def test_a_peer_that_is_off_is_not_timed(self) -> None:
        with mock.patch.object(sys, "path", [str(PEERS), *sys.path]):
            import common

            self.assertIsNone(common.verdict(dict(o=0.002, dq=0.004)))
            for found in (dict(o=0.002, dq=0.5), dict(o=float("nan")), dict(o=float("inf")), {}):
                self.assertIsNotNone(common.verdict(found))

    def test_the_report_shows_what_is_lost(self) -> None:
        shape, rows = "8,4096,16,32,128,128", []
        for peer, ms in (("ours", 2.0), ("fla", 5.0), ("flashqla", 1.0)):
            rows.append(dict(kind="check", peer=peer, shape=shape, errors=dict(o=1e-3, dq=2e-3), kept_mib=1.0, wrong=None))
            rows.append(dict(kind="time", peer=peer, shape=shape, case="both", ms=ms, least=ms, most=ms, rounds=[ms], runs=1))
        rows.append(dict(kind="check", peer="jla", shape=shape, errors=None, kept_mib=None, wrong="not written: 50% of dq"))
        code = "import json, sys, report; print(report.Report(json.load(sys.stdin)).text())"
        done = subprocess.run([sys.executable, "-c", code], input=json.dumps(rows), capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(PEERS)})
        if "No module named 'numpy'" in done.stderr:
            self.skipTest("NumPy is missing")
        self.assertEqual(done.returncode, 0, done.stderr)
        losses = done.stdout.split("## Where train_gdn loses")[1].split("##")[0]
        self.assertIn("FlashQLA 1.000 ms, train_gdn 2.000: 2.00 times its time", losses)
        self.assertNotIn("fla 5", losses)
        self.assertIn("**1.000 (1.000 to 1.000)**", done.stdout)
        self.assertIn("fla 2.50 (0.40); FlashQLA 0.50 (2.00)", done.stdout)
        self.assertIn("jax-linear-attention: our script or the peer, not timed: not written: 50% of dq", done.stdout)

    @unittest.skipUnless(all(map(importlib.util.find_spec, ("torch", "transformers"))), "transformers is missing")
    @unittest.skipUnless((HERE.parents[1] / "libgdn.so").exists(), "libgdn.so is not built")
    def test_small_qwen3_next_trains_alike(self) -> None:
        done = call("train_qwen3_next", "--small", "--steps", 4, "--ways", "torch,torch2,gdn", "--out", self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("modeling_qwen3_next.torch_chunk_gated_delta_rule", done.stdout)  # was replaced
        results = json.loads((self.folder / "losses.json").read_text())
        theirs, other, ours = (results[way]["losses"] for way in ("torch", "torch2", "gdn"))
        self.assertEqual(len(ours), 4)
        self.assertLess(ours[3], ours[0])
        self.assertLess(max(abs(x - y) for x, y in zip(theirs, ours)), 1e-3)
        self.assertGreater(abs(theirs[0] - other[0]), 1e-3)
        self.assertTrue(all(ms > 0 for ms in results["gdn"]["ms"]))
        self.assert_one_line_error(call("train_qwen3_next", "--ways", "none"), "--ways none, expected of torch")


if __name__ == "__main__":
    unittest.main()
