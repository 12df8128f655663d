#!/usr/bin/env python3
"""Tests of dev/bench.py: python3 dev/test_bench.py"""

import contextlib
import io
import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
LAYERS = """NVIDIA H200, d = 1024, M = 32768, H = 6, dk = 128, dv = 256, I = 2816, V = 50257
device copy: 4235 GB/s (read + write)

layer                                       ms        MB     GB/s  copy%
embedding_forward                       0.0287      87.2     3039  71.8%
softmax_cross_entropy, V = 256, loss    0.0206      16.8      814  19.2%
logits 50304 x 1024 dw                  4.9085                              688 TFLOP/s
"""
DELTA_RULE = """NVIDIA H200, median of 30 runs
B=8 T=4096 Hk=16 Hv=32 dk=128 dv=128   saved 1040 MiB, scratch 780 MiB
  forward                   0.712 ms    241.3 TFLOP/s     1131 GB/s  floor  0.286 ms   40.2%
    nothing saved           0.519 ms    331.0 TFLOP/s     1552 GB/s  floor  0.286 ms   55.2%
  8 splits of 64 chunks
  recurrent, one token      0.028 ms      0.9 TFLOP/s     1189 GB/s  floor  0.011 ms   39.6%
"""
STEP = """NVIDIA H200, peak matrix product 785 TFLOP/s, -opt adamw, -recompute 0
    d   L   B  parameters        ms   tokens/s    sol  plan GiB  used GiB  first s
  256   8  32    20796256    15.310    2140330  34.4%      3.65      4.20     0.13
"""
SHAPE = "delta rule, B=8 T=4096 Hk=16 Hv=32 dk=128 dv=128: "


class Bench(unittest.TestCase):
    def test_reads_what_the_benchmarks_print(self) -> None:
        self.assertEqual(
            bench.parse(LAYERS + DELTA_RULE + STEP),
            {
                "layer, d = 1024: embedding_forward": 0.0287,
                "layer, d = 1024: softmax_cross_entropy, V = 256, loss": 0.0206,
                "layer, d = 1024: logits 50304 x 1024 dw": 4.9085,
                SHAPE + "forward": 0.712,
                SHAPE + "forward, nothing saved": 0.519,
                SHAPE + "recurrent, one token": 0.028,
                "step, d = 256, 8 layers, 32 sequences": 15.31,
            },
        )

    def test_reads_a_record(self) -> None:
        """Every line of a time in what bench_layers wrote is found."""
        text = (RESULTS / "layer_speed" / "h200_d1024_4a4eda9.txt").read_text()
        lines = [line for line in text.splitlines() if line.endswith(("%", "TFLOP/s")) and not line.startswith("layer ")]
        self.assertEqual(len(bench.parse(text)), len(lines))
        self.assertGreater(len(lines), 30)

    def test_of_several_rounds_the_least(self) -> None:
        self.assertEqual(bench.parse(STEP + STEP.replace("15.310", "15.100"))["step, d = 256, 8 layers, 32 sequences"], 15.1)

    def test_moved(self) -> None:
        before = {"a": 1.0, "b": 1.0, "c": 1.0, "tiny": 0.010, "gone": 1.0}
        now = {"a": 1.031, "b": 1.029, "c": 0.9, "tiny": 0.0115, "new": 1.0}
        self.assertEqual(bench.moved(now, before, 3), [("a", 1.0, 1.031), ("c", 1.0, 0.9)])

    def test_the_exit_code_says_what_became_slower(self) -> None:
        baseline = {"date": "2026-12-01", "commit": "abc", "driver": "580", "ms": {"a": 1.0, "b": 1.0}}
        for now, code, word in [({"a": 1.02, "b": 1.0}, 0, "0 slower"), ({"a": 0.5, "b": 1.0}, 0, "1 faster"), ({"a": 1.04}, 1, "SLOWER")]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                self.assertEqual(bench.report(now, baseline, 3), code)
            self.assertIn(word, out.getvalue())
        self.assertIn("not timed now: b", out.getvalue())


if __name__ == "__main__":
    unittest.main()
