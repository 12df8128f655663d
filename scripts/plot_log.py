#!/usr/bin/env python3
"""Draws one or several runs: loss, learning rate, gradient norm and tokens/s against the step.

    python3 scripts/plot_log.py run_001 run_002 --out runs

Takes folders of runs or their log.csv files. Training losses and norms are averaged over --smooth steps;
those of single steps lie behind them. Circles are validations, a dotted line is the floor under the loss where it
is known (the built-in stories' entropy). --hours draws against the time since the first step in place of the step.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from common import Error, Parser, import_pyplot, number, read_csv, run_main, save_figure

COLUMNS = ["step", "split", "loss", "lr", "grad_norm", "tokens_per_s"]
LATER_COLUMNS = ["floor", "time"]  # that older logs do not have
Series = dict[str, list[float]]


def read_log(path: Path) -> tuple[Series, Series]:
    """The columns of the training rows, and of the validations."""
    if path.is_dir():
        path = path / "log.csv"
    train: Series = {c: [] for c in COLUMNS + LATER_COLUMNS if c != "split"}
    val: Series = {c: [] for c in ("step", "loss", "time")}
    for row in read_csv(path, COLUMNS):
        if row["split"] not in ("train", "val"):
            raise Error(f"{path}: split '{row['split']}': expected train or val")
        for column, values in (train if row["split"] == "train" else val).items():
            missing = column in LATER_COLUMNS and not row.get(column)
            values.append(math.nan if missing else number(path, row, column))
    if not train["step"]:
        raise Error(f"{path}: no training steps")
    return train, val


def running_mean(values: list[float], window: int) -> list[float]:
    """Each value's mean with its neighbours, `window` of them or up to the ends."""
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in parts]


def labels(paths: list[Path]) -> list[str]:
    """The folders' names, or whole paths where these are not distinct."""
    names = [(p.resolve() if p.is_dir() or p.name != "log.csv" else p.resolve().parent).name for p in paths]
    return names if len(set(names)) == len(names) else [str(p) for p in paths]


def hours(values: list[float], start: float) -> list[float]:
    return [(value - start) / 3600 for value in values]


def draw(paths: list[Path], smooth: int, prefix: Path, by_hours: bool) -> None:
    logs = [read_log(path) for path in paths]
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    (loss_axis, lr_axis), (norm_axis, speed_axis) = axes
    for i, ((train, val), name) in enumerate(zip(logs, labels(paths))):
        color, steps, val_steps = f"C{i % 10}", train["step"], val["step"]
        if by_hours:
            if math.isnan(train["time"][0]):
                raise Error(f"{paths[i]}: the log has no times; leave out --hours")
            steps, val_steps = hours(train["time"], train["time"][0]), hours(val["time"], train["time"][0])
        window = smooth or max(1, len(steps) // 50)
        for axis, column in ((loss_axis, "loss"), (norm_axis, "grad_norm")):
            axis.plot(steps, train[column], color=color, lw=0.6, alpha=0.25)
            axis.plot(steps, running_mean(train[column], window), color=color, lw=1.6, label=name)
        if not math.isnan(train["floor"][0]):
            floor = running_mean(train["floor"], window)
            loss_axis.plot(steps, floor, color=color, lw=1.2, ls=":")
        loss_axis.plot(
            val_steps, val["loss"], color=color, ls="", marker="o", ms=6, mfc="white", mew=1.6, zorder=3
        )
        lr_axis.plot(steps, train["lr"], color=color, lw=1.6)
        speed_axis.plot(steps, train["tokens_per_s"], color=color, lw=1.2)
    loss_axis.set(title="loss, nats per token (circles: validation; dotted: floor)")
    unit = "hours" if by_hours else "step"
    lr_axis.set(title="learning rate", ylim=(0, None))
    norm_axis.set(title="norm of the gradient", yscale="log", xlabel=unit)
    speed_axis.set(title="tokens/s", ylim=(0, None), xlabel=unit)
    lr_axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    speed_axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    handles, names = loss_axis.get_legend_handles_labels()
    columns = max(1, min(4, 110 // (max(map(len, names)) + 6)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns)
    save_figure(figure, prefix)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    p = Parser(prog="plot_log.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", nargs="+", type=Path, help="folders of runs, or log.csv files")
    p.add_argument("-o", "--out", type=Path, default=Path("log"), help="writes OUT.png and OUT.svg [log]")
    p.add_argument(
        "--smooth", type=int, default=0, metavar="N", help="steps to average over [a fiftieth of the run]"
    )
    p.add_argument("--hours", action="store_true", help="against the time since the first step")
    a = p.parse_args(argv)
    if a.smooth < 0:
        raise Error(f"--smooth {a.smooth}: expected 0 or more")
    draw(a.run, a.smooth, a.out, a.hours)
    return 0


if __name__ == "__main__":
    run_main(main)
