#!/usr/bin/env python3
"""The Gated Delta Network of train_gdn in plain PyTorch, under autograd: a second opinion on model and gradients.

Sources: Yang, Kautz, Hatamizadeh, arXiv 2412.06464 (model); Liu, Gu, arXiv 2606.04048 (mup, see ../../mup.h).
Parameters are a dict of tensors under flash-linear-attention's names, as in train_gdn's checkpoints. The arithmetic
is float64 or float32, whatever the parameters are; under torch.autocast Linears run in bf16, norms, gates and the
delta rule in float32.

Shapes: B sequences, T tokens, d width, H value heads, dk and dv key and value sizes of a head, C tokens of a chunk,
N chunks, V vocabulary (padded).
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass

import packages  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from shards import VOCAB, mix64, shuffled, u64

EPS = 1e-6
TAPS = 4
Parameters = dict[str, torch.Tensor]


# ---- sizes and mup's constants -----------------------------------------------------------------------------


@dataclass
class Config:
    width: int = 256
    layers: int = 8
    heads_k: int = 6
    heads_v: int = 6
    head_dim_k: int = 32
    head_dim_v: int = 64
    mlp_size: int = 768
    vocab: int = VOCAB
    padded_vocab: int = 50304
    tied: bool = True
    neg_eigval: bool = False
    base_width: int = 256
    fixed_head_size: bool = False
    parametrization: str = "mup"
    gains: str = "vector"  # train_gdn -gains: gains and taps as vectors, or like hidden weights
    gates: str = "independent"  # -gates, which initial values and SGD alone know
    readout: str = "param"  # -readout: s as the parametrization has it, or that of mup or sp
    logit_factor: float = 1.0  # -logit_factor
    base_layers: int = 0  # -L0; 0: layers
    depth_alpha: str = "1"  # -depth_alpha

    @property
    def residual_scale(self) -> float:
        """Of a layer's two branches: (L0/L)^alpha (mup.h, section 7)."""
        if self.parametrization == "sp" or self.depth_alpha == "off" or not self.base_layers:
            return 1.0
        return (self.base_layers / self.layers) ** (0.5 if self.depth_alpha == "1/2" else 1.0)

    @property
    def ratio(self) -> float:
        """r = d / d0; 1 under sp. What the logits divide by, but for logit_factor."""
        return 1.0 if self.parametrization == "sp" else self.width / self.base_width

    def fan_in_ratio(self, name: str) -> float:
        """A Linear's fan-in over the base's: r, and r_I = I / I0 for W_down. (For W_o it is r_H r_v, which is r with fixed
        heads and with heads of a fixed size.)"""
        if name.endswith("down_proj.weight") and self.ratio != 1 and self.mlp_size == default_mlp_size(self.width):
            return self.mlp_size / default_mlp_size(self.base_width)
        return self.ratio

    @property
    def logit_scale(self) -> float:
        """m_out."""
        return self.logit_factor / self.ratio

    @property
    def readout_scale(self) -> float:
        """s = dk^-1/2, or, as mup has it, dk0^-1/2 (dk/dk0)^1/2."""
        rule = self.parametrization if self.readout == "param" else self.readout
        r_k = 1.0 if self.fixed_head_size or rule != "mup" else self.width / self.base_width
        return r_k / math.sqrt(self.head_dim_k)  # dk0 = dk / r_k

    def learning_rate_scale(self, name: str) -> float:
        """AdamW's: a Linear's 1 / its fan-in's ratio, all else (embedding, head, gains, taps, time scales) 1; in blocks
        times rho^(alpha - 1)."""
        depth = (self.base_layers or self.layers) / self.layers if self.residual_scale != 1 else 1.0
        block = self.residual_scale / depth if name.startswith("model.layers.") else 1.0
        return block * (1 / self.fan_in_ratio(name) if is_linear(name) else 1.0)

    def initial_std(self, name: str) -> float:
        """Of a matrix's normal values."""
        if not is_linear(name):
            return 0.02
        if is_gate(name) and self.gates != "independent" and self.parametrization == "mup":
            r_h = self.ratio if self.fixed_head_size else 1.0
            return 0.02 * math.sqrt(r_h) / self.ratio
        return 0.02 / math.sqrt(self.fan_in_ratio(name))


CHOICES = dict(parametrization=("mup", "mup0", "sp"), gains=("vector", "hidden"), gates=("independent", "output", "aligned"),
               readout=("param", "mup", "sp"), depth_alpha=("1", "1/2", "off"))  # gdn/mup_names.h


def config_of(j: dict) -> Config:
    """Of config.json's object. A key of "train_gdn", or a value, that this file does not know is an error: it may change the
    model."""
    ours = dict(j["train_gdn"])
    known = {"vocab", "base_width", "fixed_head_size", "logit_factor", "base_layers", *CHOICES}
    if unknown := sorted(ours.keys() - known):
        raise ValueError(f"train_gdn: unknown key '{unknown[0]}', expected some of {', '.join(sorted(known))}")
    for key, choices in CHOICES.items():
        if ours.get(key, choices[0]) not in choices:
            raise ValueError(f"train_gdn: {key} '{ours[key]}', expected {', '.join(choices)}")
    return Config(j["hidden_size"], j["num_hidden_layers"], j["num_heads"], j["num_v_heads"], j["head_dim"],
                  round(j["expand_v"] * j["head_dim"]), j["intermediate_size"], padded_vocab=j["vocab_size"],
                  tied=j["tie_word_embeddings"], neg_eigval=j["allow_neg_eigval"], **ours)


def is_gate(name: str) -> bool:
    return name.endswith((".a_proj.weight", ".b_proj.weight"))


def default_mlp_size(width: int) -> int:
    """8d/3 rounded up to a multiple of 256."""
    return -(-8 * width // 768) * 256


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def make_config(width: int, layers: int = 8, heads: int = 6, base_width: int = 256) -> Config:
    """Fixed heads: dk = 3d / 4H, dv = 2 dk, MLP 8d/3 rounded up to a multiple of 256."""
    if 3 * width % (4 * heads):
        sys.exit(f"--width {width}: 3/4 of it must be a multiple of --heads {heads}")
    dk = 3 * width // (4 * heads)
    return Config(width, layers, heads, heads, dk, 2 * dk, default_mlp_size(width), base_width=base_width)


def parameter_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    d, keys, values = c.width, c.heads_k * c.head_dim_k, c.heads_v * c.head_dim_v
    shapes = {"model.embeddings.weight": (c.padded_vocab, d)}
    for layer in range(c.layers):
        at = f"model.layers.{layer}."
        shapes[at + "attn_norm.weight"] = (d,)
        for name, rows in zip("qkvgab", (keys, keys, values, values, c.heads_v, c.heads_v)):
            shapes[f"{at}attn.{name}_proj.weight"] = (rows, d)
        for name, rows in zip("qkv", (keys, keys, values)):
            shapes[f"{at}attn.{name}_conv1d.weight"] = (rows, 1, TAPS)
        shapes[at + "attn.A_log"] = (c.heads_v,)
        shapes[at + "attn.dt_bias"] = (c.heads_v,)
        shapes[at + "attn.o_norm.weight"] = (c.head_dim_v,)
        shapes[at + "attn.o_proj.weight"] = (d, values)
        shapes[at + "mlp_norm.weight"] = (d,)
        shapes[at + "mlp.gate_proj.weight"] = (c.mlp_size, d)
        shapes[at + "mlp.up_proj.weight"] = (c.mlp_size, d)
        shapes[at + "mlp.down_proj.weight"] = (d, c.mlp_size)
    shapes["model.norm.weight"] = (d,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.padded_vocab, d)
    return shapes


# ---- initial values: those of train_gdn -seed, number by number (../../gdn/random.h, parameters.h) ---------


def random_uniform(key: np.ndarray, index: np.ndarray) -> np.ndarray:
    bits = mix64(key + index * u64(0xD1342543DE82EF95))
    return ((bits >> u64(11)).astype(np.float64) + 0.5) * 2.0**-53


def initial_values(name: str, shape: tuple[int, ...], c: Config, seed: int) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    hash = 0xCBF29CE484222325  # FNV-1a of the name
    for byte in name.encode():
        hash = (hash ^ byte) * 0x100000001B3 % 2**64
    key, index = mix64(mix64(u64(seed)) ^ u64(hash)), np.arange(math.prod(shape), dtype=np.uint64)
    u = random_uniform(key, index)
    if name.endswith("conv1d.weight"):
        x = (u - 0.5) / math.sqrt(c.ratio if c.gains == "hidden" else 1)
    elif name.endswith("A_log"):
        x = np.log(1e-4 + u * (16 - 1e-4))
    elif name.endswith("dt_bias"):
        dt = np.maximum(np.exp(u * (math.log(0.1) - math.log(0.001)) + math.log(0.001)), 1e-4)
        x = dt + np.log(-np.expm1(-dt))
    else:  # pairs of Box-Muller normals
        even, odd = np.repeat(u[0::2], 2)[:len(u)], np.repeat(u[1::2], 2)[:len(u)]
        turn = np.where(index % u64(2) == 0, np.cos(2 * math.pi * odd), np.sin(2 * math.pi * odd))
        x = c.initial_std(name) * np.sqrt(-2 * np.log(even)) * turn
    return torch.from_numpy(x.astype(np.float32)).view(shape)


def initialize(c: Config, seed: int) -> Parameters:
    return {name: initial_values(name, shape, c, seed) for name, shape in parameter_shapes(c).items()}


# ---- checkpoints of train_gdn ------------------------------------------------------------------------------


def read_safetensors(path: str, prefix: str = "") -> Parameters:
    """The tensors whose name starts with prefix, without it, in float32 (or float64)."""
    types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
    tensors = {}
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            data = bytearray(file.read())
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    except (ValueError, MemoryError, OverflowError):
        sys.exit(f"{path}: not a safetensors file")
    for name, entry in header.items():
        if name != "__metadata__" and name.startswith(prefix):
            begin, end = entry["data_offsets"]
            x = torch.frombuffer(data, dtype=torch.uint8)[begin:end].clone().view(types[entry["dtype"]])
            tensors[name[len(prefix):]] = (x.float() if x.dtype == torch.bfloat16 else x).view(entry["shape"])
    return tensors


def find_checkpoint(path: str) -> str:
    """The folder itself or, for a run's folder, its newest checkpoint."""
    if os.path.exists(f"{path}/config.json"):
        return path
    steps = sorted(f.path for f in os.scandir(path) if os.path.exists(f"{f.path}/checkpoint.json")
                   and f.name.startswith("step_") and f.name[5:].isdigit()) if os.path.isdir(path) else []
    return steps[-1] if steps else sys.exit(f"{path}: no checkpoint there (config.json, step_*/)")


def load_checkpoint(path: str) -> tuple[Config, Parameters]:
    """Master weights where the checkpoint has them, else the rounded ones."""
    path = find_checkpoint(path)
    try:
        with open(f"{path}/config.json") as file:
            j = json.load(file)
        c = config_of(j)
    except (ValueError, KeyError, TypeError) as e:
        sys.exit(f"{path}/config.json: not a configuration of train_gdn ({e!r})")
    master = f"{path}/training_state.safetensors"
    w = (read_safetensors(master, "master.") if os.path.exists(master)
         else read_safetensors(f"{path}/model.safetensors"))
    for name, shape in parameter_shapes(c).items():
        if name not in w or tuple(w[name].shape) != shape:
            sys.exit(f"{path}: tensor '{name}' is {tuple(w[name].shape) if name in w else 'missing'}, expected {shape}")
    return c, w


# ---- the gated delta rule ----------------------------------------------------------------------------------
# q, k [B,T,H,dk]; v [B,T,H,dv]; g, beta [B,T,H]; both return o [B,T,H,dv]


def recurrent_steps(state, q, k, v, g, beta, scale: float):
    """S [B,H,dk,dv] after these tokens, and their o."""
    o = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * u[:, :, None]
        o.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return state, torch.stack(o, 1)


def gated_delta_rule_recurrent(q, k, v, g, beta, scale: float, piece: int = 256):
    """Token by token: the definition. The backward computes the states of `piece` tokens again at a time."""
    state = q.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])
    pieces = []
    for inputs in zip(*(x.split(piece, 1) for x in (q, k, v, g, beta))):
        state, o = checkpoint(recurrent_steps, state, *inputs, scale, use_reentrant=False)
        pieces.append(o)
    return torch.cat(pieces, 1)


def gated_delta_rule_chunked(q, k, v, g, beta, scale: float, chunk: int = 64):
    """In chunks of C tokens (dev/doc/delta_rule.md): only the state S goes from chunk to chunk."""
    batch, tokens, heads, _ = q.shape
    pad = -tokens % chunk  # zeros behind the end: beta = 0 writes nothing

    def chunks(x):  # [B,T,H,n] -> [N,B*H,C,n]
        x = F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk))
        return x.permute(1, 0, 3, 2, 4).flatten(1, 2)

    q, k, v, beta, G = (chunks(x) for x in (q, k, v, beta[..., None], g[..., None]))
    G = G.cumsum(2)  # [N,B*H,C,1]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    D = (G - G.mT).masked_fill(~lower, -torch.inf).exp()  # [N,B*H,C,C]
    A = (beta * (k @ k.mT) * D).tril(-1)
    U, W = torch.linalg.solve_triangular(  # (I + A)^-1 [beta V, beta exp(G) K]; the diagonal of A is taken as 1
        A, torch.cat([beta * v, beta * G.exp() * k], -1), upper=False, unitriangular=True).split(
            [v.shape[-1], k.shape[-1]], -1)
    k_end = (k * (G[:, :, -1:] - G).exp()).mT  # [N,B*H,dk,C]: what a write is worth at the chunk's end
    decay = G[:, :, -1:].exp()  # [N,B*H,1,1]
    state = q.new_zeros(batch * heads, k.shape[-1], v.shape[-1])
    states, writes = [], []
    for U_n, W_n, k_n, decay_n in zip(U.unbind(), W.unbind(), k_end.unbind(), decay.unbind()):
        states.append(state)
        writes.append(torch.baddbmm(U_n, W_n, state, alpha=-1))  # Vn = U - W S [B*H,C,dv]
        state = torch.baddbmm(decay_n * state, k_n, writes[-1])
    o = scale * ((q * G.exp()) @ torch.stack(states) + ((q @ k.mT) * D) @ torch.stack(writes))
    o = o.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4)  # [B,N,C,H,dv]
    return o.flatten(1, 2)[:, :tokens]


# ---- the model ---------------------------------------------------------------------------------------------


def wide(x):
    """bf16, which Linears return under autocast, as float32."""
    return x.float() if x.dtype == torch.bfloat16 else x


def rmsnorm(x, gain):
    x = wide(x)
    return gain * x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()


def short_conv(x, taps):
    """Depthwise and causal: y_t = sum_j taps_j x_{t-3+j}; x [B,T,n], taps [n,1,4]."""
    tokens, padded = x.shape[1], F.pad(wide(x), (0, 0, TAPS - 1, 0))
    return sum(taps[:, 0, j] * padded[:, j:j + tokens] for j in range(TAPS))


def mixer(h, w: Parameters, at: str, c: Config, delta_rule):
    """h [B,T,d]; tensors of this layer begin with `at`."""
    q, k, v, z, a, b = (F.linear(h, w[f"{at}{name}_proj.weight"]) for name in "qkvgab")
    with torch.autocast(h.device.type, enabled=False):
        q, k, v = (F.silu(short_conv(x, w[f"{at}{name}_conv1d.weight"])) for name, x in zip("qkv", (q, k, v)))
        q, k = (x.unflatten(-1, (c.heads_k, -1)) for x in (q, k))
        q, k = (x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt() for x in (q, k))
        q, k = (x.repeat_interleave(c.heads_v // c.heads_k, 2) for x in (q, k)) if c.heads_v > c.heads_k else (q, k)
        beta = (2 if c.neg_eigval else 1) * wide(b).sigmoid()
        g = -w[at + "A_log"].exp() * F.softplus(wide(a) + w[at + "dt_bias"])
        o = delta_rule(q, k, v.unflatten(-1, (c.heads_v, -1)), g, beta, c.readout_scale)
        y = rmsnorm(o, w[at + "o_norm.weight"]).flatten(2) * F.silu(wide(z))
    return F.linear(y, w[at + "o_proj.weight"])


def mlp(h, w: Parameters, at: str):
    gate, up = (F.linear(h, w[f"{at}{name}_proj.weight"]) for name in ("gate", "up"))
    return F.linear(F.silu(gate) * up, w[at + "down_proj.weight"])


def loss(w: Parameters, c: Config, tokens, delta_rule=gated_delta_rule_chunked):
    """Mean cross-entropy in nats; tokens [B,T+1]. Padded logits get no probability."""
    x = F.embedding(tokens[:, :-1], w["model.embeddings.weight"])
    for layer in range(c.layers):
        at = f"model.layers.{layer}."
        x = x + c.residual_scale * mixer(rmsnorm(x, w[at + "attn_norm.weight"]), w, at + "attn.", c, delta_rule)
        x = x + c.residual_scale * mlp(rmsnorm(x, w[at + "mlp_norm.weight"]), w, at + "mlp.")
    head = w["model.embeddings.weight" if c.tied else "lm_head.weight"]
    logits = F.linear(rmsnorm(x, w["model.norm.weight"]) * c.logit_scale, head)  # [B,T,V]
    return F.cross_entropy(wide(logits.flatten(0, 1)[:, :c.vocab]), tokens[:, 1:].flatten())


# ---- self-check --------------------------------------------------------------------------------------------


def relative(x, y) -> float:
    return ((x - y).norm() / y.norm().clamp_min(1e-300)).item()


def with_gradients(function, inputs: list, *args) -> list:
    """The output and the gradients of its product with fixed weights."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, *args)
    weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype, device=out.device)).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def check(device: str) -> None:
    torch.manual_seed(1)
    failed = False

    def report(what: str, error: float, bound: float) -> None:
        nonlocal failed
        failed |= not error <= bound
        print(f"{what:60} {error:9.2e}  (at most {bound:.0e})  {'ok' if error <= bound else 'FAILED'}")

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    for what, tokens, decay in (("mild decay", 150, 0.1), ("strong decay", 128, 60.0), ("no decay", 200, 0.0)):
        q, k = (F.normalize(normal(2, tokens, 3, 16), dim=-1) for _ in "qk")
        g, beta = -decay * normal(2, tokens, 3).square(), normal(2, tokens, 3).sigmoid()
        inputs = [q, k, normal(2, tokens, 3, 24), g, beta]
        want = with_gradients(gated_delta_rule_recurrent, inputs, 0.25)
        for name, x, y in zip(("o", "dq", "dk", "dv", "dg", "dbeta"),
                              with_gradients(gated_delta_rule_chunked, inputs, 0.25), want):
            report(f"chunked against recurrent, {what}: {name}", relative(x, y), 1e-10)
        got = gated_delta_rule_chunked(*(x.float() for x in inputs), 0.25)
        report(f"chunked in float32, {what}: o", relative(got.double(), want[0]), 1e-4)  # G to -4000, rounded to 2^-13

    for c in (make_config(32, 2, 2, 16), make_config(32, 2, 2)):
        if c.base_width == 256:
            c = Config(**{**vars(c), "heads_v": 4, "tied": False, "neg_eigval": True})
        w = {name: x.double().to(device) for name, x in initialize(c, 7).items()}
        tokens = torch.randint(c.vocab, (2, 101), device=device)
        rules = gated_delta_rule_recurrent, gated_delta_rule_chunked
        want, got = (with_gradients(lambda *x, rule=rule: loss(dict(zip(w, x)), c, tokens, rule), list(w.values()))
                     for rule in rules)
        report(f"model of {'tied' if c.tied else 'untied, grouped values'}: loss", relative(got[0], want[0]), 1e-10)
        report("  largest error of a gradient", max(map(relative, got[1:], want[1:])), 1e-10)

    # dataloader.h itself gave these: n = 78121, seed 42; the last two are of the second epoch
    order = shuffled(np.array([0, 1, 2, 63, 64000, 78120, 78121, 78122]), 78121, 42)
    dump = np.array([24432, 29976, 14908, 77529, 65268, 1863, 9543, 21585])
    report("data order against a dump of dataloader.h", float((order != dump).sum()), 0)
    report("data order visits everything once", float(len(set(shuffled(np.arange(999), 999, 1))) != 999), 0)
    sys.exit("reference.py: check failed" if failed else None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The model of train_gdn in plain PyTorch.")
    parser.add_argument("command", choices=["check"], help="check: compare the two forms of the delta rule in float64")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    check(parser.parse_args().device)
