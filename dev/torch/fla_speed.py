#!/usr/bin/env python3
"""train_gdn beside flash-linear-attention: the training step, and the gated delta rule alone, in one run on one GPU.

    make train_gdn dev/bench_delta_rule && python3 dev/torch/fla_speed.py --allow-hopper --minutes 7 -o results

fla's step is GatedDeltaNetForCausalLM with float32 parameters under bf16 autocast, cross-entropy, clipping at 1 and
fused AdamW, on random tokens; ours is ./train_gdn with the same sizes. H = 6, V = 50304, T = 1024, tied. A time is the
median after the first steps. fla's delta rule includes the L2 norms of q and k, ours does not (short_conv has them).

1. fla's kernels for all parts are compiled, on all cores (triton_ahead.py).
2. One part after another has the GPU to itself, ours and then fla's. fla's autotuner measures its configurations there,
   each for --tune ms. `compiled` counts kernels that the first step missed. fla's own first step, which compiles on one
   core, is not measured here; the core-seconds of 1 say what it compiles. `memory`: the peak of PyTorch's allocator in
   fla's timed steps, and our plan.
Parts come in the order of --parts, as long as --minutes last; what has been measured is printed and, with -o, written
after each part: fla_speed.csv and fla_speed.md.
"""

import argparse
import contextlib
import csv
import gc
import json
import os
import re
import select
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
PARTS = ("step:1024,32,8 step:512,32,8 rule:32,1024,6,6,128,256 rule:8,4096,16,32,128,128 step:256,32,8 step:1536,32,8 "
         "step:2048,8,21 rule:32,1024,6,6,64,128 rule:32,1024,6,6,32,64")
NUMBERS = {"step": ("d", "B", "L"), "rule": ("B", "T", "Hk", "Hv", "dk", "dv")}
Part = tuple[str, tuple[int, ...]]


def median(values: list) -> float:
    return sorted(values)[len(values) // 2]


def parts(text: str) -> list[Part]:
    found = []
    for word in text.split():
        what, _, numbers = word.partition(":")
        try:
            found.append((what, tuple(map(int, numbers.split(",")))))
        except ValueError:
            found.append((what, ()))
        if len(NUMBERS.get(what, ())) != len(found[-1][1]):
            raise argparse.ArgumentTypeError(f"'{word}': expected step:d,B,L or rule:B,T,Hk,Hv,dk,dv")
    return found


def title(part: Part) -> str:
    return part[0] + " " + " ".join(f"{name}={n}" for name, n in zip(NUMBERS[part[0]], part[1]))


# ---- fla, in processes of its own -------------------------------------------------------------------------------


def fla_step(width: int, batch: int, layers: int, steps: int, device: str = "cuda") -> dict:
    torch.manual_seed(1)
    c = make_config(width, layers)
    with torch.device(device):
        model = others.fla_class()(others.fla_config(c, tie_word_embeddings=True)).train()
        tokens = torch.randint(c.vocab, (batch, 1024))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times = []
    for step in range(steps):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        begin = time.time()
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.time() - begin)
    if steps < 5:
        return {}
    ms = 1e3 * median(times[3:])
    return dict(ms=ms, tokens_per_s=1e3 * batch * 1024 / ms, gib=torch.cuda.max_memory_allocated() / 2**30)


def fla_rule(batch: int, tokens: int, heads_k: int, heads_v: int, dk: int, dv: int, runs: int,
             device: str = "cuda") -> dict:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    normal = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16).requires_grad_()  # noqa: E731
    q, k = normal(batch, tokens, heads_k, dk), normal(batch, tokens, heads_k, dk)
    v, do = normal(batch, tokens, heads_v, dv), normal(batch, tokens, heads_v, dv).detach()
    g = (-0.1 * torch.rand(batch, tokens, heads_v, device=device)).requires_grad_()
    beta = torch.rand(batch, tokens, heads_v, device=device).requires_grad_()

    def forward():
        return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]

    def backward(o) -> None:
        torch.autograd.grad(o, (q, k, v, g, beta), do)

    if runs < 5:
        backward(forward())
        return {}
    times = []
    for _ in range(runs + 3):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        events[0].record()
        o = forward()
        events[1].record()
        backward(o)
        events[2].record()
        torch.cuda.synchronize()
        times.append((events[0].elapsed_time(events[1]), events[1].elapsed_time(events[2])))
    return dict(forward=median([t[0] for t in times[3:]]), backward=median([t[1] for t in times[3:]]))


def run_fla(part: Part, runs: int, device: str = "cuda") -> dict:
    what, numbers = part
    with others.fla_configurations(make_config(numbers[0], 1).head_dim_k if what == "step" else numbers[4]):
        return (fla_step if what == "step" else fla_rule)(*numbers, runs, device)


def collect(wanted: list[Part], device: str = "cuda") -> dict:
    """The compile jobs of the parts, in their order. A model of two layers has the kernels of all."""
    import triton_ahead

    jobs = {}
    for what, numbers in wanted:
        with triton_ahead.collecting(jobs):
            run_fla((what, numbers[:2] + (2,) if what == "step" else numbers), 1, device)
        gc.collect()
        torch.cuda.empty_cache()
    return jobs


def compile_ahead(wanted: list[Part], seconds: float) -> None:
    import triton_ahead

    jobs = collect(wanted)
    print(json.dumps(dict(triton_ahead.compile_all(jobs, seconds), collected_s=time.time() - START)), flush=True)


def serve(runs: int, tune_ms: float) -> None:
    """Answers each part on a line of standard input with a line of JSON: its numbers, or what went wrong."""
    import triton_ahead

    triton_ahead.shorten_autotuning(tune_ms)
    compiled = triton_ahead.count_compiled()
    answers, sys.stdout = sys.stdout, sys.stderr  # what the packages print is no answer
    for line in sys.stdin:
        compiled.clear()
        begin = time.time()
        try:
            answer = run_fla(parts(line)[0], runs)
        except torch.OutOfMemoryError as e:
            answer = dict(error=str(e).splitlines()[0])
        print(json.dumps(dict(answer, compiled=len(compiled), total_s=time.time() - begin)), file=answers, flush=True)
        gc.collect()
        torch.cuda.empty_cache()


class Fla:
    """A process that measures parts; a new one is started where it died, as after an error of a kernel."""

    def __init__(self, o: argparse.Namespace, environment: dict, log: Path):
        self.command = [sys.executable, __file__, "--serve", "--steps", str(o.steps), "--tune", str(o.tune)]
        self.command += ["--allow-hopper"] * o.allow_hopper
        self.environment, self.log, self.process = environment, log, None

    def ask(self, part: Part, seconds: float) -> dict:
        if self.process is None or self.process.poll() is not None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                                                text=True, env=self.environment)
        what, numbers = part
        with contextlib.suppress(BrokenPipeError):  # it has ended: below
            self.process.stdin.write(f"{what}:{','.join(map(str, numbers))}\n")
            self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], max(0, seconds))[0]:
            self.stop()
            return dict(error=f"no answer within {seconds:.0f} s")
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        lines = self.log.read_text().strip().splitlines()
        return dict(error=lines[-1] if lines else f"exit code {self.process.returncode}")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


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
            return dict(error=(output.read_text().strip().splitlines() or [f"exit code {process.returncode}"])[-1])
        rows = [line.split(",") for line in log.read_text().splitlines()]
        ms = median([float(r[5]) for r in rows if r[1] == "train"][3:])
        memory = re.search(r"^memory: ([0-9.]+) GiB", output.read_text(), re.MULTILINE)
    return dict(ms=ms, tokens_per_s=1e3 * batch * 1024 / ms, first_s=first or float("nan"), gib=float(memory[1]))


def our_rule(*numbers: int) -> dict:
    """Forward and backward ms, as dev/bench_delta_rule prints them; the last number is of its runs."""
    done = subprocess.run([ROOT / "dev" / "bench_delta_rule", str(numbers[-1]), *map(str, numbers[:-1])],
                          capture_output=True, text=True)
    if done.returncode:
        return dict(error=f"bench_delta_rule: {done.stderr.strip()}")
    return {name: float(ms) for name, ms in re.findall(r"^  (forward|backward) +([0-9.]+) ms", done.stdout, re.MULTILINE)}


# ---- both -------------------------------------------------------------------------------------------------------

ROWS = {"step": (("ms a step", "ms", 1), ("tokens/s", "tokens_per_s", 0), ("memory, GiB", "gib", 1),
                 ("first step, s", "first_s", 1)),
        "rule": (("forward ms", "forward", 3), ("backward ms", "backward", 3))}


class Report:
    """What is printed, and the same in the folder after each part."""

    def __init__(self, folder: Path | None):
        self.folder, self.text, self.rows = folder, [], []
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.text.append(line)
        if self.folder:
            (self.folder / "fla_speed.md").write_text("\n".join(self.text) + "\n")

    def add(self, part: Part, mine: dict, fla: dict) -> None:
        for what, key, digits in ROWS[part[0]]:
            a, b = mine.get(key), fla.get(key)
            ratio = (a / b if key == "tokens_per_s" else b / a) if a and b else None
            cells = [f"{x:,.{digits}f}" if x else "-" for x in (a, b)] + [f"{ratio:.2f}" if ratio else "-"]
            self.say(f"| {title(part)} | {what} | {' | '.join(cells)} |")
            self.rows.append([title(part), what, *(f"{x:.6g}" if x else "" for x in (a, b, ratio))])
        if self.folder:
            with (self.folder / "fla_speed.csv").open("w", newline="") as file:
                csv.writer(file).writerows([["part", "what", "train_gdn", "fla", "ratio"], *self.rows])


def compare(o: argparse.Namespace, folder: str, report: Report) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": o.cache or f"{folder}/triton", "FLA_CACHE_RESULTS": "0",
                   "PYTHONUNBUFFERED": "1"}
    log, end = Path(folder, "log"), START + 60 * o.minutes
    command = [sys.executable, __file__, "--compile", str(0.55 * (end - time.time())), "--parts", o.text]
    with log.open("w") as file:
        done = subprocess.run(command + ["--allow-hopper"] * o.allow_hopper, stdout=subprocess.PIPE, stderr=file, text=True,
                              env=environment)
    if done.returncode:
        report.say(f"fla: compiling ahead failed: {(log.read_text().strip().splitlines() or ['no output'])[-1]}")
    else:
        x = json.loads(done.stdout.strip().splitlines()[-1])
        report.say(f"fla: {x['compiled']} of {x['kernels']} kernel configurations compiled ahead ({x['failed']} cannot be) "
                   f"in {x['seconds']:.0f} s by {x['workers']} processes, {x['core_seconds']:.0f} core-seconds")
    report.say("\n| part | | train_gdn | fla | how many times better |\n|---|---|---|---|---|")
    fla, notes = Fla(o, environment, log), []
    for part in o.parts:
        if time.time() > end - 5:
            notes.append(f"{title(part)}: not measured, --minutes {o.minutes:g} were over")
            continue
        mine = (our_step if part[0] == "step" else our_rule)(*part[1], o.steps)
        theirs = fla.ask(part, end - time.time())
        report.add(part, mine, theirs)
        notes += [f"{title(part)}, {name}: {x['error']}" for name, x in (("train_gdn", mine), ("fla", theirs)) if "error" in x]
        if "total_s" in theirs:
            notes.append(f"{title(part)}, fla: {theirs['total_s']:.0f} s with autotuning, {theirs['compiled']} compiled")
    fla.stop()
    report.say("\n" + "\n".join(notes))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", default=PARTS, metavar="'PART ...'",
                   help="step:d,B,L (width, sequences, layers) or rule:B,T,Hk,Hv,dk,dv, the most important first "
                        f"['{PARTS}']")
    p.add_argument("--minutes", type=float, default=30, help="wall time for all [30]")
    p.add_argument("--steps", type=int, default=20, help="steps, or runs of a kernel [20]")
    p.add_argument("--tune", type=float, default=20, help="ms for each configuration of an autotuner; Triton has 100 [20]")
    p.add_argument("--cache", metavar="FOLDER", help="keep Triton's compiled kernels there [a temporary folder]")
    p.add_argument("-o", type=Path, metavar="FOLDER", help="write fla_speed.csv and fla_speed.md there")
    p.add_argument("--allow-hopper", action="store_true",
                   help="remove fla's refusal of its backward on Hopper with Triton 3.4 to 3.7.0 (its issue 640)")
    p.add_argument("--compile", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    p.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.steps < 5:
        sys.exit(f"fla_speed.py: --steps {o.steps}: expected 5 or more")
    o.text = o.parts
    try:
        o.parts = parts(o.text)
    except argparse.ArgumentTypeError as e:
        sys.exit(f"fla_speed.py: --parts {e}")
    if reason := others.missing_fla():
        sys.exit(f"fla_speed.py: skipped: {reason}")
    warning = others.allow_fla_on_hopper() if o.allow_hopper else None
    if o.compile:
        compile_ahead(o.parts, o.compile)
        return
    if o.serve:
        serve(o.steps, o.tune)
        return
    needed = {"train_gdn" if what == "step" else "dev/bench_delta_rule" for what, _ in o.parts}
    for program in sorted(needed):
        if not (ROOT / program).exists():
            sys.exit(f"fla_speed.py: {ROOT / program}: not built; run: make {program}")
    report = Report(o.o)
    versions = ", ".join(f"{name} {others.version(name)}" for name in ("torch", "triton", "flash-linear-attention"))
    report.say(f"{torch.cuda.get_device_name()}; {versions}; autotuning {o.tune:g} ms a configuration")
    if warning:
        report.say(f"WARNING: {warning}")
    with tempfile.TemporaryDirectory() as folder:
        compare(o, folder, report)


if __name__ == "__main__":
    main()
