#!/usr/bin/env python3
"""Chooses SGD's constants at d = 256 by RULE.md, freezes them, and runs the wide models once.

    python3 select_constants.py TRAIN_GDN DATA OUT [SECONDS=570]

TRAIN_GDN: the program. DATA: folder with books_train_000.bin, books_train_001.bin, books_val_000.bin. OUT: folder for
data.csv (the columns of scripts/sweep.py and, first, the step of the rule), report.md, runs.tar.gz and README.md. No run is
started that would not end within SECONDS. The state is data.csv: the same command goes on from OUT/data.csv, or, where OUT has none,
from the data.csv beside this script; the rule is walked from its start again and takes what is there from the CSV.
Environment: OPTIONS, more of train_gdn's options, to try the script on a small machine; COMMIT, where there is no git. Needs no
packages of Python.
"""

from __future__ import annotations

import datetime
import math
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent.parent / "scripts"))
import sweep  # noqa: E402
from common import Error, find_binary, read_csv, run_main, write_csv  # noqa: E402

COLUMNS = ["step", *sweep.COLUMNS]
BASE, SEEDS, BUDGET = 256, (42, 43), 28
TIE = 0.005  # nats
SECONDS = {256: 17.0, 512: 31.0, 1024: 76.0, 2048: 222.0}  # of a run, until one of that width has ended


class TimeIsUp(Exception):
    pass


@dataclass(frozen=True)
class Constants:
    lr: float = 0.3
    mom: float = 0.9
    clip: float = 1
    warmup: int = 100
    hidden: float = 1  # -init_of
    embedding: float = 1  # -lr_of
    taps_and_gains: float = 1  # -lr_of conv, gain, output_gain

    def options(self) -> list[str]:
        """Of train_gdn, without -lr; only what is not the program's default."""
        words = ["-logit_factor", "4", "-mom", f"{self.mom:g}", "-clip", f"{self.clip:g}", "-warmup", f"{self.warmup}"]
        if self.hidden != 1:
            words += ["-init_of", f"hidden={self.hidden:g}"]
        factors = [("embedding", self.embedding)]
        factors += [(name, self.taps_and_gains) for name in ("conv", "gain", "output_gain")]
        text = ",".join(f"{name}={x:g}" for name, x in factors if x != 1)
        return words + (["-lr_of", text] if text else [])


def candidates(step: int, c: Constants) -> list[Constants]:
    """The values of a step of RULE.md in its order, what stands first."""
    if step == 1:
        return [replace(c, lr=lr) for lr in (0.3, 1.2)]
    if step == 2:
        return [replace(c, clip=x, lr=c.lr / x) for x in (1, 0.25)]
    if step == 3:
        return [replace(c, warmup=x) for x in (100, 500)]
    if step == 4:
        return [replace(c, hidden=x, lr=c.lr * x) for x in (1, 2, 4)]
    if step == 5:
        return [replace(c, embedding=x) for x in (1, 0.25, 0.0625)]
    if step == 6:
        return [replace(c, taps_and_gains=x) for x in (1, 0.25)]
    if step == 7:
        return [replace(c, mom=x, lr=c.lr * (1 - x) / (1 - c.mom)) for x in (0.9, 0.95)]
    factor = 2 if step == 8 else math.sqrt(2)
    return [replace(c, lr=c.lr * x) for x in (1, factor, 1 / factor)]


FIRST_STEP_OF_LR, LAST_STEP = 8, 9


def choose(losses: list[float], tie: float) -> int:
    """Index of the value that is kept: the first within `tie` of the lowest."""
    if not any(map(math.isfinite, losses)):
        return 0
    return next(i for i, loss in enumerate(losses) if loss <= min(losses) + tie)


class Runs:
    """Trains what data.csv does not have yet."""

    def __init__(self, binary: str, data: Path, out: Path, limit: float):
        self.binary, self.data, self.out, self.limit = binary, data, out, limit
        self.start = time.monotonic()
        self.path, self.logs = out / "data.csv", out / "data_runs"
        if not self.path.exists() and (HERE / "data.csv").exists():
            shutil.copy(HERE / "data.csv", self.path)
        rows = read_csv(self.path, COLUMNS) if self.path.exists() else []
        self.rows = {self.key(row): row for row in rows if row["status"] != "failed"}
        if (out / "runs.tar.gz").exists():
            with tarfile.open(out / "runs.tar.gz") as tar:
                tar.extractall(out)
        self.logs.mkdir(exist_ok=True)
        self.used: list[tuple] = []  # keys of the runs at the base that the rule asked for, each once

    @staticmethod
    def key(row: dict[str, str]) -> tuple:
        return int(row["width"]), row["lr"], int(row["seed"]), row["options"]

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def expected(self, width: int) -> float:
        seen = [float(r["seconds"]) for r in self.rows.values() if int(r["width"]) == width and r["status"] == "ok"]
        return statistics.fmean(seen) if seen else SECONDS[width]

    def arguments(self, c: Constants):
        shards = ["-i", "books_train_*.bin", "-j", "books_val_*.bin", "-n", "1000"]
        more = os.environ.get("OPTIONS", "").split()
        return sweep.parse_arguments(["--binary", self.binary, "--", *shards, *c.options(), *more])

    def row(self, step: str, c: Constants, width: int, seed: int) -> dict[str, str]:
        """The row of a run: from the CSV, or trained now. Throws TimeIsUp where that would not end in time."""
        a = self.arguments(c)
        run = sweep.Run("sgd", "mup", width, f"{c.lr:.4g}", seed)
        key = (width, run.lr, seed, sweep.options_text(a, "sgd"))
        if width == BASE and key not in self.used:
            self.used.append(key)
            if len(self.used) > BUDGET:
                raise Error(f"more than {BUDGET} runs at d = {BASE}: select_constants.py does not do what RULE.md says")
        if key not in self.rows:
            if self.seconds() + self.expected(width) > self.limit:
                raise TimeIsUp
            self.rows[key] = {"step": step, **self.train(a, run, f"step{step}_{len(self.rows):02d}_")}
            write_csv(self.path, COLUMNS, self.rows.values())
            row = self.rows[key]
            print(f"{self.seconds():4.0f} s  step {step}  {' '.join(c.options())}  {sweep.describe(a, row)}", flush=True)
            if row["status"] == "failed":
                raise Error(f"step {step}, lr {run.lr}, seed {seed}: {row['message']}; the same command runs it again")
        return self.rows[key]

    def train(self, a, run: sweep.Run, prefix: str) -> dict[str, str]:
        folder = self.logs / (prefix + run.name() + ".part")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with sweep.Pool(None, 1) as pool:
            pool.start(run, sweep.command(a, run, folder), folder / "output.txt")
            while not (ended := pool.finished()):
                time.sleep(0.05)
        _, code, seconds = ended[0]
        row = sweep.result(a, run, folder, code, seconds)
        sweep.keep_log(folder, folder.with_suffix(""))
        return {name: str(value) for name, value in row.items()}

    def loss(self, step: str, c: Constants, width: int, seed: int) -> float:
        row = self.row(step, c, width, seed)
        return float(row["val_loss"]) if row["status"] == "ok" else math.inf

    def pack(self) -> None:
        with tarfile.open(self.out / "runs.tar.gz", "w:gz") as tar:
            tar.add(self.logs, arcname=self.logs.name)
        shutil.rmtree(self.logs)


def text(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def select(runs: Runs, report: list[str]) -> tuple[Constants, dict[float, list[float]]]:
    """The frozen constants, and the losses of the last two steps' learning rates."""
    c, grid = Constants(), {}
    report += ["| step | lr | options | seeds 42, 43 | mean | |", "|---|---|---|---|---|---|"]
    for step in range(1, LAST_STEP + 1):
        values = candidates(step, c)
        of_seeds = [[runs.loss(str(step), value, BASE, seed) for seed in SEEDS] for value in values]
        means = [statistics.fmean(losses) for losses in of_seeds]
        kept = choose(means, TIE if step < FIRST_STEP_OF_LR else 0)
        for i, value in enumerate(values):
            report.append(
                f"| {step} | {value.lr:.4g} | `{' '.join(value.options())}` | {', '.join(map(text, of_seeds[i]))} | "
                f"{text(means[i])} | {'kept' if i == kept else ''} |"
            )
        if step >= FIRST_STEP_OF_LR:
            grid.update({float(f"{v.lr:.4g}"): losses for v, losses in zip(values, of_seeds)})
        c = values[kept]
    return c, grid


def widths(runs: Runs, frozen: Constants, report: list[str]) -> None:
    report += ["", "| d | lr | seed 42 | clipped |", "|---|---|---|---|"]
    root = math.sqrt(2)
    for width, factor in [(1024, 1), (2048, 1), (1024, root), (1024, 1 / root), (512, 1), (512, root), (512, 1 / root)]:
        row = runs.row("wide", replace(frozen, lr=frozen.lr * factor), width, SEEDS[0])
        loss = text(float(row["val_loss"])) if row["status"] == "ok" else row["status"]
        report.append(f"| {width} | {row['lr']} | {loss} | {row['clipped']} |")


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
    except OSError:
        return ""


def main(argv: list[str]) -> int:
    if not 3 <= len(argv) <= 4:
        raise Error("usage: select_constants.py TRAIN_GDN DATA OUT [SECONDS=570]")
    binary, data, out = find_binary(argv[0]), Path(argv[1]).resolve(), Path(argv[2]).resolve()
    for name in ("books_train_000.bin", "books_train_001.bin", "books_val_000.bin"):
        if not (data / name).exists():
            raise Error(f"{data / name}: no such file")
    if len(argv) == 4 and not argv[3].isdigit():
        raise Error(f"SECONDS '{argv[3]}': expected a whole number")
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(data)  # so that the column options holds no path
    runs = Runs(binary, data, out, float(argv[3]) if len(argv) == 4 else 570)
    report = ["# What the rule chose, and the widths", ""]
    done = False
    try:
        frozen, grid = select(runs, report)
        bracketed = min(grid) < float(f"{frozen.lr:.4g}") < max(grid)
        report += ["", f"Frozen, after {len(runs.used)} runs at d = {BASE}: `-lr {frozen.lr:.4g} {' '.join(frozen.options())}`"]
        report[-1] += "." if bracketed else "; not bracketed at the base."
        widths(runs, frozen, report)
        done = True
    except TimeIsUp:
        report += ["", f"So far; the time was up after {len(runs.rows)} runs."]
        print("runs are left for which the time did not suffice; the same command goes on")
    finally:
        runs.pack()
        (out / "report.md").write_text("\n".join(report) + "\n")
        device = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").replace("\n", ", ") or "CPU"
        commit = os.environ.get("COMMIT") or output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
        date, seconds = datetime.datetime.now(datetime.timezone.utc).date(), f"{runs.seconds():.0f}"
        about = f"Device: {device}. Date: {date}. Commit: {commit}. Seconds of the last call: {seconds}."
        readme = [about if line.startswith("Device: ") else line for line in (HERE / "README.md").read_text().splitlines()]
        (out / "README.md").write_text("\n".join(readme) + "\n")
    print("\n".join(report))
    print(f"sgd_frozen: {runs.seconds():.0f} s, {'all done' if done else 'not done'}")
    return 0


if __name__ == "__main__":
    run_main(main)
