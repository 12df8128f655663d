#!/usr/bin/env python3
"""Draws loss against learning rate per width, and prints how well the best learning rate transfers.

    python3 scripts/plot_transfer.py results/books.csv --out results/transfer --table results/transfer.md

Reads CSVs of sweep.py; one panel per optimizer, parametrization and kind of heads. From a parabola through
the three lowest points of loss against log2(lr), losses averaged over seeds (where a seed has only some of the
learning rates, after the mean difference between seeds is taken out, so that it bends no curve; losses more than 0.5
above a seed's lowest do not count for it):
    shift(d)  = log2( best lr at d / best lr at the base width )
    regret(d) = loss at d with the lr that was best at the base width, minus the best loss at d
A learning rate at which a seed diverged is not a point of the parabola; it is marked at the top of the plot. A minimum
that is not inside its points is "not bracketed", and then best lr, shift and regret are not given as if measured.

Intervals of 95% are those of a parametric bootstrap: each run's loss is drawn again around its point's mean, all figures
are computed from the drawn losses in the same way, and the 2.5% and 97.5% quantiles are taken; of the regret, which cannot be
below 0, the 95% quantile as an upper bound. The noise, normal, is the pooled deviation of seeds at equal (width, learning
rate), over all such points of an optimizer and kind of heads; a point with one seed is taken to have it too. Points more than
0.05 above their width's lowest have a noise of their own where at least 3 degrees of freedom say that it is 1.5 times as
large. That the noise is itself an estimate is drawn too (chi squared). What a seed changes at all learning rates of a width
alike moves no minimum, but counts as noise unless --paired takes it out: without, such intervals are too wide. An end
"open" means that there the minimum is not bracketed.
    each seed             the grid's best lr of its runs alone, and its own shift from three points or more
    P(regret > 0.01)      share of draws; one whose regret the points do not measure counts
    regret on the grid    the base's grid best instead of the width's own; 0 says only that |shift| < half the grid's step
    P(other lr)           share of draws in which the grid's best differs from the base's (at the base: from the measured one)
    within                yes: the interval of the shift is within +-0.5 and the bound of the regret within 0.01; no: either is
                          outside for sure; "?": the data do not decide, or a minimum is not bracketed
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterable

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
    side: float = math.nan  # where not bracketed: -inf, the minimum is at or below the lowest lr, inf: at or above the highest

    def loss(self, x: float) -> float:
        return self.c + self.a * (x - self.x0) ** 2 if self.a is not None else math.nan

    def bracketed_x0(self) -> float:
        """x0; -inf or inf where the minimum lies below or above the points, nan where they do not say."""
        return self.x0 if self.bracketed else self.side


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
    side = {lrs[0]: -math.inf, lrs[-1]: math.inf}.get(best, math.nan)
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
        return Minimum(math.log2(best), losses[best], None, "; ".join(notes), False, side)
    x0, c, a = fit
    inside = math.log2(lrs[0]) <= x0 <= math.log2(lrs[-1])
    if not inside:
        notes.append("parabola's minimum outside the grid")
    height = max(losses[lr] for lr in used) - losses[best]
    if height > FAR:
        notes.append(f"parabola through a loss {height:.1f} above the lowest")
    return Minimum(x0, c, a, "; ".join(notes), inside and not at_edge and height <= FAR, side)



@dataclass
class Noise:
    """Standard deviation of one run's loss, with the degrees of freedom it was estimated with (inf: known)."""

    sigma: float
    freedom: float
    far: tuple[float, float] | None = None  # the same of points more than NEAR above the lowest, where it is larger

    def draw(self, rng: random.Random) -> Callable[[float], float]:
        """Height above the lowest loss -> sigma, as uncertain as it is."""

        def one(sigma: float, freedom: float) -> float:
            return sigma if math.isinf(freedom) else sigma * math.sqrt(freedom / rng.gammavariate(freedom / 2, 2))

        near = one(self.sigma, self.freedom)
        far = one(*self.far) if self.far else near
        return lambda height: near if height <= NEAR else far

    def text(self) -> str:
        def say(sigma: float, freedom: float) -> str:
            return f"{sigma:.4f}" + ("" if math.isinf(freedom) else f" ({freedom:g} degrees of freedom)")

        far = f"; more than {NEAR:g} above the lowest {say(*self.far)}" if self.far else ""
        return f"noise of one run {say(self.sigma, self.freedom)}{far}"


NEAR = 0.05  # nats above the lowest loss of a width: where the noise is that of the minimum
MIN_FREEDOM, LARGER = 3, 1.5  # of a noise of its own above that: degrees of freedom, ratio


def estimate_noise(panels: list[dict[int, Curve]], paired: bool = False) -> Noise | None:
    """From all points with two seeds or more that are not far above their width's lowest; None where there are none.

    paired: near the minimum, each seed's mean deviation at a width is taken out first, over learning rates with the same
    seeds.
    """
    groups: dict[tuple, tuple[float, int]] = {}  # squares and freedom; at the base width panels share runs: each once
    for panel in panels:
        for width, curve in panel.items():
            points = curve.points()
            lowest = min(map(statistics.fmean, points.values()), default=0)
            together: dict[tuple, list[list[float]]] = {}  # near or not, seeds, lr unless paired -> losses
            for lr, losses in points.items():
                seeds = tuple(seed for seed, of_seed in curve.by_seed.items() if lr in of_seed)
                height = statistics.fmean(losses) - lowest
                if len(losses) > 1 and height <= FAR:
                    near = height <= NEAR
                    together.setdefault((near, seeds, None if paired and near else lr), []).append(losses)
            for (near, _, lr), rows in together.items():
                count = len(rows[0])
                of_seed = [statistics.fmean(column) for column in zip(*rows)] if lr is None else [0.0] * count
                deviations = [y - m for row in rows for y, m in zip([y - statistics.fmean(row) for y in row], of_seed)]
                if lr is None:
                    center = statistics.fmean(of_seed)
                    deviations = [y + center for y in deviations]
                freedom = (count - 1) * (len(rows) - (lr is None))
                groups[width, near, lr, str(sorted(rows))] = (sum(x * x for x in deviations), freedom)

    def pooled(near: bool) -> tuple[float, float]:
        squares, freedom = (sum(g[i] for key, g in groups.items() if key[1] == near) for i in (0, 1))
        return (math.sqrt(squares / freedom) if freedom else 0.0), float(freedom)

    (sigma, freedom), far = pooled(True), pooled(False)
    if not freedom:
        return Noise(*far) if far[1] else None
    return Noise(sigma, freedom, far if far[1] >= MIN_FREEDOM and far[0] > LARGER * sigma else None)


@dataclass
class Interval:
    low: float
    high: float

    def text(self, convert: Callable[[float], str]) -> str:
        low, high = ("open" if math.isinf(x) else convert(x) for x in (self.low, self.high))
        return f"[{low}, {high}]"


def quantile(ordered: list[float], q: float) -> float:
    return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]


def interval(values: list[float]) -> Interval:
    """Of 95%. A value that is nan could be anything: it widens both sides."""
    low = sorted(-math.inf if math.isnan(x) else x for x in values)
    high = sorted(math.inf if math.isnan(x) else x for x in values)
    return Interval(quantile(low, 0.025), quantile(high, 0.975))


@dataclass
class Spread:
    """What the bootstrap says of one width."""

    best: Interval  # log2 of the best learning rate
    shift: Interval
    regret_bound: float  # one-sided, 95%; inf: not bounded by the measured points
    regret_low: float  # the 5% quantile
    exceeds: float  # P(regret > WANTED_REGRET); a regret that is not known counts
    other_lr: float


@dataclass
class OfSeed:
    """A seed's own figures."""

    grid_best: float
    shift: float | None  # None: fewer than three points here or at the base


@dataclass
class Figures:
    width: int
    minimum: Minimum
    lowest: float  # the lowest measured loss
    shift: float
    regret: float  # nan: the base's best lr was not bracketed, or lies outside this width's points
    grid_regret: float  # at the grid's lr that was best at the base width; inf: diverged, nan: not run
    by_seed: dict[int, OfSeed]
    spread: Spread | None
    note: str


def shift_of(width: Minimum, base: Minimum) -> float:
    """In octaves; +-inf where one of the two is not bracketed, nan where that says nothing of the sign."""
    x, x_base = width.bracketed_x0(), base.bracketed_x0()
    return x - x_base  # inf - inf is nan


def regret_of(width: Minimum, base: Minimum, lrs: Iterable[float]) -> float:
    x = base.bracketed_x0()
    if not (math.isfinite(x) and width.bracketed and min(lrs) <= 2**x <= max(lrs)):
        return math.nan
    return width.loss(x) - width.c


def drawn(curve: Curve, sigma: Callable[[float], float], rng: random.Random, mean: Losses) -> Losses:
    """The curve's means, with every run's loss drawn around its point's."""
    lowest = min(mean.values())

    def one(lr: float) -> float:
        return mean[lr] + rng.gauss(0, 1) * sigma(mean[lr] - lowest)

    seeds = [set(losses) for losses in curve.by_seed.values()]
    if all(lrs == seeds[0] for lrs in seeds):
        return {lr: y + (one(lr) - y) / math.sqrt(len(seeds)) for lr, y in mean.items()}
    again = {
        seed: {lr: one(lr) if lr in mean else y for lr, y in losses.items()} for seed, losses in curve.by_seed.items()
    }
    return Curve(again, curve.bad_lrs).mean()


def bootstrap(panel: dict[int, Curve], base: int, noise: Noise, draws: int) -> dict[int, Spread]:
    """Width -> intervals; parametric, see the head of this file. The same numbers every time."""
    rng = random.Random(1)
    means = {width: curve.mean() for width, curve in panel.items()}
    measured_best = min(means[base], key=means[base].__getitem__)
    best: dict[int, list[float]] = {width: [] for width in panel}
    shifts: dict[int, list[float]] = {width: [] for width in panel}
    regrets: dict[int, list[float]] = {width: [] for width in panel}
    others = dict.fromkeys(panel, 0)
    for _ in range(draws):
        sigma = noise.draw(rng)
        losses = {width: drawn(curve, sigma, rng, means[width]) for width, curve in panel.items()}
        minima = {width: find_minimum(losses[width], panel[width].bad_lrs) for width in panel}
        base_best = min(losses[base], key=losses[base].__getitem__)
        for width in panel:
            best[width].append(minima[width].bracketed_x0())
            shifts[width].append(shift_of(minima[width], minima[base]))
            regrets[width].append(regret_of(minima[width], minima[base], losses[width]))
            here = min(losses[width], key=losses[width].__getitem__)
            others[width] += here != (measured_best if width == base else base_best)
    return {
        width: Spread(
            interval(best[width]),
            interval(shifts[width]),
            quantile(sorted(math.inf if math.isnan(x) else x for x in regrets[width]), 0.95),
            quantile(sorted(0.0 if math.isnan(x) else x for x in regrets[width]), 0.05),
            sum(not x <= WANTED_REGRET for x in regrets[width]) / draws,
            others[width] / draws,
        )
        for width in panel
    }


def seeds_of(panel: dict[int, Curve], width: int, base: int) -> dict[int, OfSeed]:
    """Each seed's own grid best and shift; of a seed with one learning rate nothing."""
    complete = {seed: losses for seed, losses in complete_seeds(panel, {base, width}).items()}
    found = {}
    for seed, losses in sorted(panel[width].by_seed.items()):
        trained = {lr: y for lr, y in losses.items() if lr not in panel[width].bad_lrs}
        if len(trained) < 2:
            continue
        shift = None
        if seed in complete and width != base:
            of_width, of_base = (find_minimum(complete[seed][w], panel[w].bad_lrs) for w in (width, base))
            shift = shift_of(of_width, of_base)
        found[seed] = OfSeed(min(trained, key=trained.__getitem__), shift)
    return found


def evaluate(
    panel: dict[int, Curve], base: int, noise: Noise | None = None, draws: int = 2000
) -> list[Figures]:
    means = panel[base].mean()
    reference = find_minimum(means, panel[base].bad_lrs)
    reference_lr = min(means, key=means.__getitem__)
    spreads = bootstrap(panel, base, noise, draws) if noise else {}
    figures = []
    for width, curve in sorted(panel.items()):
        losses = curve.mean()
        minimum = find_minimum(losses, curve.bad_lrs)
        notes = [minimum.note] if minimum.note else []
        if minimum.bracketed and reference.bracketed and not min(losses) <= 2**reference.x0 <= max(losses):
            notes.append("the base's best lr lies outside the measured points: no regret")
        grid_regret = losses.get(reference_lr, math.nan) - min(losses.values())
        if reference_lr in curve.bad_lrs:
            grid_regret = math.inf
        figures.append(
            Figures(
                width,
                minimum,
                min(losses.values()),
                shift_of(minimum, reference),
                regret_of(minimum, reference, losses),
                grid_regret,
                seeds_of(panel, width, base),
                spreads.get(width),
                "; ".join(notes),
            )
        )
    return figures


def complete_seeds(panel: dict[int, Curve], widths: set[int]) -> dict[int, dict[int, Losses]]:
    """For each seed with three points or more at these widths: width -> its losses."""
    seeds = set.intersection(*(set(panel[w].by_seed) for w in widths))
    kept = {}
    for seed in sorted(seeds):
        of_seed = {
            w: {lr: y for lr, y in panel[w].by_seed[seed].items() if lr not in panel[w].bad_lrs}
            for w in widths
        }
        if all(len(losses) >= 3 for losses in of_seed.values()):
            kept[seed] = of_seed
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


HEAD = ["run", "width", "best lr", "best loss", "shift", "regret", "P(regret > 0.01)", "regret on the grid",
        "P(other lr)", "each seed: grid's best, shift", "within", "note"]  # fmt: skip


def within(f: Figures, base: Minimum) -> str:
    if not (f.minimum.bracketed and base.bracketed):
        return "?"
    s = f.spread
    if s is None:
        return "?" if math.isnan(f.regret) else "yes" if abs(f.shift) <= WANTED_SHIFT and f.regret <= WANTED_REGRET else "no"
    if -WANTED_SHIFT <= s.shift.low and s.shift.high <= WANTED_SHIFT and s.regret_bound <= WANTED_REGRET:
        return "yes"
    if s.shift.low > WANTED_SHIFT or s.shift.high < -WANTED_SHIFT or s.regret_low > WANTED_REGRET:
        return "no"
    return "?"


def cells(f: Figures, name: str, base: Minimum, is_base: bool) -> list[str]:
    m, s = f.minimum, f.spread
    best = f"{2**m.x0:.3g}" if m.bracketed else "not bracketed"
    shift = f"{f.shift:+.2f}" if math.isfinite(f.shift) else "not bracketed"
    if math.isfinite(f.regret):
        regret = f"{f.regret:.4f}"
    else:
        regret = "not measured" if m.bracketed and base.bracketed else "not bracketed"
    if s:
        best += " " + s.best.text(lambda x: f"{2**x:.3g}")
        shift += " " + s.shift.text(lambda x: f"{x:+.2f}")
        regret += " (no bound)" if math.isinf(s.regret_bound) else f" (< {s.regret_bound:.4f})"
    grid = {math.inf: "diverged"}.get(f.grid_regret, "-" if math.isnan(f.grid_regret) else f"{f.grid_regret:.4f}")
    seeds = []
    for seed, own in f.by_seed.items():
        seeds.append(f"{seed}: {own.grid_best:g}")
        if own.shift is not None:
            seeds[-1] += f", {own.shift:+.2f}" if math.isfinite(own.shift) else ", not bracketed"
    return [
        name,
        str(f.width),
        best,
        f"{m.c if m.bracketed else f.lowest:.4f}",
        "base" if is_base else shift,
        "base" if is_base else regret,
        "base" if is_base else f"{s.exceeds:.2f}" if s else "-",
        "base" if is_base else grid,
        f"{s.other_lr:.2f}" if s else "-",
        "; ".join(seeds),
        "base" if is_base else within(f, base),
        f.note,
    ]


def table(figures: dict[tuple[str, str, str], list[Figures]], base: int) -> str:
    """The figures of merit in Markdown."""
    lines = [HEAD, [":--"] + ["--:"] * 8 + [":--", ":-:", ":--"]]
    for panel, rows in figures.items():
        reference = next(f.minimum for f in rows if f.width == base)
        lines += [cells(f, panel_title(panel), reference, f.width == base) for f in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
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
    if f.minimum.bracketed:
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
    p.add_argument("--draws", type=int, default=2000, metavar="N", help="of the bootstrap [2000]")
    p.add_argument(
        "--noise", type=float, metavar="X", help="standard deviation of one run's loss, where no point has two seeds"
    )
    p.add_argument(
        "--paired", action="store_true",
        help="take out of the noise what a seed changes at all learning rates of a width alike",
    )  # fmt: skip
    a = p.parse_args(argv)
    if a.draws < 100:
        raise Error(f"--draws {a.draws}: expected 100 or more")
    if a.noise is not None and not a.noise > 0:
        raise Error(f"--noise {a.noise:g}: expected a positive number")
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
    figures, said = {}, {}
    for name, panel in panels.items():
        kind = (name[0], name[2])
        noise = estimate_noise([p for other, p in panels.items() if (other[0], other[2]) == kind], a.paired)
        if a.noise is not None:
            noise = Noise(a.noise, math.inf)
        figures[name] = evaluate(panel, a.base, noise, a.draws)
        title = panel_title((name[0], "", name[2]))
        said[f"{title}: {noise.text() if noise else 'no point has two seeds, so no intervals (--noise gives it)'}"] = None
    text = table(figures, a.base) + "\n" + "".join(f"{line}.\n" for line in said)
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
