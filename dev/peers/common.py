"""What the scripts of all peers share: shapes, inputs on disk, errors, and a worker that answers over a pipe. No PyTorch, no
JAX: the scripts that need one import it, as both would want the GPU's memory.

Shapes: "B,T,Hk,Hv,dk,dv". Inputs are files of a folder (PEERS_WORK/inputs/SHAPE) that inputs.py writes, the same numbers for
all: q, k of unit length and v, do in bf16 (as uint16), g and beta in float32, and in want.npz the float64 results of a few
(sequence, key head) pairs.
"""

import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

WORK = Path(os.environ.get("PEERS_WORK", "/tmp/peers"))
SHAPES = ["32,1024,6,6,64,128", "32,1024,6,6,128,256", "8,4096,16,32,128,128", "1,32768,16,32,128,128"]
SMALL_SHAPES = ["2,128,2,2,16,32", "1,256,2,4,16,16"]  # for a CPU
STEPS = ["1024,32,8", "2048,8,21", "512,32,8", "256,32,8"]  # width, sequences of 1024 tokens, layers
SMALL_STEPS = ["128,2,2"]
NAMES = ["o", "dq", "dk", "dv", "dg", "dbeta"]
OF_KEY_HEADS = ("dq", "dk")
TOLERANCE = 0.02  # |x - float64| / |float64|: five times what bf16 kernels have; a wrong kernel has 0.1 and more

# What is timed: name -> what the table calls it
CASES = {
    "forward": "forward, nothing kept",
    "forward_kept": "forward that keeps what the backward needs",
    "backward": "backward from what was kept",
    "both": "forward + backward, one piece",
    "both_recomputed": "forward + backward, nothing kept between",
    "both_norms": "forward + backward, L2 norms of q, k inside",
    "gradients": "gradients alone, o not made",
}


def sizes(shape: str) -> tuple[int, ...]:
    numbers = tuple(map(int, shape.split(",")))
    if len(numbers) != 6:
        sys.exit(f"{Path(sys.argv[0]).name}: shape '{shape}': expected B,T,Hk,Hv,dk,dv")
    return numbers


def folder(shape: str) -> Path:
    return WORK / "inputs" / shape.replace(",", "_")


def load(shape: str, name: str) -> np.ndarray:
    """q, k [B,T,Hk,dk], v, do [B,T,Hv,dv] uint16 (bf16's bits), g, beta [B,T,Hv] float32."""
    return np.load(folder(shape) / f"{name}.npy", mmap_mode="r")


def pairs(shape: str) -> list[tuple[int, int]]:
    """(sequence, key head) of those results that are held to float64: the first and the last."""
    B, _, Hk, *_ = sizes(shape)
    return sorted({(0, 0), (B - 1, Hk - 1)})


def slice_of(shape: str, name: str, pair: tuple[int, int]) -> tuple:
    """Where a result of a pair lies in the whole [B,T,heads,...]: all value heads of the key head."""
    _, _, Hk, Hv, *_ = sizes(shape)
    (b, h), r = pair, Hv // Hk
    return b, slice(None), slice(h, h + 1) if name in OF_KEY_HEADS else slice(h * r, (h + 1) * r)


def errors(shape: str, results: dict, to_numpy: Callable) -> dict[str, float]:
    """|x - float64| / |float64| of each result there is, over the pairs."""
    want = np.load(folder(shape) / "want.npz")
    out = {}
    for name, x in results.items():
        off = norm = 0.0
        for n, pair in enumerate(pairs(shape)):
            expected = want[f"{name}_{n}"].astype(np.float64)
            part = np.asarray(to_numpy(x[slice_of(shape, name, pair)]), dtype=np.float64)
            if part.shape != expected.shape:
                raise ValueError(f"{name}: shape {part.shape}, expected {expected.shape}")
            off += float(((part - expected) ** 2).sum())
            norm += float((expected**2).sum())
        out[name] = float(np.sqrt(off / norm))
    return out


def verdict(found: dict[str, float]) -> str | None:
    """Why these errors (or their absence) forbid a time, or None."""
    if "o" not in found:
        return "gives no o"
    wrong = [f"{name} {e:.3g}" for name, e in found.items() if not e <= TOLERANCE]
    return f"off float64 by more than {TOLERANCE}: {', '.join(wrong)}" if wrong else None


def summary(rounds: list[list[float]]) -> dict:
    """Of a case's times, ms, a list a round."""
    every = [ms for times in rounds for ms in times]
    return dict(ms=statistics.median(every), least=min(every), most=max(every),
                rounds=[statistics.median(times) for times in rounds], runs=len(every))


class Record:
    """Lines of JSON in PEERS_OUT/peers.jsonl, one a measurement, written as they come: what a run that fails has, it keeps."""

    def __init__(self) -> None:
        self.path = Path(os.environ.get("PEERS_OUT", WORK / "out")) / "peers.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(dict(kind=kind, at=time.time(), **values)) + "\n")



def read_record(path: Path) -> list[dict]:
    """A record's lines; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def one_line(e: BaseException) -> str:
    lines = (str(e).strip() or repr(e)).splitlines()
    return f"{type(e).__name__}: {lines[0][:300]}"


def serve(worker) -> None:
    """Answers requests, a line of JSON on standard input each, with a line of JSON: {"do": method, ...arguments}."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the packages print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        begin = time.time()
        try:
            answer = getattr(worker, request.pop("do"))(**request) or {}
        except BaseException as e:  # of any of the packages' own kinds
            traceback.print_exc(file=sys.stderr)
            answer = dict(error=one_line(e))
        print(json.dumps(dict(answer, seconds=round(time.time() - begin, 2))), file=answers, flush=True)
