"""Tests of follow_log.py.

    python3 scripts/test_follow_log.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import importlib.util
import signal
import struct
import subprocess
import sys
import time
import unittest
from pathlib import Path

from testing import HERE, InFolder, call, needs_tensorboard

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


if __name__ == "__main__":
    unittest.main()
