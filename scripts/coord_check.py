#!/usr/bin/env python3
"""The coordinate check: do activations keep their size, and move at the same rate, at every width?

    python3 scripts/coord_check.py -o results/coord --seeds 1,2,3,4 -- -i 'books_train_*.bin'

Runs ./train_gdn -coord_check (gdn/coord_check.h says what it measures) over widths, both ways of growing them
(6 heads whose size grows; heads of 64 whose number grows), sp beside mup, and seeds. Fits the slope of log2(rms)
against log2(d), mean squares averaged over seeds, for every activation, layer and step, and for its change since
step 0. Every run is made twice: activations are judged at the learning rate, updates, (W_t - W_0) x, at a hundredth
of it. That an update is aligned with its input (mup.h, section 2) holds while the input is the one it was made from:
at the full learning rate the first step turns the normalized o by more than its size. Exit code 1 when a slope of mup
leaves the range that train_gdn derives for it by more than --tolerance, or when a run fails. Gradients are listed and
not judged.

    python3 scripts/coord_check.py -o results/depth --depths 4,8,16,32,64 --widths 256 --seeds 1,2

takes models of one width and several depths (mup.h, section 7), -depth_alpha off beside 1 and 1/2, which are judged; slopes are
against log2(L), of the layers that end a quarter of the depth each.

Writes a figure of each optimizer and family, sp beside mup (OUT_adamw_6_heads.png and .svg, OUT_sgd_heads_of_64...),
OUT.csv (sizes, a row per width, activation, layer and step), OUT_slopes.csv, and the runs' own CSVs to OUT_runs. These are used again when the same options ask for
them: kill it at any time, and the same command goes on. Options after -- go to ./train_gdn. Without: L = 4, one
sequence of 32 tokens (the ranges are derived for widths above the number of tokens), no decay, no clipping, a
quarter of AdamW's and a tenth of SGD's default learning rate, constant from the first step on. In their values
{width} stands for the width: -load runs/w{width} measures trained models.
"""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common import (
    Error,
    Parser,
    Pool,
    add_pool_options,
    choose,
    find_binary,
    import_package,
    import_pyplot,
    last_line,
    number,
    parse_extra,
    read_csv,
    run_main,
    save_figure,
    split,
    write_csv,
)

PARAMS, OPTIMIZERS, GROWTHS = ("sp", "mup0", "mup"), ("adamw", "sgd"), ("head_dim", "heads")
ALPHAS = ("off", "1/2", "1")  # of -depth_alpha, in the place of PARAMS where the depth grows
NAMES = {"adamw": "AdamW", "sgd": "SGD", "sp": "SP", "mup0": "muP0", "mup": "muP", "off": "depth off", "1/2": "alpha 1/2", "1": "alpha 1"}
SETTINGS = {"L": "4", "T": "32", "B": "1", "wd": "0", "clip": "0"}
SMALL_STEP = 0.01  # learning rate of the pass for updates, as a multiple of the other one's
LR = {"adamw": "1e-3", "sgd": "0.03"}
OF_THE_GRID = {"w", "param", "opt", "seed", "o", "heads", "head_dim", "coord_check", "resume", "gen", "h"}
NO_EFFECT = {"d"}  # on what is measured, as far as it matters here
RUN_COLUMNS = [
    "step", "layer", "activation", "rms", "rms_change_since_step_0",
    "rms_slope_min", "rms_slope_max", "change_slope_min", "change_slope_max",
    "rms_depth_slope_min", "rms_depth_slope_max", "change_depth_slope_min", "change_depth_slope_max",
]  # fmt: skip
SIZES = ["optimizer", "growth", "param", "width", "step", "layer", "activation", "seeds", "rms", "change"]
SLOPES = ["optimizer", "growth", "param", "activation", "what", "layer", "step"]
SLOPES += ["slope", "standard_error", "wanted_min", "wanted_max", "judged", "outside"]
GREY, MARKERS = "#555555", "o^Dvs"  # contrast with white 7.5:1
DRAWN = ("embedding", "q'", "k'", "v'", "alpha", "beta", "S", "o", "mixer", "mlp", "block", "logits")


@dataclass(frozen=True)
class Run:
    optimizer: str
    growth: str
    param: str  # where the depth grows: alpha
    width: int  # where the depth grows: L
    seed: int
    linear: bool  # the pass with small steps, for updates

    def name(self) -> str:
        name = f"{self.optimizer}_{self.growth}_{self.param.replace('/', '_')}_w{self.width}_s{self.seed}"
        return name + "_linear" * self.linear


@dataclass(frozen=True)
class Size:
    """What a slope is fitted to: the rms of an activation, gradient or update, or its change since step 0."""

    optimizer: str
    growth: str
    param: str
    activation: str
    what: str  # rms or change
    layer: str  # empty: of no layer
    step: int


@dataclass
class Slope:
    value: float
    error: float  # standard error over seeds (jackknife); NaN with one seed
    low: float  # wanted; NaN: not derived
    high: float
    judged: bool
    outside: bool


# Size -> width -> seed -> mean square
MeanSquares = dict[Size, dict[int, dict[int, float]]]


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser(
        prog="coord_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("-o", "--out", type=Path, default=Path("coord"), help="start of the outputs' names [coord]")
    p.add_argument("--widths", default="256,512,1024,2048", help="[256,512,1024,2048]")
    p.add_argument("--depths", help="in the place of widths, of which there is one: layers, multiples of 4")
    p.add_argument("--base_depth", type=int, default=8, help="L0 with --depths [8]")
    p.add_argument("--alphas", default="off,1/2,1", help="with --depths, of -depth_alpha [off,1/2,1]")
    p.add_argument("--growth", default="head_dim,heads", help="what grows with the width [head_dim,heads]")
    p.add_argument("--heads", type=int, default=6, help="heads where their size grows [6]")
    p.add_argument("--head_dim", type=int, default=64, help="keys in a head where their number grows [64]")
    p.add_argument("--params", default="sp,mup", help="[sp,mup]")
    p.add_argument("--optimizers", default="adamw", help="adamw, sgd or both [adamw]")
    p.add_argument("--seeds", default="1,2,3,4", help="of initial values and data [1,2,3,4]")
    p.add_argument("--tolerance", type=float, default=0.1, help="[0.1]")
    p.add_argument("--table", type=Path, metavar="FILE", help="write the table as Markdown")
    add_pool_options(p)
    cut = argv.index("--") if "--" in argv else len(argv)
    a = p.parse_args(argv[:cut])
    a.extra = parse_extra("coord_check.py", argv[cut + 1 :], OF_THE_GRID)
    a.widths, a.seeds = split("--widths", a.widths, int), split("--seeds", a.seeds, int)
    a.params = sorted(choose("--params", a.params, PARAMS), key=PARAMS.index)
    a.optimizers = choose("--optimizers", a.optimizers, OPTIMIZERS)
    a.growth = choose("--growth", a.growth, GROWTHS)
    a.width = a.widths[0]
    if a.depths is not None:
        a.depths = split("--depths", a.depths, int)
        a.params = sorted(choose("--alphas", a.alphas, ALPHAS), key=ALPHAS.index)
        if len(a.widths) > 1:
            raise Error(f"--depths with --widths {','.join(map(str, a.widths))}: expected one width")
        if wrong := [depth for depth in a.depths if depth < 4 or depth % 4]:
            raise Error(f"--depths {wrong[0]}: expected multiples of 4")
        if "L" in a.extra:
            raise Error("-L: --depths gives the layers")
        a.widths, a.growth = a.depths, ["depth"]
        if len(a.depths) < 2:
            raise Error(f"--depths {a.depths[0]}: a slope needs two depths or more")
    if len(a.widths) < 2:
        raise Error(f"--widths {a.widths[0]}: a slope needs two widths or more")
    if not a.tolerance >= 0:
        raise Error(f"--tolerance {a.tolerance:g}: expected 0 or more")
    return a


def options(a: argparse.Namespace, run: Run) -> dict[str, str]:
    """Of train_gdn, all that say what is measured."""
    family = {"head_dim": str(a.head_dim)} if run.growth == "heads" else {"heads": str(a.heads)}
    grid = {"w": run.width, "param": run.param, "opt": run.optimizer, "seed": run.seed}
    settings = {**SETTINGS, "lr": LR[run.optimizer]}
    if run.growth == "depth":
        grid |= {"w": a.width, "w0": a.width, "param": "mup"}
        settings |= {"L": str(run.width), "L0": str(a.base_depth), "depth_alpha": run.param}
    extra = {name: value.replace("{width}", str(run.width)) for name, value in a.extra.items()}
    values = {**{k: str(v) for k, v in grid.items()}, **family, **settings, **extra}
    try:
        return {**values, "lr": f"{float(values['lr']) * SMALL_STEP:.12g}"} if run.linear else values
    except ValueError:
        raise Error(f"-lr {values['lr']}: expected a number") from None


def options_text(a: argparse.Namespace, run: Run) -> str:
    values = options(a, run)
    return " ".join(f"-{name} {values[name]}" for name in sorted(values) if name not in NO_EFFECT) + "\n"


def is_done(a: argparse.Namespace, run: Run, folder: Path) -> bool:
    said = folder / f"{run.name()}.options"
    return (folder / f"{run.name()}.csv").exists() and said.exists() and said.read_text() == options_text(a, run)


def run_all(a: argparse.Namespace, runs: list[Run], folder: Path) -> dict[Run, str]:
    """Runs what is not there yet; returns what the runs that failed said."""
    failed = {}
    waiting = [run for run in runs if not is_done(a, run, folder)]
    done, total = len(runs) - len(waiting), len(runs)
    with Pool(a.gpus, a.per_gpu) as pool:
        while waiting or pool.busy():
            for run, code, seconds in pool.finished():
                part, said = folder / f"{run.name()}.part", folder / f"{run.name()}.txt"
                done += 1
                if code:
                    failed[run] = f"killed by signal {-code}" if code < 0 else last_line(said)
                else:
                    part.replace(folder / f"{run.name()}.csv")
                    (folder / f"{run.name()}.options").write_text(options_text(a, run))
                    said.unlink()
                print(f"{done}/{total}  {run.name()}  {failed.get(run, 'ok')}  {seconds:.1f} s", flush=True)
            while waiting and pool.has_room():
                run = waiting.pop(0)
                (folder / f"{run.name()}.options").unlink(missing_ok=True)
                words = [w for name, value in options(a, run).items() for w in (f"-{name}", value)]
                command = [a.binary, "-coord_check", *words, "-o", str(folder / f"{run.name()}.part")]
                pool.start(run, command, folder / f"{run.name()}.txt")
            time.sleep(0.02)
    return failed


def read_run(path: Path, run: Run, squares: MeanSquares, wanted: dict[Size, tuple[float, float]]) -> None:
    for row in read_csv(path, RUN_COLUMNS):
        for what, column in (("rms", "rms"), ("change", "rms_change_since_step_0")):
            if row[column] == "" or (what == "change" and row["step"] == "0"):
                continue
            if row["activation"].startswith("update:") != run.linear:
                continue
            layer, slope = row["layer"], f"{what}_slope"
            if run.growth == "depth":
                slope = f"{what}_depth_slope"
                if layer and (int(layer) + 1) * 4 % run.width:
                    continue  # no layer of the other depths is as deep in the model
                layer = f"{(int(layer) + 1) * 4 // run.width}/4" if layer else ""
            size = Size(run.optimizer, run.growth, run.param, row["activation"], what, layer, int(row["step"]))
            squares.setdefault(size, {}).setdefault(run.width, {})[run.seed] = number(path, row, column) ** 2
            wanted[size] = tuple(
                number(path, row, f"{slope}_{end}") if row[f"{slope}_{end}"] else math.nan
                for end in ("min", "max")
            )


def fit(by_width: dict[int, dict[int, float]], leave_out: int | None = None) -> float:
    """The slope of log2(rms) against log2(width); NaN where fewer than two widths have a size."""
    points = []
    for width, by_seed in by_width.items():
        squares = [x for seed, x in by_seed.items() if seed != leave_out]
        if squares and sum(squares) > 0:
            points.append((math.log2(width), 0.5 * math.log2(sum(squares) / len(squares))))
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def find_slopes(a: argparse.Namespace, squares: MeanSquares, wanted: dict) -> dict[Size, Slope]:
    slopes = {}
    for size, by_width in squares.items():
        value, seeds = fit(by_width), {seed for by_seed in by_width.values() for seed in by_seed}
        without = [fit(by_width, seed) for seed in seeds] if len(seeds) > 1 else []
        mean = sum(without) / len(without) if without else math.nan
        error = math.sqrt(sum((x - mean) ** 2 for x in without) * (len(seeds) - 1) / len(seeds))
        low, high = wanted[size]
        judged = not math.isnan(low + value)
        inside = low - a.tolerance <= value <= high + a.tolerance
        slopes[size] = Slope(value, error if without else math.nan, low, high, judged, judged and not inside)
    return slopes


def write_sizes(a: argparse.Namespace, squares: MeanSquares) -> None:
    rows = []
    for size, by_width in squares.items():
        if size.what == "change":
            continue
        changes = squares.get(replace(size, what="change"), {})
        for width, by_seed in sorted(by_width.items()):
            row = {**vars(size), "width": width, "seeds": len(by_seed), "change": ""}
            row["rms"] = f"{math.sqrt(sum(by_seed.values()) / len(by_seed)):.6g}"
            if width in changes:
                row["change"] = f"{math.sqrt(sum(changes[width].values()) / len(changes[width])):.6g}"
            rows.append({column: row[column] for column in SIZES})
    write_csv(named(a.out, ".csv"), SIZES, rows)


def write_slopes(a: argparse.Namespace, slopes: dict[Size, Slope]) -> None:
    def text(x: float) -> str:
        return "" if math.isnan(x) else f"{x:.4g}"

    rows = [
        {
            **vars(size), "slope": text(s.value), "standard_error": text(s.error), "wanted_min": text(s.low),
            "wanted_max": text(s.high), "judged": int(s.judged), "outside": int(s.outside),
        }
        for size, s in slopes.items()
    ]  # fmt: skip
    write_csv(named(a.out, "_slopes.csv"), SLOPES, rows)


def named(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def family(a: argparse.Namespace, growth: str) -> str:
    if growth == "depth":
        return f"depth at width {a.width}"
    return f"{a.heads} heads" if growth == "head_dim" else f"heads of {a.head_dim}"


def span(slopes: list[Slope]) -> str:
    values = [s.value for s in slopes if not math.isnan(s.value)]
    return f"{min(values):+.2f} to {max(values):+.2f}" if values else "-"


def wanted_text(slopes: list[Slope]) -> str:
    known = [s for s in slopes if not math.isnan(s.low)]
    if not known:
        return "-"
    low, high = min(s.low for s in known) + 0.0, max(s.high for s in known) + 0.0  # + 0.0: no "-0"
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def table(a: argparse.Namespace, slopes: dict[Size, Slope]) -> str:
    """Per activation the lowest and highest slope over layers and steps, in Markdown."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, list[Slope]]]] = {}
    for size, s in slopes.items():
        group = groups.setdefault((size.optimizer, size.growth, size.param), {})
        group.setdefault(size.activation, {"rms": [], "change": []})[size.what].append(s)
    text = ""
    for (optimizer, growth, param), activations in groups.items():
        every = [s for by_what in activations.values() for part in by_what.values() for s in part]
        text += (
            f"{NAMES[optimizer]}, {NAMES[param]}, {family(a, growth)}: {sum(s.outside for s in every)} of "
            f"{sum(s.judged for s in every)} slopes outside\n\n"
        )
        lines = [["size of", "slopes", "wanted", "slopes of the change", "wanted", "outside"]]
        lines.append([":--", "--:", "--:", "--:", "--:", "--:"])
        for activation, by_what in activations.items():
            both = by_what["rms"] + by_what["change"]
            outside = f"{sum(s.outside for s in both)} of {sum(s.judged for s in both)}"
            cells = [cell for part in by_what.values() for cell in (span(part), wanted_text(part))]
            lines.append([activation, *cells, outside if any(s.judged for s in both) else "not judged"])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        for line in lines:
            text += "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |\n"
        text += "\n"
    return text


def pooled(squares: MeanSquares, size: Size, layers: list[str]) -> dict[int, float]:
    """Width -> rms over layers and seeds."""
    sums: dict[int, list[float]] = {}
    for layer in layers:
        for width, by_seed in squares.get(replace(size, layer=layer), {}).items():
            sums.setdefault(width, []).extend(by_seed.values())
    return {width: math.sqrt(sum(x) / len(x)) for width, x in sorted(sums.items()) if sum(x) > 0}


def draw(a: argparse.Namespace, squares: MeanSquares, slopes: dict[Size, Slope], optimizer: str, growth: str) -> None:
    """Two columns of activations, in each the parametrizations side by side on one scale; slopes over all layers."""
    pyplot, ticker = import_pyplot(), import_package("matplotlib.ticker")
    steps = sorted({size.step for size in squares if size.what == "change"})
    layers = sorted({size.layer for size in squares})
    colors = pyplot.get_cmap("viridis_r")([0.45 + 0.55 * i / max(1, len(steps) - 1) for i in range(len(steps))])
    drawn = [activation for activation in DRAWN if any(size.activation == activation for size in squares)]
    rows, params = -(-len(drawn) // 2), a.params
    size = (2 * (2.1 * len(params) + 0.5), 1.75 * rows + 1.0)
    figure, axes = pyplot.subplots(rows, 2 * len(params), figsize=size, squeeze=False, layout="constrained")
    for i, activation in enumerate(drawn):
        panels = axes[i % rows][i // rows * len(params) : (i // rows + 1) * len(params)]
        for axis, param in zip(panels, params):
            base = Size(optimizer, growth, param, activation, "rms", "", 0)
            initial = pooled(squares, base, layers)
            axis.plot(list(initial), list(initial.values()), color=GREY, ls="--", marker="s", ms=3, lw=1.2)
            for step, color, marker in zip(steps, colors, itertools.cycle(MARKERS)):
                change = pooled(squares, replace(base, what="change", step=step), layers)
                axis.plot(list(change), list(change.values()), color=color, marker=marker, ms=4, lw=1.4)
            sizes = [s for size, s in slopes.items() if replace(size, layer="") == base]
            changes = [s for size, s in slopes.items() if replace(size, layer="", step=0) == replace(base, what="change")]
            text = f"slopes {span(sizes)}, of changes {span(changes)}"
            axis.text(0.5, 1.03, text, transform=axis.transAxes, fontsize=5.5, ha="center", color=GREY)
            axis.set(xscale="log", yscale="log", title=f"{activation}, {NAMES[param]}\n")
            axis.set_xticks(sorted(a.widths), [str(w) for w in sorted(a.widths)])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=7))
            axis.yaxis.set_major_formatter("{x:g}")
        limits = [y for axis in panels for y in axis.get_ylim()]
        for axis in panels:
            axis.set_ylim(min(limits), max(limits))
            axis.tick_params(labelleft=axis is panels[0])
        panels[0].set_ylabel("rms")
    for axis in axes[-1]:
        axis.set_xlabel("layers" if growth == "depth" else "width")
    line = pyplot.Line2D
    handles = [line([], [], color=GREY, ls="--", marker="s", ms=3, label="size at step 0")]
    for step, color, marker in zip(steps, colors, itertools.cycle(MARKERS)):
        handles.append(line([], [], color=color, marker=marker, ms=4, label=f"change after step {step}"))
    figure.suptitle(f"Coordinate check, {NAMES[optimizer]}, {family(a, growth)}, all layers")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save_figure(figure, named(a.out, f"_{optimizer}_{family(a, growth).replace(' ', '_')}"))
    pyplot.close(figure)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    a = parse_arguments(argv)
    a.binary = find_binary(a.binary)
    import_package("matplotlib")  # said before the runs
    runs = [
        Run(optimizer, growth, param, width, seed, linear)
        for seed in a.seeds  # a seed is complete before the next one starts
        for width in sorted(a.widths, reverse=True)
        for optimizer in a.optimizers
        for growth in a.growth
        for param in a.params
        for linear in (False, True)
    ]
    folder = named(a.out, "_runs")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        failed = run_all(a, runs, folder)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return 130
    squares: MeanSquares = {}
    wanted: dict[Size, tuple[float, float]] = {}
    order = {name: i for i, name in enumerate((*a.optimizers, *a.growth, *a.params))}
    for run in sorted(runs, key=lambda r: (order[r.optimizer], order[r.growth], order[r.param], r.width)):
        if run not in failed:
            read_run(folder / f"{run.name()}.csv", run, squares, wanted)
    if not squares:
        raise Error(f"every run failed: {next(iter(failed.values()))}")
    slopes = find_slopes(a, squares, wanted)
    write_sizes(a, squares)
    write_slopes(a, slopes)
    text = table(a, slopes)
    print("\n" + text, end="")
    if a.table:
        a.table.parent.mkdir(parents=True, exist_ok=True)
        a.table.write_text(text)
    for optimizer in a.optimizers:
        for growth in a.growth:
            draw(a, squares, slopes, optimizer, growth)
    outside = {size: s for size, s in slopes.items() if s.outside and size.param in ("mup", "1/2", "1")}
    for size, s in outside.items():
        where = f"layer {size.layer}, step {size.step}" if size.layer else f"step {size.step}"
        error = "" if math.isnan(s.error) else f" +- {s.error:.2f}"
        print(
            f"outside: {size.optimizer} {size.param} {family(a, size.growth)}: {size.activation}"
            f"{' (change)' if size.what == 'change' else ''}, {where}: slope {s.value:+.2f}{error}, "
            f"wanted {wanted_text([s])}"
        )
    problems = [f"{run.name()} failed: {said}" for run, said in failed.items()]
    if outside:
        problems.append(f"{len(outside)} slopes of {'mup' if a.depths is None else 'alpha 1/2 and 1'} are more than {a.tolerance:g} outside their ranges")
    if problems:
        raise Error("; ".join(problems))
    return 0


if __name__ == "__main__":
    run_main(main)
