#!/usr/bin/env python3
"""Trains a grid of widths x learning rates x parametrizations x optimizers x seeds, one CSV row per run.

    python3 scripts/sweep.py -o results/books.csv -- -i 'books_train_*.bin' -j 'books_val_*.bin'

Options after -- go to ./train_gdn, and are kept in the column options. Without options: L = 8, H = 6, T = 512,
64 sequences a step, 1,000 steps, 100 of them warm-up, cosine to lr / 20. The longest runs start first. Kill it at
any time and give the same command again: rows in the CSV stay, a run that was cut off is repeated. A run that
diverged or failed is a row too (column status). At the base width all parametrizations are the same network with
the same updates, bit for bit: one of them is trained, and its row is written for each (column same_run_as).
With --ranks N each run is N ranks under mpirun, on N of the --gpus; the numbers are the same as with one rank.
The column clipped is the share of steps whose gradient -clip shortened. Such a gradient enters SGD's momentum with norm
clip, whatever its size was, so where most steps are clipped lr x clip is what decides; the line of such a run says it.
"""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import shutil
import signal
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    Error,
    Parser,
    Pool,
    Slot,
    add_pool_options,
    choose,
    clock,
    find_binary,
    last_line,
    parse_extra,
    read_csv,
    run_main,
    split,
    write_csv,
)

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
    "same_run_as",
    "seconds",
    "tokens_per_s",
    "options",
    "clipped",
]
REQUIRED = COLUMNS[:-1]  # CSVs from before the column clipped can be read, and go on
PARAMS = {"adamw": ["sp", "mup"], "sgd": ["sp", "mup0", "mup"]}
LRS = {"adamw": "5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2", "sgd": "0.05,0.1,0.2,0.4,0.8,1.6"}
BASE_WIDTH = 256  # of train_gdn, without -w0
PROTOCOL = {"L": "8", "T": "512", "B": "64", "n": "1000", "warmup": "100"}
QUIET = {"v": "0", "s": "0", "save": "0"}
OF_THE_GRID = {"w", "lr", "param", "opt", "seed", "o", "resume", "load", "gen", "h"}  # not allowed after --
CLIP = "1"  # of train_gdn, without -clip
NO_EFFECT_ON_LOSS = {"b", "d", "v", "s", "save", "keep", "recompute"}  # left out of the column options


@dataclass(frozen=True)
class Run:
    optimizer: str
    param: str
    width: int
    lr: str
    seed: int
    also: tuple[str, ...] = ()  # other parametrizations that are the same run

    def keys(self) -> list[tuple]:
        """Of its rows, its own first."""
        return [(self.optimizer, p, self.width, self.lr, self.seed) for p in (self.param, *self.also)]

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
    add_pool_options(p)
    p.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks of a run, under mpirun, on as many of the GPUs [1]"
    )
    p.add_argument(
        "--minutes", type=float, default=math.inf, help="start no run that would not end in this time [no limit]"
    )
    p.add_argument(
        "--expect", default="", metavar="WIDTH=S,...",
        help="seconds that a run of a width takes, for --minutes, until one in the CSV says it [scaled from other widths]",
    )  # fmt: skip
    p.add_argument("--retry", action="store_true", help="repeat the runs whose status is failed")
    p.add_argument("--dry-run", action="store_true", help="list the runs and their tokens, train nothing")
    cut = argv.index("--") if "--" in argv else len(argv)
    a = p.parse_args(argv[:cut])
    a.extra = parse_extra("sweep.py", argv[cut + 1 :], OF_THE_GRID)
    if "i" in a.extra and "j" not in a.extra:
        raise Error("after --: -i without -j leaves no validation loss; give -j FILES too")
    if not a.minutes > 0:
        raise Error(f"--minutes {a.minutes:g}: expected a positive number")
    try:
        pairs = [pair.split("=") for pair in a.expect.split(",") if pair]
        a.expect = {int(width): float(seconds) for width, seconds in pairs}
    except ValueError:
        raise Error(f"--expect '{a.expect}': expected WIDTH=SECONDS with commas") from None
    for name in ("n", "B", "T", "w0"):
        value = a.extra.get(name, "1")
        if not value.isdigit() or value == "0":
            raise Error(f"after --: -{name} '{value}': expected a positive whole number")
    return a


def make_grid(a: argparse.Namespace) -> list[Run]:
    """Every run, narrow widths first."""
    widths, seeds = split("--widths", a.widths, int), split("--seeds", a.seeds, int)
    base = int(a.extra.get("w0", BASE_WIDTH))
    runs = []
    for width in sorted(widths):
        for optimizer in choose("--optimizers", a.optimizers, list(PARAMS)):
            lrs = split("--lrs", a.lrs or getattr(a, optimizer + "_lrs"), float)
            if any(not lr > 0 for lr in lrs):
                raise Error(f"--lrs: expected positive numbers, got {min(lrs):g}")
            params = choose("--params", a.params, PARAMS["sgd"]) if a.params else PARAMS[optimizer]
            same = [(params[-1], tuple(params[:-1]))] if width == base else [(param, ()) for param in params]
            runs += [
                Run(optimizer, param, width, f"{lr:.6g}", seed, also)
                for param, also in same
                for lr in lrs
                for seed in seeds
            ]
    return runs


def settings(a: argparse.Namespace, optimizer: str) -> dict[str, str]:
    """All of a run's options but those of the grid."""
    heads = {"head_dim": a.head_dim} if a.head_dim else {"heads": "6"}
    if "head_dim" in a.extra or "heads" in a.extra:
        heads = {"head_dim": a.head_dim} if a.head_dim else {}
    momentum = {"mom": "0.9", "wd": "0"} if optimizer == "sgd" else {}
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
    for row in read_csv(path, REQUIRED) if path.exists() else []:
        row.setdefault("clipped", "")
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


def fill_in(a: argparse.Namespace, runs: list[Run], rows: dict[tuple, dict]) -> None:
    """Writes the rows that are the same run as one which is there, under this parametrization or another."""
    for run in runs:
        if run.width != int(a.extra.get("w0", BASE_WIDTH)):
            continue
        others = [(run.optimizer, p, run.width, run.lr, run.seed) for p in PARAMS["sgd"]]
        done = [rows[key] for key in others if key in rows and not rows[key]["same_run_as"]]
        for key in run.keys() if done else []:
            if key not in rows or (rows[key]["same_run_as"] == done[0]["param"]):
                rows[key] = {**done[0], "param": key[1], "same_run_as": done[0]["param"]}


def clip_of(a: argparse.Namespace, optimizer: str) -> float:
    """The bound on the gradient's norm, 0: none."""
    return float(settings(a, optimizer).get("clip", CLIP))


def clipped_share(a: argparse.Namespace, optimizer: str, train: list[dict[str, str]]) -> float:
    """Share of the steps whose gradient was longer than -clip; the log has its norm from before."""
    clip = clip_of(a, optimizer)
    return statistics.fmean(clip > 0 and float(entry["grad_norm"]) > clip for entry in train)


def result(a: argparse.Namespace, run: Run, folder: Path, code: int, seconds: float) -> dict[str, str]:
    """The row of a run that ended, from its log.csv and the last line it said."""
    train: list[dict[str, str]] = []
    val: list[dict[str, str]] = []
    problem = ""
    try:
        for entry in read_csv(folder / "log.csv", ["step", "split", "loss", "grad_norm", "tokens_per_s"]):
            (val if entry["split"] == "val" else train).append(entry)
    except (Error, OSError) as e:
        problem = str(e)
    said = last_line(folder / "output.txt")
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
        row["clipped"] = f"{clipped_share(a, run.optimizer, train):.3f}"
    steps = settings(a, run.optimizer)["n"]
    if code != 0:
        row["status"] = "diverged" if "is not finite" in said else "failed"
        row["message"] = f"killed by signal {-code}" if code < 0 else said or f"exit code {code}"
    elif len(train) != int(steps) or not val or int(val[-1]["step"]) != len(train):
        row["status"], row["message"] = "failed", problem or f"stopped after step {len(train)} of {steps}"
    else:
        loss = float(val[-1]["loss"])
        row["val_loss"], row["status"] = val[-1]["loss"], "ok"
        if not math.isfinite(loss) or loss > losses[0]:
            row["status"] = "diverged"
            row["message"] = f"validation loss {loss:.4f}, above the first step's {losses[0]:.4f}"
    return row


@dataclass
class Eta:
    """Seconds that runs take, per width; of a width not seen yet what was expected, else scaled from the nearest one."""

    expected: dict[int, float] = field(default_factory=dict)
    seen: dict[int, list[float]] = field(default_factory=dict)

    def add(self, width: int, seconds: float) -> None:
        self.seen.setdefault(width, []).append(seconds)

    def seconds(self, width: int) -> float:
        """NaN while nothing is known."""
        if width in self.expected and width not in self.seen:
            return self.expected[width]
        if not self.seen:
            return math.nan
        nearest = min(self.seen, key=lambda w: abs(math.log(w / width)))
        return statistics.fmean(self.seen[nearest]) * (width / nearest) ** 1.2

    def left(self, slot: Slot) -> float:
        """Of a run that is under way."""
        return max(0, self.seconds(slot.job.width) - slot.seconds())

    def text(self, waiting: list[Run], pool: Pool) -> str:
        left = sum(self.seconds(run.width) for run in waiting) + sum(map(self.left, pool.busy()))
        return "?" if math.isnan(left) else clock(left / len(pool.slots))


def describe(a: argparse.Namespace, row: dict[str, str]) -> str:
    said = f"val {row['val_loss']}" if row["status"] == "ok" else f"{row['status']}: {row['message']}"
    if row["optimizer"] == "sgd" and row["clipped"] and float(row["clipped"]) > 0:
        step = float(row["lr"]) * clip_of(a, "sgd")
        said += f"  {100 * float(row['clipped']):.0f}% of steps clipped, lr x clip {step:.4g}"
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
) -> list[Run]:
    """Trains the waiting runs and returns those that a.minutes left no time for."""
    start, logs = time.monotonic(), path.with_name(path.stem + "_runs")
    for stale in logs.glob("*.part"):
        shutil.rmtree(stale)
    waiting = sorted(waiting, key=lambda run: -run.width)  # the order of the grid within a width
    too_long: list[Run] = []
    eta = Eta(a.expect)
    for row in rows.values():
        if row["status"] == "ok" and not row["same_run_as"]:
            eta.add(int(row["width"]), float(row["seconds"]))
    done = total - len(waiting)
    with Pool(a.gpus, a.per_gpu, a.ranks) as pool:
        while waiting or pool.busy():
            for run, code, seconds in pool.finished():
                row = result(a, run, logs / (run.name() + ".part"), code, seconds)
                keep_log(logs / (run.name() + ".part"), logs / run.name())
                rows[run.keys()[0]] = row
                fill_in(a, [run], rows)
                write_csv(path, COLUMNS, rows.values())
                done += 1
                if row["status"] == "ok":
                    eta.add(run.width, seconds)
                print(f"{done}/{total}  {describe(a, row)}  eta {eta.text(waiting, pool)}", flush=True)
            while waiting and pool.has_room():
                run = waiting.pop(0)
                if time.monotonic() - start + eta.seconds(run.width) > 60 * a.minutes:
                    too_long.append(run)
                    continue
                folder = logs / (run.name() + ".part")
                folder.mkdir(parents=True)
                pool.start(run, command(a, run, folder), folder / "output.txt")
            time.sleep(0.05)
    return too_long


def list_runs(a: argparse.Namespace, runs: list[Run], rows: dict[tuple, dict], waiting: list[Run]) -> None:
    tokens = 0
    for run in runs:
        values = settings(a, run.optimizer)
        if run in waiting:
            tokens += int(values["n"]) * int(values["B"]) * int(values["T"])
        state = "to do" if run in waiting else rows[run.keys()[0]]["status"]
        params = "=".join((run.param, *run.also))
        print(f"{run.optimizer:5} {params:11} w {run.width:<5} lr {run.lr:<8} seed {run.seed:<4} {state}")
    print(f"{len(runs)} runs, {len(waiting)} to do, {tokens:,} tokens to train on")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    a = parse_arguments(argv)
    runs = make_grid(a)
    path = Path(a.out)
    path = path if path.suffix == ".csv" else path.with_name(path.name + ".csv")
    rows = read_rows(a, path)
    fill_in(a, runs, rows)

    def is_done(run: Run) -> bool:
        return run.keys()[0] in rows and not (a.retry and rows[run.keys()[0]]["status"] == "failed")

    if a.dry_run:
        list_runs(a, runs, rows, [run for run in runs if not is_done(run)])
        return 0
    a.binary = find_binary(a.binary)
    logs = path.with_name(path.stem + "_runs")
    logs.mkdir(parents=True, exist_ok=True)
    lock = os.open(logs, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error(f"{path}: another sweep.py writes it") from None
    rows = read_rows(a, path)  # once more, now that nobody else writes it
    if rows:
        fill_in(a, runs, rows)
        write_csv(path, COLUMNS, rows.values())
    signal.signal(signal.SIGTERM, interrupt)
    try:
        too_long = train_all(a, [run for run in runs if not is_done(run)], len(runs), path, rows)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return 130
    ended = [rows[run.keys()[0]]["status"] for run in runs if run.keys()[0] in rows]
    counts = {status: ended.count(status) for status in ("ok", "diverged", "failed")}
    left = f", {len(too_long)} left (--minutes {a.minutes:g}; the same command goes on)" if too_long else ""
    print(f"{path}: " + ", ".join(f"{n} {status}" for status, n in counts.items()) + left)
    if counts["failed"]:
        raise Error(f"{counts['failed']} runs failed, see the column message; --retry repeats them")
    return 0


if __name__ == "__main__":
    run_main(main)
