#!/usr/bin/env python3
"""A small Qwen3-Next of transformers, random weights, trained with its own PyTorch code, with fla's kernels, and with gdn_torch.install().

    make GPU_ARCH=90a libgdn.so
    python3 dev/torch/train_qwen3_next.py --text shared/data/tinyshakespeare.txt --out $OUT    # 200 steps of each, on a GPU if there is one
    python3 dev/torch/train_qwen3_next.py --small --steps 5                                     # a CPU will do

Tokens are the text's bytes. Each way begins with the same weights and takes the same batches (AdamW, bf16 autocast on a GPU, float32 on
the CPU). "PyTorch, another seed" begins with other weights: the distance between two curves that both are right. A table has the losses
every tenth of the steps, the mean of the last tenth, the largest difference from PyTorch's curve, and the median step in ms (without
the first ten); losses.json all of them. A way that is not installed is a line that says why; one that fails ends the rest of itself.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "scripts")]
WAYS = {"torch": "PyTorch", "torch2": "PyTorch, another seed", "fla": "fla", "gdn": "train_gdn"}
FUNCTIONS = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def configuration(small: bool) -> dict:
    if small:
        return dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                    linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32,
                    num_hidden_layers=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
                    shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"], pad_token_id=0)
    return dict(vocab_size=256, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
                linear_num_key_heads=4, linear_num_value_heads=8, linear_key_head_dim=64, linear_value_head_dim=128,
                num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256,
                shared_expert_intermediate_size=512, pad_token_id=0,
                layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"])


def functions_of(way: str, qwen) -> tuple[dict, str]:
    """What stands in the place of the model's two functions, and a note."""
    if way.startswith("torch"):
        return {name: getattr(getattr(qwen, name), "__wrapped__", getattr(qwen, name)) for name in FUNCTIONS}, ""
    if way == "fla":
        import others

        import fla.ops.gated_delta_rule as rule
        note = others.allow_fla_on_hopper() or ""
        return dict(zip(FUNCTIONS, (rule.chunk_gated_delta_rule, rule.fused_recurrent_gated_delta_rule))), note
    return {}, ""


def train(way: str, qwen, data, a, device: str) -> dict:
    """Losses and the times of the steps, ms."""
    import gdn_torch
    import torch

    torch.manual_seed(a.seed + (way == "torch2"))
    model = qwen.Qwen3NextForCausalLM(qwen.Qwen3NextConfig(**configuration(a.small))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=a.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(a.seed)
    replaced, note = functions_of(way, qwen)
    result = dict(losses=[], ms=[], note=note)
    if way == "gdn":
        result["note"] = ", ".join(name for name in gdn_torch.install() if "qwen3_next" in name)
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    try:
        with mock.patch.multiple(qwen, **replaced) if replaced else mock.patch.dict({}):
            for _ in range(a.steps):
                at = torch.randint(0, len(data) - a.tokens, (a.batch,), generator=draw)
                batch = torch.stack([data[i:i + a.tokens] for i in at.tolist()]).long().to(device)
                settle()
                begin = time.perf_counter()
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    loss = model(batch, labels=batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                settle()
                result["ms"].append(1000 * (time.perf_counter() - begin))
                result["losses"].append(loss.item())
    except Exception as e:  # of any of the packages' own kinds
        result["why"] = f"{type(e).__name__}: {(str(e).strip() or repr(e)).splitlines()[0][:200]}"
    finally:
        gdn_torch.uninstall()
    return result


def table(results: dict, steps: int) -> str:
    lines = ["| step | " + " | ".join(WAYS[way] for way in results) + " |", "|---" * (1 + len(results)) + "|"]
    tenth = max(1, steps // 10)
    for step in dict.fromkeys([*range(0, steps, tenth), steps - 1]):
        cells = (f"{r['losses'][step]:.4f}" if step < len(r["losses"]) else "" for r in results.values())
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    rows: dict[str, list[str]] = {"mean of the last tenth": [], "largest difference from PyTorch's": [], "median step, ms": []}
    reference = results.get("torch", {}).get("losses", [])
    for r in results.values():
        whole = len(r["losses"]) == steps
        apart = [abs(x - y) for x, y in zip(r["losses"], reference)]
        times = r["ms"][10:] or r["ms"]
        rows["mean of the last tenth"].append(f"{statistics.mean(r['losses'][-tenth:]):.4f}" if whole else r.get("why", "none"))
        rows["largest difference from PyTorch's"].append(f"{max(apart):.4f}" if apart else "")
        rows["median step, ms"].append(f"{statistics.median(times):.1f}" if times else "")
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]) + "\n"


def main() -> int:
    p = argparse.ArgumentParser(prog="train_qwen3_next.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ways", default=",".join(WAYS), help="with commas [%(default)s]")
    p.add_argument("--steps", type=int, default=200, help="[200]")
    p.add_argument("--text", type=Path, help="[the text of this repository's README.md and dev/log.md]")
    p.add_argument("--small", action="store_true", help="a model and batches for a CPU")
    p.add_argument("--batch", type=int, help="sequences a step [16; small 2]")
    p.add_argument("--tokens", type=int, help="of a sequence [512; small 100]")
    p.add_argument("--learning_rate", type=float, default=1e-3, help="[0.001]")
    p.add_argument("--seed", type=int, default=0, help="[0]")
    p.add_argument("--out", type=Path, metavar="FOLDER", help="for losses.json and losses.md [none]")
    a = p.parse_args()
    a.batch, a.tokens = a.batch or (2 if a.small else 16), a.tokens or (100 if a.small else 512)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"train_qwen3_next.py: needs the packages {', '.join(missing)}")
    ways = a.ways.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        sys.exit(f"train_qwen3_next.py: --ways {unknown[0]}, expected of {', '.join(WAYS)}")
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    root = HERE.parents[1]
    texts = [a.text] if a.text else [root / "README.md", root / "dev/log.md"]
    data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in texts)), dtype=torch.uint8)
    if len(data) <= a.tokens:
        sys.exit(f"train_qwen3_next.py: {texts[0]} has {len(data)} bytes, expected more than --tokens {a.tokens}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict = {}
    for way in ways:
        begin = time.time()
        try:
            results[way] = train(way, qwen, data, a, device)
        except ImportError as e:
            results[way] = dict(losses=[], ms=[], why=f"not here ({e})")
        r = results[way]
        print(f"{WAYS[way]}: {len(r['losses'])} steps in {time.time() - begin:.0f} s"
              + "".join(f"; {r[k]}" for k in ("note", "why") if r.get(k)), flush=True)
    text = table(results, a.steps)
    print(f"\n{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, torch {torch.__version__}\n\n{text}")
    if a.out:
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "losses.json").write_text(json.dumps(results, indent=1) + "\n")
        (a.out / "losses.md").write_text(text)
    return 1 if any("why" in results[way] and way != "fla" for way in ways) else 0


if __name__ == "__main__":
    sys.exit(main())
