#!/usr/bin/env python3
"""Draws where the time of one training step goes on the GPU, and prints it by kind of work.

    dev/bench_step -d 1024 -trace step.json
    python3 scripts/plot_step.py step.json --out step

Above the whole step, below the forward and the backward of one layer. Colours are kinds of work: products of the
layers, the gated delta rule, what only moves bytes (norms, convolution, gates, embedding), the classifier, the
optimizer. Bars are kernels or, where the trace was taken without CUPTI, the innermost NVTX ranges.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from common import Error, Parser, import_pyplot, run_main, save_figure

KINDS = {
    "matrix products": "#7fa8d1",
    "gated delta rule": "#e08a94",
    "norms, convolution, gates, embedding": "#e8c468",
    "classifier": "#86bf9f",
    "optimizer": "#b095cb",
    "copies and zeros": "#a8a8a8",
}
WRAPPERS = ("training step", "micro-batch", "update")  # ranges that hold phases
ABOUT = {"device": str, "source": str, "width": int, "layers": int, "batch": int, "length": int, "graph_ms": float}
INCHES, CHARACTER, LINE = 12.0, 0.058, 0.12  # width of a panel, and of a letter and a line of its labels
LOW, TALL = 0.4, 1.5  # inches of a row without and with names turned upright
Row = tuple[str, list, float]  # what its bars are, these, its height


@dataclass
class Bar:
    """A range or a kernel; times in ms from the step's begin."""

    name: str
    path: tuple[str, ...]  # the ranges around it and itself
    layer: int | None
    begin: float
    length: float

    @property
    def end(self) -> float:
        return self.begin + self.length

    def kind(self) -> str:
        if "optimizer" in self.path:
            return "optimizer"
        if "classifier" in self.path:
            return "classifier"
        if any(name.startswith("linear_") for name in self.path):
            return "matrix products"
        if any(name.startswith("gated delta rule") for name in self.path):
            return "gated delta rule"
        moves_bytes = ("embedding", "norm", "conv", "swiglu")
        if any(word in name for name in self.path for word in moves_bytes):
            return "norms, convolution, gates, embedding"
        return "copies and zeros"


@dataclass
class Step:
    about: dict
    length: float  # ms
    ranges: list[Bar]  # each before those inside it
    kernels: list[Bar]

    def phases(self) -> list[Bar]:
        return [r for r in self.ranges if r.path[-1] not in WRAPPERS and r.path[-2:-1] and r.path[-2] in WRAPPERS]

    def layer_parts(self) -> list[Bar]:
        """The ranges that carry a layer's number: its mixer and its MLP, in each phase."""
        return [r for r in self.ranges if r.layer is not None and r.name == f"{r.path[-1]} {r.layer}"]

    def innermost(self) -> list[Bar]:
        """The ranges that hold no other."""
        outer = {id(a) for a, b in zip(self.ranges, self.ranges[1:]) if b.path[: len(b.path) - 1] == a.path}
        return [r for r in self.ranges if id(r) not in outer]

    def work(self) -> list[Bar]:
        return self.kernels or self.innermost()

    def by_kind(self) -> dict[str, float]:
        """Milliseconds of each kind of work, and of what is left of the step."""
        sums = {kind: math.fsum(b.length for b in self.work() if b.kind() == kind) for kind in KINDS}
        rest = "between kernels" if self.kernels else "outside of these"
        return {**sums, rest: max(0.0, self.length - math.fsum(sums.values()))}


def read_trace(path: Path) -> Step:
    try:
        trace = json.loads(path.read_text())
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except IsADirectoryError:
        raise Error(f"{path}: is a folder, expected a trace of dev/bench_step -trace") from None
    except ValueError:  # of JSON or of UTF-8
        raise Error(f"{path}: not JSON, expected a trace of dev/bench_step -trace") from None
    about = trace.get("otherData") if isinstance(trace, dict) else None
    if not isinstance(about, dict) or not isinstance(trace.get("traceEvents"), list):
        raise Error(f"{path}: has no otherData or no traceEvents, expected a trace of dev/bench_step -trace")
    for key, kind in ABOUT.items():
        if not isinstance(about.get(key), (int, float) if kind is float else kind):
            raise Error(f"{path}: otherData.{key} is {about.get(key)!r}, expected {kind.__name__}")
    bars: dict[str, list[Bar]] = {"range": [], "kernel": []}
    for i, event in enumerate(trace["traceEvents"]):
        try:
            if event["ph"] != "X":
                continue
            args = event["args"]
            bars[event["cat"]].append(
                Bar(
                    event["name"],
                    tuple(args["path"].split(" / ")),
                    args.get("layer"),
                    event["ts"] / 1000,
                    event["dur"] / 1000,
                )
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise Error(f"{path}: event {i} is none of dev/bench_step -trace ({type(e).__name__}: {e})") from None
    steps = [r for r in bars["range"] if r.path == ("training step",)]
    if len(steps) != 1 or not steps[0].length > 0:
        raise Error(f"{path}: has {len(steps)} ranges 'training step', expected one that takes time")
    for bar in bars["range"] + bars["kernel"]:
        if bar is not steps[0]:
            bar.begin -= steps[0].begin
    steps[0].begin = 0
    return Step(about, steps[0].length, bars["range"], bars["kernel"])


def draw_row(axis, top: float, height: float, bars: list[Bar], colors: list[str], labels: list[str], scale: float) -> None:
    """Bars and, where they fit in along or upright, their labels. scale: inches a ms; top and height in inches."""
    axis.broken_barh(
        [(b.begin, b.length) for b in bars], (top - height, 0.94 * height), facecolors=colors, edgecolors="white",
        linewidth=0.4 if len(bars) < 100 else 0,
    )  # fmt: skip
    for bar, label in zip(bars, labels):
        room, wanted = bar.length * scale, len(label) * CHARACTER
        upright = wanted > room
        if upright and (room < LINE or height < TALL):
            continue
        if upright and wanted > height:
            label = label[: int(height / CHARACTER) - 1] + "…"
        axis.text(
            bar.begin + bar.length / 2, top - 0.53 * height, label, ha="center", va="center", fontsize=7,
            rotation=90 if upright else 0,
        )  # fmt: skip


def draw_panel(axis, title: str, begin: float, end: float, rows: list[Row]) -> None:
    top, middles = 0.0, []
    for name, bars, height in rows:
        bars = [b for b in bars if begin < b.begin + b.length / 2 < end]
        labels, greys = [b.name for b in bars], ["#dddddd", "#c4c4c4"]
        if name == "phases":
            colors = [greys[i % 2] for i in range(len(bars))]
        elif name == "layers":
            colors = [greys["mixer" in b.path[-1]] for b in bars]
            labels = labels if len(bars) < 4 else [str(b.layer) for b in bars]
        else:
            colors = [KINDS[b.kind()] for b in bars]
            labels = labels if height == TALL else [""] * len(bars)
        draw_row(axis, top, height, bars, colors, labels, INCHES / (end - begin))
        middles.append(top - 0.53 * height)
        top -= height
    axis.set(xlim=(begin, end), ylim=(top, 0), xlabel="ms")
    axis.set_title(title, loc="left")
    axis.set_yticks(middles, [name for name, *_ in rows])
    axis.tick_params(axis="y", length=0)
    axis.grid(False)


def draw(step: Step, layer: int, prefix: Path) -> None:
    pyplot = import_pyplot()
    about, layers = step.about, ("layers", step.layer_parts(), LOW)
    rows = [("phases", step.phases(), LOW), layers, ("kernels" if step.kernels else "functions", step.work(), LOW)]
    panels = [("the whole step (layers: mixers dark, MLPs light)", 0.0, step.length, rows)]
    rows = [layers, ("functions", step.innermost(), TALL)] + ([("kernels", step.kernels, TALL)] if step.kernels else [])
    for phase in step.phases():
        parts = [r for r in step.layer_parts() if r.layer == layer and r.path[: len(phase.path)] == phase.path]
        if parts:
            begin, end = min(r.begin for r in parts), max(r.end for r in parts)
            panels.append((f"layer {layer}, {phase.name}: {end - begin:.2f} ms", begin, end, rows))
    heights = [sum(height for *_, height in rows) for *_, rows in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(INCHES + 1, sum(heights) + 0.75 * len(panels) + 1.3), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels):
        draw_panel(axis, *panel)
    figure.suptitle(
        f"One training step: {step.length:.2f} ms launch by launch, {about['graph_ms']:.2f} ms as CUDA graphs\n"
        f"{about['device']}, d = {about['width']}, L = {about['layers']}, {about['batch']} x {about['length']} tokens"
        f" (times by {about['source']})"
    )
    handles = []
    for kind, ms in step.by_kind().items():
        label = f"{kind}: {ms:.2f} ms, {ms / step.length:.1%}"
        handles.append(pyplot.Rectangle((0, 0), 1, 1, color=KINDS.get(kind, "#ffffff"), label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save_figure(figure, prefix)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    p = Parser(prog="plot_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trace", type=Path, help="JSON of dev/bench_step -trace")
    p.add_argument("-o", "--out", type=Path, default=Path("step"), help="writes OUT.png and OUT.svg [step]")
    p.add_argument("--layer", type=int, metavar="N", help="the layer to draw large [the middle one]")
    a = p.parse_args(argv)
    step = read_trace(a.trace)
    layers = sorted({r.layer for r in step.layer_parts()})
    if not layers:
        raise Error(f"{a.trace}: has no ranges of layers")
    layer = layers[len(layers) // 2] if a.layer is None else a.layer
    if layer not in layers:
        raise Error(f"--layer {layer}: expected {layers[0]} to {layers[-1]}")
    print(f"{'ms':>9} {'%':>5}  of {step.length:.2f} ms")
    for kind, ms in step.by_kind().items():
        print(f"{ms:9.3f} {100 * ms / step.length:5.1f}  {kind}")
    draw(step, layer, a.out)
    return 0


if __name__ == "__main__":
    run_main(main)
