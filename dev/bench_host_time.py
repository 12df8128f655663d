#!/usr/bin/env python3
"""How long a call of gdn_torch.chunk_gated_delta_rule keeps the host: medians of many calls, in microseconds.

    python3 dev/bench_host_time.py                                   # scripts/gdn_torch.py; on the GPU too where there is one
    git show COMMIT:scripts/gdn_torch.py >/tmp/before.py
    python3 dev/bench_host_time.py --module /tmp/before.py --module scripts/gdn_torch.py

On the CPU one token of one head of 16 and 16 is computed in float32, and what the library itself takes for it, timed apart, is taken
off. On the GPU the queue is empty before each call and nothing is taken off. "operator" is the way through PyTorch's dispatcher, which
torch.compile's code takes. "nothing" is an autograd.Function of five tensors that does no work: PyTorch's own share. Each module runs
in a process of its own; GDN_LIBRARY names the library.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GDN_LIBRARY", str(ROOT / "libgdn.so"))
SIZES = {"cpu": [(1, 1, 1, 1, 16, 16)], "cuda": [(1, 64, 2, 2, 64, 64), (8, 1024, 6, 6, 64, 128)]}  # B, T, Hk, Hv, dk, dv


def median(call, calls: int, before=lambda: None) -> float:
    for _ in range(calls // 10 + 3):
        call()
    times = []
    for _ in range(calls):
        before()
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def measure(module: Path, device: str, calls: int) -> dict:
    """{sizes: {what: microseconds}} on a device."""
    import torch

    spec = importlib.util.spec_from_file_location("gdn_torch", module)
    gdn_torch = importlib.util.module_from_spec(spec)
    sys.modules["gdn_torch"] = gdn_torch
    spec.loader.exec_module(gdn_torch)
    torch.set_num_threads(1)
    gpu = device == "cuda"
    settle = torch.cuda.synchronize if gpu else lambda: None

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, g, beta):
            ctx.save_for_backward(q, k, v, g, beta)
            return v.new_empty(v.shape)

        @staticmethod
        def backward(ctx, d_o):
            return ctx.saved_tensors

    found = {}
    for sizes in SIZES[device]:
        B, T, Hk, Hv, dk, dv = sizes
        low = torch.bfloat16 if gpu else torch.float32
        normal = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
        x = [(0.1 * normal(B, T, Hk, dk)).to(low), (0.1 * normal(B, T, Hk, dk)).to(low), normal(B, T, Hv, dv).to(low),
             -torch.rand(B, T, Hv, device=device), torch.rand(B, T, Hv, device=device)]
        leaves, d_o = [t.clone().requires_grad_() for t in x], torch.randn_like(x[2])
        rule = gdn_torch.chunk_gated_delta_rule
        in_library = {"gdn_delta_rule_forward": 0.0, "gdn_delta_rule_backward": 0.0}
        if not gpu:  # what the library takes by itself: its part of every call, each name's median
            seen: dict = {name: [] for name in in_library}
            run = gdn_torch._run

            def timed(name, call):
                start = time.perf_counter_ns()
                run(name, call)
                seen[name].append(time.perf_counter_ns() - start)
            gdn_torch._run = timed
            for _ in range(calls):
                torch.autograd.grad(rule(*leaves)[0], leaves, d_o)
            gdn_torch._run = run
            in_library = {name: statistics.median(times) / 1000 for name, times in seen.items()}
        work = in_library["gdn_delta_rule_forward"]
        both = work + in_library["gdn_delta_rule_backward"]
        options = None, None, dk**-0.5, False, False, False, False, False
        operator = torch.ops.gdn.delta_rule
        with torch.no_grad():
            forward = median(lambda: rule(*x), calls, settle) - work
            dispatched = median(lambda: operator(*x, *options), calls, settle) - work
        found[",".join(map(str, sizes))] = {
            "forward": forward, "forward, operator": dispatched,
            "forward that keeps": median(lambda: rule(*leaves), calls, settle) - work,
            "forward + backward": median(lambda: torch.autograd.grad(rule(*leaves)[0], leaves, d_o), calls, settle) - both,
            "forward + backward, nothing": median(lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves, d_o), calls, settle),
            "taken off (forward, both)": [work, both]}
    return found


def main() -> int:
    p = argparse.ArgumentParser(prog="bench_host_time.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--module", type=Path, action="append", help="a gdn_torch.py, or several [scripts/gdn_torch.py]")
    p.add_argument("--calls", type=int, default=1000, help="of each kind [1000]")
    p.add_argument("--json", type=Path, metavar="FILE", help="the figures, also as JSON")
    p.add_argument("--one", help=argparse.SUPPRESS)  # device: measures one module, prints JSON
    a = p.parse_args()
    modules = a.module or [ROOT / "scripts/gdn_torch.py"]
    if a.one:
        print(json.dumps(measure(modules[0], a.one, a.calls)))
        return 0
    import torch

    every = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for module in modules:
            words = [sys.executable, __file__, "--one", device, "--module", module, "--calls", str(a.calls)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode != 0:
                print(f"{module} on {device}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
                return 1
            for sizes, figures in json.loads(done.stdout.splitlines()[-1]).items():
                every.append({"device": device, "module": str(module), "sizes": sizes, **figures})
    names = [name for name in every[0] if name not in ("device", "module", "sizes", "taken off (forward, both)")]
    print(f"torch {torch.__version__}; microseconds of the host, medians of {a.calls} calls\n")
    print("| device | module | B,T,Hk,Hv,dk,dv | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|")
    for row in every:
        print(f"| {row['device']} | {Path(row['module']).name} | {row['sizes']} | " + " | ".join(f"{row[n]:.1f}" for n in names) + " |")
    if a.json:
        a.json.write_text(json.dumps(every, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
