#!/usr/bin/env python3
"""Loss and perplexity of an exported folder (scripts/export_hf.py) on token shards or bytes.

    python3 dev/torch/perplexity.py exported 'books_val_*.bin' [--length 1024] [--count 64]

--with fla loads it with GatedDeltaNetForCausalLM.from_pretrained (on a GPU), in bf16; --with torch runs OLMo-hybrid's
model of transformers on its weights, in float32 on any device. Both take nothing but the folder: the number to expect is
train_gdn's validation loss. Other files than .bin are read as bytes.
"""

import argparse
import glob
import json
import math
import sys
from pathlib import Path

import packages  # noqa: F401
import numpy as np
import torch

import others
from reference import EPS, Config, read_safetensors
from shards import Shards


def sequences(pattern: str, length: int, count: int):
    """[count,length+1] tokens, the first ones in file order."""
    if pattern.endswith(".bin"):
        shards = Shards(pattern, length)
        rows = [shards.tokens[at:at + length + 1] for at in shards.starts[:count]]
    else:
        paths = sorted(glob.glob(pattern)) or sys.exit(f"perplexity.py: no file matches '{pattern}'")
        texts = [np.fromfile(path, "u1") for path in paths]
        rows = [t[at:at + length + 1] for t in texts for at in range(0, (len(t) - 1) // length * length, length)][:count]
    if not rows:
        sys.exit(f"perplexity.py: {pattern}: holds no sequence of {length} + 1 tokens")
    return torch.from_numpy(np.stack(rows).astype("int64"))


def from_fla(folder: Path, device: str):
    from transformers import AutoModelForCausalLM

    others.fla_class()  # registers the model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    return lambda tokens: model(input_ids=tokens.to(device), use_cache=False).logits


def from_torch(folder: Path, device: str):
    """The folder alone decides: sp has no multipliers, and norm_eps is in every norm."""
    try:
        j = json.loads((folder / "config.json").read_text())
        c = Config(j["hidden_size"], j["num_hidden_layers"], j["num_heads"], j["num_v_heads"], j["head_dim"],
                   round(j["expand_v"] * j["head_dim"]), j["intermediate_size"], j["vocab_size"], j["vocab_size"],
                   j["tie_word_embeddings"], j["allow_neg_eigval"], parametrization="sp")
    except (ValueError, KeyError, TypeError) as e:
        sys.exit(f"perplexity.py: {folder}/config.json: not a configuration that export_hf.py writes ({e!r})")
    w = {name: x.to(device) for name, x in read_safetensors(str(folder / "model.safetensors")).items()}
    for module in others.olmo_model(tuple(vars(c).items())).modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= j["norm_eps"] / EPS
    return lambda tokens: others.olmo_logits(w, c, tokens.to(device))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("data", help="a glob of .bin shards, or of text files")
    p.add_argument("--length", type=int, default=1024, help="tokens in a sequence [1024]")
    p.add_argument("--count", type=int, default=64, help="sequences, from the start [64]")
    p.add_argument("--batch", type=int, default=8, help="sequences at a time [8]")
    p.add_argument("--with", dest="code", choices=["fla", "torch"], help="[fla where it can run]")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of --with torch")
    p.add_argument("--compile-ahead", action="store_true", help=argparse.SUPPRESS)
    o = p.parse_args()
    if not (o.folder / "config.json").exists():
        sys.exit(f"perplexity.py: {o.folder}: has no config.json")
    code = o.code or ("torch" if others.missing_fla() else "fla")
    if reason := others.missing_fla() if code == "fla" else others.missing_transformers():
        sys.exit(f"perplexity.py: {reason}")
    logits = (from_fla if code == "fla" else from_torch)(o.folder, o.device)
    tokens = sequences(o.data, o.length, o.count)
    total = 0.0
    with torch.no_grad():
        if code == "fla":
            import triton_ahead

            if o.compile_ahead:
                triton_ahead.compile_ahead([lambda: logits(tokens[:o.batch, :-1])])
            triton_ahead.in_another_process([__file__, *sys.argv[1:], "--compile-ahead"])
            triton_ahead.shorten_autotuning(2)
        for rows in tokens.split(o.batch):
            out = logits(rows[:, :-1]).float().flatten(0, 1)
            total += torch.nn.functional.cross_entropy(out, rows[:, 1:].to(out.device).flatten(), reduction="sum").item()
    loss = total / tokens[:, 1:].numel()
    print(f"{code}: loss {loss:.5f}, perplexity {math.exp(loss):.4f} over {len(tokens)} sequences of {o.length}")


if __name__ == "__main__":
    main()
