#!/usr/bin/env python3
"""Follows the log.csv of one or several runs and hands each row on to TensorBoard or Weights & Biases.

    python3 scripts/follow_log.py run_001 run_002 & tensorboard --logdir tensorboard
    python3 scripts/follow_log.py run_001 --wandb my_project

Takes folders of runs, where a log may appear later, or log.csv files. It goes on until Ctrl-C or SIGTERM; --once takes what is
there and ends. Curves are train/loss, val/loss, train/lr, train/grad_norm, train/ms, train/tokens_per_s, train/sol
and, of the built-in stories, the floors; the run's options are there as hyperparameters.

TensorBoard gets a folder per run in --out, with the events of the whole log: those of an earlier call are replaced.
Weights & Biases gets a new run with each call; as always, WANDB_MODE=offline keeps it on this machine. A resumed
training writes some rows of its log again: they are the same numbers, and are handed on once.
"""

from __future__ import annotations

import argparse
import csv
import os
import json
import signal
import time
from pathlib import Path

from common import Error, Parser, import_package, run_main
from plot_log import labels

OLDER_COLUMNS = ["step", "split", "loss", "lr", "grad_norm", "ms", "tokens_per_s", "sol"]
WITHOUT_WAIT = OLDER_COLUMNS + ["floor", "time"]
COLUMNS = WITHOUT_WAIT + ["wait_ms"]
SUFFIX = ".train_gdn"  # of our event files


class TensorBoard:
    """Events of one run in the folder OUT/LABEL."""

    def __init__(self, out: Path, label: str):
        library = import_package("tensorboardX")
        folder = out / label
        if folder.exists() and not folder.is_dir():
            raise Error(f"{folder}: is there, expected a folder or nothing")
        for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self.writer = library.SummaryWriter(str(folder), filename_suffix=SUFFIX, flush_secs=1)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def options(self, options: dict[str, str]) -> None:
        lines = ["| option | value |", "|---|---|", *(f"| -{name} | {value} |" for name, value in options.items())]
        self.writer.add_text("options", "\n".join(lines))

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, project: str, label: str):
        library = import_package("wandb")
        try:
            self.run = library.init(project=project, name=label, reinit="create_new")
        except Exception as e:  # network, login: errors of many kinds
            raise Error(f"Weights & Biases: {str(e).splitlines()[0] if str(e) else type(e).__name__}") from None

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def options(self, options: dict[str, str]) -> None:
        self.run.config.update(options, allow_val_change=True)

    def close(self) -> None:
        self.run.finish()


class Log:
    """A log.csv that grows, and is replaced by a shorter one when its run is resumed."""

    def __init__(self, path: Path):
        self.path = path
        self.file = None  # opened, identity, rest: of the file that is being read
        self.identity = None
        self.rest = b""
        self.row = 0
        self.columns = COLUMNS
        self.last = {"train": 0, "val": 0}  # step that was handed on

    def new_rows(self) -> list[tuple[int, dict[str, float]]]:
        """Step and values by name, of the rows that were completed since the last call."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            return []
        identity = (status.st_dev, status.st_ino)
        if self.file is None or identity != self.identity or status.st_size < self.file.tell():
            self.close()
            self.file, self.identity, self.rest, self.row = self.path.open("rb"), identity, b"", 0
        *lines, self.rest = (self.rest + self.file.read()).split(b"\n")
        return [values for line in lines if (values := self.parse(line)) is not None]

    def parse(self, line: bytes) -> tuple[int, dict[str, float]] | None:
        """None for what stands before the rows and for what was handed on before."""
        if self.row == 0 and line.startswith(b"#"):
            return None
        self.row += 1
        try:
            (fields,) = csv.reader([line.decode()])
            if self.row == 1 and fields in (COLUMNS, WITHOUT_WAIT, OLDER_COLUMNS):
                self.columns = fields
                return None
            if self.row == 1:
                raise ValueError
            row = dict(zip(self.columns, fields, strict=True))
            step, split = int(row["step"]), row["split"]
            values = {f"{split}/{name}": float(row[name]) for name in self.columns[2:] if row[name] and name != "time"}
            fresh = step > self.last[split]
        except (ValueError, KeyError, csv.Error):
            what = f"expected {','.join(COLUMNS)}" if self.row == 1 else "not a row of a training log"
            raise Error(f"{self.path}: line {self.row}: {what}") from None
        if not fresh:
            return None
        self.last[split] = step
        return step, values

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def options_of(folder: Path) -> dict[str, str] | None:
    """The options in effect that a checkpoint in the folder of a log names; None while there is none."""
    for path in sorted(folder.glob("step_????????/checkpoint.json"), reverse=True):
        try:
            return json.loads(path.read_text())["counters"]["in_effect"]
        except (OSError, ValueError, KeyError, TypeError):  # being replaced, or of before there was such a record
            continue
    return None


def follow(paths: list[Path], sinks: list, once: bool, seconds: float) -> int:
    """The number of rows that were handed on."""
    logs, count = [Log(path) for path in paths], 0
    untold = dict(zip(paths, sinks))
    try:
        while True:
            for log, sink in zip(logs, sinks):
                rows = log.new_rows()
                for step, values in rows:
                    sink.add(step, values)
                count += len(rows)
                if log.path in untold and (options := options_of(log.path.parent)):
                    untold.pop(log.path).options(options)
            if once:
                return count
            time.sleep(seconds)
    except KeyboardInterrupt:
        return count
    finally:
        for log, sink in zip(logs, sinks):
            log.close()
            sink.close()


def main(argv: list[str]) -> int:
    p = Parser(prog="follow_log.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="+", type=Path, help="folders of runs, or log.csv files")
    p.add_argument("-o", "--out", type=Path, default=Path("tensorboard"), help="TensorBoard's folder [tensorboard]")
    p.add_argument("--wandb", metavar="PROJECT", help="to Weights & Biases instead")
    p.add_argument("--once", action="store_true", help="take what is there, and end")
    p.add_argument("--every", type=float, default=2, metavar="X", help="seconds between looks at the logs [2]")
    a = p.parse_args(argv)
    if not a.every > 0:
        raise Error(f"--every {a.every}: expected more than 0")
    if len({path.resolve() for path in a.run}) < len(a.run):
        raise Error("a run is named twice")
    paths = []
    for run in a.run:
        if not run.exists():
            raise Error(f"{run}: no such file or folder")
        paths.append(run / "log.csv" if run.is_dir() else run)
        if a.once and not paths[-1].exists():
            raise Error(f"{paths[-1]}: no such file")
    names = [name.strip("/").replace("/", "_") for name in labels(a.run)]
    sinks = [WeightsAndBiases(a.wandb, name) if a.wandb else TensorBoard(a.out, name) for name in names]
    for stop in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell's script ignores it in what it starts with &
        signal.signal(stop, signal.default_int_handler)
    count = follow(paths, sinks, a.once, a.every)
    print(f"{count} rows of {len(paths)} logs to {'Weights & Biases' if a.wandb else a.out}")
    return 0


if __name__ == "__main__":
    run_main(main)
