#!/usr/bin/env python3
"""Loss and gradients of train_gdn against the float64 reference, on the same weights and tokens.

Runs one step of train_gdn with learning rate 0 from the checkpoint: its log has loss and gradient norm, its first
moments hold (1 - beta1) times the gradients. The reference takes the master weights, or with --round the weights
rounded to bf16 that train_gdn uses on a GPU.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from reference import find_checkpoint, is_linear, load_checkpoint, loss, read_safetensors, relative
from shards import Shards


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", help="checkpoint or run of train_gdn")
    p.add_argument("--data", required=True, help="training shards (a glob of .bin files)")
    p.add_argument("--batch", type=int, default=4, help="sequences")
    p.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    p.add_argument("--round", action="store_true", help="round Linear weights and embedding to bf16 first")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the reference")
    p.add_argument("--trainer", default=str(Path(__file__).parents[2] / "train_gdn"))
    o = p.parse_args()
    path = find_checkpoint(o.checkpoint)
    c, w = load_checkpoint(path)

    with tempfile.TemporaryDirectory() as folder:
        command = [o.trainer, "-load", path, "-i", o.data, "-T", o.length, "-B", o.batch, "-b", o.batch, "-n", 1,
                   "-lr", 0, "-clip", 0, "-b1", 0.5, "-s", 0, "-o", f"{folder}/run"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"compare.py: {' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip()}")
        with open(f"{folder}/run/log.csv") as file:
            row = next(r for r in csv.DictReader(file) if r["split"] == "train")
        ours = read_safetensors(find_checkpoint(f"{folder}/run") + "/training_state.safetensors", "moment1.")

    shards = Shards(o.data, o.length)
    starts = shards.order("ours", o.batch, 42)
    tokens = torch.stack([torch.from_numpy(shards.tokens[at:at + o.length + 1].astype("int64")) for at in starts])

    def rounded(name: str) -> bool:
        return o.round and (is_linear(name) or name in ("model.embeddings.weight", "lm_head.weight"))

    w = {name: (x.bfloat16() if rounded(name) else x).double().to(o.device).requires_grad_() for name, x in w.items()}
    want = loss(w, c, tokens.to(o.device))
    want.backward()
    norm = torch.stack([x.grad.norm() for x in w.values()]).norm().item()
    print(f"loss           ours {float(row['loss']):.6f}  float64 {want.item():.6f}")
    print(f"gradient norm  ours {float(row['grad_norm']):.6f}  float64 {norm:.6f}")
    print(f"{'gradient of':44} {'|ours - float64| / |float64|':>28} {'|float64|':>12}")
    errors = {name: relative(ours[name].double() / 0.5, x.grad.cpu()) for name, x in w.items()}
    for name, error in sorted(errors.items(), key=lambda item: -item[1]):
        print(f"{name:44} {error:28.3e} {w[name].grad.norm().item():12.3e}")


if __name__ == "__main__":
    main()
