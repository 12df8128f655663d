#!/usr/bin/env python3
"""Writes one CSV of a folder's sweeps over depths, for scripts/plot_transfer.py: L in the column width, alpha in param.

    dev/results/depth_transfer/depth_table.py FOLDER OUT.csv [BASE=8]

FOLDER has ALPHA_L.csv or ALPHA_L~MORE.csv (off_16.csv, one_4.csv, half_32~8e-3.csv), as a run.sh makes them; base.csv or
base~MORE.csv hold the runs at L = BASE, where all alphas are the same network, and their rows are written for each.
"""

import csv
import sys
from pathlib import Path

NAMES = {"off": "alpha off", "half": "alpha 1/2", "one": "alpha 1"}


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    base = int(sys.argv[3]) if len(sys.argv) > 3 else 8
    rows = []
    for path in sorted(folder.glob("*.csv")):
        name, _, depth = path.stem.split("~")[0].partition("_")
        if name not in NAMES and name != "base":
            continue
        with path.open() as file:
            read = list(csv.DictReader(file))
        for alpha in NAMES if name == "base" else [name]:
            # One text in options for all, or plot_transfer.py would take each depth for an experiment of its own.
            rows += [dict(row, param=NAMES[alpha], width=depth or base, options="", same_run_as="") for row in read]
    if not rows:
        sys.exit(f"depth_table.py: {folder}: no sweeps over depths")
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
