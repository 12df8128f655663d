"""Tests of check_layer.py; skipped where PyTorch or ./libgdn.so is missing.

    python3 scripts/test_check_layer.py
"""

import importlib.util
import os
import unittest
from pathlib import Path

from testing import HERE, InFolder, call

if not all(map(importlib.util.find_spec, ("numpy", "torch"))):
    raise unittest.SkipTest("PyTorch is missing")
if not Path(os.environ.get("GDN_LIBRARY", HERE.parent / "libgdn.so")).exists():
    raise unittest.SkipTest("./libgdn.so is not built")

LAYERS = '''
import sys
sys.path.insert(0, {here!r})
from gdn_torch import chunk_gated_delta_rule


def ours(*x, **options):
    return chunk_gated_delta_rule(*x, **options)


def without_scale(q, k, v, g, beta, scale, **options):
    return chunk_gated_delta_rule(q, k, v, g, beta, scale=1, **options)


def no_gradient_of_g(q, k, v, g, beta, **options):
    return chunk_gated_delta_rule(q, k, v, g.detach(), beta, **options)


def documents_as_one(*x, cu_seqlens=None, initial_state=None, **options):
    if cu_seqlens is not None:
        raise NotImplementedError("documents are not supported")
    return chunk_gated_delta_rule(*x, initial_state=initial_state, **options)
'''


class CheckLayer(InFolder):
    def check(self, *arguments):
        (self.folder / "layers.py").write_text(LAYERS.format(here=str(HERE)))
        return call("check_layer.py", *arguments, "--tokens", 80, "--heads", 1, 2, 8, 12, PYTHONPATH=str(self.folder),
                    OMP_WAIT_POLICY="passive")

    @staticmethod
    def cells(done):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
        return {(row[0], row[1]): row[3] for row in rows if len(row) == 4}

    def test_ours_is_close_in_every_regime_and_type(self):
        for dtype, bound in (("float32", 1e-5), ("bfloat16", 1e-2), ("float64", 1e-13)):
            done = self.check("layers:ours", "--dtype", dtype)
            self.assertEqual(done.returncode, 0, done.stderr)
            cells = self.cells(done)
            self.assertEqual(len({regime for regime, _ in cells}), 7)
            self.assertEqual(len(cells), 5 * 6 + 2 * 8)
            for cell, error in cells.items():
                self.assertLess(float(error), bound, cell)

    def test_faults_are_found(self):
        done = self.check("layers:without_scale", "--bound", 100)
        self.assertEqual(done.returncode, 1)
        self.assertIn("o in 'initial values'", done.stderr)
        self.assertNotIn("final_state", done.stderr)
        cells = self.cells(done)
        self.assertGreater(float(cells["beta near 1", "o"]), 0.5)
        self.assertLess(float(cells["long memory", "final_state"]), 1e-5)

        done = self.check("layers:no_gradient_of_g", "--bound", 1000)
        self.assertEqual(done.returncode, 1)
        self.assertEqual({error for (_, name), error in self.cells(done).items() if name == "dg"}, {"missing"})
        self.assertEqual(done.stderr.count("dg in"), 7)
        self.assertNotIn("dk in", done.stderr)

        done = self.check("layers:documents_as_one", "--bound", 1000)
        self.assertEqual(done.returncode, 1)
        self.assertIn("refused: documents are not supported", done.stdout)
        done = self.check("layers:documents_as_one", "--bound", 1000, "--without", "packed documents")
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_results_from_a_file(self):
        import numpy as np
        import torch

        import gdn_torch
        inputs, results = self.folder / "inputs.npz", self.folder / "results.npz"
        self.assertEqual(self.check("--write", inputs).returncode, 0)
        x, out = np.load(inputs), {}
        for regime in sorted({name.split("/")[0] for name in x.files if "/" in name}):
            named = {name.split("/")[1]: x[name] for name in x.files if name.startswith(regime + "/")}
            got = gdn_torch.delta_rule_float64(*(named[name] for name in ("q", "k", "v", "g", "beta")), d_o=named["d_o"],
                                               scale=float(x["scale"]), initial_state=named.get("initial_state"),
                                               d_final_state=named.get("d_final_state"), cu_seqlens=named.get("cu_seqlens"))
            out.update({f"{regime}/{name}": y.numpy() for name, y in got.items()})
        out["strong decay/dk"] = out["strong decay/dk"] * 1.5
        out["beta to 2/dv"] = torch.full((3,), 1.0).numpy()
        del out["beta near 1/o"]
        np.savez(results, **out)
        done = self.check("--read", results, "--bound", 2)
        self.assertEqual(done.returncode, 1)
        cells = self.cells(done)
        self.assertEqual(cells["strong decay", "dk"], "5.00e-01")
        self.assertEqual(cells["beta to 2", "dv"], "not finite or another shape")
        self.assertEqual(cells["beta near 1", "o"], "missing")
        self.assertIn("dk in 'strong decay', o in 'beta near 1', dv in 'beta to 2'", done.stderr)

    def test_errors(self):
        self.assert_one_line_error(self.check("layers"), "layers: expected MODULE:FUNCTION")
        self.assert_one_line_error(self.check("layers:nothing"), "layers:nothing", "nothing")
        self.assert_one_line_error(self.check("--read", self.folder / "none.npz"), "none.npz")


if __name__ == "__main__":
    unittest.main()
