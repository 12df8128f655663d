"""Tests of sweep.py, most with a trainer that takes no time; a run of ./train_gdn is skipped where that is not built.

    python3 scripts/test_sweep.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import unittest

from testing import HERE, InFolder, call, needs_train_gdn, rows_of

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


if __name__ == "__main__":
    unittest.main()
