"""What the scripts share: one-line errors, options, CSV files, running ./train_gdn, drawing."""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Container, Iterable, Mapping, Sequence

TRAIN_GDN = Path(__file__).resolve().parent.parent / "train_gdn"


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
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped", file=sys.stderr)
        sys.exit(130)
    except (Error, OSError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV that has at least these columns. Lines "# ..." before its header, where a log says where
    it comes from, and a last line that a kill cut short are left out."""
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
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    reader = csv.DictReader(lines)
    missing = [c for c in columns if c not in (reader.fieldnames or [])]
    if missing:
        raise Error(f"{path}: has no column {', '.join(missing)}; expected {','.join(columns)}")
    rows = list(reader)
    for number, row in enumerate(rows, 1):
        if any(row[c] is None for c in columns) or None in row:
            raise Error(f"{path}: row {number} has the wrong number of fields")
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the CSV as a whole: a kill leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def number(path: Path, row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise Error(f"{path}: {column} '{row[column]}': expected a number") from None


def split(option: str, text: str, convert: type) -> list:
    """The values of a list with commas, each once."""
    try:
        return list(dict.fromkeys(convert(word) for word in text.split(",")))
    except ValueError:
        raise Error(f"{option} '{text}': expected numbers with commas") from None


def choose(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The names of a list with commas, each once."""
    for word in text.split(","):
        if word not in known:
            raise Error(f"{option} '{word}': expected {', '.join(known[:-1])} or {known[-1]}")
    return list(dict.fromkeys(text.split(",")))


def parse_extra(script: str, words: list[str], forbidden: Container[str]) -> dict[str, str]:
    """Options of train_gdn as name -> value; each has a value."""
    extra: dict[str, str] = {}
    i = 0
    while i < len(words):
        name, equals, value = words[i].lstrip("-").partition("=")
        if not words[i].startswith("-") or not name:
            raise Error(f"after --: '{words[i]}': expected an option of train_gdn")
        if name in forbidden:
            raise Error(f"after --: -{name}: {script} sets this one")
        if not equals:
            i += 1
            if i == len(words):
                raise Error(f"after --: -{name} has no value")
            value = words[i]
        extra[name] = value
        i += 1
    return extra


def find_binary(path: str) -> str:
    if not os.access(path, os.X_OK) or os.path.isdir(path):
        raise Error(f"{path}: no such program; build it with make, or give --binary")
    return os.path.abspath(path)


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def last_line(output: Path) -> str:
    """What a train_gdn that failed said: its error, or its last line where it had no time for one."""
    said = output.read_text(errors="replace").strip().splitlines()
    errors = [line for line in said if line.startswith("train_gdn: ")]  # stdout may come after them
    return (errors or said or [""])[-1].removeprefix("train_gdn: ")


def add_pool_options(p: Parser) -> None:
    p.add_argument(
        "--gpus", default=os.environ.get("CUDA_VISIBLE_DEVICES"),
        help="GPUs to fill, as in 0,1 [CUDA_VISIBLE_DEVICES, else the one train_gdn chooses]",
    )  # fmt: skip
    p.add_argument("-j", "--per-gpu", type=int, default=1, metavar="N", help="runs at once on a GPU [1]")
    p.add_argument("--binary", default=str(TRAIN_GDN), help="[train_gdn]")


def die_with_parent() -> None:
    """In the child: a script that is killed takes its runs along (Linux: PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Slot:
    """One place where a process can be."""

    gpu: str | None
    job: Any = None  # None: free
    process: subprocess.Popen | None = None
    start: float = 0

    def seconds(self) -> float:
        return time.monotonic() - self.start


class Pool:
    """Runs at once, `per_gpu` on each GPU. Of several ranks each, under mpirun, a run has as many GPUs, or all where there
    are fewer, which its ranks then share. Leaving the `with` ends those that still run."""

    def __init__(self, gpus: str | None, per_gpu: int, ranks: int = 1):
        if per_gpu < 1:
            raise Error(f"--per-gpu {per_gpu}: expected 1 or more")
        if ranks < 1 or ranks & (ranks - 1):
            raise Error(f"--ranks {ranks}: expected a power of two")
        self.ranks = ranks
        every = gpus.split(",") if gpus else [None]
        if gpus and len(every) > ranks:
            if len(every) % ranks:
                raise Error(f"--ranks {ranks}: expected a number that divides the {len(every)} GPUs of --gpus {gpus}")
            every = [",".join(every[first : first + ranks]) for first in range(0, len(every), ranks)]
        elif gpus and ranks > 1:
            every = [gpus]
        self.slots = [Slot(gpu) for _ in range(per_gpu) for gpu in every]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self.busy():
            if self.ranks > 1:  # mpirun takes its ranks along
                slot.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    slot.process.wait(10)
            slot.process.kill()
            slot.process.wait()

    def busy(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.job is not None]

    def has_room(self) -> bool:
        return len(self.busy()) < len(self.slots)

    def start(self, job: Any, command: list[str], output: Path) -> None:
        """Starts a process in a free slot; what it says goes to the file `output`."""
        counts = {s.gpu: sum(b.gpu == s.gpu for b in self.busy()) for s in self.slots}
        slot = min((s for s in self.slots if s.job is None), key=lambda s: counts[s.gpu])
        environment = dict(os.environ)
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        if len(self.slots) > 1:  # share the cores
            share = (os.cpu_count() or 1) // (len(self.slots) * self.ranks)
            environment.setdefault("OMP_NUM_THREADS", str(max(1, share)))
        if self.ranks > 1:
            command = ["mpirun", "-n", str(self.ranks), "--oversubscribe", "--bind-to", "none", *command]
            if hasattr(os, "geteuid") and os.geteuid() == 0:
                environment.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        with output.open("w") as said:
            slot.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
                start_new_session=True,
            )
        slot.job, slot.start = job, time.monotonic()

    def finished(self) -> list[tuple[Any, int, float]]:
        """Job, exit code and seconds of those that ended since the last call."""
        ended = []
        for slot in self.busy():
            if slot.process.poll() is not None:
                ended.append((slot.job, slot.process.returncode, slot.seconds()))
                slot.job = None
        return ended


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
