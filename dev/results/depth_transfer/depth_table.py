#!/usr/bin/env python3
"""One CSV of a folder's sweeps over depths, and a table of losses.

    dev/results/depth_transfer/depth_table.py FOLDER OUT.csv OUT.md

FOLDER has ALPHA_L.csv or ALPHA_L~MORE.csv (off_16.csv, one_4.csv, half_32~8e-3.csv), as a run.sh makes them of sweep.py; base.csv
or base~MORE.csv hold the runs at L0 = 8, where all alphas are the same network. OUT.csv has the columns alpha, L, lr, seed, loss.
OUT.md has a row for each alpha and L: the mean loss over the seeds, the number of seeds where it is not the first row's, and the
grid's best learning rate; "<" where that is the smallest of the grid, ">" the largest: not bracketed.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

ALPHAS = {"off": "off", "half": "1/2", "one": "1"}


def main() -> None:
    folder, out, table = (Path(name) for name in sys.argv[1:4])
    losses = defaultdict(lambda: defaultdict(dict))  # (alpha, L) -> lr -> seed -> loss
    for path in sorted(folder.glob("*.csv")):
        name, _, depth = path.stem.split("~")[0].partition("_")
        if name not in ALPHAS and name != "base":
            continue
        with path.open() as file:
            for row in csv.DictReader(file):
                for alpha in ALPHAS if name == "base" else [name]:
                    if row["status"] == "ok":
                        losses[ALPHAS[alpha], int(depth or 8)][float(row["lr"])][int(row["seed"])] = float(row["val_loss"])
    if not losses:
        sys.exit(f"depth_table.py: {folder}: no sweeps over depths")
    lrs = sorted({lr for by_lr in losses.values() for lr in by_lr})
    with out.open("w") as file:
        file.write("alpha,L,lr,seed,loss\n")
        for (alpha, depth), by_lr in sorted(losses.items()):
            for lr in sorted(by_lr):
                for seed, loss in sorted(by_lr[lr].items()):
                    file.write(f"{alpha},{depth},{lr:g},{seed},{loss:.6f}\n")
    seeds = max(len(by_seed) for by_lr in losses.values() for by_seed in by_lr.values())
    lines = ["| alpha | L | " + " | ".join(f"{lr:g}" for lr in lrs) + " | best |"]
    lines.append("|" + "---|" * (len(lrs) + 3))
    for alpha in ALPHAS.values():
        for depth in sorted(depth for a, depth in losses if a == alpha):
            by_lr = losses[alpha, depth]
            mean = {lr: sum(by_seed.values()) / len(by_seed) for lr, by_seed in by_lr.items()}
            best = min(mean, key=mean.get)
            edge = "< " if best == min(mean) else "> " if best == max(mean) else ""
            cells = [f"{mean[lr]:.3f}" + (f" ({len(by_lr[lr])})" if len(by_lr[lr]) < seeds else "") if lr in mean else "" for lr in lrs]
            lines.append(f"| {alpha} | {depth} | " + " | ".join(cells) + f" | {edge}{best:g}, {mean[best]:.3f} |")
    table.write_text("\n".join(lines) + "\n")
    print(table.read_text(), end="")


if __name__ == "__main__":
    main()
