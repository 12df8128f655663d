#!/usr/bin/env python3
"""Loss and gradients of train_gdn and of other implementations against the float64 reference.

    python3 dev/torch/compare.py run_001 [--data 'shards_*.bin'] [--round] [--length 512]

Runs one step of train_gdn with learning rate 0 from the checkpoint: its log has loss and gradient norm, its first
moments hold (1 - beta1) times the gradients. The same weights and tokens go through the float64 reference and, where
these are installed, through OLMo-hybrid's model in transformers (float64, float32, and float32 under bf16 autocast) and
flash-linear-attention's GatedDeltaNetForCausalLM (float32 under bf16 autocast, on a GPU). All take the master weights,
or with --round those rounded to bf16 that train_gdn uses on a GPU. Without --data the tokens are random.

fla's kernels are compiled by a process of their own (triton_ahead.py), and its gradients are run twice over poisoned memory
(written.py): what a kernel of it did not write is called that, and is no error of fla.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

import packages  # noqa: F401
import torch

import others
import written
from reference import Config, find_checkpoint, is_linear, load_checkpoint, loss, read_safetensors, relative
from shards import Shards, shuffled, write_shard

SEED = 42  # of train_gdn's order of the data


def random_data(path: str, c: Config, batch: int, length: int):
    """Writes a shard or, for a model of bytes, a text of `batch` sequences; returns its path and the batch."""
    import numpy as np

    tokens = np.random.default_rng(1).integers(0, c.vocab, batch * length + 1)
    if c.vocab == 256:
        path += ".txt"
        tokens.astype("uint8").tofile(path)
    else:
        path += ".bin"
        write_shard(path, tokens)
    starts = length * shuffled(np.arange(batch), batch, SEED)
    return path, torch.stack([torch.from_numpy(tokens[at:at + length + 1]) for at in starts])


def one_step(o, path: str, data: str, folder: str) -> tuple[dict, dict]:
    """train_gdn's row of the log and its gradients."""
    command = [o.trainer, "-load", path, "-i", data, "-T", o.length, "-B", o.batch, "-b", o.batch, "-n", 1, "-lr", 0,
               "-clip", 0, "-b1", 0.5, "-s", 0, "-seed", SEED, "-o", f"{folder}/run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"compare.py: {' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip()}")
    with open(f"{folder}/run/log.csv") as file:
        lines = (line for line in file if not line.startswith("#"))  # where a log says what it is of
        row = next(r for r in csv.DictReader(lines) if r["split"] == "train")
    moments = read_safetensors(find_checkpoint(f"{folder}/run") + "/training_state.safetensors", "moment1.")
    return row, {name: x.double() / 0.5 for name, x in moments.items()}


def with_gradients(function, w: dict, c: Config, tokens, dtype: torch.dtype):
    w = {name: x.to(tokens.device, dtype, copy=True).requires_grad_() for name, x in w.items()}
    value = function(w, c, tokens)
    value.backward()
    return value.item(), {name: x.grad.double().cpu() for name, x in w.items()}


def checked_fla(w: dict, c: Config, tokens):
    """fla's loss and gradients, where every gradient is shown to be written."""
    def call() -> dict:
        value, gradients = with_gradients(others.fla_loss, w, c, tokens, torch.float32)
        return {"the loss": torch.tensor(value, dtype=torch.float64), **gradients}

    with others.fla_configurations(c.head_dim_k):
        gradients = written.checked(call)
    return gradients.pop("the loss").item(), gradients


def compile_fla_ahead(o, w: dict, c: Config) -> None:
    """Ends this process. The tokens do not matter."""
    import triton_ahead

    if o.allow_hopper:
        others.allow_fla_on_hopper()
    tokens = torch.zeros(o.batch, o.length + 1, dtype=torch.int64, device=o.device)
    with others.fla_configurations(c.head_dim_k):
        triton_ahead.compile_ahead([lambda: with_gradients(others.fla_loss, w, c, tokens, torch.float32)])


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", help="checkpoint or run of train_gdn")
    p.add_argument("--data", help="training shards (a glob of .bin files) [random tokens]")
    p.add_argument("--batch", type=int, default=4, help="sequences [4]")
    p.add_argument("--length", type=int, default=512, help="tokens in a sequence [512]")
    p.add_argument("--round", action="store_true", help="round Linear weights and embedding to bf16 first")
    p.add_argument("--allow-hopper", action="store_true", help="remove fla's refusal on Hopper (its issue 640)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="of the others [cuda where there is one]")
    p.add_argument("--trainer", default=str(Path(__file__).parents[2] / "train_gdn"))
    p.add_argument("--compile-ahead", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args()
    path = find_checkpoint(o.checkpoint)
    c, w = load_checkpoint(path)
    if o.compile_ahead:
        compile_fla_ahead(o, w, c)
    with tempfile.TemporaryDirectory() as folder:
        if o.data:
            data, shards = o.data, Shards(o.data, o.length)
            starts = shards.order("ours", o.batch, SEED)
            rows = [torch.from_numpy(shards.tokens[at:at + o.length + 1].astype("int64")) for at in starts]
            tokens = torch.stack(rows)
        else:
            data, tokens = random_data(f"{folder}/random", c, o.batch, o.length)
        row, ours = one_step(o, path, data, folder)
    tokens = tokens.to(o.device)

    def rounded(name: str) -> bool:
        return o.round and (is_linear(name) or name in ("model.embeddings.weight", "lm_head.weight"))

    w = {name: x.bfloat16().float() if rounded(name) else x for name, x in w.items()}
    exact_loss, exact = with_gradients(loss, w, c, tokens, torch.float64)
    columns = {"train_gdn": (float(row["loss"]), ours)}
    if reason := others.missing_transformers():
        print(f"without transformers: {reason}")
    else:
        with others.in_float64():
            columns["hf float64"] = with_gradients(others.olmo_loss, w, c, tokens, torch.float64)
        columns["hf float32"] = with_gradients(others.olmo_loss, w, c, tokens, torch.float32)
        columns["hf bf16"] = with_gradients(others.olmo_bf16_loss, w, c, tokens, torch.float32)
    if reason := others.missing_fla():
        print(f"without fla: {reason}")
    else:
        if o.allow_hopper and (warning := others.allow_fla_on_hopper()):
            print(f"WARNING: {warning}")
        import triton_ahead

        triton_ahead.in_another_process([__file__, *sys.argv[1:], "--compile-ahead"])
        triton_ahead.shorten_autotuning(2)
        try:
            columns["fla"] = checked_fla(w, c, tokens)
        except written.NotWritten as e:
            print(f"without fla: {e}: this script's fault, not fla's")
        except Exception as e:  # of any of the packages' own kinds
            print(f"without fla: {(str(e) or repr(e)).splitlines()[0]} (--allow-hopper removes a refusal)")

    def norm(gradients: dict) -> float:
        return torch.stack([x.norm() for x in gradients.values()]).norm().item()

    print(f"{'':44} {'float64':>12} {' '.join(f'{name:>12}' for name in columns)}")
    print(f"{'loss':44} {exact_loss:12.6f} {' '.join(f'{value:12.6f}' for value, _ in columns.values())}")
    print(f"{'norm of the gradient':44} {norm(exact):12.6f} {' '.join(f'{norm(g):12.6f}' for _, g in columns.values())}")
    print("gradient of: |x - float64| / |float64|")
    errors = {name: [relative(g[name], x) for _, g in columns.values()] for name, x in exact.items()}
    for name, of_columns in sorted(errors.items(), key=lambda item: -item[1][0]):
        print(f"{name:44} {exact[name].norm().item():12.3e} {' '.join(f'{e:12.2e}' for e in of_columns)}")


if __name__ == "__main__":
    main()
