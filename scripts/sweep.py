#!/usr/bin/env python3
"""Trains a grid of widths x learning rates x parametrizations x optimizers x seeds, one CSV row per run.

    python3 scripts/sweep.py -o results/books.csv -- -i 'books_train_*.bin' -j 'books_val_*.bin'

Options after -- go to ./train_gdn. Without options: L = 8, H = 6, T = 512, 64 sequences a step, 1,000 steps,
100 of them warm-up, cosine to lr / 20. Kill it at any time and give the same command again: rows in the CSV
stay, a run that was cut off is repeated. A run that diverged or failed is a row too (column status).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import Error, Parser, read_csv, run_main

COLUMNS = [
    "param",
    "optimizer",
    "width",
    "lr",
    "seed",
    "val_loss",
    "train_loss",
    "steps",
    "status",
    "message",
    "seconds",
    "tokens_per_s",
    "options",
]
PARAMS = {"adamw": ["sp", "mup"], "sgd": ["sp", "mup0", "mup"]}
LRS = {"adamw": "5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "sgd": "0.05,0.1,0.2,0.4,0.8,1.6"}
PROTOCOL = {"L": "8", "T": "512", "B": "64", "n": "1000", "warmup": "100"}
QUIET = {"v": "0", "s": "0", "save": "0"}
OF_THE_GRID = {"w", "lr", "param", "opt", "seed", "o", "resume", "load", "gen", "h"}  # not allowed after --
NO_EFFECT_ON_LOSS = {"b", "d", "v", "s", "save", "keep", "recompute"}  # left out of the column options


@dataclass(frozen=True)
class Run:
    optimizer: str
    param: str
    width: int
    lr: str
    seed: int

    def key(self) -> tuple:
        return self.optimizer, self.param, self.width, self.lr, self.seed

    def name(self) -> str:
        return f"{self.optimizer}_{self.param}_w{self.width}_lr{self.lr}_s{self.seed}"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(prog="sweep.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-o", "--out", default="sweep.csv", help="CSV; logs go to OUT_runs [sweep.csv]")
    p.add_argument("--widths", default="256,512,1024", help="[256,512,1024]")
    p.add_argument("--optimizers", default="adamw,sgd", help="[adamw,sgd]")
    p.add_argument("--params", help="for every optimizer [sp,mup with adamw; sp,mup0,mup with sgd]")
    p.add_argument("--lrs", help="for every optimizer, in place of the next two")
    p.add_argument("--adamw_lrs", default=LRS["adamw"], help=f"[{LRS['adamw']}]")
    p.add_argument("--sgd_lrs", default=LRS["sgd"], help=f"[{LRS['sgd']}]")
    p.add_argument("--seeds", default="42", help="[42]")
    p.add_argument("--head_dim", help="fixed head size: heads of this many keys [6 heads whose size grows]")
    p.add_argument(
        "--gpus", help="GPUs to fill, as in 0,1,2 (CUDA_VISIBLE_DEVICES) [the one train_gdn chooses]"
    )
    p.add_argument("--jobs", type=int, default=1, help="runs at once on a GPU [1]")
    p.add_argument(
        "--binary", default=str(Path(__file__).resolve().parent.parent / "train_gdn"), help="[train_gdn]"
    )
    p.add_argument("--retry", action="store_true", help="repeat the runs whose status is failed")
    p.add_argument("--dry-run", action="store_true", help="list the runs and their tokens, train nothing")
    cut = argv.index("--") if "--" in argv else len(argv)
    a = p.parse_args(argv[:cut])
    a.extra = parse_extra(argv[cut + 1 :])
    if a.jobs < 1:
        raise Error(f"--jobs {a.jobs}: expected 1 or more")
    return a


def parse_extra(words: list[str]) -> dict[str, str]:
    """Options of train_gdn as name -> value; each has a value."""
    extra: dict[str, str] = {}
    i = 0
    while i < len(words):
        name, equals, value = words[i].lstrip("-").partition("=")
        if not words[i].startswith("-") or not name:
            raise Error(f"after --: '{words[i]}': expected an option of train_gdn")
        if name in OF_THE_GRID:
            raise Error(f"after --: -{name}: sweep.py sets this one")
        if not equals:
            i += 1
            if i == len(words):
                raise Error(f"after --: -{name} has no value")
            value = words[i]
        extra[name] = value
        i += 1
    if "i" in extra and "j" not in extra:
        raise Error("after --: -i without -j leaves no validation loss; give -j FILES too")
    return extra


def split(option: str, text: str, convert: type) -> list:
    try:
        return list(dict.fromkeys(convert(word) for word in text.split(",")))
    except ValueError:
        raise Error(f"{option} '{text}': expected numbers with commas") from None


def make_grid(a: argparse.Namespace) -> list[Run]:
    """Every run, narrow widths first."""
    widths, seeds = split("--widths", a.widths, int), split("--seeds", a.seeds, int)
    runs = []
    for width in sorted(widths):
        for optimizer in dict.fromkeys(a.optimizers.split(",")):
            if optimizer not in PARAMS:
                raise Error(f"--optimizers '{optimizer}': expected adamw or sgd")
            lrs = split("--lrs", a.lrs or getattr(a, optimizer + "_lrs"), float)
            if any(not lr > 0 for lr in lrs):
                raise Error(f"--lrs: expected positive numbers, got {min(lrs):g}")
            for param in dict.fromkeys(a.params.split(",")) if a.params else PARAMS[optimizer]:
                if param not in PARAMS["sgd"]:
                    raise Error(f"--params '{param}': expected sp, mup0 or mup")
                runs += [Run(optimizer, param, width, f"{lr:.6g}", seed) for lr in lrs for seed in seeds]
    return runs


def settings(a: argparse.Namespace, optimizer: str) -> dict[str, str]:
    """All of a run's options but those of the grid."""
    heads = {"head_dim": a.head_dim} if a.head_dim else {"heads": "6"}
    if "head_dim" in a.extra or "heads" in a.extra:
        heads = {"head_dim": a.head_dim} if a.head_dim else {}
    momentum = {"mom": "0.98", "wd": "0"} if optimizer == "sgd" else {}
    return {**PROTOCOL, **heads, **momentum, **QUIET, **a.extra}


def options_text(a: argparse.Namespace, optimizer: str) -> str:
    """What a row's column options says: all that changes the loss and is not a column of its own."""
    values = {"min_lr": "lr/20", **settings(a, optimizer)}
    return " ".join(
        f"-{name} {value}" for name, value in sorted(values.items()) if name not in NO_EFFECT_ON_LOSS
    )


def command(a: argparse.Namespace, run: Run, folder: Path) -> list[str]:
    values = {
        "w": run.width,
        "param": run.param,
        "opt": run.optimizer,
        "lr": run.lr,
        "min_lr": f"{float(run.lr) / 20:.6g}",
        "seed": run.seed,
        **settings(a, run.optimizer),
        "o": folder,
    }
    return [a.binary] + [word for name, value in values.items() for word in (f"-{name}", str(value))]


def row_key(row: dict[str, str]) -> tuple:
    return row["optimizer"], row["param"], int(row["width"]), row["lr"], int(row["seed"])


def read_rows(a: argparse.Namespace, path: Path) -> dict[tuple, dict[str, str]]:
    """The rows of an earlier sweep; an error where they were made with other options."""
    rows = {}
    for row in read_csv(path, COLUMNS) if path.exists() else []:
        expected = options_text(a, row["optimizer"])
        if row["options"] != expected:
            raise Error(f"{path}: holds runs with '{row['options']}', now '{expected}'; choose another -o")
        try:
            rows[row_key(row)] = row
        except ValueError:
            raise Error(
                f"{path}: width '{row['width']}' and seed '{row['seed']}': expected numbers"
            ) from None
    return rows


def write_rows(path: Path, rows: dict[tuple, dict]) -> None:
    """Replaces the CSV as a whole: a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def result(a: argparse.Namespace, run: Run, folder: Path, code: int, seconds: float) -> dict[str, str]:
    """The row of a run that ended, from its log.csv and the last line it said."""
    train: list[dict[str, str]] = []
    val: list[dict[str, str]] = []
    problem = ""
    try:
        for entry in read_csv(folder / "log.csv", ["step", "split", "loss", "tokens_per_s"]):
            (val if entry["split"] == "val" else train).append(entry)
    except (Error, OSError) as e:
        problem = str(e)
    said = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    errors = [line for line in said if line.startswith("train_gdn: ")]  # stdout may come after them
    last_line = (errors or said or [""])[-1].removeprefix("train_gdn: ")
    row = dict.fromkeys(COLUMNS, "")
    row.update(
        optimizer=run.optimizer,
        param=run.param,
        width=run.width,
        lr=run.lr,
        seed=run.seed,
        steps=len(train),
        seconds=f"{seconds:.1f}",
        options=options_text(a, run.optimizer),
    )
    losses = [float(entry["loss"]) for entry in train]
    if losses:
        tail = losses[-max(1, min(10, len(losses) // 10)) :]  # a step's loss alone is noisy
        row["train_loss"] = f"{statistics.fmean(tail):.6f}"
        row["tokens_per_s"] = f"{statistics.median(float(entry['tokens_per_s']) for entry in train):.0f}"
    steps = settings(a, run.optimizer)["n"]
    if code != 0:
        row["status"] = "diverged" if "is not finite" in last_line else "failed"
        row["message"] = f"killed by signal {-code}" if code < 0 else last_line or f"exit code {code}"
    elif len(train) != int(steps) or not val or int(val[-1]["step"]) != len(train):
        row["status"], row["message"] = "failed", problem or f"stopped after step {len(train)} of {steps}"
    else:
        loss = float(val[-1]["loss"])
        row["val_loss"], row["status"] = val[-1]["loss"], "ok"
        if not math.isfinite(loss) or loss > losses[0]:
            row["status"] = "diverged"
            row["message"] = f"validation loss {loss:.4f}, above the first step's {losses[0]:.4f}"
    return row


def die_with_parent() -> None:
    """In the child: a sweep.py that is killed takes its runs along (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Slot:
    """One place where a run can be."""

    gpu: str | None
    run: Run | None = None
    process: subprocess.Popen | None = None
    folder: Path = Path()
    start: float = 0

    def launch(self, a: argparse.Namespace, run: Run, folder: Path, threads: int | None) -> None:
        self.run, self.folder, self.start = run, folder, time.monotonic()
        environment = dict(os.environ)
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpu
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        folder.mkdir(parents=True)
        with (folder / "output.txt").open("w") as output:
            self.process = subprocess.Popen(
                command(a, run, folder),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )


@dataclass
class Eta:
    """Seconds that runs take, per width; a width not seen yet is scaled from the nearest one."""

    seen: dict[int, list[float]] = field(default_factory=dict)

    def add(self, width: int, seconds: float) -> None:
        self.seen.setdefault(width, []).append(seconds)

    def seconds(self, width: int) -> float:
        nearest = min(self.seen, key=lambda w: abs(math.log(w / width)))
        return statistics.fmean(self.seen[nearest]) * (width / nearest) ** 1.2

    def text(self, waiting: list[Run], slots: list[Slot]) -> str:
        if not self.seen:
            return "?"
        left = sum(self.seconds(run.width) for run in waiting)
        for slot in slots:
            if slot.run:
                left += max(0, self.seconds(slot.run.width) - (time.monotonic() - slot.start))
        return clock(left / len(slots))


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def describe(row: dict[str, str]) -> str:
    said = f"val {row['val_loss']}" if row["status"] == "ok" else f"{row['status']}: {row['message']}"
    return (
        f"{row['optimizer']} {row['param']} w {row['width']} lr {row['lr']} seed {row['seed']}  {said}"
        f"  {clock(float(row['seconds']))}  {row['tokens_per_s'] or 0} tokens/s"
    )


def keep_log(folder: Path, final: Path) -> None:
    """The run's folder under its final name, without checkpoints."""
    for inside in folder.iterdir():
        if inside.is_dir():
            shutil.rmtree(inside)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)


def train_all(
    a: argparse.Namespace, waiting: list[Run], total: int, path: Path, rows: dict[tuple, dict]
) -> None:
    logs = path.with_name(path.stem + "_runs")
    for stale in logs.glob("*.part"):
        shutil.rmtree(stale)
    gpus = a.gpus.split(",") if a.gpus else [None]
    slots = [Slot(gpu) for _ in range(a.jobs) for gpu in gpus]
    threads = max(1, (os.cpu_count() or 1) // len(slots)) if len(slots) > 1 else None  # share the cores
    eta = Eta()
    for row in rows.values():
        if row["status"] == "ok":
            eta.add(int(row["width"]), float(row["seconds"]))
    done = total - len(waiting)
    try:
        while waiting or any(slot.run for slot in slots):
            for slot in slots:
                if slot.run and slot.process.poll() is not None:
                    run, seconds = slot.run, time.monotonic() - slot.start
                    row = result(a, run, slot.folder, slot.process.returncode, seconds)
                    keep_log(slot.folder, logs / run.name())
                    rows[run.key()] = row
                    write_rows(path, rows)
                    slot.run = None
                    done += 1
                    if row["status"] == "ok":
                        eta.add(run.width, seconds)
                    print(f"{done}/{total}  {describe(row)}  eta {eta.text(waiting, slots)}", flush=True)
                if not slot.run and waiting:
                    run = waiting.pop(0)
                    slot.launch(a, run, logs / (run.name() + ".part"), threads)
            time.sleep(0.05)
    finally:
        for slot in slots:
            if slot.run:
                slot.process.kill()
                slot.process.wait()
                shutil.rmtree(slot.folder, ignore_errors=True)


def list_runs(a: argparse.Namespace, runs: list[Run], rows: dict[tuple, dict], waiting: list[Run]) -> None:
    tokens = 0
    for run in runs:
        values = settings(a, run.optimizer)
        if run in waiting:
            tokens += int(values["n"]) * int(values["B"]) * int(values["T"])
        state = "to do" if run in waiting else rows[run.key()]["status"]
        print(f"{run.optimizer:5} {run.param:4} w {run.width:<5} lr {run.lr:<8} seed {run.seed:<4} {state}")
    print(f"{len(runs)} runs, {len(waiting)} to do, {tokens:,} tokens to train on")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    a = parse_arguments(argv)
    runs = make_grid(a)
    for name in ("n", "B", "T"):
        value = settings(a, "adamw")[name]
        if not value.isdigit() or value == "0":
            raise Error(f"after --: -{name} '{value}': expected a positive whole number")
    path = Path(a.out)
    path = path if path.suffix == ".csv" else path.with_name(path.name + ".csv")
    rows = read_rows(a, path)

    def is_done(run: Run) -> bool:
        return run.key() in rows and not (a.retry and rows[run.key()]["status"] == "failed")

    if a.dry_run:
        list_runs(a, runs, rows, [run for run in runs if not is_done(run)])
        return 0
    if not os.access(a.binary, os.X_OK) or os.path.isdir(a.binary):
        raise Error(f"{a.binary}: no such program; build it with make, or give --binary")
    a.binary = os.path.abspath(a.binary)
    logs = path.with_name(path.stem + "_runs")
    logs.mkdir(parents=True, exist_ok=True)
    lock = os.open(logs, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"{path}: another sweep.py writes it") from None
    rows = read_rows(a, path)  # once more, now that nobody else writes it
    signal.signal(signal.SIGTERM, interrupt)
    try:
        train_all(a, [run for run in runs if not is_done(run)], len(runs), path, rows)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return 130
    count = {s: sum(rows[run.key()]["status"] == s for run in runs) for s in ("ok", "diverged", "failed")}
    print(f"{path}: " + ", ".join(f"{n} {status}" for status, n in count.items()))
    if count["failed"]:
        raise Error(f"{count['failed']} runs failed, see the column message; --retry repeats them")
    return 0


if __name__ == "__main__":
    run_main(main)
