#!/usr/bin/env python3
"""gdn_torch.chunk_gated_delta_rule beside fla's and FlashQLA's, called from PyTorch as their users call them, on one GPU.

    make GPU_ARCH=90a libgdn.so
    PYTHONPATH=site python3 dev/peers/torch_times.py --out $OUT          # site: fla 0.6.0 and what else is installed (run.sh install)

For each shape and function: forward without gradients, and forward + backward with all five gradients returned. Device time by a
CUDA graph's replays, and of eager calls queued back to back between two events (where the host is slower, that is the host's time);
host time of one eager call into an empty queue. Functions take turns, --rounds times, so that a drift of the clocks shows in the least
and most. Before a time is taken o and the gradients are held to float64 of the first sequence (dev/peers/common.py's bound). What is
not installed, or fails, is a line that says why. A ratio is the other's time / ours: below 1, ours loses.
Writes torch_times.md and torch_times.json.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "torch"), str(HERE.parents[1] / "scripts")]
import common  # noqa: E402

KINDS = {"graph": "device, CUDA graph", "eager": "device, eager back to back", "host": "host, one eager call"}


def ours():
    import gdn_torch

    gdn_torch.library()
    return gdn_torch.chunk_gated_delta_rule, "this checkout"


def fla():
    import fla
    import others

    note = others.allow_fla_on_hopper()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule, f"{fla.__version__}{'; ' + note if note else ''}"


def flashqla():
    import importlib.metadata as m

    from flash_qla import chunk_gated_delta_rule

    return chunk_gated_delta_rule, m.version("flash-qla")


FUNCTIONS = {"train_gdn": ours, "fla": fla, "FlashQLA": flashqla}


def inputs(shape: str, device: str):
    import torch
    import torch.nn.functional as F

    B, T, Hk, Hv, dk, dv = common.sizes(shape)
    r = torch.Generator(device).manual_seed(0)
    normal = lambda *s: torch.randn(*s, generator=r, device=device)  # noqa: E731
    low = torch.bfloat16 if device == "cuda" else torch.float32
    x = [F.normalize(normal(B, T, Hk, dk), dim=-1).to(low), F.normalize(normal(B, T, Hk, dk), dim=-1).to(low),
         normal(B, T, Hv, dv).to(low), -0.1 * torch.rand(B, T, Hv, generator=r, device=device),
         torch.rand(B, T, Hv, generator=r, device=device)]
    return [t.requires_grad_() for t in x], normal(B, T, Hv, dv).to(low)


def calls_of(function, x, d_o):
    """Forward, and forward + backward."""
    import torch

    def forward():
        with torch.no_grad():
            return function(*x)[0]

    def both():
        o = function(*x)[0]
        return o.detach(), *torch.autograd.grad(o, x, d_o)
    return {"forward": forward, "forward + backward": both}


def wrong(call, x, d_o) -> str | None:
    """Why its o and gradients, of the first sequence, forbid a time."""
    import gdn_torch

    found = call()
    first = [t.detach()[:1] for t in x]
    want = gdn_torch.delta_rule_float64(*first, d_o=d_o[:1])
    errors = {}
    for name, value in zip(common.NAMES, found):
        value, exact = value[:1].double().cpu(), want[name]
        errors[name] = ((value - exact).norm() / exact.norm()).item()
    return common.verdict(errors)


def graph_of(call):
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def between_events(call, calls: int) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


def of_host(call, calls: int, settle) -> float:
    times = []
    for _ in range(calls):
        settle()
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    settle()
    return statistics.median(times)


def measure(shape: str, functions: dict, rounds: int, calls: int, device: str, seconds: float) -> list[dict]:
    """A row for each function, case and kind: ms of each round, or why there is none."""
    import torch

    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    x, d_o = inputs(shape, device)
    rows, timers, end = [], [], time.time() + seconds
    for name, function in functions.items():
        cases = calls_of(function, x, d_o)
        try:
            why = wrong(cases["forward + backward"], x, d_o)
        except Exception as e:  # of any of the packages' own kinds
            why = common.one_line(e)
        for case, call in cases.items():
            for kind in KINDS if device == "cuda" else ["host"]:
                row = dict(shape=shape, function=name, case=case, kind=kind, ms=[])
                rows.append(row)
                if why:
                    row["why"] = why
                    continue
                try:
                    if kind == "graph":
                        timers.append((row, lambda g=graph_of(call): between_events(g.replay, calls)))
                    elif kind == "eager":
                        timers.append((row, lambda call=call: between_events(call, calls)))
                    else:
                        timers.append((row, lambda call=call: of_host(call, calls, settle)))
                except Exception as e:
                    row["why"] = common.one_line(e)
    for _ in range(rounds):
        for row, timer in timers:
            if row.get("why") or (row["ms"] and time.time() > end):
                continue
            try:
                row["ms"].append(timer())
            except Exception as e:
                row["why"] = common.one_line(e)
    return rows


def table(record: dict) -> str:
    lines = [f"{record['device']}, torch {record['torch']}, {record['date']}; " +
             "; ".join(f"{name} {about}" for name, about in record["functions"].items()),
             "", "ms, the median of the rounds (least to most); ratio: the other's / ours, below 1 ours loses", ""]
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["shape"] == shape]
        names = list(dict.fromkeys(row["function"] for row in rows))
        lines += [f"## {shape} (B,T,Hk,Hv,dk,dv)", "",
                  "| | | " + " | ".join(name if name == "train_gdn" else f"{name} | ratio" for name in names) + " |",
                  "|---" * (2 + 2 * len(names) - (1 if "train_gdn" in names else 0)) + "|"]
        for case, kind in dict.fromkeys((row["case"], row["kind"]) for row in rows):
            at = {row["function"]: row for row in rows if (row["case"], row["kind"]) == (case, kind)}
            mine = at.get("train_gdn", {}).get("ms")
            cells = [case, KINDS[kind]]
            for name in names:
                ms = at[name]["ms"]
                cells.append(f"{statistics.median(ms):.3f} ({min(ms):.3f} to {max(ms):.3f})" if ms else at[name].get("why", "no time"))
                if name != "train_gdn":
                    cells.append(f"{statistics.median(ms) / statistics.median(mine):.2f}" if ms and mine else "")
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(prog="torch_times.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", nargs="+", help=f"B,T,Hk,Hv,dk,dv [{' '.join(common.SHAPES)} 1,64,2,2,64,64]")
    p.add_argument("--functions", default=",".join(FUNCTIONS), help="with commas [%(default)s]")
    p.add_argument("--rounds", type=int, default=5, help="[5]")
    p.add_argument("--calls", type=int, default=20, help="of one kind in a round [20]")
    p.add_argument("--seconds", type=float, default=60, help="for a shape; later rounds are left out [60]")
    p.add_argument("--out", type=Path, default=Path("."), help="folder of torch_times.md and torch_times.json [.]")
    a = p.parse_args()
    if not importlib.util.find_spec("torch"):
        sys.exit("torch_times.py: needs the package torch")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = dict(device=torch.cuda.get_device_name() if device == "cuda" else "CPU", torch=torch.__version__,
                  date=time.strftime("%Y-%m-%d", time.gmtime()), functions={}, rows=[])
    functions = {}
    for name in a.functions.split(","):
        if name not in FUNCTIONS:
            sys.exit(f"torch_times.py: --functions {name}, expected of {', '.join(FUNCTIONS)}")
        try:
            functions[name], record["functions"][name] = FUNCTIONS[name]()
        except Exception as e:
            record["functions"][name] = f"not here ({common.one_line(e)})"
    a.out.mkdir(parents=True, exist_ok=True)
    for shape in a.shapes or [*common.SHAPES, "1,64,2,2,64,64"]:
        try:
            record["rows"] += measure(shape, functions, a.rounds, a.calls, device, a.seconds)
        except torch.OutOfMemoryError as e:
            print(f"{shape}: {common.one_line(e)}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        (a.out / "torch_times.json").write_text(json.dumps(record, indent=1) + "\n")  # what a run that is stopped has, it keeps
        (a.out / "torch_times.md").write_text(table(record))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
