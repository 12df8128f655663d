#!/usr/bin/env python3
"""How far each implementation of the gated delta rule is from a float64 recurrence, as a table.

    make dev/delta_rule_file && python3 dev/torch/accuracy.py            on a GPU, or with --device cpu

Outputs and all gradients, over regimes of decay and write strength, the same inputs for all: q, k (unit length), v and
do in bf16, g and beta in float32, scale dk^-1/2. A cell is |x - float64| / |float64|. Columns:
  best bf16      the float64 result rounded to bf16 (g and beta's gradients: to float32): what no bf16 output can beat
  train_gdn      ./dev/delta_rule_file, the CUDA layer (on the CPU the float layer)
  hf chunked     transformers' torch_chunk_gated_delta_rule, which casts to float32 inside (on the CPU with float32 results
                 too, as train_gdn's are there)
  hf recurrent   transformers' torch_recurrent_gated_delta_rule, likewise
  fla            flash-linear-attention's chunk_gated_delta_rule, where it is installed and there is a GPU

fla's kernels are compiled by a process of their own (triton_ahead.py), and it runs twice over poisoned memory (written.py):
what a kernel did not write is said to be that, and is no error of fla. On a CPU one sequence is computed at a time and the
long ones have 4096 tokens, which takes 2 GiB; on a GPU all of one length go in one batch and the long ones have 16384.
"""

import argparse
import itertools
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import packages  # noqa: F401
import torch
import torch.nn.functional as F

import others
import written
from reference import gated_delta_rule_recurrent, read_safetensors

PROGRAM = Path(__file__).parents[1] / "delta_rule_file"
NAMES = ["o", "dq", "dk", "dv", "dg", "dbeta"]


def make_inputs(regime: str, tokens: int, heads_k: int, heads_v: int, dk: int, dv: int, device: str) -> dict:
    """Of one sequence; in float64, but numbers of the types that the layers take."""
    r = torch.Generator().manual_seed(11)
    normal = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    gates = 1, tokens, heads_v
    u, logit = uniform(*gates), normal(*gates)
    A, dt = 16 * uniform(heads_v), torch.exp(uniform(heads_v) * math.log(100) + math.log(0.001))
    g, beta, alike = {
        "initial values": (-A * dt * torch.exp(0.3 * normal(*gates)), logit.sigmoid(), 0),
        "strong decay": (torch.where(u < 0.2, -50 * uniform(*gates), -2 * uniform(*gates)), logit.sigmoid(), 0),
        "every token decays by e^-5 to e^-20": (-5 - 15 * u, logit.sigmoid(), 0),
        "hardly any decay": (-1e-3 * u, logit.sigmoid(), 0),
        "beta near 1": (-0.1 * u, 1 - 1e-3 * uniform(*gates), 0),
        "beta near 1, keys alike": (-1e-2 * u, 1 - 1e-3 * uniform(*gates), 2),
        "beta to 2, hardly any decay": (-1e-3 * u, 2 * uniform(*gates), 0),
    }[regime]
    q, k = (normal(1, tokens, heads_k, dk) for _ in "qk")
    k = k + alike * normal(1, 1, heads_k, dk)
    q, k = (F.normalize(x, dim=-1) for x in (q, k))
    v, do = (normal(1, tokens, heads_v, dv) for _ in "vd")
    x = {name: y.bfloat16().double() for name, y in dict(q=q, k=k, v=v, do=do).items()}
    return {name: y.to(device) for name, y in {**x, "g": g.float().double(), "beta": beta.float().double()}.items()}


def results(function, sequences: list[dict], low: torch.dtype) -> list[dict]:
    """o and the gradients of each; q, k, v in `low`, g and beta in float32 (float64 where low is). Sequences of one length
    go in one batch on a GPU, which a step of a recurrence takes as long for one as for all; on a CPU, where a batch would
    only take its memory, one by one."""
    if len(sequences) > 1 and sequences[0]["q"].device.type == "cpu":
        return [results(function, [x], low)[0] for x in sequences]
    x = {name: torch.cat([x[name] for x in sequences]) for name in sequences[0]}
    gate = torch.float64 if low == torch.float64 else torch.float32
    inputs = [x[name].to(gate if name in ("g", "beta") else low).requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o = function(*inputs, x["q"].shape[-1] ** -0.5)
    grads = torch.autograd.grad(o, inputs, x["do"].to(o.dtype))
    return [dict(zip(NAMES, each)) for each in zip(*(y.split(1) for y in (o.detach(), *grads)))]


def checked_results(function, sequences: list[dict], low: torch.dtype) -> list[dict]:
    """results, where every number is shown to be written."""
    def call() -> dict:
        return {f"{name} of sequence {n}": x for n, each in enumerate(results(function, sequences, low))
                for name, x in each.items()}

    values = iter(written.checked(call).values())
    return [dict(zip(NAMES, each)) for each in zip(*[values] * len(NAMES))]


def exact(sequences: list[dict]) -> list[dict]:
    def recurrent(q, k, v, g, beta, scale):
        return gated_delta_rule_recurrent(others.same_heads(q, v), others.same_heads(k, v), v, g, beta, scale)

    return results(recurrent, sequences, torch.float64)


def rounded(want: dict) -> dict:
    return {name: y.float() if name in ("dg", "dbeta") else y.bfloat16() for name, y in want.items()}


def ours(x: dict, device: str) -> dict:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        low = {name: y.float() if name in ("g", "beta") else y.bfloat16() for name, y in x.items()}
        save_file({name: y.cpu().contiguous() for name, y in low.items()}, f"{folder}/in.safetensors")
        done = subprocess.run([PROGRAM, f"{folder}/in.safetensors", f"{folder}/out.safetensors", device],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"accuracy.py: {done.stderr.strip()}")
        return read_safetensors(f"{folder}/out.safetensors")


def error(x, want) -> float:
    x = x.to(want.device).double()
    return ((x - want).norm() / want.norm()).item()


def shown(e: float) -> str:
    return f"{e:.2e}" if math.isfinite(e) else "not finite"


def compile_fla_ahead(o, groups: list) -> None:
    """Ends this process."""
    import triton_ahead

    if o.allow_hopper:
        others.allow_fla_on_hopper()
    calls = [lambda tokens=tokens, names=names: results(
        others.fla_chunked, [make_inputs(names[0], tokens, *o.heads, o.device)] * len(names), torch.bfloat16)
        for tokens, names in groups]
    triton_ahead.compile_ahead(calls)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--heads", type=int, nargs=4, default=[1, 2, 64, 128], metavar=("HK", "HV", "DK", "DV"))
    p.add_argument("--tokens", type=int, default=1000, help="of the regimes' sequence [1000]")
    p.add_argument("--long", type=int, help="tokens of the long sequences, 0: none [16384, on a CPU 4096]")
    p.add_argument("--allow-hopper", action="store_true", help="remove fla's refusal on Hopper (its issue 640)")
    p.add_argument("-o", type=Path, metavar="FILE", help="write the table there too, row by row")
    p.add_argument("--compile-ahead", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args()
    o.long = (16384 if o.device == "cuda" else 4096) if o.long is None else o.long
    regimes = ["initial values", "strong decay", "every token decays by e^-5 to e^-20", "hardly any decay",
               "beta near 1", "beta near 1, keys alike", "beta to 2, hardly any decay"]
    groups = [(o.tokens, regimes)]
    if o.long:
        groups.append((o.long, ["strong decay", "beta near 1", "hardly any decay", "initial values"]))
    if o.compile_ahead:
        compile_fla_ahead(o, groups)
    file = o.o.open("w") if o.o else None

    def say(line: str) -> None:
        print(line, flush=True)
        if file:
            print(line, file=file, flush=True)

    if not PROGRAM.exists():
        sys.exit(f"accuracy.py: {PROGRAM}: not built; run: make dev/{PROGRAM.name}")
    low = torch.bfloat16 if o.device == "cuda" else torch.float32  # the number format of train_gdn's layer there
    columns = {"best bf16": None, "train_gdn": lambda xs: [ours(x, o.device) for x in xs]}
    if reason := others.missing_transformers():
        say(f"without transformers: {reason}")
    else:
        columns["hf chunked"] = lambda xs: results(others.transformers_chunked, xs, low)
        columns["hf recurrent"] = lambda xs: results(others.transformers_recurrent, xs, low)
    if reason := others.missing_fla():
        say(f"without fla: {reason}")
    else:
        if o.allow_hopper and (warning := others.allow_fla_on_hopper()):
            say(f"WARNING: {warning}")
        columns["fla"] = lambda xs: checked_results(others.fla_chunked, xs, torch.bfloat16)
    packages = [f"{name} {others.version(name)}" for name in
                ("torch", "triton", "transformers", "flash-linear-attention") if others.version(name)]
    say(f"device {torch.cuda.get_device_name() if o.device == 'cuda' else 'CPU'}; {', '.join(packages)}")
    hk, hv, dk, dv = o.heads
    say(f"Hk {hk}, Hv {hv}, dk {dk}, dv {dv}; * marks the smallest error, best bf16 apart\n")
    say(f"| regime | tokens | | {' | '.join(columns)} |")
    say("|---" * (3 + len(columns)) + "|")
    if "fla" in columns:
        import triton_ahead

        triton_ahead.in_another_process([__file__, *sys.argv[1:], "--compile-ahead"])
        triton_ahead.shorten_autotuning(2)
    not_closest = []
    for tokens, names in groups:
        inputs = [make_inputs(regime, tokens, *o.heads, o.device) for regime in names]
        wanted, got = exact(inputs), {}
        for column, call in columns.items():
            try:
                got[column] = call(inputs) if call else [rounded(want) for want in wanted]
            except written.NotWritten as e:
                say(f"{column} ({tokens} tokens): {e}: this script's fault, not the peer's")
            except Exception as e:  # of any of the packages' own kinds
                print(f"{column} fails ({tokens} tokens): {(str(e) or repr(e)).splitlines()[0]}", file=sys.stderr)
        for n, (regime, name) in enumerate(itertools.product(names, NAMES)):
            errors = {column: error(y[n // len(NAMES)][name], wanted[n // len(NAMES)][name]) for column, y in got.items()}
            least = min((e for column, e in errors.items() if column != "best bf16" and math.isfinite(e)), default=math.nan)
            if not errors["train_gdn"] <= least:
                not_closest.append(f"{name} in '{regime}' of {tokens} tokens, {errors['train_gdn'] / least:.2f} times")
            cells = [f"{shown(errors[c])}{'*' if c != 'best bf16' and errors[c] == least else ''}" if c in errors else "fails"
                     for c in columns]
            say(f"| {regime} | {tokens} | {name} | {' | '.join(cells)} |")
    if not_closest:
        say("\ntrain_gdn is not the closest in: " + "; ".join(not_closest))


if __name__ == "__main__":
    main()
