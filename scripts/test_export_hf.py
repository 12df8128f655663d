"""Tests of export_hf.py; those that train are skipped where ./train_gdn is not built.

    python3 scripts/test_export_hf.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import unittest
from pathlib import Path

from testing import HERE, TRAIN_GDN, InFolder, call, needs_tiktoken, needs_train_gdn, rows_of


class Export(InFolder):
    MODEL = ("-w", 32, "-w0", 16, "-heads", 2, "-L", 1)
    TINY = "-d cpu -T 32 -B 2 -s 0 -v 0 -vn 8".split()

    def train(self, *words: object) -> None:
        done = subprocess.run(
            [TRAIN_GDN, *self.TINY, *map(str, words)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)

    def tensors(self, path: Path) -> dict[str, tuple[str, list[int], bytes]]:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        header.pop("__metadata__", None)
        return {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}

    @needs_train_gdn
    def test_multipliers_go_into_the_weights(self) -> None:
        for name, options, halved, eps, tied in (
            ("mup", (), ("embeddings", "o_proj", "down_proj"), 2.5e-7, True),
            ("mup0", ("-param", "mup0"), (), 1e-6, False),
            ("sp", ("-param", "sp"), (), 1e-6, True),
            ("untied", (), ("embeddings", "o_proj", "down_proj"), 2.5e-7, False),
            ("factor", ("-logit_factor", 8), ("embeddings", "o_proj", "down_proj"), 2.5e-7, False),
        ):
            run, out = self.folder / name, self.folder / f"{name}_out"
            self.train(*self.MODEL, "-n", 2, *options, "-o", run)
            done = call("export_hf.py", run, out, *["--tied"] * (name != "untied"))
            self.assertEqual(done.returncode, 0, done.stderr)
            config = json.loads((out / "config.json").read_text())
            self.assertEqual((config["norm_eps"], config["tie_word_embeddings"]), (eps, tied))
            self.assertNotIn("train_gdn", config)
            before, after = self.tensors(run / "step_00000002/model.safetensors"), self.tensors(out / "model.safetensors")
            self.assertEqual(set(after) - set(before), set() if tied else {"lm_head.weight"})
            before["lm_head.weight"] = before["model.embeddings.weight"]
            for tensor, (dtype, shape, data) in after.items():
                factor = 0.5 if tensor == "lm_head.weight" or any(part in tensor for part in halved) else 1
                if (name, tensor) == ("factor", "lm_head.weight"):
                    factor = 4
                count = math.prod(shape)
                want = [factor * x for x in struct.unpack(f"<{count}f", before[tensor][2])]
                self.assertEqual((dtype, list(struct.unpack(f"<{count}f", data))), ("F32", want), tensor)
            self.assertEqual(len(json.loads((out / "vocab.json").read_text(encoding="utf-8"))), 256)

    @needs_train_gdn
    def test_exported_folder_loads_with_the_same_loss(self) -> None:
        for name, options in (("width", ()), ("depth", ("-L", 2, "-L0", 1))):
            run, out = self.folder / name, self.folder / f"{name}_out"
            self.train(*self.MODEL, "-n", 2, "-param", "mup0", *options, "-o", run)
            self.assertEqual(call("export_hf.py", run, out).returncode, 0)
            rows = []
            for load in (run, out):
                self.train("-load", load, "-n", 1, "-lr", 0, "-save", 0, "-o", self.folder / f"again_{load.name}")
                rows.append(rows_of(self.folder / f"again_{load.name}" / "log.csv"))
            for a, b in zip(*rows):
                self.assertAlmostEqual(float(a["loss"]), float(b["loss"]), places=5)

    @needs_tiktoken
    def test_vocabulary_text_gives_a_tokenizer(self) -> None:
        """vocab.txt holds no merges; those that are found give the same tokens."""
        sys.path.insert(0, str(HERE))
        import export_hf
        import tokenize_text

        words = [b"th", b"the", b" t", b" the", b"in", b"ing", b"th" + b"ing", "\u00e9".encode(), b"  ", b"    "]
        ranks = {token: i for i, token in enumerate([bytes([b]) for b in range(256)] + words)}
        (self.folder / "vocab.txt").write_text(tokenize_text.vocabulary_text(ranks))
        count, tokenize_text.END_OF_TEXT = tokenize_text.END_OF_TEXT, len(ranks)
        try:
            export_hf.write_gpt2_files(self.folder, self.folder / "vocab.txt")
        finally:
            tokenize_text.END_OF_TEXT = count
        lines = (self.folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        self.assertEqual(lines, ["#version: 0.2", "t h", "th e", "\u0120 t", "\u0120 the", "i n", "in g", "th ing", "\u00c3 \u00a9", "\u0120 \u0120", "\u0120\u0120 \u0120\u0120"])  # fmt: skip
        ids = json.loads((self.folder / "vocab.json").read_text(encoding="utf-8"))
        self.assertEqual((ids["thing"], ids["\u0120the"], ids["!"]), (262, 259, 33))

    def test_errors(self) -> None:
        out = self.folder / "out"
        self.assert_one_line_error(call("export_hf.py", self.folder / "none", out), "none: no checkpoint there")
        (self.folder / "config.json").write_text("{}")
        self.assert_one_line_error(call("export_hf.py", self.folder, out), "not a configuration of train_gdn")
        config = {"hidden_size": 8, "norm_eps": 1e-6, "train_gdn": {"vocab": 50257, "base_width": 8, "fixed_head_size": False, "parametrization": "mup"}}  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps(config))
        self.assert_one_line_error(call("export_hf.py", self.folder, out), "model.safetensors: no such file")
        (self.folder / "model.safetensors").write_text("x")
        self.assert_one_line_error(call("export_hf.py", self.folder, out), "not a safetensors file")


if __name__ == "__main__":
    unittest.main()
