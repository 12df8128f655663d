"""Tests of coord_check.py, most with a program that takes no time.

    python3 scripts/test_coord_check.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import math
import subprocess
import sys
import unittest

from testing import InFolder, call, needs_matplotlib, needs_train_gdn, rows_of

# -coord_check of a trainer whose v' has slope BREAK under mup at step 1, 0.5 under sp; a seed's sizes are a factor
# apart, and the widest sp run of seed 9 fails.
FAKE_COORD = f"""#!{sys.executable}
import os, sys
assert sys.argv[1] == "-coord_check"
o = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls.txt"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if o["-param"] == "sp" and o["-seed"] == "9" and o["-w"] == "1024":
    sys.exit("train_gdn: -coord_check at width 1024: after 1 steps the loss is not finite; lower -lr")
d, seed = int(o["-w"]), 1 + int(o["-seed"]) / 10
with open(o["-o"], "w") as out:
    out.write("step,layer,activation,rms,rms_change_since_step_0,")
    out.write("rms_slope_min,rms_slope_max,change_slope_min,change_slope_max,")
    out.write("rms_depth_slope_min,rms_depth_slope_max,change_depth_slope_min,change_depth_slope_max\\n")
    for step in (0, 1):
        slope = 0.5 if o["-param"] == "sp" else float(os.environ.get("BREAK", 0)) * step
        out.write(f"{{step}},0,v',{{seed * d**slope}},{{step * d**slope}},0,0,0,0,,,,\\n")
        out.write(f"{{step}},,logits,{{d**-0.3}},{{step * d**-0.2}},-0.5,0,-0.5,0,,,,\\n")
        out.write(f"{{step}},0,grad:v_proj,{{1 / d}},,,,,,,,,\\n")
    linear = float(o["-lr"]) < 1e-4  # only there updates have their slope
    out.write(f"1,0,update:v_proj,{{d**(float(os.environ.get('UPDATE', 0)) if linear else -0.5)}},,0,0,,,,,,\\n")
    if "-depth_alpha" in o:  # layer l of L is as large as its number, but under alpha 1 also L to the power of DEPTH
        L = int(o["-L"])
        slope = float(os.environ.get("DEPTH", 0)) if o["-depth_alpha"] == "1" else 0
        for layer in range(L):
            out.write(f"1,{{layer}},block,{{(layer + 1) / L * L**slope}},1,0,0,0,0,0,0,0,0\\n")
"""


class CoordCheck(InFolder):
    WORDS = ("--widths", "256,512,1024", "--growth", "head_dim", "--seeds", "1,2")

    def setUp(self) -> None:
        super().setUp()
        self.fake = self.folder / "fake_train_gdn"
        self.fake.write_text(FAKE_COORD)
        self.fake.chmod(0o755)

    def check(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
        words = ("--binary", self.fake, "-o", self.folder / "out", *self.WORDS, *arguments)
        return call("coord_check.py", *words, **environment)

    def calls(self) -> list[str]:
        return (self.folder / "calls.txt").read_text().splitlines()

    def slopes(self) -> dict[tuple[str, ...], dict[str, str]]:
        rows = rows_of(self.folder / "out_slopes.csv")
        return {(r["param"], r["activation"], r["what"], r["step"]): r for r in rows}

    @needs_matplotlib
    def test_depths(self) -> None:
        words = ("--widths", "96", "--depths", "4,8,16", "--alphas", "off,1")
        done = self.check(*words)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for word in ("-w 96", "-w0 96", "-L0 8", "-param mup"):
            self.assertIn(word, self.calls()[0])
        self.assertEqual({call.split("-L ")[1].split()[0] for call in self.calls()}, {"4", "8", "16"})
        rows = [r for r in rows_of(self.folder / "out_slopes.csv") if r["activation"] == "block" and r["what"] == "rms"]
        self.assertEqual({r["layer"] for r in rows}, {"1/4", "2/4", "3/4", "4/4"})  # those that end a quarter of the depth
        self.assertEqual({r["param"] for r in rows}, {"off", "1"})
        for row in rows:
            self.assertAlmostEqual(float(row["slope"]), 0)
        for name in self.folder.glob("out_runs/*"):
            name.unlink()
        done = self.check(*words, DEPTH="0.5")
        self.assert_one_line_error(done, "slopes of alpha 1/2 and 1 are more than 0.1 outside")
        self.assertIn("outside: adamw 1 depth at width 96: block, layer 2/4, step 1: slope +0.50", done.stdout)

    @needs_matplotlib
    def test_depths_that_cannot_be(self) -> None:
        for words, said in ((("--depths", "4,6"), "--depths 6: expected multiples of 4"), (("--depths", "8"), "two depths or more"),
                            (("--depths", "4,8", "--widths", "96,192"), "expected one width"),
                            (("--depths", "4,8", "--alphas", "2"), "--alphas '2'"),
                            (("--depths", "4,8", "--", "-L", "4"), "--depths gives the layers")):
            cut = ("--widths", "96", *words) if "--widths" not in words else words
            self.assert_one_line_error(self.check(*cut), said)

    @needs_matplotlib
    def test_slopes_table_and_figures(self) -> None:
        done = self.check("-j", 2, "--table", self.folder / "table.md", "--", "-T", 16)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(len(self.calls()), 2 * 2 * 3 * 2)
        for word in ("-w 1024", "-heads 6", "-lr 1e-3 ", "-clip 0", "-T 16", "-B 1", "-L 4"):
            self.assertIn(word, self.calls()[0])
        self.assertIn("-lr 1e-05", " ".join(self.calls()))
        slopes = self.slopes()
        self.assertAlmostEqual(float(slopes["sp", "v'", "change", "1"]["slope"]), 0.5)
        self.assertAlmostEqual(float(slopes["mup", "logits", "rms", "0"]["slope"]), -0.3)
        self.assertAlmostEqual(float(slopes["mup", "grad:v_proj", "rms", "0"]["slope"]), -1)
        self.assertEqual(slopes["mup", "grad:v_proj", "rms", "0"]["judged"], "0")
        sizes = {(r["param"], r["width"], r["step"], r["activation"]): r for r in rows_of(self.folder / "out.csv")}
        self.assertAlmostEqual(float(sizes["mup", "256", "1", "v'"]["rms"]), math.sqrt((1.1**2 + 1.2**2) / 2), places=5)
        self.assertEqual(sizes["mup", "256", "1", "v'"]["seeds"], "2")
        table = (self.folder / "table.md").read_text()
        self.assertIn(table, done.stdout)
        self.assertIn("AdamW, SP, 6 heads: 3 of 7 slopes outside", table)
        self.assertIn("AdamW, muP, 6 heads: 0 of 7 slopes outside", table)
        self.assertEqual((self.folder / "out_adamw_6_heads.png").read_bytes()[:4], b"\x89PNG")
        self.assertIn("<svg", (self.folder / "out_adamw_6_heads.svg").read_text())

    @needs_matplotlib
    def test_a_slope_outside_is_an_error(self) -> None:
        done = self.check("--params", "mup", BREAK="0.11")
        self.assert_one_line_error(done, "2 slopes of mup are more than 0.1 outside")
        self.assertIn("v' (change), layer 0, step 1: slope +0.11 +- 0.00, wanted 0", done.stdout)
        self.assertEqual(self.check("--params", "mup", "--tolerance", "0.12", BREAK="0.11").returncode, 0)
        done = self.check("--params", "mup", "--", "-T", 16, UPDATE="0.11")
        self.assert_one_line_error(done, "1 slopes of mup are more than 0.1 outside")
        self.assertIn("update:v_proj, layer 0, step 1: slope +0.11", done.stdout)

    @needs_matplotlib
    def test_runs_are_used_again_where_the_options_are_equal(self) -> None:
        words = ("--params", "mup", "--widths", "256,512", "--seeds", "1", "--")
        self.check(*words)
        self.assertEqual(self.check(*words).returncode, 0)
        self.assertEqual(len(self.calls()), 4)
        self.check(*words, "-T", 16)
        self.assertEqual(len(self.calls()), 8)
        self.check(*words, "-load", "runs/w{width}")
        self.assertIn("-load runs/w512", self.calls()[8])

    @needs_matplotlib
    def test_a_failed_run_is_said(self) -> None:
        done = self.check("--seeds", "9")
        self.assert_one_line_error(done, "adamw_head_dim_sp_w1024_s9 failed", "the loss is not finite")
        self.assertAlmostEqual(float(self.slopes()["sp", "v'", "rms", "0"]["slope"]), 0.5)  # from the other widths

    @needs_matplotlib
    def test_errors(self) -> None:
        self.assert_one_line_error(self.check("--widths", "256"), "--widths 256", "two widths")
        self.assert_one_line_error(self.check("--params", "up"), "--params 'up'")
        self.assert_one_line_error(self.check("--growth", "both"), "--growth 'both'")
        self.assert_one_line_error(self.check("--tolerance", "-1"), "--tolerance -1")
        self.assert_one_line_error(self.check("--", "-seed", "1"), "-seed", "coord_check.py sets this one")
        self.assert_one_line_error(call("coord_check.py", "--binary", "/no/such"), "/no/such", "make")

    @needs_matplotlib
    @needs_train_gdn
    def test_real_trainer_on_the_cpu(self) -> None:
        words = ["-o", self.folder / "out", "--widths", "64,128,256", "--heads", 3, "--head_dim", 16, "--seeds", 1]
        words += ["--optimizers", "adamw,sgd", "--tolerance", 5, "-j", 2]
        done = call("coord_check.py", *words, "--", "-d", "cpu", "-L", 1, "-T", 8, OMP_NUM_THREADS="1")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        rows = rows_of(self.folder / "out_slopes.csv")
        for optimizer in ("adamw", "sgd"):
            for growth in ("head_dim", "heads"):
                # Weights of one standard deviation at every width: their product grows as the root of the width.
                initial = {
                    r["param"]: float(r["slope"])
                    for r in rows
                    if (r["optimizer"], r["growth"], r["activation"], r["what"], r["step"])
                    == (optimizer, growth, "v'", "rms", "0")
                }
                self.assertLess(abs(initial["mup"]), 0.15)
                self.assertGreater(initial["sp"], 0.35)


if __name__ == "__main__":
    unittest.main()
