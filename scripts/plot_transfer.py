#!/usr/bin/env python3
"""Draws loss against learning rate per width, and prints how well the best learning rate transfers.

    python3 scripts/plot_transfer.py results/books.csv --out results/transfer --table results/transfer.md

Reads CSVs of sweep.py; one panel per optimizer, parametrization and kind of heads. From a parabola through
the three lowest points of loss against log2(lr), losses averaged over seeds (where a seed has only some of the
learning rates, after the mean difference between seeds is taken out, so that it bends no curve; losses more than 0.5
above a seed's lowest do not count for it):
    shift(d)  = log2( best lr at d / best lr at the base width )
    regret(d) = loss at d with the lr that was best at the base width, minus the best loss at d
A learning rate at which a seed diverged is not a point of the parabola; it is marked at the top of the plot.
The column "within" asks for |shift| <= 0.5 and regret <= 0.01; "?": the minimum is not inside the grid, or one of
the three losses is more than 0.5 above the lowest, so that the parabola says little of its bottom.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import Error, Parser, import_pyplot, number, read_csv, run_main, save_figure, width_colors

COLUMNS = ["param", "optimizer", "width", "lr", "seed", "val_loss", "status", "options"]
ORDER = ["adamw", "sgd", "sp", "mup0", "mup"]
WANTED_SHIFT, WANTED_REGRET = 0.5, 0.01
FAR = 0.5  # nats above the lowest loss: beyond what can be trained, where no parabola holds
Losses = dict[float, float]  # learning rate -> loss


@dataclass
class Curve:
    """All runs of one width in a panel."""

    by_seed: dict[int, Losses] = field(default_factory=dict)
    bad_lrs: set[float] = field(default_factory=set)  # a seed diverged

    def points(self) -> dict[float, list[float]]:
        """Learning rate -> the seeds' losses, in order, where none diverged."""
        lrs = sorted({lr for losses in self.by_seed.values() for lr in losses} - self.bad_lrs)
        return {lr: [losses[lr] for losses in self.by_seed.values() if lr in losses] for lr in lrs}

    def offsets(self) -> dict[int, float]:
        """Each seed's mean difference from the seed that has the most points, over the points that both could train."""
        if not self.by_seed:
            return {}
        trained = {
            seed: {lr: y for lr, y in losses.items() if lr not in self.bad_lrs and y <= min(losses.values()) + FAR}
            for seed, losses in self.by_seed.items()
        }
        reference = trained[max(self.by_seed, key=lambda seed: len(self.by_seed[seed]))]
        differences = {
            seed: [y - reference[lr] for lr, y in losses.items() if lr in reference] for seed, losses in trained.items()
        }
        return {seed: statistics.fmean(d) if d else 0.0 for seed, d in differences.items()}

    def mean(self) -> Losses:
        offsets = self.offsets()
        level = statistics.fmean(offsets.values()) if offsets else 0.0
        return {
            lr: level + statistics.fmean(y[lr] - offsets[seed] for seed, y in self.by_seed.items() if lr in y)
            for lr in self.points()
        }


@dataclass
class Minimum:
    """The parabola a (x - x0)^2 + c in x = log2(lr); without one (a = None) the lowest point."""

    x0: float
    c: float
    a: float | None
    note: str
    bracketed: bool  # higher losses were measured on both sides, not far above: shift and regret are more than bounds

    def loss(self, x: float) -> float:
        return self.c + self.a * (x - self.x0) ** 2 if self.a is not None else math.nan


def parabola(losses: Losses, lrs: list[float]) -> tuple[float, float, float] | None:
    """x0, c, a of Minimum's parabola through the losses at three learning rates; None where it has no minimum."""
    (x1, y1), (x2, y2), (x3, y3) = ((math.log2(lr), losses[lr]) for lr in lrs)
    slope12, slope23 = (y2 - y1) / (x2 - x1), (y3 - y2) / (x3 - x2)
    a = (slope23 - slope12) / (x3 - x1)
    if a <= 0:
        return None
    x0 = (x1 + x2) / 2 - slope12 / (2 * a)
    return x0, y1 - a * (x1 - x0) ** 2, a


def find_minimum(losses: Losses, bad_lrs: set[float] = frozenset()) -> Minimum:
    """The best learning rate, from the three lowest points; `note` says what speaks against it.

    In their place the lowest point and its neighbours, and `note` says why, where the three lowest are not neighbours (a
    point between them is high by noise, or one beyond is low), or where the lowest is not their middle, though the
    grid goes on, and their parabola's minimum lies beyond it, where a higher loss was measured.
    """
    lowest = sorted(losses, key=losses.__getitem__)[:3]
    best, lrs = lowest[0], sorted(losses)
    notes = []
    next_to_diverged = best == lrs[-1] and any(lr > best for lr in bad_lrs)
    at_edge = best in (lrs[0], lrs[-1]) and not next_to_diverged
    if next_to_diverged:
        notes.append("minimum next to a diverged lr")
    if at_edge:
        notes.append(f"minimum at the grid's {'lower' if best == lrs[0] else 'upper'} edge")
    if len(lowest) < 3:
        notes.append(f"only {len(lowest)} points")
        return Minimum(math.log2(best), losses[best], None, "; ".join(notes), False)
    first = min(max(lrs.index(best) - 1, 0), len(lrs) - 3)
    around, three = lrs[first : first + 3], sorted(lowest)
    used = around  # the three lowest points, unless one of them is no neighbour
    fit = parabola(losses, used)
    if three != [lr for lr in lrs if three[0] <= lr <= three[-1]]:
        notes.append("three lowest points are not neighbours")
    elif three != around:
        of_three = parabola(losses, three)
        if of_three and math.log2(three[0]) <= of_three[0] <= math.log2(three[-1]):
            fit, used = of_three, three
        else:
            notes.append("three lowest points on one side")
    if fit is None:
        notes.append("three lowest points have no minimum")
        return Minimum(math.log2(best), losses[best], None, "; ".join(notes), False)
    x0, c, a = fit
    inside = math.log2(lrs[0]) <= x0 <= math.log2(lrs[-1])
    if not inside:
        notes.append("parabola's minimum outside the grid")
    height = max(losses[lr] for lr in used) - losses[best]
    if height > FAR:
        notes.append(f"parabola through a loss {height:.1f} above the lowest")
    return Minimum(x0, c, a, "; ".join(notes), inside and not at_edge and height <= FAR)


@dataclass
class Figures:
    width: int
    minimum: Minimum
    shift: float
    shift_std: float  # over seeds, nan with fewer than two
    regret: float
    grid_regret: float  # at the grid's lr that was best at the base width; inf: diverged, nan: not run
    note: str


def evaluate(panel: dict[int, Curve], base: int) -> list[Figures]:
    reference, means = find_minimum(panel[base].mean(), panel[base].bad_lrs), panel[base].mean()
    reference_lr = min(means, key=means.__getitem__)
    figures = []
    for width, curve in sorted(panel.items()):
        losses = curve.mean()
        minimum = find_minimum(losses, curve.bad_lrs)
        notes = [minimum.note] if minimum.note else []
        low, high = min(losses), max(losses)
        if minimum.a is not None and not low <= 2**reference.x0 <= high:
            notes.append("regret extrapolated beyond the measured points")
        grid_regret = losses.get(reference_lr, math.nan) - min(losses.values())
        if reference_lr in curve.bad_lrs:
            grid_regret = math.inf
        shifts = [
            find_minimum(of_seed[width]).x0 - find_minimum(of_seed[base]).x0
            for of_seed in complete_seeds(panel, {base, width})
        ]
        figures.append(
            Figures(
                width,
                minimum,
                minimum.x0 - reference.x0,
                statistics.stdev(shifts) if len(shifts) > 1 else math.nan,
                minimum.loss(reference.x0) - minimum.c,
                grid_regret,
                "; ".join(notes),
            )
        )
    return figures


def complete_seeds(panel: dict[int, Curve], widths: set[int]) -> list[dict[int, Losses]]:
    """For each seed with three points or more at these widths: width -> its losses."""
    seeds = set.intersection(*(set(panel[w].by_seed) for w in widths))
    kept = []
    for seed in sorted(seeds):
        of_seed = {
            w: {lr: y for lr, y in panel[w].by_seed[seed].items() if lr not in panel[w].bad_lrs}
            for w in widths
        }
        if all(len(losses) >= 3 for losses in of_seed.values()):
            kept.append(of_seed)
    return kept


def read_panels(paths: list[Path]) -> dict[tuple[str, str, str], dict[int, Curve]]:
    """(optimizer, parametrization, heads) -> width -> curve. Failed runs are said and left out."""
    panels: dict[tuple[str, str, str], dict[int, Curve]] = {}
    options: dict[tuple[str, str, str], str] = {}
    seen: set[tuple] = set()
    for path in paths:
        for row in read_csv(path, COLUMNS):
            size = re.search(r"-head_dim (\S+)", row["options"])
            if row["optimizer"] not in ORDER or row["param"] not in ORDER:
                raise Error(f"{path}: optimizer '{row['optimizer']}', param '{row['param']}': not known")
            panel = (row["optimizer"], row["param"], f"head size {size[1]}" if size else "")
            width, lr, seed = (number(path, row, c) for c in ("width", "lr", "seed"))
            if width <= 0 or lr <= 0:
                raise Error(f"{path}: width {row['width']}, lr {row['lr']}: expected positive numbers")
            if options.setdefault(panel, row["options"]) != row["options"]:
                raise Error(
                    f"{path}: {row['optimizer']} {row['param']} runs with '{row['options']}' and with "
                    f"'{options[panel]}' do not belong in one plot"
                )
            if (panel, width, lr, seed) in seen:
                raise Error(
                    f"{path}: a second row for {row['optimizer']} {row['param']} width {row['width']} "
                    f"lr {row['lr']} seed {row['seed']}"
                )
            seen.add((panel, width, lr, seed))
            curve = panels.setdefault(panel, {}).setdefault(int(width), Curve())
            if row["status"] == "diverged":
                curve.bad_lrs.add(lr)
            elif row["status"] == "ok":
                curve.by_seed.setdefault(int(seed), {})[lr] = number(path, row, "val_loss")
            elif row["status"] == "failed":
                print(
                    f"left out, failed: {row['optimizer']} {row['param']} width {row['width']} "
                    f"lr {row['lr']} seed {row['seed']}",
                    file=sys.stderr,
                )
            else:
                raise Error(f"{path}: status '{row['status']}': expected ok, diverged or failed")
    if not panels:
        raise Error(f"{', '.join(map(str, paths))}: no rows")
    rank = {name: i for i, name in enumerate(ORDER)}
    return dict(sorted(panels.items(), key=lambda item: (item[0][2], *(rank.get(n, 9) for n in item[0][:2]))))


def panel_title(panel: tuple[str, str, str]) -> str:
    names = {"adamw": "AdamW", "sgd": "SGD", "mup": "muP", "mup0": "muP0", "sp": "SP"}
    return ", ".join(names.get(word, word) for word in panel if word)


def table(figures: dict[tuple[str, str, str], list[Figures]], base: int) -> str:
    """The figures of merit in Markdown."""
    head = ["run", "width", "best lr", "best loss", "shift", "regret", "regret on the grid", "within", "note"]
    lines = [head, [":--"] + ["--:"] * 6 + [":-:", ":--"]]
    for panel, rows in figures.items():
        reference = next(f.minimum for f in rows if f.width == base)
        for f in rows:
            shift = f"{f.shift:+.2f}" + (f" ± {f.shift_std:.2f}" if math.isfinite(f.shift_std) else "")
            regret = "-" if math.isnan(f.regret) else f"{f.regret:.4f}"
            grid = {math.inf: "diverged"}.get(
                f.grid_regret, "-" if math.isnan(f.grid_regret) else f"{f.grid_regret:.4f}"
            )
            within = "yes" if abs(f.shift) <= WANTED_SHIFT and f.regret <= WANTED_REGRET else "no"
            if not (f.minimum.bracketed and reference.bracketed):
                within = "?"
            if f.width == base:
                shift = regret = grid = within = "base"
            lines.append(
                [
                    panel_title(panel),
                    str(f.width),
                    f"{2**f.minimum.x0:.3g}",
                    f"{f.minimum.c:.4f}",
                    shift,
                    regret,
                    grid,
                    within,
                    f.note,
                ]
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |\n" for line in lines)


def draw(
    panels: dict[tuple[str, str, str], dict[int, Curve]],
    figures: dict[tuple[str, str, str], list[Figures]],
    limit: float,
    prefix: Path,
) -> None:
    """A row of panels per optimizer and kind of heads, a column per parametrization."""
    pyplot = import_pyplot()
    rows = list(dict.fromkeys((optimizer, heads) for optimizer, _, heads in panels))
    columns = sorted({param for _, param, _ in panels}, key=ORDER.index)
    size = (4.3 * len(columns) + 0.4, 3.4 * len(rows) + 0.7)
    figure, axes = pyplot.subplots(len(rows), len(columns), figsize=size, squeeze=False, layout="constrained")
    widths = sorted({width for panel in panels.values() for width in panel})
    color = dict(zip(widths, width_colors(len(widths))))
    excess = [
        y - min(c.mean().values()) for p in panels.values() for c in p.values() for y in c.mean().values()
    ]
    top = min(limit, max(1.15 * max(excess), 1e-3))
    for (row, column), axis in [
        ((r, c), axes[i][j]) for i, r in enumerate(rows) for j, c in enumerate(columns)
    ]:
        name = (row[0], column, row[1])
        if name not in panels:
            axis.set_axis_off()
            continue
        for f in figures[name]:
            draw_curve(axis, panels[name][f.width], f, color[f.width], top, widths.index(f.width))
        axis.set(title=panel_title(name), xscale="log", ylim=(-0.04 * top, 1.15 * top))
        axis.set(xlabel="peak learning rate", ylabel="validation loss − best at that width")
        lrs = sorted({lr for c in panels[name].values() for lr in set(c.points()) | c.bad_lrs})
        shown = lrs[:: -(-len(lrs) // 7)]
        axis.set_xticks(shown, [f"{lr:.3g}" for lr in shown])
        axis.minorticks_off()
    handles = [pyplot.Line2D([], [], color=color[w], marker="o", ms=4, label=f"width {w}") for w in widths]
    gray = {"color": "#888888", "ls": ""}
    handles.append(pyplot.Line2D([], [], color="#888888", ls=":", label="minimum of the parabola"))
    if any(curve.bad_lrs for panel in panels.values() for curve in panel.values()):
        handles.append(pyplot.Line2D([], [], **gray, marker="x", mew=1.8, label="diverged"))
    if max(excess) > 1.15 * top:
        handles.append(pyplot.Line2D([], [], **gray, marker="^", label="above the plot"))
    figure.legend(handles=handles, loc="outside lower center", ncols=(2, 4, 8)[min(len(columns), 3) - 1])
    save_figure(figure, prefix)
    pyplot.close(figure)


def draw_curve(axis, curve: Curve, f: Figures, color, top: float, rank: int) -> None:
    points, means = curve.points(), curve.mean()
    best = min(means.values())
    excess = {lr: y - best for lr, y in means.items()}
    spread = [statistics.stdev(losses) if len(losses) > 1 else 0 for losses in points.values()]
    axis.plot(list(excess), list(excess.values()), color=color, lw=1.6, marker="o", ms=4, zorder=3)
    if any(spread):
        bars = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 2.5, "alpha": 0.7}
        axis.errorbar(list(excess), list(excess.values()), spread, **bars)
    axis.axvline(2**f.minimum.x0, color=color, lw=1, ls=":", zorder=1)
    level = (1.12 - 0.035 * rank) * top  # one height per width, so that marks do not hide each other
    bad = sorted(curve.bad_lrs)
    axis.plot(bad, [level] * len(bad), color=color, ls="", marker="x", ms=6, mew=1.8, zorder=4)
    above = [lr for lr, y in excess.items() if y > 1.15 * top]
    axis.plot(above, [level] * len(above), color=color, ls="", marker="^", ms=5, zorder=4)


def main(argv: list[str]) -> int:
    p = Parser(
        prog="plot_transfer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("csv", nargs="+", type=Path, help="CSVs of sweep.py")
    p.add_argument(
        "-o", "--out", type=Path, default=Path("transfer"), help="writes OUT.png and OUT.svg [transfer]"
    )
    p.add_argument("--table", type=Path, metavar="FILE", help="write the table as Markdown")
    p.add_argument("--base", type=int, default=256, help="base width [256]")
    p.add_argument(
        "--ymax", type=float, default=0.5, help="top of the plot, in nats above the best loss [0.5]"
    )
    a = p.parse_args(argv)
    if not a.ymax > 0:
        raise Error(f"--ymax {a.ymax:g}: expected a positive number")
    panels = read_panels(a.csv)
    few = []
    for name, panel in panels.items():
        if a.base not in panel:
            raise Error(f"{panel_title(name)}: no runs at the base width {a.base} (--base N chooses another)")
        if len(panel[a.base].points()) < 3:
            raise Error(
                f"{panel_title(name)}: too few points at the base width {a.base}: "
                f"{len(panel[a.base].points())} learning rates that did not diverge, 3 are needed"
            )
        for width, curve in list(panel.items()):
            count = len(curve.points())
            if count < 3:
                few.append(f"{panel_title(name)} width {width} has {count}")
            if count == 0:
                del panel[width]
    figures = {name: evaluate(panel, a.base) for name, panel in panels.items()}
    text = table(figures, a.base)
    print(text, end="")
    if a.table:
        a.table.parent.mkdir(parents=True, exist_ok=True)
        a.table.write_text(text)
        print(f"wrote {a.table}")
    draw(panels, figures, a.ymax, a.out)
    if few:
        raise Error("too few points for a parabola, 3 are needed: " + "; ".join(few))
    return 0


if __name__ == "__main__":
    run_main(main)
