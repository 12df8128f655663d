#!/usr/bin/env python3
"""Trains the model of reference.py with torch.optim.AdamW: the reference run (d = 256, L = 8, H = 6, T = 512,
64 sequences a step, 1,000 steps, mup) by an independent implementation, to be compared with train_gdn's.

With --order ours and the same --seed (or --init CHECKPOINT) it starts from the same weights and sees the same tokens as
train_gdn, so that losses can be compared step by step.
"""

import argparse
import math
import sys
import time

import packages  # noqa: F401
import torch

from reference import Config, Parameters, initialize, is_linear, load_checkpoint, loss, make_config
from shards import Shards


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--data", required=True, help="folder of .bin shards")
    add("--train", default="*_train_*.bin", help="training shards in --data")
    add("--val", default="*_val_*.bin", help="validation shards in --data")
    add("--width", type=int, default=256)
    add("--base-width", type=int, default=256)
    add("--layers", type=int, default=8)
    add("--heads", type=int, default=6, help="fixed heads: their sizes grow with the width")
    add("--length", type=int, default=512, help="tokens in a sequence, T")
    add("--batch", type=int, default=64, help="sequences in a step")
    add("--micro", type=int, default=0, help="sequences in a micro-batch; 0: by width")
    add("--steps", type=int, default=1000)
    add("--warmup", type=int, default=-1, help="-1: a tenth of the steps")
    add("--lr", type=float, default=4e-3, help="peak learning rate at the base width")
    add("--min-lr", type=float, default=-1, help="learning rate at the last step; -1: --lr / 20")
    add("--wd", type=float, default=0.1)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, 0: no clipping")
    add("--init", default="", help="checkpoint or run of train_gdn to take model and weights from; none: train_gdn's "
        "initial values for --init-seed")
    add("--seed", type=int, default=42, help="of the data order")
    add("--init-seed", type=int, default=42, help="of the initial values")
    add("--order", choices=["ours", "sequential", "random"], default="ours",
        help="ours: dataloader.h's; sequential: file order; random: random places with replacement")
    add("--decay-all", action="store_true", help="decay every tensor, not only Linear weights")
    add("--amp", choices=["bf16", "none"], default="bf16", help="none: float32, TF32 off")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--time-limit", type=float, default=math.inf, help="seconds of training; then validate and stop")
    add("--every", type=int, default=50, help="steps between printed lines")
    o = p.parse_args()
    if o.batch % (o.micro or 1):
        sys.exit(f"--batch {o.batch}: must be a multiple of --micro {o.micro}")
    o.warmup = o.steps // 10 if o.warmup < 0 else o.warmup
    o.min_lr = o.lr / 20 if o.min_lr < 0 else o.min_lr
    return o


def learning_rate(o: argparse.Namespace, step: int) -> float:
    """Schedule of gdn/optimizer.h; step counts from 1."""
    if step <= o.warmup:
        return o.lr * step / o.warmup
    progress = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * progress))


def make_optimizer(w: Parameters, c: Config, o: argparse.Namespace) -> torch.optim.AdamW:
    groups: dict[tuple[float, float], list] = {}
    for name, x in w.items():
        decay = o.wd if o.decay_all or is_linear(name) or name == "lm_head.weight" else 0.0
        groups.setdefault((c.learning_rate_scale(name), decay), []).append(x)
    return torch.optim.AdamW([dict(params=x, scale=scale, weight_decay=decay) for (scale, decay), x in groups.items()],
                             lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=o.device.startswith("cuda"))


class Batches:
    """Rows of tokens [rows,T+1] int64 on the device."""

    def __init__(self, shards: Shards, device: str):
        self.tokens = torch.from_numpy(shards.tokens).to(torch.int32).to(device)
        self.span = torch.arange(shards.length + 1, device=device)

    def rows(self, starts) -> torch.Tensor:
        at = torch.as_tensor(starts, device=self.span.device)
        return self.tokens[at[:, None] + self.span].long()


def main() -> None:
    o = parse()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    c, w = load_checkpoint(o.init) if o.init else (make_config(o.width, o.layers, o.heads, o.base_width), None)
    if c.gains != "vector":
        sys.exit(f"--init {o.init}: trained with -gains {c.gains}, expected vector")
    w = w or initialize(c, o.init_seed)
    w = {name: x.float().to(o.device).requires_grad_() for name, x in w.items()}
    most = max(1, 64 * 512 * 512 // (max(512, c.width) * o.length))  # 50 GB by estimate
    micro = o.micro or max(n for n in range(1, most + 1) if o.batch % n == 0)
    train, validation = (Shards(f"{o.data}/{pattern}", o.length) for pattern in (o.train, o.val))
    starts = train.order(o.order, o.steps * o.batch, o.seed).reshape(o.steps, o.batch)
    batches, validation_batches = Batches(train, o.device), Batches(validation, o.device)
    optimizer = make_optimizer(w, c, o)
    print(" ".join(f"{name}={value}" for name, value in vars(o).items()))
    print(c)
    gpu = torch.cuda.get_device_name() if o.device.startswith("cuda") else "CPU"
    print(f"{sum(x.numel() for x in w.values())} parameters, micro-batches of {micro}, {len(train.starts)} sequences "
          f"an epoch, torch {torch.__version__}, {gpu}", flush=True)

    def autocast():
        return torch.autocast(o.device.split(":")[0], torch.bfloat16, enabled=o.amp == "bf16")

    begin = time.time()
    for step in range(1, o.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(o, step) * group["scale"]
        total = torch.zeros((), device=o.device)
        for first in range(0, o.batch, micro):
            with autocast():
                part = loss(w, c, batches.rows(starts[step - 1, first:first + micro])) * (micro / o.batch)
            part.backward()
            total += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(w.values(), o.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 1 or step % o.every == 0 or step == o.steps:
            seconds = time.time() - begin
            print(f"step {step}/{o.steps}  loss {total.item():.6f}  lr {learning_rate(o, step):.3e}  norm "
                  f"{norm.item():.6f}  {seconds:.1f} s", flush=True)
            if not math.isfinite(total.item()):
                sys.exit(f"train_reference.py: the loss of step {step} is not finite; lower --lr")
        if time.time() - begin > o.time_limit:
            print(f"stopped by --time-limit {o.time_limit:g} after step {step}: the schedule is not complete")
            break

    count, total = len(validation.starts), torch.zeros((), dtype=torch.float64, device=o.device)
    for first in range(0, count, micro):
        rows = validation_batches.rows(validation.starts[first:first + micro])
        with torch.no_grad(), autocast():
            total += loss(w, c, rows).double() * len(rows)
    print(f"validation after step {step}: loss {total.item() / count:.4f} over {count} sequences")


if __name__ == "__main__":
    main()
