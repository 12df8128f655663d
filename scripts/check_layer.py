#!/usr/bin/env python3
"""How far your gated delta rule is from train_gdn's float64 one: relative errors of outputs, states and gradients.

    make libgdn.so
    python3 scripts/check_layer.py my_module:my_function                     a PyTorch function, with autograd
    python3 scripts/check_layer.py my_module:my_function --dtype bfloat16 --device cuda
    python3 scripts/check_layer.py --write inputs.npz                        for JAX, numpy, C++: compute from this file ...
    python3 scripts/check_layer.py --read results.npz                        ... and have these results compared

The function is called like flash-linear-attention's, function(q, k, v, g, beta, scale=..., and, in the regimes that have
them, initial_state=..., output_final_state=True, cu_seqlens=...), with q, k [B,T,HK,DK], v [B,T,HV,DV], g, beta [B,T,HV],
states [N,HV,DK,DV], and returns o or (o, final_state). A regime that it refuses is a line that says so; --without leaves
regimes out.

A cell is |x - float64| / |float64| (the norms of the whole tensor); "best" is what rounding the float64 result to --dtype
costs (gradients of g and beta and states: to float32). With --bound X the exit code is 1 where an error is above X times that
of "best", or a regime was refused.
"""

import argparse
import importlib
import math
import os
import sys
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
except ImportError as error:
    sys.exit(f"check_layer.py: needs the package {error.name}")

import gdn_torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")
GATES = ("g", "beta", "initial_state", "dg", "dbeta", "d_initial_state", "final_state", "d_final_state")  # float32 at least

# name: (log decay, write strength) of uniform numbers a, b in (0, 1); packed documents; states at both ends
REGIMES = {
    "initial values": (lambda a, b: (-0.1 * a * a, b), False, False),
    "strong decay": (lambda a, b: (torch.where(a < 0.2, -250 * a, -2 * a), b), False, False),
    "long memory": (lambda a, b: (-0.002 * a, b), False, True),
    "packed documents": (lambda a, b: (-0.5 * a, 2 * b), True, True),
    "beta near 0": (lambda a, b: (-0.1 * a, 1e-3 * b), False, False),
    "beta near 1": (lambda a, b: (-0.1 * a, 1 - 1e-3 * b), False, False),
    "beta to 2": (lambda a, b: (-0.002 * a, 2 * b), False, False),
}


def make_inputs(regime, tokens, heads, dtype):
    """float64 tensors of numbers that `dtype` has; gates and states of float32."""
    gates, documents, states = REGIMES[regime]
    hk, hv, dk, dv = heads
    r = torch.Generator().manual_seed(17)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)
    a, b = (torch.rand(1, tokens, hv, generator=r, dtype=torch.float64) for _ in "ab")
    g, beta = gates(a, b)
    q, k = (F.normalize(normal(1, tokens, hk, dk), dim=-1) for _ in "qk")
    x = dict(q=q, k=k, v=normal(1, tokens, hv, dv), g=g, beta=beta, d_o=normal(1, tokens, hv, dv))
    count = 1
    if documents:  # of 1 token, of 64, to a third of all, and the rest
        x["cu_seqlens"] = torch.tensor(sorted({0, 1, min(65, tokens), max(min(65, tokens), tokens // 3), tokens}))
        count = len(x["cu_seqlens"]) - 1
    if states:
        x.update(initial_state=normal(count, hv, dk, dv), d_final_state=normal(count, hv, dk, dv))
    return {name: t if name == "cu_seqlens" else t.to(working_type(name, dtype)).double() for name, t in x.items()}


def working_type(name, dtype):
    return torch.float32 if name in GATES and dtype != torch.float64 else dtype


def exact(x, scale):
    return gdn_torch.delta_rule_float64(*(x[name] for name in INPUTS[:5]), d_o=x["d_o"], scale=scale,
                                        initial_state=x.get("initial_state"), d_final_state=x.get("d_final_state"),
                                        cu_seqlens=x.get("cu_seqlens"))


def wanted(x, results):
    """Of the exact results those that the regime asks for."""
    return {name: y for name, y in results.items() if name != "final_state" or "initial_state" in x}


def run(function, x, scale, dtype, device):
    """The results of a PyTorch function, by name."""
    leaves = {name: x[name].to(device, working_type(name, dtype)).requires_grad_() for name in INPUTS if name in x}
    options = {"scale": scale}
    if "initial_state" in x:
        options.update(initial_state=leaves["initial_state"], output_final_state=True)
    if "cu_seqlens" in x:
        options["cu_seqlens"] = x["cu_seqlens"].to(device)
    out = function(*(leaves[name] for name in INPUTS[:5]), **options)
    o, last = out if isinstance(out, (tuple, list)) else (out, None)
    loss = (o * x["d_o"].to(device, o.dtype)).sum()
    results = {"o": o.detach()}
    if "initial_state" in x:
        if last is None:
            raise ValueError("no final_state returned")
        results["final_state"] = last.detach()
        loss = loss.to(last.dtype) + (last * x["d_final_state"].to(device, last.dtype)).sum()
    names = ["d_initial_state" if name == "initial_state" else "d" + name for name in leaves]
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {**results, **{name: y for name, y in zip(names, gradients) if y is not None}}


def error(x, reference):
    """|x - reference| / |reference|; infinite where shapes differ or numbers are none."""
    x = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if x.shape != reference.shape or not torch.isfinite(x).all():
        return math.inf
    size = reference.norm().item()
    return (x - reference).norm().item() / size if size else (x - reference).norm().item()


class Table:
    def __init__(self, dtype, bound):
        self.dtype, self.bound, self.failures = dtype, bound, []
        print(f"| {'regime':16} | {'tensor':15} | {'best':8} | {'yours':10} |")
        print("|---" * 4 + "|")

    def add(self, regime, name, reference, got):
        best = error(reference.to(working_type(name, self.dtype)), reference)
        mine = None if got is None else error(got, reference)
        text = "missing" if mine is None else "not finite or another shape" if math.isinf(mine) else f"{mine:.2e}"
        print(f"| {regime:16} | {name:15} | {best:.2e} | {text:10} |", flush=True)
        if self.bound is not None and (mine is None or not mine <= self.bound * max(best, 2.0 ** -53)):
            self.failures.append(f"{name} in '{regime}'")

    def refuse(self, regime, reason):
        print(f"| {regime:16} | refused: {reason} |", flush=True)
        if self.bound is not None:
            self.failures.append(f"'{regime}' (refused)")

    def end(self):
        if self.failures:
            sys.exit(f"check_layer.py: above {self.bound:g} times the error of rounding: {', '.join(self.failures)}")


def user_function(name):
    module, colon, attribute = name.partition(":")
    if not colon:
        sys.exit(f"check_layer.py: {name}: expected MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as problem:
        sys.exit(f"check_layer.py: {name}: {problem}")
    return function


def write(path, inputs, scale):
    arrays = {f"{regime}/{name}": t.numpy() for regime, x in inputs.items() for name, t in x.items()}
    np.savez(path, scale=np.float64(scale), **arrays)
    print(f"{path}: arrays REGIME/NAME in float64; write o, final_state, dq, dk, dv, dg, dbeta, d_initial_state under the same "
          "regimes' names, the gradients of sum(o d_o) + sum(final_state d_final_state), and pass that file to --read")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("function", nargs="?", metavar="MODULE:FUNCTION")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of q, k, v and o [float32]")
    p.add_argument("--device", default="cpu", help="where your function runs [cpu]")
    p.add_argument("--tokens", type=int, default=500)
    p.add_argument("--heads", type=int, nargs=4, default=[1, 2, 32, 64], metavar=("HK", "HV", "DK", "DV"))
    p.add_argument("--without", nargs="+", default=[], metavar="REGIME", choices=REGIMES, help=", ".join(REGIMES))
    p.add_argument("--bound", type=float, metavar="X")
    p.add_argument("--write", type=Path, metavar="FILE.npz")
    p.add_argument("--read", type=Path, metavar="FILE.npz")
    o = p.parse_args()
    if sum(x is not None for x in (o.function, o.write, o.read)) != 1:
        p.error("expected one of MODULE:FUNCTION, --write and --read")
    if o.tokens < 1:
        p.error(f"--tokens {o.tokens}: expected at least 1")
    dtype, scale = DTYPES[o.dtype], o.heads[2] ** -0.5
    inputs = {regime: make_inputs(regime, o.tokens, o.heads, dtype) for regime in REGIMES if regime not in o.without}
    if o.write:
        return write(o.write, inputs, scale)
    function = user_function(o.function) if o.function else None
    read = np.load(o.read) if o.read else None
    table = Table(dtype, o.bound)
    for regime, x in inputs.items():
        references = wanted(x, exact(x, scale))
        if function is not None:
            try:
                got = run(function, x, scale, dtype, o.device)
            except Exception as problem:  # whatever the function raises
                table.refuse(regime, (str(problem) or repr(problem)).splitlines()[0])
                continue
        else:
            got = {name: read[f"{regime}/{name}"] for name in references if f"{regime}/{name}" in read}
        for name, reference in references.items():
            table.add(regime, name, reference, got.get(name))
    table.end()


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(f"check_layer.py: {problem}")
