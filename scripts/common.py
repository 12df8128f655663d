"""What the scripts share: one-line errors, reading CSV files, drawing."""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable, Sequence


class Error(Exception):
    """One line for the user; the script ends with exit code 1."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise Error(f"{message} (-h lists the options)")


def run_main(main: Callable[[list[str]], int]) -> None:
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # the reader of our output left, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Error, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has at least these columns. A last line that a kill cut short is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise Error(f"{path}: no such file") from None
    except IsADirectoryError:
        raise Error(f"{path}: is a folder, expected a CSV file") from None
    except UnicodeDecodeError:
        raise Error(f"{path}: not a text file, expected CSV") from None
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
    reader = csv.DictReader(lines)
    missing = [c for c in columns if c not in (reader.fieldnames or [])]
    if missing:
        raise Error(f"{path}: has no column {', '.join(missing)}; expected {','.join(columns)}")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if any(row[c] is None for c in columns) or None in row:
            raise Error(f"{path}: row {number} has the wrong number of fields")
    return rows


def number(path: Path, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise Error(f"{path}: {column} '{row[column]}': expected a number") from None


def import_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise Error(f"needs the package {e.name}: pip install -r scripts/requirements.txt") from None


def import_pyplot() -> ModuleType:
    import_package("matplotlib").use("Agg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
            "axes.titlesize": 11,
            "legend.frameon": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "train_gdn",
        }
    )
    return pyplot


def save_figure(figure, prefix: Path) -> None:
    """Writes PREFIX.png and PREFIX.svg."""
    if prefix.suffix in (".png", ".svg"):
        prefix = prefix.with_suffix("")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for ending in (".png", ".svg"):
        path = prefix.with_name(prefix.name + ending)
        figure.savefig(
            path, dpi=160, bbox_inches="tight", metadata={"Date": None} if ending == ".svg" else None
        )
        print(f"wrote {path}")


def width_colors(count: int) -> list:
    """Light to dark, for curves in the order of their width."""
    import matplotlib

    colormap = matplotlib.colormaps["viridis_r"]
    return [colormap(0.12 + 0.83 * i / max(1, count - 1)) for i in range(count)]
