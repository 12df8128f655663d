#!/usr/bin/env python3
"""Writes the golden files that test_gdn reads (gdn/tests/golden/*.safetensors, gdn/tests/test_golden.cpp).

    python3 dev/torch/golden.py            writes them        (needs torch, transformers >= 5, safetensors)
    python3 dev/torch/golden.py --check    says whether those in the repository are the same numbers

Inputs, outputs and gradients of the gated delta rule, of one mixer and of a small model (gdn/tests/golden/README.md). The numbers are those of
transformers' code, its casts to float32 lifted to float64, and must agree to 1e-12 with reference.py, which was
written for this project from the equations; else nothing is written. Inputs are bf16 numbers, so that a GPU's layers
get them unrounded; outputs are rounded to float32.
"""

import argparse
import sys
from pathlib import Path

import packages  # noqa: F401
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

import others
from reference import Config, gated_delta_rule_recurrent, initialize, loss, mixer, recurrent_steps, relative

FOLDER = Path(__file__).parents[2] / "gdn" / "tests" / "golden"
AGREE = 1e-12


def bf16(x):
    """The nearest bf16 numbers, in float64."""
    return x.bfloat16().double()


def gradients(function, inputs: dict, weights=None):
    """The output and the gradients of sum(output * weights)."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = function(**inputs)
    grads = torch.autograd.grad((out * weights).sum() if weights is not None else out, list(inputs.values()))
    return [out.detach(), *grads]


def agreed(what: str, theirs: list, ours: list, names: list) -> dict:
    """Their numbers by name, where ours agree."""
    for name, x, y in zip(names, theirs, ours):
        error = relative(x, y)
        if not error < AGREE:
            sys.exit(f"golden.py: {what}: {name} of transformers and of reference.py differ by {error:.1e}")
    print(f"{what}: largest difference {max(map(relative, theirs, ours)):.1e}")
    return {name: x.float() for name, x in zip(names, theirs)}


def delta_rule(decay: str, tokens: int, batch: int = 1, heads_k: int = 1, heads_v: int = 2, dk: int = 16, dv: int = 32):
    """s = 1/4. Strong decay: a fifth of the tokens forget all but e^-50..0, as where a document begins; beta near 1:
    each write overwrites; beta to 2: negative eigenvalues, hardly any decay."""
    r = torch.Generator().manual_seed(len(decay))
    normal = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    q, k = (bf16(F.normalize(normal(batch, tokens, heads_k, dk), dim=-1)) for _ in "qk")
    v, d_o = bf16(normal(batch, tokens, heads_v, dv)), bf16(normal(batch, tokens, heads_v, dv))
    gates = batch, tokens, heads_v
    u = uniform(*gates)
    g, beta = {
        "strong_decay": (torch.where(u < 0.2, -50 * uniform(*gates), -2 * uniform(*gates)), uniform(*gates)),
        "beta_near_1": (-0.1 * uniform(*gates), 1 - 1e-3 * uniform(*gates)),
        "beta_to_2": (-0.002 * uniform(*gates), 2 * uniform(*gates)),
    }[decay]
    inputs = dict(q=q, k=k, v=v, g=g.float().double(), beta=beta.float().double())
    with others.in_float64():
        theirs = gradients(lambda **x: others.transformers_recurrent(**x, scale=0.25), inputs, d_o)
        chunked = gradients(lambda **x: others.transformers_chunked(**x, scale=0.25), inputs, d_o)

    def expanded(q, k, v, g, beta):
        return gated_delta_rule_recurrent(others.same_heads(q, v), others.same_heads(k, v), v, g, beta, 0.25)

    ours = gradients(expanded, inputs, d_o)
    names = ["o"] + ["d" + name for name in inputs]
    agreed(f"delta rule, {decay}, in chunks", chunked, ours, names)
    outputs = agreed(f"delta rule, {decay}", theirs, ours, names)
    stored = {name: x.bfloat16() for name, x in {**inputs, "d_o": d_o}.items() if name not in ("g", "beta")}
    return {**stored, "g": g.float(), "beta": beta.float(), **outputs}


def delta_rule_with_states(regime: str, lengths: list[int], heads_k: int = 1, heads_v: int = 2, dk: int = 16, dv: int = 32):
    """s = 1/4. Documents one after the other, each from a state to a state of its own, and the gradients of
    sum(o d_o) + sum(final_state d_final_state). Long memory: a decay of at most e^-0.002 a token, so that the first state is
    still read at the end; beta near 0: hardly anything is written."""
    r = torch.Generator().manual_seed(len(regime))
    normal = lambda *shape: torch.randn(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    uniform = lambda *shape: torch.rand(*shape, generator=r, dtype=torch.float64)  # noqa: E731
    tokens, count = sum(lengths), len(lengths)
    q, k = (bf16(F.normalize(normal(1, tokens, heads_k, dk), dim=-1)) for _ in "qk")
    v, d_o = bf16(normal(1, tokens, heads_v, dv)), bf16(normal(1, tokens, heads_v, dv))
    state, d_state = bf16(normal(count, heads_v, dk, dv)), bf16(normal(count, heads_v, dk, dv))
    gates = 1, tokens, heads_v
    g, beta = {
        "documents": (-0.5 * uniform(*gates), 2 * uniform(*gates)),
        "long_memory": (-0.002 * uniform(*gates), uniform(*gates)),
        "beta_near_0": (-0.1 * uniform(*gates), 1e-3 * uniform(*gates)),
    }[regime]
    inputs = dict(q=q, k=k, v=v, g=g.float().double(), beta=beta.float().double(), initial_state=state)

    def by_document(function):
        """o and final_state, and the gradients."""
        x = {name: y.detach().clone().requires_grad_() for name, y in inputs.items()}
        parts = [x[name].split(lengths, 1) if name != "initial_state" else x[name].split(1) for name in x]
        o, last = (torch.cat(y, axis) for y, axis in zip(zip(*(function(*part) for part in zip(*parts))), (1, 0)))
        grads = torch.autograd.grad((o * d_o).sum() + (last * d_state).sum(), list(x.values()))
        return [o.detach(), last.detach(), *grads]

    def of_transformers(function):
        def call(q, k, v, g, beta, state):
            o, last = function(others.same_heads(q, v), others.same_heads(k, v), v, g, beta, initial_state=state,
                               output_final_state=True)
            return 0.25 * dk ** 0.5 * o, last
        return call

    def ours(q, k, v, g, beta, state):
        return recurrent_steps(state, others.same_heads(q, v), others.same_heads(k, v), v, g, beta, 0.25)[::-1]

    with others.in_float64():
        theirs = by_document(of_transformers(others.olmo().torch_recurrent_gated_delta_rule))
        chunked = by_document(of_transformers(others.qwen().torch_chunk_gated_delta_rule))
    names = ["o", "final_state", *("d" + name for name in "q k v g beta".split()), "d_initial_state"]
    agreed(f"delta rule, {regime}, in chunks", chunked, by_document(ours), names)
    outputs = agreed(f"delta rule, {regime}", theirs, by_document(ours), names)
    stored = {name: x.bfloat16() for name, x in dict(q=q, k=k, v=v, d_o=d_o, initial_state=state, d_final_state=d_state).items()}
    return {**stored, "g": g.float(), "beta": beta.float(), **outputs,
            "cu_seqlens": torch.tensor([sum(lengths[:n]) for n in range(count + 1)], dtype=torch.int32)}


# d0 = 16, so logits are halved and s = 2 dk^-1/2; value heads in groups of two; the vocabulary is padded
CONFIG = Config(width=32, layers=2, heads_k=2, heads_v=4, head_dim_k=16, head_dim_v=16, mlp_size=48, vocab=60,
                padded_vocab=64, tied=False, neg_eigval=False, base_width=16)


def weights(c: Config) -> dict:
    """Initial values, but matrices large enough for gates, norms and the delta rule to bend."""
    w = initialize(c, 1)
    r = torch.Generator().manual_seed(5)
    for name, x in w.items():
        if name.endswith(("_proj.weight", "embeddings.weight", "lm_head.weight")):
            w[name] = 10 * x
        elif name.endswith("norm.weight"):
            w[name] = 1 + 0.2 * torch.randn(x.shape, generator=r)
    return {name: bf16(x) for name, x in w.items()}


def one_mixer(c: Config, tokens: int):
    at = "model.layers.0.attn."
    r = torch.Generator().manual_seed(3)
    normal = lambda: bf16(torch.randn(2, tokens, c.width, generator=r, dtype=torch.float64))  # noqa: E731
    inputs = {"h": normal(), **{name: x for name, x in weights(c).items() if name.startswith(at)}}
    dy = normal()

    def call(function):
        return gradients(lambda **x: function(x["h"], x), inputs, dy)

    with others.in_float64():
        theirs = call(lambda h, w: others.qwen_mixer(h, w, at, c))
        olmos = call(lambda h, w: others.olmo_mixer(h, w, at, c))
    ours = call(lambda h, w: mixer(h, w, at, c, gated_delta_rule_recurrent))
    names = ["y"] + ["grad." + name for name in inputs]
    agreed("OLMo-hybrid's mixer", olmos, ours, names)
    outputs = agreed("Qwen3-Next's mixer", theirs, ours, names)
    return {**{name: x.bfloat16() for name, x in {**inputs, "dy": dy}.items()}, **outputs}


def small_model(c: Config, tokens: int):
    w = weights(c)
    text = torch.randint(c.vocab, (2, tokens + 1), generator=torch.Generator().manual_seed(4))
    with others.in_float64():
        theirs = gradients(lambda **x: others.olmo_loss(x, c, text), w)
    ours = gradients(lambda **x: loss(x, c, text, gated_delta_rule_recurrent), w)
    outputs = agreed("OLMo-hybrid's model, linear layers alone", theirs, ours, ["loss"] + ["grad." + n for n in w])
    outputs["loss"] = outputs["loss"].reshape(1)
    return {**{name: x.bfloat16() for name, x in w.items()}, **outputs, "inputs": text[:, :-1].int().contiguous(),
            "targets": text[:, 1:].int().contiguous()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare with the files in the repository, write nothing")
    check = p.parse_args().check
    if reason := others.missing_transformers():
        sys.exit(f"golden.py: {reason}")
    files = {f"delta_rule_{regime}": lambda regime=regime: delta_rule(regime, 139)
             for regime in ("strong_decay", "beta_near_1", "beta_to_2")}
    files |= {f"delta_rule_{regime}": lambda regime=regime, lengths=lengths: delta_rule_with_states(regime, lengths)
              for regime, lengths in (("documents", [1, 64, 75]), ("long_memory", [140]), ("beta_near_0", [70, 70]))}
    files |= {"mixer": lambda: one_mixer(CONFIG, 70), "model": lambda: small_model(CONFIG, 70)}
    total, changed = 0, False
    for name, make in files.items():
        path, tensors = FOLDER / f"{name}.safetensors", make()
        if check:
            with safe_open(path, "pt") as file:
                stored = {key: file.get_tensor(key) for key in file.keys()}
            worst = max(relative(stored[key].double(), x.double()) for key, x in tensors.items())
            changed |= stored.keys() != tensors.keys() or not worst < 1e-6
            print(f"{path.name}: largest difference to what is stored {worst:.1e}")
        else:
            save_file({key: x.contiguous() for key, x in tensors.items()}, path)
        total += path.stat().st_size
    print(f"{total} bytes in {FOLDER.name}/")
    if changed:
        sys.exit("golden.py: the stored files are not these numbers")


if __name__ == "__main__":
    main()
