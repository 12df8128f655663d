#!/usr/bin/env python3
"""Small folders in the layouts of published Gated DeltaNet checkpoints: loaded by train_gdn with the loss that transformers'
code has on their weights, or refused by the key that asks for what train_gdn does not have.

    make && python3 dev/torch/field_checkpoints.py

fla's GatedDeltaNetForCausalLM (on the CPU, where it can be made but not run) makes and saves each; the loss is that of
OLMo-hybrid's model of transformers with linear layers alone (others.py), in float64 on the same weights. Layouts:
  fla's defaults    6 heads, expand_v 2, untied                              flame's 340M and 1B
  shards            8 heads, expand_v 1, float32 shards with an index, attn.D     m-a-p's 1.3B
  one gate_proj     gate and up projection in mlp.gate_proj, bf16            older fla
  value heads       4 key and 8 value heads, tied                            Primus's 300M
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import packages  # noqa: F401
import torch
from safetensors.torch import load_file, save_file

import others
from reference import Config

PROGRAM = Path(__file__).parents[2] / "train_gdn"
VOCAB, WIDTH, LAYERS, TOKENS = 256, 48, 2, 96
AGREE = 2e-5  # train_gdn computes in float32, and prints 6 digits


def fla_model(**options):
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    torch.manual_seed(0)
    config = GatedDeltaNetConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, vocab_size=VOCAB,
                                 **{"num_heads": 6, "head_dim": 8, **options})
    model = GatedDeltaNetForCausalLM(config)
    with torch.no_grad():  # larger than initial values, so that gates, norms and the delta rule bend
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(8)
            elif name.endswith("norm.weight"):
                p.add_(0.2 * torch.randn_like(p))
    return model


def save(folder: Path, model, extra=None, rename=None, dtype=torch.float32, **options) -> None:
    """As save_pretrained does it; `rename` makes the tensors of the layout from those of today."""
    model.to(dtype).save_pretrained(folder, **options)
    if not (extra or rename):
        return
    for path in sorted(folder.glob("*.safetensors")):
        w = load_file(path)
        w = rename(w) if rename else w
        if extra and path == sorted(folder.glob("*.safetensors"))[0]:
            w |= extra
            index = folder / "model.safetensors.index.json"
            if index.exists():
                listed = json.loads(index.read_text())
                listed["weight_map"] |= {name: path.name for name in extra}
                index.write_text(json.dumps(listed))
        save_file({name: x.contiguous() for name, x in w.items()}, path, metadata={"format": "pt"})


def one_gate_proj(w: dict) -> dict:
    out = {name: x for name, x in w.items() if ".mlp.up_proj" not in name}
    for l in range(LAYERS):
        at = f"model.layers.{l}.mlp."
        out[at + "gate_proj.weight"] = torch.cat([w[at + "gate_proj.weight"], w[at + "up_proj.weight"]])
    return out


LOADED = {
    "fla's defaults": (dict(), dict()),
    "shards": (dict(num_heads=8, expand_v=1), dict(max_shard_size="40KB", extra={
        f"model.layers.{l}.attn.D": torch.ones(8) for l in range(LAYERS)})),
    "one gate_proj": (dict(), dict(rename=one_gate_proj, dtype=torch.bfloat16)),
    "value heads": (dict(num_heads=4, num_v_heads=8, expand_v=1, tie_word_embeddings=True), dict()),
}
REFUSED = {  # options, and the key that the refusal names
    "no short convolution": (dict(use_short_conv=False), "'use_short_conv' is false"),
    "another gate": (dict(output_gate_activation="sigmoid"), "'output_gate_activation' is \"sigmoid\""),
    "another eps": (dict(norm_eps=1e-5), "'norm_eps' is 1e-05"),
    "no gate": (dict(use_gate=False), "'use_gate' is false"),
    "softmax layers": (dict(), "'attn' is "),
    "biased convolution": (dict(conv_bias=True), "'conv_bias' is true"),
}


def config_of(model) -> Config:
    c = model.config
    return Config(c.hidden_size, c.num_hidden_layers, c.num_heads, c.num_v_heads or c.num_heads, c.head_dim,
                  int(c.expand_v * c.head_dim), model.model.layers[0].mlp.intermediate_size, c.vocab_size, c.vocab_size,
                  c.tie_word_embeddings, c.allow_neg_eigval, parametrization="sp")


def train_gdn(folder: Path, data: Path) -> subprocess.CompletedProcess:
    return subprocess.run([PROGRAM, "-d", "cpu", "-load", folder, "-eval", data, "-T", str(TOKENS)], capture_output=True, text=True)


def main() -> None:
    if reason := others.missing_transformers() or (others.version("flash-linear-attention") is None and "fla is not installed"):
        sys.exit(f"field_checkpoints.py: {reason}")
    if not PROGRAM.exists():
        sys.exit(f"field_checkpoints.py: {PROGRAM}: not built; run: make")
    with tempfile.TemporaryDirectory() as name:
        work, failed = Path(name), []
        text = torch.randint(VOCAB, (TOKENS + 1,), generator=torch.Generator().manual_seed(1))
        data = work / "data.txt"
        data.write_bytes(bytes(text.tolist()))
        for layout, (options, how) in LOADED.items():
            model, folder = fla_model(**options), work / layout.replace(" ", "_")
            save(folder, model, **how)
            w = {n: x.detach().double() for n, x in model.state_dict().items()}
            if model.config.tie_word_embeddings:
                w.pop("lm_head.weight", None)
            with others.in_float64():
                want = others.olmo_loss(w, config_of(model), text[None]).item()
            done = train_gdn(folder, data)
            got = float(done.stdout.split("loss ")[1].split()[0]) if "loss " in done.stdout else None
            files = len(list(folder.glob("*.safetensors")))
            print(f"{layout}: {files} file(s), transformers {want:.6f}, train_gdn {got} {done.stderr.strip()}")
            if got is None or not abs(got - want) < AGREE * want:
                failed.append(layout)
        for layout, (options, expected) in REFUSED.items():
            folder = work / layout.replace(" ", "_")
            fla_model(**options).save_pretrained(folder)
            if layout == "softmax layers":  # which fla makes where flash-attn is installed
                config = json.loads((folder / "config.json").read_text())
                (folder / "config.json").write_text(json.dumps(config | {"attn": {"layers": [1], "num_heads": 2}}))
            done = train_gdn(folder, data)
            print(f"{layout}: {done.stderr.strip().replace(str(work), '')}")
            if done.returncode != 1 or expected not in done.stderr:
                failed.append(layout)
    if failed:
        sys.exit(f"field_checkpoints.py: not as expected: {', '.join(failed)}")


if __name__ == "__main__":
    main()
