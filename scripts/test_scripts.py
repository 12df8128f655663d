"""Tests of the scripts; no GPU.

    python3 -m unittest scripts/test_scripts.py        python3 scripts/test_scripts.py

The sweep of a real ./train_gdn is skipped where that is not built, plots where matplotlib is missing, tokenizing where tiktoken is.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from plot_transfer import Curve, evaluate, find_minimum  # noqa: E402
from test_plot_transfer import Coverage, NotBracketed, Table, TheNoise  # noqa: E402, F401
from test_timed_runs import TheRule, TimedRuns  # noqa: E402, F401

TRAIN_GDN = HERE.parent / "train_gdn"
HAVE_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
needs_matplotlib = unittest.skipUnless(HAVE_MATPLOTLIB, "matplotlib is missing")
needs_tiktoken = unittest.skipUnless(importlib.util.find_spec("tiktoken"), "tiktoken is missing")
needs_tensorboard = unittest.skipUnless(importlib.util.find_spec("tensorboardX"), "tensorboardX is missing")
needs_train_gdn = unittest.skipUnless(TRAIN_GDN.exists(), "./train_gdn is not built")

# A trainer whose loss is a parabola in log2(lr): lr > 0.1 diverges, lr 0.05 fails, lr 0.03 ends early without
# an error, lr 0.02 ends above where it started, and every run says so in calls.txt.
FAKE = f"""#!{sys.executable}
import math, os, sys, time
o = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, steps, lr = o["-o"], int(o["-n"]), float(o["-lr"])
with open(os.path.join(os.path.dirname(sys.argv[0]), "calls.txt"), "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + " GPU=" + os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
os.makedirs(os.path.join(folder, "step_00000001"))
time.sleep(float(os.environ.get("FAKE_SECONDS", 0)))
log = open(os.path.join(folder, "log.csv"), "w")
log.write("step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\\n")
ran = 1 if lr > 0.1 or lr == 0.03 else steps
for step in range(1, ran + 1):
    log.write(f"{{step}},train,{{6 - step / steps}},{{lr}},1.0,2.0,{{1000 + step}},0.1\\n")
if lr > 0.1:
    sys.exit("train_gdn: step 2: the loss is not finite (loss nan); lower -lr")
if lr == 0.05:
    print("device: fake", file=sys.stdout)  # buffered: comes after the error
    sys.exit("train_gdn: cudaMalloc: out of memory")
loss = 9 if lr == 0.02 else 4 + (math.log2(lr) + 8) ** 2 / 100
if ran == steps:
    log.write(f"{{steps}},val,{{loss}},,,,,\\n")
"""
OPTIONS = "-B 64 -L 8 -T 512 -heads 6 -min_lr lr/20 -n 1000 -warmup 100"


def call(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(line for line in f if not line.startswith("#")))


class InFolder(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_one_line_error(self, done: subprocess.CompletedProcess, *words: str) -> None:
        self.assertEqual(done.returncode, 1, done.stderr)
        last_line = done.stderr.strip().splitlines()[-1]
        self.assertNotIn("Traceback", done.stderr)
        for word in words:
            self.assertIn(word, last_line)


class Sweep(InFolder):
    def setUp(self) -> None:
        super().setUp()
        self.fake = self.folder / "fake_train_gdn"
        self.fake.write_text(FAKE)
        self.fake.chmod(0o755)
        self.csv = self.folder / "out.csv"

    def sweep(self, *arguments: object, extra: tuple = (), **environment: str) -> subprocess.CompletedProcess:
        words = (
            "--binary",
            self.fake,
            "-o",
            self.csv,
            "--optimizers",
            "adamw",
            "--params",
            "mup",
            *arguments,
        )
        return call("sweep.py", *words, "--", *extra, **environment)

    def calls(self) -> list[str]:
        path = self.folder / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    def test_default_grid_is_the_small_protocol(self) -> None:
        done = call("sweep.py", "--dry-run", "-o", self.csv)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("to do\n"), 6 * (1 + 1) + 2 * 6 * (2 + 3))
        self.assertEqual(done.stdout.count(" mup=sp=mup0 "), 6)
        self.assertIn("72 runs, 72 to do, 2,359,296,000 tokens", done.stdout)
        self.assertFalse(self.csv.exists())

    def test_runs_of_several_ranks_are_packed_on_the_gpus(self) -> None:
        fake_mpirun = self.folder / "mpirun"
        fake_mpirun.write_text(f"""#!/bin/sh
echo "$*" >>{self.folder}/mpirun.txt
shift 5
exec "$@"
""")
        fake_mpirun.chmod(0o755)
        path = {"PATH": f"{self.folder}:{os.environ['PATH']}"}
        words = ("--widths", "256", "--lrs", "1e-3,2e-3,4e-3,8e-3", "--ranks", "2")
        self.assertEqual(self.sweep(*words, "--gpus", "0,1,2,3", FAKE_SECONDS="0.3", **path).returncode, 0)
        self.assertEqual({call.split("GPU=")[1] for call in self.calls()}, {"0,1", "2,3"})
        lines = (self.folder / "mpirun.txt").read_text().splitlines()
        self.assertEqual(len(lines), 4)
        for line in lines:
            self.assertTrue(line.startswith(f"-n 2 --oversubscribe --bind-to none {self.fake} "), line)
        self.assertEqual(len(rows_of(self.csv)), 4)
        for gpus, seen in (("7", "7"), ("4,5", "4,5")):  # fewer are shared, as many are taken
            self.csv.unlink()
            (self.folder / "calls.txt").unlink()
            self.assertEqual(self.sweep(*words, "--gpus", gpus, **path).returncode, 0)
            self.assertEqual({call.split("GPU=")[1] for call in self.calls()}, {seen})
        self.assert_one_line_error(self.sweep(*words, "--gpus", "0,1,2", "--retry", **path), "--ranks 2", "3 GPUs")
        self.assert_one_line_error(self.sweep("--ranks", "3"), "--ranks 3", "power of two")

    def test_command_lines(self) -> None:
        words = ("--widths", "256", "--lrs", "4e-3", "--seeds", "7", "--gpus", "3")
        self.assertEqual(self.sweep(*words, extra=("-n", "20", "-b", "32")).returncode, 0)
        self.assertEqual(
            call(
                "sweep.py",
                "--binary",
                self.fake,
                "-o",
                self.folder / "sgd",
                "--optimizers",
                "sgd",
                "--params",
                "sp",
                "--head_dim",
                "64",
                "--widths",
                "256",
                "--lrs",
                "0.01",
            ).returncode,
            0,
        )
        adamw, sgd = self.calls()
        for word in (
            "-w 256 -param mup -opt adamw -lr 0.004 -min_lr 0.0002 -seed 7",
            "-L 8",
            "-T 512",
            "-B 64",
            "-n 20",
            "-warmup 100",
            "-heads 6",
            "-save 0",
            "-b 32",
            "GPU=3",
        ):
            self.assertIn(word, adamw)
        for word in ("-opt sgd", "-mom 0.9 -wd 0", "-head_dim 64", "-n 1000", "GPU=none"):
            self.assertIn(word, sgd)
        self.assertNotIn("-heads", sgd)
        self.assertNotIn("-mom", adamw)

    def test_every_ending_is_a_row(self) -> None:
        done = self.sweep(
            "--widths", "256", "--lrs", "0.004,0.02,0.03,0.05,0.2", "-j", "3", extra=("-n", "20")
        )
        self.assert_one_line_error(done, "2 runs failed", "--retry")
        rows = {row["lr"]: row for row in rows_of(self.csv)}
        self.assertEqual(
            {lr: row["status"] for lr, row in rows.items()},
            {"0.004": "ok", "0.02": "diverged", "0.03": "failed", "0.05": "failed", "0.2": "diverged"},
        )
        self.assertAlmostEqual(float(rows["0.004"]["val_loss"]), 4 + (math.log2(0.004) + 8) ** 2 / 100)
        self.assertAlmostEqual(
            float(rows["0.004"]["train_loss"]), (5 + 5.05) / 2
        )  # the last tenth of 20 steps
        self.assertEqual((rows["0.004"]["steps"], rows["0.2"]["steps"]), ("20", "1"))
        self.assertEqual(rows["0.004"]["tokens_per_s"], "1010")
        self.assertIn("not finite", rows["0.2"]["message"])
        self.assertIn("above the first step", rows["0.02"]["message"])
        self.assertEqual(rows["0.05"]["message"], "cudaMalloc: out of memory")
        self.assertIn("after step 1 of 20", rows["0.03"]["message"])
        logs = self.folder / "out_runs"
        self.assertEqual(len(list(logs.glob("*/log.csv"))), 5)
        self.assertEqual(list(logs.glob("*/step_*")) + list(logs.glob("*.part")), [])

    def test_finished_rows_are_skipped_and_failed_ones_repeated_on_request(self) -> None:
        self.sweep("--widths", "256", "--lrs", "0.004,0.05")
        self.sweep("--widths", "256", "--lrs", "0.004,0.05,0.008")
        self.assertEqual(len(self.calls()), 3)
        self.sweep("--widths", "256", "--lrs", "0.004,0.05,0.008", "--retry")
        self.assertEqual(len(self.calls()), 4)
        self.assertEqual(len(rows_of(self.csv)), 3)

    def test_parametrizations_share_the_run_at_the_base_width(self) -> None:
        words = ("--binary", self.fake, "-o", self.csv, "--optimizers", "adamw", "--lrs", "0.004,0.05")
        self.assertEqual(call("sweep.py", *words, "--widths", "256", "--params", "sp").returncode, 1)
        self.assertEqual(len(self.calls()), 2)
        done = call("sweep.py", *words, "--widths", "256,512", "--params", "sp,mup")
        self.assert_one_line_error(done, "3 runs failed")
        self.assertEqual(len(self.calls()), 2 + 4)
        self.assertIn("-w 512", self.calls()[2])  # the longest first
        rows = {(r["param"], r["width"], r["lr"]): r for r in rows_of(self.csv)}
        self.assertEqual(len(rows), 8)
        for lr in ("0.004", "0.05"):
            own, copy = rows["sp", "256", lr], rows["mup", "256", lr]
            self.assertEqual((own["same_run_as"], copy["same_run_as"]), ("", "sp"))
            self.assertEqual({**copy, "param": "sp", "same_run_as": ""}, own)
            self.assertEqual(rows["mup", "512", lr]["same_run_as"], "")
        call("sweep.py", *words, "--widths", "512", "--params", "sp,mup", "--", "-w0", "512")
        self.assertEqual(len(self.calls()), 6)  # other options: an error, no run

    def test_no_run_starts_that_would_not_end_in_time(self) -> None:
        words = ("--widths", "256", "--lrs", "0.001,0.002,0.004,0.008", "--minutes", "0.025")
        done = self.sweep(*words, FAKE_SECONDS="0.6")
        self.assertEqual(done.returncode, 0, done.stderr)
        finished = len(rows_of(self.csv))
        self.assertIn(finished, (1, 2))
        self.assertIn(f"{finished} ok, 0 diverged, 0 failed, {4 - finished} left", done.stdout)
        self.assertEqual(len(self.calls()), finished)
        self.assertEqual(self.sweep(*words[:4]).returncode, 0)
        self.assertEqual(len(self.calls()), 4)

    def test_expected_seconds_of_a_width(self) -> None:
        words = ("--widths", "256,512", "--lrs", "0.004,0.008", "--expect", "256=9,512=90")
        done = self.sweep(*words, "--minutes", "0.5")
        self.assertIn("2 ok, 0 diverged, 0 failed, 2 left", done.stdout)
        self.assertEqual({row["width"] for row in rows_of(self.csv)}, {"256"})
        done = self.sweep(*words, "--minutes", "1.9")  # one fits; what it took counts from then on
        self.assertIn("4 ok, 0 diverged, 0 failed", done.stdout)

    def test_clipped_steps(self) -> None:
        """The fake's gradients have norm 1."""
        words = ("--optimizers", "sgd,adamw", "--widths", "256", "--lrs", "0.1")
        for clip, share, said in ((0.25, "1.000", "100% of steps clipped, lr x clip 0.025"), (1, "0.000", ""), (0, "0.000", "")):
            self.csv = self.folder / f"clip{clip}.csv"
            done = self.sweep(*words, extra=("-n", "20", "-clip", str(clip)))
            self.assertEqual([row["clipped"] for row in rows_of(self.csv)], [share, share])
            self.assertEqual(done.stdout.count("clipped"), 1 if said else 0, done.stdout)  # not under AdamW
            self.assertIn(said, done.stdout)

    def test_rows_from_before_the_column_clipped(self) -> None:
        self.sweep("--widths", "256", "--lrs", "0.004")
        old = [",".join(line.split(",")[:-1]) for line in self.csv.read_text().splitlines()]
        self.csv.write_text("\n".join(old) + "\n")
        self.assertEqual(self.sweep("--widths", "256", "--lrs", "0.004,0.008").returncode, 0)
        self.assertEqual([row["clipped"] for row in rows_of(self.csv)], ["", "0.000"])
        self.assertEqual(len(self.calls()), 2)

    def test_every_gpu_is_filled(self) -> None:
        words = ("--widths", "256", "--lrs", "0.001,0.002,0.004,0.008", "-j", "2")
        self.assertEqual(self.sweep(*words, CUDA_VISIBLE_DEVICES="4,7", FAKE_SECONDS="0.3").returncode, 0)
        self.assertEqual(sorted(line[-1] for line in self.calls()), ["4", "4", "7", "7"])

    def kill_and_resume(self, how: signal.Signals) -> None:
        words = [
            "--binary",
            str(self.fake),
            "-o",
            str(self.csv),
            "--optimizers",
            "adamw",
            "--params",
            "mup",
            "--widths",
            "256",
            "--lrs",
            "1e-3,2e-3,4e-3",
        ]
        first = subprocess.Popen(
            [sys.executable, str(HERE / "sweep.py"), *words],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "FAKE_SECONDS": "0.7"},
        )
        deadline = time.monotonic() + 60
        while len(self.calls()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        first.send_signal(how)
        first.wait()
        self.assertEqual([row["lr"] for row in rows_of(self.csv)], ["0.001"])
        done = call("sweep.py", *words)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([row["lr"] for row in rows_of(self.csv)], ["0.001", "0.002", "0.004"])
        self.assertEqual(len(self.calls()), 4)  # the second was repeated, the first was not
        self.assertEqual(len(list((self.folder / "out_runs").iterdir())), 3)

    def test_resume_after_sigkill(self) -> None:
        self.kill_and_resume(signal.SIGKILL)

    def test_resume_after_sigterm(self) -> None:
        self.kill_and_resume(signal.SIGTERM)

    def test_other_options_do_not_mix(self) -> None:
        self.sweep("--widths", "256", "--lrs", "0.004")
        self.assertEqual(self.sweep("--widths", "256", "--lrs", "0.004", extra=("-b", "8")).returncode, 0)
        self.assert_one_line_error(
            self.sweep("--widths", "256", "--lrs", "0.004", extra=("-L", "4")), "choose another -o"
        )

    def test_errors(self) -> None:
        self.assert_one_line_error(self.sweep("--widths", "256,x"), "--widths '256,x'")
        self.assert_one_line_error(self.sweep("--lrs", "0"), "positive")
        self.assert_one_line_error(self.sweep("--nonsense"), "--nonsense")
        self.assert_one_line_error(self.sweep(extra=("-lr", "1")), "-lr")
        self.assert_one_line_error(self.sweep(extra=("-i", "x.bin")), "-j")
        self.assert_one_line_error(self.sweep(extra=("-L",)), "no value")
        self.assert_one_line_error(self.sweep(extra=("-n", "0")), "-n '0'")
        self.assert_one_line_error(self.sweep("--minutes", "0"), "--minutes 0")
        self.assert_one_line_error(self.sweep("--expect", "256:9"), "--expect '256:9'")
        self.assert_one_line_error(self.sweep("-j", "0"), "--per-gpu 0")
        self.assert_one_line_error(self.sweep("--optimizers", "adam"), "--optimizers 'adam'")
        self.assert_one_line_error(
            call("sweep.py", "--binary", "/no/such", "-o", self.csv), "/no/such", "make"
        )
        self.csv.write_text("a,b\n1,2\n")
        self.assert_one_line_error(self.sweep(), "out.csv", "no column")
        self.assertEqual(self.calls(), [])

    @needs_train_gdn
    def test_real_trainer_on_the_cpu(self) -> None:
        tiny = (
            "-d",
            "cpu",
            "-w0",
            "32",
            "-L",
            "1",
            "-heads",
            "2",
            "-T",
            "32",
            "-B",
            "2",
            "-n",
            "12",
            "-warmup",
            "2",
            "-vn",
            "4",
        )
        words = (
            "-o",
            self.csv,
            "--widths",
            "32,64",
            "--params",
            "mup",
            "--adamw_lrs",
            "2e-3,4e-3",
            "--sgd_lrs",
            "1e6",
        )
        done = call("sweep.py", *words, "--", *tiny, "-clip", "0", OMP_NUM_THREADS="1")
        self.assertEqual(done.returncode, 0, done.stderr)
        rows = rows_of(self.csv)
        self.assertEqual([row["status"] for row in rows], ["ok", "ok", "diverged"] * 2)
        for row in rows[0:2] + rows[3:5]:
            self.assertEqual(row["steps"], "12")
            self.assertTrue(0 < float(row["val_loss"]) < 6 and float(row["tokens_per_s"]) > 0)
        self.assertEqual(len(list((self.folder / "out_runs").glob("*/log.csv"))), 6)
        self.assertEqual(list((self.folder / "out_runs").glob("*/step_*")), [])


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
    out.write("rms_slope_min,rms_slope_max,change_slope_min,change_slope_max\\n")
    for step in (0, 1):
        slope = 0.5 if o["-param"] == "sp" else float(os.environ.get("BREAK", 0)) * step
        out.write(f"{{step}},0,v',{{seed * d**slope}},{{step * d**slope}},0,0,0,0\\n")
        out.write(f"{{step}},,logits,{{d**-0.3}},{{step * d**-0.2}},-0.5,0,-0.5,0\\n")
        out.write(f"{{step}},0,grad:v_proj,{{1 / d}},,,,,\\n")
    linear = float(o["-lr"]) < 1e-4  # only there updates have their slope
    out.write(f"1,0,update:v_proj,{{d**(float(os.environ.get('UPDATE', 0)) if linear else -0.5)}},,0,0,,\\n")
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


def parabola(x0: float, a: float, c: float, xs: range) -> dict[float, float]:
    return {2.0**x: c + a * (x - x0) ** 2 for x in xs}


class Minima(unittest.TestCase):
    def test_parabola(self) -> None:
        m = find_minimum(parabola(-8.3, 0.04, 4.0, range(-11, -5)))
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.0)
        self.assertAlmostEqual(m.loss(-7.3), 4.04)
        self.assertEqual((m.note, m.bracketed), ("", True))

    def test_three_points_by_hand(self) -> None:
        # y = 1, 0, 3 at x = -1, 0, 1: a = 2, slope 1 at 0, so x0 = -1/4 and c = -1/8; x = 2 is not used.
        m = find_minimum({0.5: 1.0, 1.0: 0.0, 2.0: 3.0, 4.0: 50.0})
        self.assertAlmostEqual(m.x0, -0.25)
        self.assertAlmostEqual(m.c, -0.125)

    def test_edges(self) -> None:
        self.assertIn("lower edge", find_minimum(parabola(-11.2, 0.1, 4, range(-11, -5))).note)
        self.assertIn("upper edge", find_minimum(parabola(-5, 0.1, 4, range(-11, -5))).note)
        self.assertIn("diverged lr", find_minimum(parabola(-6, 0.1, 4, range(-11, -5)), {2.0**-5}).note)
        straight = find_minimum({1.0: 3.0, 2.0: 2.0, 4.0: 1.0})
        self.assertIsNone(straight.a)
        self.assertEqual(straight.x0, 2)
        self.assertFalse(straight.bracketed)

    def test_a_loss_far_above(self) -> None:
        # beyond what can be trained: the parabola is drawn, but shift and regret are not to be trusted
        far = find_minimum({6.4: 4.565, 12.8: 4.454, 25.6: 6.495, 51.2: 21.0})
        self.assertEqual(far.note, "parabola through a loss 2.0 above the lowest")
        self.assertFalse(far.bracketed)
        self.assertTrue(find_minimum({6.4: 4.565, 12.8: 4.454, 25.6: 4.9, 51.2: 21.0}).bracketed)

    def test_points_that_are_not_neighbours(self) -> None:
        losses = {1.0: 1.2, 2.0: 0.9, 4.0: 1.2, 8.0: 1.1, 16.0: 2.0}  # 4 is high, or 8 low
        m = find_minimum(losses)
        self.assertIn("not neighbours", m.note)
        self.assertAlmostEqual(m.x0, 1)
        losses[1.0] = 0.8  # now the lowest is at the edge
        self.assertIn("lower edge", find_minimum(losses).note)
        self.assertAlmostEqual(find_minimum({1.0: 1.5, 2.0: 0.8, 4.0: 1.5, 8.0: 1.1, 16.0: 0.7}).x0, 4)

    def test_lowest_points_on_one_side(self) -> None:
        losses = {1.0: 2.0, 2.0: 0.50, 4.0: 0.515, 8.0: 0.54}  # through the last three the minimum is at 2^0
        m = find_minimum(losses)
        self.assertIn("on one side", m.note)
        self.assertAlmostEqual(m.x0, 1.4901, 4)  # 1 + (1.50 - 0.015) / (2 (1.50 + 0.015))
        # A loss beyond the edge of what can be trained bends no parabola: the three lowest points have one of their own.
        cliff = find_minimum({0.5: 1.28, 1.0: 1.245, 2.0: 1.242, 4.0: 2.1})
        self.assertEqual(cliff.note, "")
        self.assertAlmostEqual(cliff.x0, 0.59375)  # 1/2 + 0.003 / (0.035 - 0.003)
        self.assertGreater(cliff.c, 1.239)

    def test_shift_and_regret(self) -> None:
        xs = range(-11, -4)
        base, wide = parabola(-8.0, 0.04, 4.0, xs), parabola(-8.5, 0.08, 3.0, xs)
        panel = {
            256: Curve({1: base, 2: {lr: y + 0.2 for lr, y in base.items()}}),
            512: Curve({1: wide, 2: wide}),
        }
        of_base, of_wide = evaluate(panel, 256)
        self.assertAlmostEqual(of_base.minimum.c, 4.1)
        self.assertEqual((of_base.shift, of_base.regret), (0, 0))
        self.assertAlmostEqual(of_wide.shift, -0.5)
        for own in of_wide.by_seed.values():
            self.assertAlmostEqual(own.shift, -0.5)
        self.assertAlmostEqual(of_wide.regret, 0.08 * 0.25)
        self.assertAlmostEqual(of_wide.grid_regret, 0)  # x = -8 and -9 are as good

    def test_a_seed_with_some_of_the_points_bends_nothing(self) -> None:
        full = parabola(-8.3, 0.04, 4.0, range(-11, -5))
        some = {lr: y + 0.3 for lr, y in full.items() if 2.0**-9 <= lr <= 2.0**-7}
        m = find_minimum(Curve({1: full, 2: some}).mean())
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.15)

    def test_a_learning_rate_that_is_too_high_says_nothing_of_the_difference_between_seeds(self) -> None:
        full = parabola(-8.3, 0.04, 4.0, range(-11, -5))
        some = {lr: full[lr] for lr in (2.0**-9, 2.0**-8)} | {2.0**-5: 4.7}
        m = find_minimum(Curve({1: full | {2.0**-5: 7.0}, 2: some}).mean())
        self.assertAlmostEqual(m.x0, -8.3)
        self.assertAlmostEqual(m.c, 4.0)


class Plots(InFolder):
    def write(
        self, name: str, x0: dict[int, float], diverged: float = 1e9, param: str = "mup", lrs=range(-11, -5)
    ) -> Path:
        path = self.folder / name
        with path.open("w") as f:
            f.write("param,optimizer,width,lr,seed,val_loss,status,options\n")
            for width, best in x0.items():
                for lr, loss in parabola(best, 0.04, 4.0, lrs).items():
                    for seed, noise in ((1, 0.0001), (2, -0.0001)):
                        ending = (
                            f",diverged,{OPTIONS}" if lr >= diverged else f"{loss + noise:.9f},ok,{OPTIONS}"
                        )
                        f.write(f"{param},adamw,{width},{lr!r},{seed},{ending}\n")
        return path

    def plot(self, *arguments: object) -> subprocess.CompletedProcess:
        return call(
            "plot_transfer.py", *arguments, "--out", self.folder / "plot", "--table", self.folder / "table.md"
        )

    def assert_drawn(self, name: str) -> None:
        self.assertEqual((self.folder / f"{name}.png").read_bytes()[:4], b"\x89PNG")
        self.assertGreater((self.folder / f"{name}.png").stat().st_size, 5000)
        self.assertIn("<svg", (self.folder / f"{name}.svg").read_text())

    @needs_matplotlib
    def test_plot_and_table(self) -> None:
        mup = self.write("mup.csv", {256: -8.0, 512: -8.25})
        sp = self.write("sp.csv", {256: -8.0, 512: -10.0}, diverged=2.0**-7, param="sp")
        done = self.plot(mup, sp)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_drawn("plot")
        table = (self.folder / "table.md").read_text()
        self.assertIn(table, done.stdout)
        cells = [[c.strip() for c in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("|")]
        by_name = {(c[0], c[1]): dict(zip(cells[0], c)) for c in cells}
        mup, sp = by_name["AdamW, muP", "512"], by_name["AdamW, SP", "512"]
        self.assertRegex(mup["shift"], r"^-0\.25 \[-0\.2[5-7], -0\.2[3-5]\]$")
        self.assertRegex(mup["regret"], r"^0\.0025 \(< 0\.002[5-9]\)$")
        self.assertEqual((mup["regret on the grid"], mup["within"]), ("0.0000", "yes"))
        self.assertRegex(sp["shift"], r"^-2\.00 \[open, -1\.9\d\]$")  # the base's best is the last that did not diverge
        self.assertEqual((sp["regret"][:6], sp["regret on the grid"], sp["within"]), ("0.1600", "0.1600", "no"))
        self.assertEqual(by_name["AdamW, SP", "256"]["shift"], "base")
        self.assertRegex(table, r"\nAdamW: noise of one run 0\.0001 \(\d+ degrees of freedom\)\.\n$")

    @needs_matplotlib
    def test_noise_from_outside(self) -> None:
        path = self.write("a.csv", {256: -8.0, 512: -8.25})
        done = self.plot(path, "--noise", 0.01, "--draws", 200)
        self.assertIn("AdamW: noise of one run 0.0100.", done.stdout)
        self.assert_one_line_error(self.plot(path, "--noise", 0), "--noise 0")
        self.assert_one_line_error(self.plot(path, "--draws", 9), "--draws 9")

    @needs_matplotlib
    def test_minimum_at_the_edge_is_said(self) -> None:
        done = self.plot(self.write("a.csv", {256: -8.0, 512: -11.3}))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("minimum at the grid's lower edge", done.stdout)
        self.assertIn("| ?", done.stdout)

    @needs_matplotlib
    def test_a_width_with_too_few_points(self) -> None:
        path = self.write("a.csv", {256: -8.0, 512: -8.0})
        spot = self.write("b.csv", {1024: -8.0, 2048: -8.0}, lrs=range(-9, -7), diverged=2.0**-8)
        self.assert_one_line_error(self.plot(path, spot), "too few points", "width 1024 has 1")
        self.assert_drawn("plot")

    @needs_matplotlib
    def test_plot_log(self) -> None:
        for name in ("one", "two"):
            (self.folder / name).mkdir()
            steps = "".join(f"{i},train,{6 / i},0.1,1.5,2,1000,0.1\n" for i in range(1, 101))
            log = "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n" + steps + "100,val,0.07,,,,,\n101,trai"
            (self.folder / name / "log.csv").write_text(log)
        done = call(
            "plot_log.py", self.folder / "one", self.folder / "two" / "log.csv", "--out", self.folder / "log"
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_drawn("log")

    def test_errors_of_plot_transfer(self) -> None:
        good = self.write("good.csv", {256: -8.0, 512: -8.0})
        self.assert_one_line_error(self.plot(self.folder / "none.csv"), "none.csv: no such file")
        self.assert_one_line_error(self.plot(self.folder), "folder")
        self.assert_one_line_error(self.plot(good, good), "second row")
        self.assert_one_line_error(
            self.plot(self.write("b.csv", {512: -8.0})), "no runs at the base width 256"
        )
        self.assert_one_line_error(
            self.plot(self.write("c.csv", {256: -8.0}, lrs=range(-9, -7))), "too few points"
        )
        for text, words in (
            ("a,b\n1,2\n", "no column param"),
            (good.read_text().splitlines()[0] + "\n", "no rows"),
            (good.read_text().replace("4.", "four ", 1), "expected a number"),
            (good.read_text().replace(",ok,", ",maybe,", 1), "status 'maybe'"),
            (good.read_text().replace("-L 8", "-L 4", 1), "do not belong in one plot"),
            (good.read_text().replace(",ok,", ",", 1), "number of fields"),
        ):
            (self.folder / "bad.csv").write_text(text)
            self.assert_one_line_error(self.plot(self.folder / "bad.csv"), "bad.csv", words)

    def test_errors_of_plot_log(self) -> None:
        self.assert_one_line_error(call("plot_log.py", self.folder / "none"), "no such file")
        (self.folder / "log.csv").write_text("step,loss\n1,2\n")
        self.assert_one_line_error(call("plot_log.py", self.folder), "no column split")
        (self.folder / "log.csv").write_text("step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n")
        self.assert_one_line_error(call("plot_log.py", self.folder), "no training steps")

    def trace(self, kernels: bool) -> dict:
        """As of dev/bench_step -trace: two layers whose norm, product and delta rule take 1, 4 and 2 ms, and so on."""
        ranges, launched, now = [], [], 0

        def add(path: str, layer: int | None, *inside) -> None:
            nonlocal now
            event = {"ph": "X", "cat": "range", "name": path.split(" / ")[-1], "ts": now, "args": {"path": path}}
            if layer is not None:
                event["args"]["layer"] = layer
            ranges.append(event)
            for name, content in inside:
                if isinstance(content, int):
                    ranges.append({**event, "name": name, "ts": now, "dur": 1000 * content, "args": {**event["args"], "path": f"{path} / {name}"}})
                    launched.append({**ranges[-1], "cat": "kernel", "name": "k", "args": {**event["args"], "path": f"{path} / {name} / k"}})
                    now += 1000 * content
                else:
                    add(f"{path} / {name}", layer if name != "mixer forward" else content[0], *content[1:])
            event["dur"] = now - event["ts"]
            if path.endswith("mixer forward"):
                event["name"] += f" {layer}"

        def mixer(layer: int) -> tuple:
            return "mixer forward", [layer, ("rmsnorm_forward", 1), ("linear_forward", 4), ("gated delta rule", 2)]

        forward = "forward", [None, ("embedding_forward", 1), mixer(0), mixer(1)]
        classifier = "classifier", [None, ("linear_forward", 3), ("softmax_cross_entropy", 2)]
        update = "update", [None, ("optimizer", [None, ("global_norm", 1), ("adamw_update", 2)])]
        add("training step", None, ("zero gradients", 1), ("micro-batch", [None, forward, classifier]), update)
        ranges[0]["dur"] += 1000
        about = {"device": "GPU", "source": "CUPTI", "width": 64, "layers": 2, "batch": 4, "length": 8, "graph_ms": 24.5}
        return {"otherData": about, "traceEvents": [{"ph": "M", "name": "thread_name"}, *ranges, *(launched if kernels else [])]}

    @needs_matplotlib
    def test_plot_step(self) -> None:
        for kernels, rest in ((True, "between kernels"), (False, "outside of these")):
            (self.folder / "step.json").write_text(json.dumps(self.trace(kernels)))
            done = call("plot_step.py", self.folder / "step.json", "-o", self.folder / "step.png")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assert_drawn("step")
            lines = [line.split(None, 2) for line in done.stdout.splitlines() if not line.startswith("wrote")]
            self.assertEqual(lines[0][2], "of 25.00 ms")
            wanted = {
                "matrix products": 8, "gated delta rule": 4, "norms, convolution, gates, embedding": 3, "classifier": 5,
                "optimizer": 3, "copies and zeros": 1, rest: 1,
            }  # fmt: skip
            self.assertEqual({kind: (float(ms), float(share)) for ms, share, kind in lines[1:]},
                             {kind: (ms, 4.0 * ms) for kind, ms in wanted.items()})  # fmt: skip
            drawn = (self.folder / "step.svg").read_text()
            for text in ("25.00 ms launch by launch, 24.50 ms as CUDA graphs", "layer 1, forward: 7.00 ms", "gated delta rule: 4.00 ms, 16.0%"):
                self.assertIn(text, drawn)

    def test_errors_of_plot_step(self) -> None:
        def draw(trace: object, *words: object) -> subprocess.CompletedProcess:
            path = self.folder / "bad.json"
            path.write_text(trace if isinstance(trace, str) else json.dumps(trace))
            return call("plot_step.py", path, "-o", self.folder / "step", *words)

        self.assert_one_line_error(call("plot_step.py", self.folder / "none.json"), "none.json: no such file")
        self.assert_one_line_error(call("plot_step.py", self.folder), "is a folder")
        self.assert_one_line_error(draw("step,loss"), "bad.json: not JSON")
        self.assert_one_line_error(draw("[]"), "bad.json: has no otherData")
        good = self.trace(True)
        self.assert_one_line_error(draw(good, "--layer", 2), "--layer 2: expected 0 to 1")
        self.assert_one_line_error(draw({**good, "otherData": {**good["otherData"], "width": "d"}}), "otherData.width is 'd'")
        self.assert_one_line_error(draw({**good, "traceEvents": [{"ph": "X", "name": "a", "cat": "range"}]}), "event 0", "args")
        self.assert_one_line_error(draw({**good, "traceEvents": good["traceEvents"][2:]}), "has 0 ranges 'training step'")
        no_layers = [e for e in good["traceEvents"] if "layer" not in e.get("args", {})]
        self.assert_one_line_error(draw({**good, "traceEvents": no_layers}), "no ranges of layers")
        wrong = json.loads(json.dumps(good).replace('"ts": 1000,', '"ts": "soon",'))
        self.assert_one_line_error(draw(wrong), "bad.json: event", "TypeError")

    def test_missing_package_is_named(self) -> None:
        (self.folder / "matplotlib.py").write_text("raise ImportError('none', name='matplotlib')\n")
        good = self.write("good.csv", {256: -8.0})
        done = call("plot_transfer.py", good, "--out", self.folder / "plot", PYTHONPATH=str(self.folder))
        self.assert_one_line_error(done, "needs the package matplotlib", "requirements.txt")

    def test_help(self) -> None:
        for script in ("sweep.py", "coord_check.py", "plot_transfer.py", "plot_log.py", "plot_step.py", "follow_log.py", "tokenize_text.py",
                       "detokenize.py", "export_hf.py"):  # fmt: skip
            done = call(script, "-h")
            self.assertEqual(done.returncode, 0)
            self.assertIn("python3 scripts/" + script, done.stdout)


HEADER = "step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n"
NAMES = ["loss", "lr", "grad_norm", "ms", "tokens_per_s", "sol"]


def events(folder: Path) -> list[tuple[int, str, float]]:
    """Step, name and value of all scalars in TensorBoard's event files, in order (records of length, checksum, Event,
    checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return scalars


def train_row(step: int) -> str:
    return f"{step},train,{8 - step / 4},0.5,2,10,1000,0.25\n"


def train_scalars(step: int) -> list[tuple[int, str, float]]:
    values = (8 - step / 4, 0.5, 2, 10, 1000, 0.25)
    return [(step, f"train/{name}", value) for name, value in zip(NAMES, values)]


class FollowLog(InFolder):
    @needs_tensorboard
    def test_events_are_the_rows(self) -> None:
        for name, rows in (("a", 3), ("b", 1)):
            (self.folder / name).mkdir()
            text = HEADER + "".join(map(train_row, range(1, rows + 1))) + f"{rows},val,4.5,,,,,\n" + "9,tra"
            (self.folder / name / "log.csv").write_text(text)
        for _ in range(2):  # the second call replaces what the first one wrote
            done = call("follow_log.py", self.folder / "a", self.folder / "b" / "log.csv", "--once", "-o", self.folder / "out")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("6 rows of 2 logs", done.stdout)
            want = [s for step in (1, 2, 3) for s in train_scalars(step)] + [(3, "val/loss", 4.5)]
            self.assertEqual(events(self.folder / "out" / "a"), want)
            self.assertEqual(events(self.folder / "out" / "b"), [*train_scalars(1), (1, "val/loss", 4.5)])

    @needs_tensorboard
    def test_headers_of_now_and_of_before_there_was_wait_ms(self) -> None:
        for name, columns, more in (("now", ",floor,time,wait_ms", "0.19,1.5,3"), ("before", ",floor,time", "0.19,1.5")):
            (self.folder / name).mkdir()
            text = "# train_gdn\n" + HEADER.strip() + columns + "\n" + train_row(1).strip() + "," + more + "\n"
            (self.folder / name / "log.csv").write_text(text)
            done = call("follow_log.py", self.folder / name, "--once", "-o", self.folder / "out")
            self.assertEqual(done.returncode, 0, done.stderr)
            values = {tag: value for _, tag, value in events(self.folder / "out" / name)}
            self.assertEqual(set(values), {f"train/{n}" for n in [*NAMES, "floor", *["wait_ms"] * (name == "now")]})

    @needs_tensorboard
    def test_follows_a_run_that_grows_and_is_resumed(self) -> None:
        run = self.folder / "run"
        run.mkdir()
        words = [sys.executable, str(HERE / "follow_log.py"), str(run), "--every", "0.05", "-o", str(self.folder / "out")]
        follower = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.addCleanup(follower.wait)
        self.addCleanup(follower.kill)

        def wait_for(steps: list[int]) -> None:
            want = [s for step in steps for s in train_scalars(step)]
            for _ in range(600):
                if events(self.folder / "out" / "run") == want:
                    return
                time.sleep(0.05)
            self.assertEqual(events(self.folder / "out" / "run"), want)

        log = run / "log.csv"
        wait_for([])
        log.write_text(HEADER + train_row(1) + train_row(2)[:9])  # a row that is being written
        wait_for([1])
        with log.open("a") as f:
            f.write(train_row(2)[9:] + train_row(3))
        wait_for([1, 2, 3])
        (run / "log.csv.tmp").write_text(HEADER + train_row(1))  # resumed after step 1
        (run / "log.csv.tmp").rename(log)
        with log.open("a") as f:
            f.write(train_row(2) + train_row(3) + train_row(4))
        wait_for([1, 2, 3, 4])
        follower.send_signal(signal.SIGINT)
        self.assertIn("4 rows of 1 logs", follower.communicate(timeout=60)[0])
        self.assertEqual(follower.returncode, 0)

    @needs_tensorboard
    def test_ends_on_sigterm(self) -> None:
        log = self.folder / "log.csv"
        log.write_text(HEADER + train_row(1))
        words = [sys.executable, str(HERE / "follow_log.py"), str(log), "--every", "0.05", "-o", str(self.folder / "out")]
        follower = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.addCleanup(follower.wait)
        self.addCleanup(follower.kill)
        for _ in range(600):
            if any(events(folder) == [*train_scalars(1)] for folder in (self.folder / "out").glob("*")):
                break
            time.sleep(0.05)
        follower.send_signal(signal.SIGTERM)
        self.assertIn("1 rows of 1 logs", follower.communicate(timeout=60)[0])
        self.assertEqual(follower.returncode, 0)

    @unittest.skipUnless(importlib.util.find_spec("wandb"), "wandb is missing")
    def test_weights_and_biases_without_network(self) -> None:
        (self.folder / "log.csv").write_text(HEADER + train_row(1) + train_row(2))
        done = call("follow_log.py", self.folder, "--once", "--wandb", "project", WANDB_MODE="offline", WANDB_DIR=str(self.folder))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("2 rows of 1 logs to Weights & Biases", done.stdout)
        data = b"".join(path.read_bytes() for path in self.folder.glob("wandb/offline-run-*/run-*.wandb"))
        for name in NAMES:
            self.assertIn(f"train/{name}".encode(), data)

    def test_errors(self) -> None:
        out = ("--once", "-o", self.folder / "out")
        self.assert_one_line_error(call("follow_log.py", self.folder / "none", *out), "none: no such file")
        self.assert_one_line_error(call("follow_log.py", self.folder, *out), "log.csv: no such file")
        self.assert_one_line_error(call("follow_log.py", self.folder, self.folder, *out), "named twice")
        self.assert_one_line_error(call("follow_log.py", self.folder, "--every", 0), "--every 0.0")
        log = self.folder / "log.csv"
        log.write_text(HEADER)
        for package, words in (("tensorboardX", out), ("wandb", ("--once", "--wandb", "project"))):
            (self.folder / f"{package}.py").write_text(f"raise ImportError('none', name='{package}')\n")
            done = call("follow_log.py", log, *words, PYTHONPATH=str(self.folder))
            self.assert_one_line_error(done, f"needs the package {package}", "requirements.txt")

    @needs_tensorboard
    def test_wrong_formats(self) -> None:
        log = self.folder / "log.csv"
        for text, part in (
            ("step,loss\n", "log.csv: line 1: expected step,split,"),
            ("\xff\xfe\n", "log.csv: line 1"),
            (HEADER + "1,train,2\n", "log.csv: line 2"),
            (HEADER + train_row(1) + "x,train,1,1,1,1,1,1\n", "log.csv: line 3"),
            (HEADER + "1,test,1,1,1,1,1,1\n", "log.csv: line 2"),
        ):
            log.write_bytes(text.encode("latin1"))
            self.assert_one_line_error(call("follow_log.py", log, "--once", "-o", self.folder / "out"), part)


def read_shard(path: Path) -> list[int]:
    """llm.c's format."""
    data = path.read_bytes()
    header = struct.unpack("<256i", data[:1024])
    tokens = struct.unpack(f"<{len(data) // 2 - 512}H", data[1024:])
    if header != (20240520, 1, len(tokens), *[0] * 253):
        raise AssertionError(f"{path}: header {header[:4]}, {len(tokens)} tokens")
    return list(tokens)


@needs_tiktoken
class Tokenizing(InFolder):
    """With a vocabulary of GPT-2's size: the bytes, then 50,000 of their pairs, the one of 'th' first."""

    def setUp(self) -> None:
        super().setUp()
        pairs = [bytes((a, b)) for a in range(256) for b in range(256) if bytes((a, b)) != b"th"]
        self.tokens = [bytes([b]) for b in range(256)] + [b"th"] + pairs[:49_999]
        lines = [base64.b64encode(t) + f" {i}".encode() for i, t in enumerate(self.tokens)]
        self.vocab = self.folder / "vocab.tiktoken"
        self.vocab.write_bytes(b"\n".join(lines) + b"\n")

    def tokenize(self, *arguments: object, out: str = "out", **environment: str) -> subprocess.CompletedProcess:
        words = ("--out", self.folder / out, "--vocab", self.vocab, "--processes", 2, *arguments)
        return call("tokenize_text.py", *words, **environment)

    def documents(self, *shards: str, out: str = "out") -> list[str]:
        """Texts of all documents of these shards, in order; each shard must begin with a document."""
        texts: list[bytes] = []
        for pattern in shards:
            for path in sorted((self.folder / out).glob(pattern)):
                tokens = read_shard(path)
                self.assertEqual(tokens[0], 50256)
                for token in tokens:
                    if token == 50256:
                        texts.append(b"")
                    else:
                        texts[-1] += self.tokens[token]
        return [text.decode() for text in texts]

    def jsonl(self, count: int, name: str = "a.jsonl") -> list[str]:
        texts = [f"document {i}: then\n  \u00e4 {'x' * (i % 7)} it's " * (1 + i % 5) for i in range(count)]
        (self.folder / name).write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
        return texts

    def test_text_jsonl_and_gzip(self) -> None:
        texts = self.jsonl(5)
        (self.folder / "b.txt").write_text("the first<|endoftext|>the \u4e2d second<|endoftext|>")
        with gzip.open(self.folder / "c.jsonl.gz", "wt") as f:
            f.write(json.dumps({"text": "zipped"}) + "\n")
        done = self.tokenize("--val", 0, *(self.folder / name for name in ("a.jsonl", "b.txt", "c.jsonl.gz")))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), [*texts, "the first", "the \u4e2d second", "zipped"])
        self.assertIn(256, read_shard(self.folder / "out" / "train_000000.bin"))  # 'th' was merged

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is missing")
    def test_every_kind_of_json_packed_or_not(self) -> None:
        import bz2
        import lzma

        import pyarrow

        def zstd(data: bytes) -> bytes:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(data)
            return sink.getvalue().to_pybytes()

        rows = [{"meta": {"text": t}, "id": i} for i, t in enumerate(("one", None, "two", ""))]
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        files = {
            "a.json": json.dumps(rows).encode(), "b.json": json.dumps(rows, indent=2).encode(), "c.json": lines,
            "d.ndjson": lines, "e.json.gz": gzip.compress(json.dumps(rows).encode()), "f.jsonl.zst": zstd(lines),
            "g.jsonl.xz": lzma.compress(lines), "h.ndjson.bz2": bz2.compress(lines), "i.json.zst": zstd(json.dumps(rows).encode()),
            "j.jsonl": b"\xef\xbb\xbf" + lines,
        }  # fmt: skip
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        done = self.tokenize("--val", 0, "--column", "meta.text", *(self.folder / name for name in files))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), ["one", "two"] * len(files))
        self.assertIn(f"skipped {len(files)} null and {len(files)} empty rows", done.stdout)
        (self.folder / "one.json").write_text(json.dumps({"meta": {"text": "alone"}}, indent=1))
        (self.folder / "text.zst").write_bytes(zstd("the \u4e2d<|endoftext|>second".encode()))
        words = ("--val", 0, "--column", "meta.text", self.folder / "one.json", self.folder / "text.zst")
        self.assertEqual(self.tokenize(*words, out="more").returncode, 0)
        self.assertEqual(self.documents("train_*", out="more"), ["alone", "the \u4e2d", "second"])
        for name, data, message in (
            ("x.jsonl", b'{"a": 1}\n', "line 1: has no 'text'; its keys: a (--column)"), ("x.jsonl", b"[1]\n", "item 1: expected a JSON object"),
            ("x.jsonl", b'{"text": 3}\n', "line 1: 'text' is not text"), ("x.jsonl", b'{"text": "a"}\n{"te', "line 2: not JSON"),
            ("x.json", b'{"text":\n', "x.json: not JSON"), ("x.jsonl.zst", b"no zstd", "x.jsonl.zst: damaged .zst"),
            ("x.jsonl.gz", b"no gzip", "x.jsonl.gz: damaged .gz"), ("x.txt.xz", b"no xz", "x.txt.xz: damaged .xz"),
            ("x.txt", gzip.compress(b"a"), "x.txt: is parquet or gzip by its first bytes"),
        ):  # fmt: skip
            (self.folder / name).write_bytes(data)
            self.assert_one_line_error(self.tokenize(self.folder / name, out="bad"), message)

    def test_a_document_of_a_million_blanks(self) -> None:
        texts = ["a" + " " * 1_000_000 + "b", "\n" * 200_000, " " * 5000 + "\u2003" * 3000 + "\n's", "\t" * 4000 + " x" + " " * 1001 + "!"]
        (self.folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        done = self.tokenize("--val", 0, self.folder / "a.jsonl")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.documents("train_*"), texts)
        # where tiktoken has stack enough its tokens are the same
        import tokenize_text

        ranks = {token: i for i, token in enumerate(self.tokens)}
        tokenize_text.make_encodings(ranks)
        for space in (" ", "\n", "\t \n", " \u2003", "\x1c ", "\u3000"):
            for before in ("", "a", "'", "1!"):
                for after in ("", "b", "'s", "7", "!", "\x1c", "\u4e2d"):
                    text = before + space * 1500 + after
                    self.assertEqual(tokenize_text.tokens_of(text), self.encode(text), (space, before, after))

    def test_one_document_still_gives_validation_data(self) -> None:
        text = " ".join(f"word {i} of it" for i in range(20_000))
        (self.folder / "a.txt").write_text(text)
        done = self.tokenize("--shard_tokens", 10_000, self.folder / "a.txt")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("1 training and 1 validation shards", done.stdout)
        train, val = (read_shard(self.folder / "out" / f"{split}_000000.bin") for split in ("train", "val"))
        self.assertEqual([*train, *val[1:]], [50256, *self.encode(text)])
        self.assertEqual((val[0], len(val)), (50256, 4097))
        # killed between writing the validation shard and cutting the training shard
        out = self.folder / "out"
        state = json.loads((out / "progress.json").read_text())
        (out / "progress.json").write_text(json.dumps(state | {"complete": False, "cut": len(train)}))
        whole = struct.pack("<256i", 20240520, 1, len(train) + 4096, *[0] * 253) + struct.pack(f"<{len(train) + 4096}H", *train, *val[1:])
        for data in (whole, (out / "train_000000.bin").read_bytes()):
            (out / "train_000000.bin").write_bytes(data)
            (out / "progress.json").write_text(json.dumps(state | {"complete": False, "cut": len(train)}))
            done = self.tokenize("--shard_tokens", 10_000, self.folder / "a.txt")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(read_shard(out / "train_000000.bin"), train)
        (self.folder / "short.txt").write_text("ab ab ab")
        self.assertIn("too little text for validation", self.tokenize(self.folder / "short.txt", out="short").stdout)

    def test_stopped_it_leaves_no_process(self) -> None:
        self.jsonl(30_000)
        for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)):
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            words = [sys.executable, HERE / "tokenize_text.py", "--out", self.folder / "out", "--vocab", self.vocab, "--processes", 2]
            command = [*map(str, words), *[str(self.folder / "a.jsonl")] * 40]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
            deadline = time.monotonic() + 60
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            self.assertEqual(len(workers), 2)
            time.sleep(0.3)
            os.kill(process.pid, how)
            said = process.communicate(timeout=60)[1]
            self.assertEqual(process.returncode, code, said)
            if how == signal.SIGINT:
                self.assertEqual(said.strip().splitlines()[-1], "tokenize_text.py: stopped")
                self.assertNotIn("Traceback", said)
            while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
                time.sleep(0.05)
            self.assertFalse(any(Path(f"/proc/{worker}").exists() for worker in workers))

    def test_progress_fits_the_terminal(self) -> None:
        import tokenize_text

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for columns in (20, 40, 80):
            os.environ["COLUMNS"] = str(columns)
            said = Terminal()
            with contextlib.redirect_stderr(said):
                progress = tokenize_text.Progress()
                progress.tokens, progress.documents, progress.last = 123_456_789_012, 1_234_567, 0
                progress.show(0.5)
            line = said.getvalue().removeprefix("\r").removesuffix("\033[K")
            self.assertLess(len(line), columns)
            self.assertTrue(line.startswith(" 50.0%"), line)
        del os.environ["COLUMNS"]

    @unittest.skipUnless(importlib.util.find_spec("pyarrow"), "pyarrow is missing")
    def test_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "two", ""], "text": [1, 2, 3]}), path)
        self.assertEqual(self.tokenize("--val", 0, "--column", "body", path).returncode, 0)
        self.assertEqual(self.documents("train_*"), ["one", "two"])
        self.assert_one_line_error(self.tokenize(path, out="b"), "row 1: 'text' is not text")
        self.assert_one_line_error(self.tokenize("--column", "c", path, out="c"), "no column c; columns: body, text")
        # null rows are counted, a text in a struct is a column, and a wrong column is corrected in place
        rows = {"meta": [{"text": "in it", "n": 1}, None, {"text": None, "n": 2}, {"text": "", "n": 3}]}
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
        self.assert_one_line_error(self.tokenize("--column", "text", path, out="n"), "no column text; columns: meta.text, meta.n")
        self.assert_one_line_error(self.tokenize("--column", "meta", path, out="n"), "row 1: 'meta' is not text")
        done = self.tokenize("--column", "meta.text", path, out="n")
        self.assertIn("skipped 2 null and 1 empty rows", done.stdout, done.stderr)
        self.assertEqual(self.documents("train_*", out="n"), ["in it"])
        path.write_text("no parquet")
        self.assert_one_line_error(self.tokenize(path, out="d"), "not a parquet file")

    def test_split_is_by_document(self) -> None:
        texts = self.jsonl(400) + self.jsonl(400, "b.jsonl")
        done = self.tokenize("--val", 0.2, "--shard_tokens", 3000, self.folder / "a.jsonl", self.folder / "b.jsonl")
        self.assertEqual(done.returncode, 0, done.stderr)
        train, val = self.documents("train_*"), self.documents("val_*")
        self.assertEqual(sorted(train + val), sorted(texts))
        self.assertEqual(set(train) & set(val), set())
        self.assertTrue(80 < len(val) < 260, len(val))
        for path in (self.folder / "out").glob("train_*.bin"):
            self.assertLess(len(read_shard(path)), 3300)

    def test_killed_runs_go_on_to_the_same_bytes(self) -> None:
        self.jsonl(3000)
        words = ("--val", 0.1, "--shard_tokens", 5000, self.folder / "a.jsonl")
        self.assertEqual(self.tokenize(*words, out="whole").returncode, 0)
        shutil.copytree(self.folder / "whole", self.folder / "out")
        state = json.loads((self.folder / "out" / "progress.json").read_text())
        # as killed after the second training shard, with the third one half written
        whole, documents, tokens, val, full = self.documents("train_*", out="whole"), 0, 0, 0, 0
        trained = set(whole)
        for line in (self.folder / "a.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            documents += 1
            count = 1 + len(self.encode(text))
            if text not in trained:
                val += count
                continue
            tokens += count
            if tokens >= 5000:
                full, tokens = full + 1, 0
            if full == 2:
                break
        self.assertLess(val, 5000)
        state |= {"documents": documents, "train": 2, "val": 0, "val_tokens": val, "complete": False}
        (self.folder / "out" / "progress.json").write_text(json.dumps(state))
        (self.folder / "out" / "train_000002.bin.tmp").write_text("half")
        for path in (self.folder / "out").glob("train_*.bin"):
            if path.name > "train_000001.bin":
                path.unlink()
        done = self.tokenize(*words)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn(f"going on after {documents} documents", done.stderr)
        for path in (self.folder / "whole").glob("*.bin"):
            self.assertEqual(path.read_bytes(), (self.folder / "out" / path.name).read_bytes(), path.name)
        self.assertIn("complete already", self.tokenize(*words).stdout)
        self.assert_one_line_error(self.tokenize(*words, "--shard_tokens", 9), "other shard_tokens")

    def encode(self, text: str) -> list[int]:
        import tiktoken

        sys.path.insert(0, str(HERE))
        from tokenize_text import PATTERN

        ranks = {token: i for i, token in enumerate(self.tokens)}
        return tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)

    def test_gpt2_files_give_the_same_vocabulary(self) -> None:
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = iter(range(256, 1000))
        letter = {b: chr(b) if b in shown else chr(next(hidden)) for b in range(256)}
        ids = {"".join(letter[b] for b in token): i for i, token in enumerate(self.tokens)}
        folder = self.folder / "files"
        folder.mkdir()
        (folder / "encoder.json").write_text(json.dumps(ids | {"<|endoftext|>": 50256}))
        merges = "\n".join(" ".join(letter[b] for b in token) for token in self.tokens[256:])
        (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges + "\n")
        (self.folder / "a.txt").write_text("the thing")
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="a").returncode, 0)
        self.vocab = folder
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="b").returncode, 0)
        self.vocab = self.folder / "a" / "vocab.txt"  # its own output
        self.assertEqual(self.tokenize(self.folder / "a.txt", out="c").returncode, 0)
        a, b, c = ((self.folder / out / "vocab.txt").read_bytes() for out in "abc")
        self.assertEqual(a, b)
        self.assertEqual(a, c)

    @needs_train_gdn
    def test_vocabulary_turns_tokens_into_text(self) -> None:
        self.jsonl(50)
        self.assertEqual(self.tokenize("--val", 0, self.folder / "a.jsonl").returncode, 0)
        lines = (self.folder / "out" / "vocab.txt").read_text().splitlines()
        self.assertEqual(lines[0], "train_gdn vocabulary 1")
        self.assertTrue(lines[1].startswith("letters 41-5a,61-7a,aa-aa,b5-b5,"), lines[1])
        self.assertTrue(lines[2].startswith("numbers 30-39,b2-b3,"), lines[2])
        self.assertTrue(lines[3].startswith("spaces 9-d,20-20,85-85,a0-a0,"), lines[3])
        self.assertEqual([bytes.fromhex(line) for line in lines[4:]], self.tokens)

        def train_gdn(*words: object) -> str:
            words = (TRAIN_GDN, "-d", "cpu", "-seed", 1, *words)
            done = subprocess.run([*map(str, words)], capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout.decode(errors="replace")

        shards, run = self.folder / "out" / "train_*.bin", self.folder / "run"
        train_gdn("-i", shards, "-w", 16, "-heads", 1, "-L", 1, "-T", 8, "-B", 1, "-n", 1, "-s", 0, "-v", 0, "-o", run)
        text = train_gdn("-load", run, "-gen", 9, "-prompt", "the th\u4e2d", "-vocab", self.folder / "out" / "vocab.txt")
        self.assertTrue(text.startswith("the th\u4e2d"), text)
        # the same by numbers: the prompt's tokens by tiktoken, and what follows
        prompt = [50256, *self.encode("the th\u4e2d")]
        numbers = [int(n) for n in train_gdn("-load", run, "-gen", 9, "-prompt", " ".join(map(str, prompt))).split()]
        self.assertEqual(numbers[: len(prompt)], prompt)
        known = [*self.tokens, b"<|endoftext|>"]
        self.assertEqual(text, b"".join(known[n] for n in numbers[1:]).decode(errors="replace") + "\n")

    def test_shards_back_to_text(self) -> None:
        texts = self.jsonl(40)
        self.assertEqual(self.tokenize("--val", 0, "--shard_tokens", 300, self.folder / "a.jsonl").returncode, 0)
        shards = sorted((self.folder / "out").glob("train_*.bin"))
        self.assertGreater(len(shards), 1)
        whole = "<|endoftext|>".join(texts)
        for vocab in (self.vocab, self.folder / "out" / "vocab.txt"):
            done = call("detokenize.py", "--vocab", vocab, *shards)
            self.assertEqual((done.returncode, done.stdout), (0, whole), done.stderr)
        # a part, by tokens, over the end of the first shard
        tokens = [token for path in shards for token in read_shard(path)]
        count, file = len(read_shard(shards[0])) + 5, self.folder / "part.txt"
        words = ("--tokens", count, "--separator", "\\n-\\n", "--vocab", self.vocab, "--out", file)
        done = call("detokenize.py", *words, *shards)
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        known = [*self.tokens, b"\n-\n"]
        self.assertEqual(file.read_bytes(), b"".join(known[token] for token in tokens[1:count]))
        # the text gives the shards again
        (self.folder / "whole.txt").write_text(whole)
        words = ("--val", 0, "--shard_tokens", 300, self.folder / "whole.txt")
        self.assertEqual(self.tokenize(*words, out="again").returncode, 0)
        for path in shards:
            self.assertEqual((self.folder / "again" / path.name).read_bytes(), path.read_bytes())

    def test_errors_of_shards_back_to_text(self) -> None:
        def turn(data: bytes, *words: object) -> subprocess.CompletedProcess:
            (self.folder / "a.bin").write_bytes(data)
            return call("detokenize.py", "--vocab", self.vocab, self.folder / "a.bin", *words)

        header = struct.pack("<256i", 20240520, 1, 2, *[0] * 253)
        self.assertEqual(turn(header + struct.pack("<2H", 50256, 65)).stdout, "A")
        self.assert_one_line_error(turn(header + struct.pack("<H", 65)), "a.bin: has 1 of its 2 tokens")
        self.assert_one_line_error(turn(header + struct.pack("<2H", 65, 50257)), "a.bin: has token 50257")
        self.assert_one_line_error(turn(b"text"), "a.bin: not a token shard")
        self.assert_one_line_error(turn(header, "--tokens", 0), "--tokens 0")
        self.assert_one_line_error(turn(header, self.folder / "none.bin"), "none.bin: no such file")
        self.assert_one_line_error(turn(header, self.folder), "is a folder")
        self.vocab.write_text("train_gdn vocabulary 1\nletters\nnumbers\nspaces\n41\n")
        self.assert_one_line_error(turn(header), "has 1 tokens, expected the 50256")
        self.vocab.write_text("train_gdn vocabulary 1\nletters\nnumbers\nspaces\nxyz\n")
        self.assert_one_line_error(turn(header), "expected a token in hexadecimal")

    def test_errors(self) -> None:
        text = self.folder / "a.txt"
        text.write_bytes(b"\xff\xfe")
        self.assert_one_line_error(self.tokenize(text), "a.txt: not UTF-8")
        self.assert_one_line_error(self.tokenize(self.folder / "none.txt"), "none.txt: no such file")
        self.assert_one_line_error(self.tokenize(self.folder), "is a folder")
        text.write_text("")
        self.assert_one_line_error(self.tokenize(text, out="e"), "no documents")
        line = self.folder / "b.jsonl"
        line.write_text('{"text": "a"}\n{"txt": "b"}\n')
        self.assert_one_line_error(self.tokenize(line, out="j"), "b.jsonl: line 2")
        self.assert_one_line_error(self.tokenize("--val", 1, line), "--val 1.0")
        self.assert_one_line_error(self.tokenize("--processes", 0, line), "--processes 0")
        (self.folder / "full").mkdir()
        (self.folder / "full" / "train_000000.bin").write_text("")
        self.assert_one_line_error(self.tokenize(line, out="full"), "no progress.json")
        self.vocab.write_text("aGVsbG8= 0\n")
        self.assert_one_line_error(self.tokenize(line), "has 1 tokens, expected the 50256")
        self.vocab = self.folder
        self.assert_one_line_error(self.tokenize(line), "expected vocab.bpe and encoder.json")
        (self.folder / "tiktoken.py").write_text("raise ImportError('none', name='tiktoken')\n")
        self.assert_one_line_error(self.tokenize(line, PYTHONPATH=str(self.folder)), "needs the package tiktoken")


class ShardServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges, and with the header that names their SHA-256 where `says_checksum`."""

    folder: Path
    says_checksum = True
    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data, first = path.read_bytes(), 0
        if self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.requests.append(f"{self.command} {path.name} {first}")
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if self.says_checksum:
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first:])

    def log_message(self, *_: object) -> None:
        pass


@unittest.skipUnless(shutil.which("curl"), "curl is missing")
class FinewebEdu(InFolder):
    def setUp(self) -> None:
        super().setUp()
        (self.folder / "server").mkdir()
        self.names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in (1, 2)]
        for name in self.names:
            data = struct.pack("<256i", 20240520, 1, 3000, *[0] * 253) + name.encode()[:20] * 300
            (self.folder / "server" / name).write_bytes(data)
        self.handler = type("Handler", (ShardServer,), {"folder": self.folder / "server", "requests": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"

    def fetch(self, *arguments: object) -> subprocess.CompletedProcess:
        words = ["bash", HERE / "fineweb_edu.sh", "-o", self.folder / "out", "-n", 2, "-u", self.url, *arguments]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)

    def assert_fetched(self) -> None:
        self.assertEqual(sorted(p.name for p in (self.folder / "out").iterdir()), sorted(self.names))
        for name in self.names:
            self.assertEqual((self.folder / "out" / name).read_bytes(), (self.folder / "server" / name).read_bytes())

    def test_fetches_resumes_and_checks(self) -> None:
        (self.folder / "out").mkdir()
        half = (self.folder / "server" / self.names[1]).read_bytes()[:2000]
        (self.folder / "out" / f"{self.names[1]}.part").write_bytes(half)
        done = self.fetch()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assert_fetched()
        self.assertIn(f"GET {self.names[1]} 2000", self.handler.requests)
        self.handler.requests.clear()
        self.assertEqual(self.fetch().returncode, 0)
        self.assertFalse([r for r in self.handler.requests if r.startswith("GET")])

    def test_checksums_from_a_file(self) -> None:
        self.handler.says_checksum = False
        self.assert_one_line_error(self.fetch(), "no SHA256SUMS")
        sums = [hashlib.sha256((self.folder / "server" / n).read_bytes()).hexdigest() + f"  {n}\n" for n in self.names]
        (self.folder / "server" / "SHA256SUMS").write_text("".join(sums[:2]))
        self.assert_one_line_error(self.fetch(), "has no SHA-256 of edu_fineweb_train_000002.bin")
        (self.folder / "server" / "SHA256SUMS").write_text("".join(sums))
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_fetched()

    def test_damage_is_seen(self) -> None:
        (self.folder / "out").mkdir()
        (self.folder / "out" / f"{self.names[0]}.part").write_bytes(b"x" * 100)
        self.assert_one_line_error(self.fetch(), self.names[0], "SHA-256")
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_fetched()
        (self.folder / "out" / self.names[2]).write_bytes(b"y")
        self.assert_one_line_error(self.fetch(), self.names[2], "delete it")

    def test_errors(self) -> None:
        self.assert_one_line_error(self.fetch("-n", "0"), "-n '0'")
        self.assert_one_line_error(self.fetch("-n", "x"), "-n 'x'")
        self.assert_one_line_error(self.fetch("-q"), "unknown option -q")
        self.assert_one_line_error(self.fetch("more"), "unexpected argument 'more'")
        self.assertIn("-u URL", self.fetch("-h").stdout)
        (self.folder / "server" / self.names[2]).unlink()
        self.assert_one_line_error(self.fetch(), self.names[2])


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
        run, out = self.folder / "run", self.folder / "out"
        self.train(*self.MODEL, "-n", 2, "-param", "mup0", "-o", run)
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
