#!/usr/bin/env python3
"""Times every kernel and the training step, and compares them with a recorded baseline of the same card.

    make bench                                      the times, beside the baseline where there is one
    python3 dev/bench.py --record                   the same, and writes them as this card's baseline
    python3 dev/bench.py --from LOG [LOG ...]       of output that was kept, in place of running anything

Runs dev/bench_layers, dev/bench_delta_rule and dev/bench_step ROUNDS times in turn; a time is the least of its rounds, in
milliseconds (a clock that falls makes a round slower, nothing makes one faster). A baseline is a JSON file of the card's name in
the folder dev/results/baseline, with date, commit and driver. Printed is what moved by more than --percent; exit code 1
where something is slower by more than that, 2 where a benchmark failed. Two runs of one commit differ by up to 2.5% where the clock
falls under the load, and more in kernels under 0.02 ms: those are compared with --percent and 0.002 ms.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASELINES = ROOT / "dev" / "results" / "baseline"
COMMANDS = [["./dev/bench_layers"], ["./dev/bench_delta_rule"], ["./dev/bench_step"]]
NOISE_MS = 0.002

Times = dict[str, float]  # what is timed -> milliseconds

STEP = re.compile(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+\d+\s+([\d.]+)\s+\d+\s+[\d.]+%")
SHAPE = re.compile(r"B=\d+ T=\d+ .*?dv=\d+")
KERNEL = re.compile(r"  (\s*\S.*?)\s+([\d.]+) ms ")
LAYER = re.compile(r"(\S.*?)\s{2,}([\d.]+)\s+(?:[\d.]+\s+\d+\s+[\d.]+%|\d+ TFLOP/s)")
LAYERS_HEAD = re.compile(r".*\b(d = \d+), M = ")


def parse(text: str) -> Times:
    """The times of what the three benchmarks print; of a name that comes twice the least."""
    times: Times = {}
    shape = outer = width = ""
    for line in text.splitlines():
        if head := LAYERS_HEAD.match(line):
            width, shape = head[1], ""
        elif found := SHAPE.match(line):
            shape, width = found[0], ""
        elif step := STEP.match(line):
            add(times, f"step, d = {step[1]}, {step[2]} layers, {step[3]} sequences", float(step[4]))
        elif shape and (kernel := KERNEL.match(line)):
            name = kernel[1].strip()
            if kernel[1].startswith(" "):
                name = f"{outer}, {name}"
            else:
                outer = name
            add(times, f"delta rule, {shape}: {name}", float(kernel[2]))
        elif width and (layer := LAYER.match(line)):
            add(times, f"layer, {width}: {layer[1]}", float(layer[2]))
    return times


def add(times: Times, name: str, ms: float) -> None:
    times[name] = min(ms, times.get(name, ms))


def moved(now: Times, before: Times, percent: float) -> list[tuple[str, float, float]]:
    """(name, before, now) of what differs by more than percent and by more than NOISE_MS, the largest ratio first."""
    pairs = [(name, before[name], ms) for name, ms in now.items() if name in before]
    pairs = [p for p in pairs if abs(p[2] - p[1]) > max(p[1] * percent / 100, NOISE_MS)]
    return sorted(pairs, key=lambda p: p[1] / p[2])


def report(now: Times, baseline: dict, percent: float) -> int:
    """Prints the comparison; 1 where something is slower."""
    before: Times = baseline["ms"]
    print(f"baseline: {baseline['date']}, {baseline['commit']}, driver {baseline['driver']}; {len(now)} times")
    changes = moved(now, before, percent)
    for name, old, new in changes:
        print(f"{'SLOWER' if new > old else 'faster'} {100 * (new / old - 1):+6.1f}%  {old:.4f} -> {new:.4f} ms  {name}")
    for name in sorted(before.keys() - now.keys()):
        print(f"not timed now: {name}")
    for name in sorted(now.keys() - before.keys()):
        print(f"not in the baseline: {now[name]:.4f} ms  {name}")
    slower = sum(new > old for _, old, new in changes)
    print(f"{slower} slower, {len(changes) - slower} faster by more than {percent:g}% (and {NOISE_MS:g} ms)")
    return 1 if slower else 0


def measure(rounds: int) -> Times:
    """Runs the benchmarks, printing the first round's output."""
    text = ""
    for i in range(rounds):
        for command in COMMANDS:
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
            if i == 0 or done.returncode:
                print(done.stdout, flush=True)
            if done.returncode:
                print(f"bench.py: {command[0]}: exit code {done.returncode}", file=sys.stderr)
                sys.exit(2)
            text += done.stdout
    return parse(text)


def output(*command: str) -> str:
    """What a command prints; "unknown" where it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or "unknown"
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--record", action="store_true", help="write this card's baseline")
    p.add_argument("--rounds", type=int, default=3, help="[3]")
    p.add_argument("--percent", type=float, default=3, help="[3]")
    p.add_argument("--from", nargs="+", type=Path, metavar="LOG", dest="logs", help="what the benchmarks printed")
    p.add_argument("--card", help="with --from: the GPU's name")
    p.add_argument("--commit", default=output("git", "describe", "--always", "--dirty"), help="[of the checkout]")
    a = p.parse_args()
    card, driver = a.card or "unknown", "unknown"
    if not a.card:
        found = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()[0]
        card, _, driver = (part.strip() for part in found.partition(","))
    now = parse("".join(log.read_text() for log in a.logs)) if a.logs else measure(a.rounds)
    if not now:
        print("bench.py: no time was found", file=sys.stderr)
        return 2
    path = BASELINES / (re.sub(r"[^A-Za-z0-9]+", "_", card) + ".json")
    code = 0
    if path.exists():
        code = report(now, json.loads(path.read_text()), a.percent)
    else:
        print(f"no baseline of {card}: {len(now)} times, nothing to compare with; --record keeps them")
    if a.record:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"card": card, "driver": driver, "date": str(date.today()), "commit": a.commit, "ms": now}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"recorded as {path.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
