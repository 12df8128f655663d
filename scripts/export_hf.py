#!/usr/bin/env python3
"""A checkpoint of train_gdn as a folder that flash-linear-attention and transformers load.

    python3 scripts/export_hf.py run_001 exported --vocab shards/vocab.txt
    python3 -c "import fla; from transformers import AutoModelForCausalLM as M; M.from_pretrained('exported')"

GatedDeltaNetForCausalLM has none of muP's multipliers, so they go into the weights, with r = width / base width:
  readout    s = r dk^-1/2 (muP, fixed heads) in place of dk^-1/2 matters to the eps of a norm alone:
             rmsnorm(s o, eps) = rmsnorm(dk^-1/2 o, eps / r^2). So norm_eps is divided by r^2, for the other norms the
             residual stream by r: embedding, o_proj and down_proj.
  logits     1/r W_emb h: the embedding divided by r does both, and stays tied. Where the readout scale is fla's (muP of
             fixed head size, mup0), or with -logit_factor f, lm_head = f/r W_emb, untied.
  depth      (L0/L)^alpha of a layer's branches: o_proj and down_proj times it.
lm_head is written for a tied model too, as one that is not tied: flash-linear-attention 0.5.2 does not load a tied one
under transformers 5 ("'list' object has no attribute 'keys'"). --tied leaves it out where it is the embedding.
Exact where r and f are powers of 2; else the scaled weights are rounded to their type once more. Rows of padding are left out:
vocab_size is the number of tokens.

./train_gdn -load takes a checkpoint itself rather than its export: of a muP export with r other than 1 it refuses
norm_eps, as its norms have a fixed eps of 1e-6, and says which checkpoint it was made from (train_gdn_export in
config.json: run folder and step).

--vocab takes a folder with OpenAI's vocab.bpe and encoder.json or Hugging Face's merges.txt and vocab.json, or the
vocab.txt of tokenize_text.py; the tokenizer then loads with AutoTokenizer. A model of bytes gets a tokenizer of 256 bytes. Without PyTorch; weights keep their type.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from pathlib import Path

from common import Error, Parser, import_package, run_main
from tokenize_text import FIRST_LINE, begins_with, gpt2_bytes, read_vocabulary, split_token

SIZES = {"F64": 8, "F32": 4, "BF16": 2}
EMBEDDING, HEAD = "model.embeddings.weight", "lm_head.weight"
END_OF_TEXT = 50256


class Tensors:
    """A safetensors file: dtype, shape and bytes by name."""

    def __init__(self, path: Path):
        if not path.exists():
            raise Error(f"{path}: no such file")
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                self.data = file.read()
            header.pop("__metadata__", None)
            self.entries = {name: (e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, KeyError, TypeError, MemoryError):
            raise Error(f"{path}: not a safetensors file") from None
        for name, (dtype, shape, begin, end) in self.entries.items():
            if dtype not in SIZES or end - begin != SIZES[dtype] * math.prod(shape) or end > len(self.data):
                raise Error(f"{path}: tensor '{name}' is {dtype} {shape}, expected F32, F64 or BF16 of that size")

    def rows(self, name: str, count: int | None = None) -> tuple[str, list[int], bytes]:
        """The tensor, or its first `count` rows."""
        dtype, shape, begin, end = self.entries[name]
        if count is not None:
            shape = [count, *shape[1:]]
            end = begin + SIZES[dtype] * math.prod(shape)
        return dtype, shape, self.data[begin:end]


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    ordered = sorted(tensors.items(), key=lambda item: -SIZES[item[1][0]])
    for name, (dtype, shape, data) in ordered:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, (_, _, data) in ordered:
            file.write(data)


def scaled(tensor: tuple[str, list[int], bytes], factor: float) -> tuple[str, list[int], bytes]:
    """The tensor times the factor, rounded to its own type (bf16 to nearest even)."""
    numpy = import_package("numpy")
    dtype, shape, data = tensor
    if dtype != "BF16":
        x = numpy.frombuffer(data, "<f4" if dtype == "F32" else "<f8")
        return dtype, shape, (x * x.dtype.type(factor)).tobytes()
    x = (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    bits = (x * numpy.float32(factor)).view("<u4")
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return dtype, shape, bits.astype("<u2").tobytes()


def newest_checkpoint(path: Path) -> Path:
    """The folder itself or, for a run's folder, its newest complete checkpoint."""
    if (path / "config.json").exists():
        return path
    steps = sorted(p.parent for p in path.glob("step_*/checkpoint.json") if p.parent.name[5:].isdigit())
    if not steps:
        raise Error(f"{path}: no checkpoint there (config.json, step_*/)")
    return steps[-1]


def write_gpt2_files(out: Path, source: Path) -> None:
    """vocab.json and merges.txt from a vocab.txt."""
    ranks = read_vocabulary(source)
    letter = {b: c for c, b in gpt2_bytes().items()}
    text_of = lambda token: "".join(letter[b] for b in token)  # noqa: E731
    ordered = sorted(ranks, key=ranks.__getitem__)
    merges = [" ".join(map(text_of, split_token(token, ranks))) for token in ordered if len(token) > 1]
    (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    ids = {text_of(token): ranks[token] for token in ordered} | {"<|endoftext|>": END_OF_TEXT}
    (out / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")


def write_tokenizer(out: Path, vocab: int, source: Path | None) -> str:
    """vocab.json, merges.txt and tokenizer_config.json; says what it did."""
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    if vocab == 256:
        ids = dict(sorted(gpt2_bytes().items(), key=lambda item: item[1]))
        (out / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (out / "merges.txt").write_text("#version: 0.2\n")
        # a token that GPT2Tokenizer must have, and may not add: a zero byte
        config |= {name: chr(256) for name in ("unk_token", "bos_token", "eos_token")}
        said = "tokenizer: 256 bytes"
    elif source is None:
        return "tokenizer: GPT-2's (AutoTokenizer.from_pretrained('gpt2')); --vocab puts its files in the folder"
    else:
        pairs = [(source / a, source / b) for a, b in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))]
        found = next(((merges, ids) for merges, ids in pairs if merges.exists() and ids.exists()), None)
        if source.is_file() and begins_with(source, FIRST_LINE):
            write_gpt2_files(out, source)
        elif found:
            shutil.copy(found[0], out / "merges.txt")
            shutil.copy(found[1], out / "vocab.json")
        else:
            raise Error(f"{source}: expected vocab.txt, or a folder with vocab.bpe and encoder.json, or merges.txt and vocab.json")
        config |= {name: "<|endoftext|>" for name in ("unk_token", "bos_token", "eos_token")}
        said = "tokenizer: GPT-2's"
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return said


def export(checkpoint: Path, out: Path, source: Path | None, tied: bool) -> None:
    try:
        config = json.loads((checkpoint / "config.json").read_text())
        ours = config.pop("train_gdn")
        vocab, parametrization = ours["vocab"], ours["parametrization"]
        ratio = 1.0 if parametrization == "sp" else config["hidden_size"] / ours["base_width"]
        logit_scale = ours.get("logit_factor", 1) / ratio
        branches = 1.0  # (L0/L)^alpha
        alpha = {"1": 1.0, "1/2": 0.5}.get(ours.get("depth_alpha", "1"))
        if "base_layers" in ours and alpha is not None and parametrization != "sp":
            branches = (ours["base_layers"] / config["num_hidden_layers"]) ** alpha
    except (ValueError, KeyError, TypeError) as e:
        raise Error(f"{checkpoint / 'config.json'}: not a configuration of train_gdn ({e!r})") from None
    readout = {"param": parametrization}.get(ours.get("readout", "param"), ours.get("readout"))
    grows = readout == "mup" and not ours["fixed_head_size"]
    stream = config["hidden_size"] / ours["base_width"] if grows else 1.0  # divides the residual stream
    tensors = Tensors(checkpoint / "model.safetensors")
    if EMBEDDING not in tensors.entries:
        raise Error(f"{checkpoint / 'model.safetensors'}: tensor '{EMBEDDING}' is missing")
    exported = {name: tensors.rows(name, vocab if name in (EMBEDDING, HEAD) else None) for name in tensors.entries}
    if not tied or (HEAD in exported and logit_scale != 1) or logit_scale != 1 / stream:
        exported[HEAD] = scaled(exported.get(HEAD, exported[EMBEDDING]), logit_scale)
    for name in exported:
        factor = 1 / stream if name == EMBEDDING else 1.0
        if name.endswith((".o_proj.weight", ".down_proj.weight")):
            factor = branches / stream
        if factor != 1:
            exported[name] = scaled(exported[name], factor)
    end = {256: None, 50257: END_OF_TEXT}.get(vocab)
    types = {"F32": "float32", "F64": "float64", "BF16": "bfloat16"}
    config |= {"vocab_size": vocab, "tie_word_embeddings": HEAD not in exported, "bos_token_id": end, "eos_token_id": end,
               "norm_eps": config["norm_eps"] / stream**2, "pad_token_id": None, "torch_dtype": types[exported[EMBEDDING][0]],
               "train_gdn_export": "/".join(checkpoint.resolve().parts[-2:])}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise Error(f"{out}: is not empty")
    said = write_tokenizer(out, vocab, source)
    write_tensors(out / "model.safetensors", exported)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {checkpoint} to {out}: {len(exported)} tensors, {'un' * (HEAD in exported)}tied, {said}")


def main(argv: list[str]) -> int:
    p = Parser(prog="export_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="checkpoint, or a run's folder (its newest one)")
    p.add_argument("out", type=Path, help="a new folder")
    p.add_argument("--vocab", type=Path, metavar="PATH", help="GPT-2's files or vocab.txt, for the tokenizer [none]")
    p.add_argument("--tied", action="store_true", help="leave out lm_head where it is the embedding")
    a = p.parse_args(argv)
    export(newest_checkpoint(a.checkpoint), a.out, a.vocab, a.tied)
    return 0


if __name__ == "__main__":
    run_main(main)
