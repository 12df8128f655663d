#!/usr/bin/env python3
"""train_gdn beside flash-linear-attention: the training step, and the gated delta rule alone, in one run on one GPU.

    make train_gdn dev/bench_delta_rule && python3 dev/torch/fla_speed.py --allow-hopper

fla's step is GatedDeltaNetForCausalLM with float32 parameters under bf16 autocast, cross-entropy, clipping at 1 and
fused AdamW, on random tokens; ours is ./train_gdn with the same sizes. H = 6, V = 50304, T = 1024, tied. A time is the
median after the first steps. `first step` is, of both, from the start of the process to the end of the first step:
fla's kernels tune themselves in it, so each of its sizes runs in a process of its own. fla's delta rule includes the
L2 norms of q and k, ours does not (short_conv has them).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import packages  # noqa: F401
import torch

import others
from reference import make_config
from shards import write_shard

ROOT = Path(__file__).parents[2]
START = time.time()


def median(values: list) -> float:
    return sorted(values)[len(values) // 2]


def sizes(text: str) -> list[tuple[int, ...]]:
    try:
        return [tuple(int(n) for n in part.split(",")) for part in text.split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers with commas, sizes separated by spaces") from None


# ---- fla, in a process of its own: prints a line of JSON --------------------------------------------------------


def fla_step(width: int, batch: int, layers: int, steps: int) -> dict:
    from fla.models import GatedDeltaNetForCausalLM

    torch.manual_seed(1)
    c = make_config(width, layers)
    model = GatedDeltaNetForCausalLM(others.fla_config(c, tie_word_embeddings=True)).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(c.vocab, (batch, 1024), device="cuda")
    times = []
    for step in range(steps):
        begin = time.time()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.time() - begin)
        if step == 0:
            first = time.time() - START
    ms = 1e3 * median(times[3:])
    return dict(ms=ms, tokens_per_s=1e3 * batch * 1024 / ms, first_s=first,
                gib=torch.cuda.max_memory_allocated() / 2**30)


def fla_rule(batch: int, tokens: int, heads_k: int, heads_v: int, dk: int, dv: int, runs: int) -> dict:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    normal = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()  # noqa: E731
    q, k = normal(batch, tokens, heads_k, dk), normal(batch, tokens, heads_k, dk)
    v, do = normal(batch, tokens, heads_v, dv), normal(batch, tokens, heads_v, dv).detach()
    g = (-0.1 * torch.rand(batch, tokens, heads_v, device="cuda")).requires_grad_()
    beta = torch.rand(batch, tokens, heads_v, device="cuda").requires_grad_()
    forward, backward = [], []
    for _ in range(runs + 3):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        o = chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]
        events[1].record()
        torch.autograd.grad(o, (q, k, v, g, beta), do)
        events[2].record()
        torch.cuda.synchronize()
        forward.append(events[0].elapsed_time(events[1]))
        backward.append(events[1].elapsed_time(events[2]))
    return dict(forward=median(forward[3:]), backward=median(backward[3:]))


def ask_fla(what: str, numbers: tuple, allow: bool) -> dict | None:
    """What fla_step or fla_rule returns, from a new process; None, with a line that says why, where it failed."""
    command = [sys.executable, __file__, "--only", what, *map(str, numbers)] + ["--allow-hopper"] * allow
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    print(f"fla, {what} {numbers}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return None


# ---- ours -------------------------------------------------------------------------------------------------------


def our_step(width: int, batch: int, layers: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        count = batch * 1024 * steps + 1
        write_shard(f"{folder}/random.bin", torch.randint(50257, (count,)).numpy())
        command = [ROOT / "train_gdn", "-i", f"{folder}/random.bin", "-d", "cuda", "-w", width, "-L", layers, "-heads", 6,
                   "-T", 1024, "-b", batch, "-B", batch, "-n", steps, "-v", 0, "-s", 0, "-save", 0, "-o", f"{folder}/run"]
        log, output, first = Path(folder, "run", "log.csv"), Path(folder, "output"), None
        with output.open("w") as file:
            begin = time.time()
            process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT)
            while process.poll() is None:
                if first is None and log.exists() and ",train," in log.read_text():
                    first = time.time() - begin
                time.sleep(0.005)
        if process.returncode:
            sys.exit(f"fla_speed.py: {output.read_text().strip().splitlines()[-1]}")
        rows = [line.split(",") for line in log.read_text().splitlines()]
        ms = median([float(r[5]) for r in rows if r[1] == "train"][3:])
        memory = re.search(r"^memory: ([0-9.]+) GiB", output.read_text(), re.MULTILINE)
    return dict(ms=ms, tokens_per_s=1e3 * batch * 1024 / ms, first_s=first or float("nan"), gib=float(memory[1]))


def our_rules() -> dict:
    """(B, T, Hk, Hv, dk, dv) -> forward and backward ms, as dev/bench_delta_rule prints them."""
    done = subprocess.run([ROOT / "dev" / "bench_delta_rule"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fla_speed.py: bench_delta_rule: {done.stderr.strip()}")
    found, size = {}, None
    for line in done.stdout.splitlines():
        if shape := re.match(r"B=(\d+) T=(\d+) Hk=(\d+) Hv=(\d+) dk=(\d+) dv=(\d+)", line):
            size = tuple(map(int, shape.groups()))
        elif size and (row := re.match(r"  (forward|backward) +([0-9.]+) ms", line)):
            found.setdefault(size, {})[row[1]] = float(row[2])
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=sizes, default=sizes("512,32,8 1024,32,8"), metavar="'W,B,L ...'",
                   help="width, sequences, layers of each training step ['512,32,8 1024,32,8']")
    p.add_argument("--steps", type=int, default=20, help="steps, or runs of a kernel [20]")
    p.add_argument("--no-steps", action="store_true", help="the delta rule alone")
    p.add_argument("--no-rules", action="store_true", help="the training steps alone")
    p.add_argument("--allow-hopper", action="store_true",
                   help="remove fla's refusal of its backward on Hopper with Triton 3.4 to 3.7.0 (its issue 640)")
    p.add_argument("--only", nargs="+", metavar="WHAT", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.steps < 5:
        sys.exit(f"fla_speed.py: --steps {o.steps}: expected 5 or more")
    if reason := others.missing_fla():
        sys.exit(f"fla_speed.py: skipped: {reason}")
    warning = others.allow_fla_on_hopper() if o.allow_hopper else None
    if o.only:
        what, *numbers = o.only
        print(json.dumps((fla_step if what == "step" else fla_rule)(*map(int, numbers))))
        return
    for program in ([] if o.no_steps else ["train_gdn"]) + ([] if o.no_rules else ["dev/bench_delta_rule"]):
        if not (ROOT / program).exists():
            sys.exit(f"fla_speed.py: {ROOT / program}: not built; run: make {program}")
    packages = ", ".join(f"{name} {others.version(name)}" for name in ("torch", "triton", "flash-linear-attention"))
    print(f"{torch.cuda.get_device_name()}; {packages}")
    if warning:
        print(f"WARNING: {warning}")
    if not o.no_rules:
        print("\n| B, T, Hk, Hv, dk, dv | | train_gdn ms | fla ms | fla / train_gdn |\n|---|---|---|---|---|")
        for size, times in our_rules().items():
            theirs = ask_fla("rule", (*size, o.steps), o.allow_hopper)
            for name, ms in times.items() if theirs else ():
                print(f"| {', '.join(map(str, size))} | {name} | {ms:.3f} | {theirs[name]:.3f} | {theirs[name] / ms:.2f} |",
                      flush=True)
    if not o.no_steps:
        print("\n| d, sequences, L | | train_gdn | fla | ratio |\n|---|---|---|---|---|")
        for size in o.sizes:
            a, b = our_step(*size, o.steps), ask_fla("step", (*size, o.steps), o.allow_hopper)
            if b is None:
                continue
            for what, key, digits in (("ms a step", "ms", 1), ("tokens/s", "tokens_per_s", 0),
                                      ("first step, s", "first_s", 1), ("memory, GiB", "gib", 1)):
                ratio = a[key] / b[key] if key == "tokens_per_s" else b[key] / a[key]
                print(f"| {', '.join(map(str, size))} | {what} | {a[key]:,.{digits}f} | {b[key]:,.{digits}f} | {ratio:.2f} |",
                      flush=True)


if __name__ == "__main__":
    main()
