"""The same layer and model built from other people's code, under this project's tensor names.

transformers >= 5 (https://github.com/huggingface/transformers): torch_chunk_gated_delta_rule and
torch_recurrent_gated_delta_rule, the mixers of Qwen3-Next and OLMo-hybrid, and OLMo-hybrid's model with linear layers
alone. flash-linear-attention (https://github.com/fla-org/flash-linear-attention): chunk_gated_delta_rule and
GatedDeltaNetForCausalLM, on a GPU.

Three of this project's constants have no place in their code. The logits' scale 1/r multiplies the output matrix, the
multiplier of the branches W_o and W_down. The
readout scale s, theirs is dk^-1/2, only enters a norm: rmsnorm(s o, eps) = rmsnorm(dk^-1/2 o, eps / (s^2 dk)), so the
norm's eps takes it. Both are exact.

Shapes as in reference.py; q and k may have fewer heads than v.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import math
import os
from unittest import mock

import packages  # noqa: F401
import torch
import torch.nn.functional as F
from torch.func import functional_call

from reference import EPS, Config, Parameters

# What a shortened autotuning chose stays out of Triton's cache, where a measurement of times would find it. (fla reads this
# as it is imported.)
os.environ.setdefault("FLA_CACHE_RESULTS", "0")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_transformers() -> str | None:
    """Why transformers' code cannot be used here, or None."""
    have = version("transformers")
    if have is None or int(have.split(".")[0]) < 5:
        return f"transformers {have or 'is not installed'}, 5 or newer is needed"
    return None


def missing_fla() -> str | None:
    """Why flash-linear-attention cannot be used here, or None."""
    if version("flash-linear-attention") is None:
        return "flash-linear-attention is not installed"
    return None if torch.cuda.is_available() else "flash-linear-attention needs a GPU"


@contextlib.contextmanager
def in_float64():
    """Lets code that rounds to float32 on the way keep float64: its torch.float32 and .float() mean float64. It is
    imported before that, as it imports fla, whose defaults would else stay float64."""
    olmo(), qwen()
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch.Tensor, "float",
                                                                              torch.Tensor.double):
        yield


@functools.lru_cache
def plain_torch(module: str):
    """A modeling file of transformers with its own PyTorch functions, where it would take fla's kernels."""
    code = importlib.import_module(f"transformers.models.{module}")
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn"):
        setattr(code, name, inspect.unwrap(getattr(code, name)))
    return code


def olmo():
    return plain_torch("olmo_hybrid.modeling_olmo_hybrid")


def qwen():
    return plain_torch("qwen3_next.modeling_qwen3_next")


# ---- the gated delta rule: (q, k, v, g, beta, scale) -> o -------------------------------------------------------


def same_heads(x, v):
    return x.repeat_interleave(v.shape[2] // x.shape[2], 2)


def transformers_chunked(q, k, v, g, beta, scale: float):
    o, _ = qwen().torch_chunk_gated_delta_rule(same_heads(q, v), same_heads(k, v), v, g, beta)
    return scale * math.sqrt(q.shape[-1]) * o


def transformers_recurrent(q, k, v, g, beta, scale: float):
    o, _ = olmo().torch_recurrent_gated_delta_rule(same_heads(q, v), same_heads(k, v), v, g, beta)
    return scale * math.sqrt(q.shape[-1]) * o


def fla_chunked(q, k, v, g, beta, scale: float):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, scale=scale)[0]


def allow_fla_on_hopper() -> str | None:
    """Removes the check by which fla's gated backward refuses to run on Hopper with Triton 3.4 to 3.7.0 (fla issue 640).
    Returns what to print with the numbers, or None where the check does not apply."""
    from fla.ops.common import chunk_o

    refuses = (getattr(chunk_o, "IS_NVIDIA_HOPPER", False) and getattr(chunk_o, "TRITON_ABOVE_3_4_0", False)
               and not getattr(chunk_o, "TRITON_ABOVE_3_7_1", False))
    if not refuses:
        return None
    chunk_o.TRITON_ABOVE_3_4_0 = False
    return (f"fla {version('flash-linear-attention')} refuses its gated backward on Hopper with Triton 3.4 to 3.7.0 (its issue "
            f"640); here, with Triton {version('triton')}, it is measured with that refusal removed")


@contextlib.contextmanager
def fla_configurations(head_dim_k: int):
    """With dk = 32 on Hopper, only those configurations of fla's chunk_bwd_kernel_dqkwg that have two warps: each of
    those with four ends the process with an illegal memory access (seen with fla 0.5.2, Triton 3.6)."""
    from fla.ops.common import chunk_o

    tuner = chunk_o.chunk_bwd_kernel_dqkwg
    while not hasattr(tuner, "configs"):
        tuner = tuner.fn
    every = tuner.configs
    if head_dim_k == 32 and getattr(chunk_o, "IS_NVIDIA_HOPPER", False):
        tuner.configs = [c for c in every if c.num_warps == 2]
    try:
        yield
    finally:
        tuner.configs = every


# ---- the mixer: (h, w, at, c) -> y, as reference.mixer ----------------------------------------------------------


def o_norm_eps(c: Config) -> float:
    return EPS / (c.readout_scale**2 * c.head_dim_k)


def transformers_sizes(c: Config) -> dict:
    return dict(hidden_size=c.width, intermediate_size=c.mlp_size, num_hidden_layers=c.layers + 1, rms_norm_eps=EPS,
                vocab_size=c.padded_vocab, linear_num_key_heads=c.heads_k, linear_num_value_heads=c.heads_v,
                linear_key_head_dim=c.head_dim_k, linear_value_head_dim=c.head_dim_v, linear_conv_kernel_dim=4,
                num_attention_heads=1, num_key_value_heads=1, head_dim=16, pad_token_id=None, bos_token_id=None,
                eos_token_id=None, layer_types=["linear_attention"] * c.layers + ["full_attention"])


def olmo_config(c: Config):
    from transformers import OlmoHybridConfig

    return OlmoHybridConfig(**transformers_sizes(c), linear_allow_neg_eigval=c.neg_eigval, tie_word_embeddings=False)


def olmo_weights(w: Parameters, at: str) -> Parameters:
    """A layer's attn tensors under the names of OlmoHybridGatedDeltaNet."""
    mapped = {f"{name}_proj.weight": w[f"{at}{name}_proj.weight"] for name in "qkvgabo"}
    mapped["conv1d.weight"] = torch.cat([w[f"{at}{name}_conv1d.weight"] for name in "qkv"])
    return {**mapped, "A_log": w[at + "A_log"], "dt_bias": w[at + "dt_bias"], "o_norm.weight": w[at + "o_norm.weight"]}


def olmo_mixer(h, w: Parameters, at: str, c: Config):
    module = olmo().OlmoHybridGatedDeltaNet(olmo_config(c), 0).to(h.device)
    module.o_norm.variance_epsilon = o_norm_eps(c)
    return functional_call(module, olmo_weights(w, at), (h,))


def qwen_weights(w: Parameters, at: str, c: Config) -> Parameters:
    """The same under Qwen3-Next's: rows of q, k, v, z and of b, a side by side for each key head."""
    q, k, v, z, a, b = (w[f"{at}{name}_proj.weight"].unflatten(0, (c.heads_k, -1)) for name in "qkvgab")
    mapped = olmo_weights(w, at)
    return {"in_proj_qkvz.weight": torch.cat([q, k, v, z], 1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat([b, a], 1).flatten(0, 1), "conv1d.weight": mapped["conv1d.weight"],
            "A_log": mapped["A_log"], "dt_bias": mapped["dt_bias"], "norm.weight": mapped["o_norm.weight"],
            "out_proj.weight": mapped["o_proj.weight"]}


def qwen_mixer(h, w: Parameters, at: str, c: Config):
    if c.neg_eigval:
        raise ValueError("Qwen3-Next has no negative eigenvalues")
    from transformers import Qwen3NextConfig

    module = qwen().Qwen3NextGatedDeltaNet(Qwen3NextConfig(**transformers_sizes(c)), 0).to(h.device)
    module.norm.variance_epsilon = o_norm_eps(c)
    return functional_call(module, qwen_weights(w, at, c), (h,))


# ---- the model: (w, c, tokens [B,T+1]) -> mean cross-entropy, as reference.loss ---------------------------------


def branches(w: Parameters, c: Config) -> Parameters:
    """The multiplier of a layer's branches, which their code has not, in the matrices that end them."""
    if c.residual_scale == 1:
        return w
    return {name: x * c.residual_scale if name.endswith((".o_proj.weight", ".down_proj.weight")) else x for name, x in w.items()}


def output_matrix(w: Parameters, c: Config):
    return w["model.embeddings.weight" if c.tied else "lm_head.weight"] * c.logit_scale


@functools.lru_cache(1)
def olmo_model(sizes: tuple):
    c = Config(**dict(sizes))
    model = olmo().OlmoHybridForCausalLM(olmo_config(c))
    model.model.layers = model.model.layers[:c.layers]  # without the attention layer that its config asks for
    for layer in model.model.layers:
        layer.linear_attn.o_norm.variance_epsilon = o_norm_eps(c)
    return model


def olmo_logits(w: Parameters, c: Config, tokens):
    """tokens [B,T] -> logits [B,T,padded vocabulary]."""
    model = olmo_model(tuple(vars(c).items())).to(tokens.device)
    w = branches(w, c)
    mapped = {"model.embed_tokens.weight": w["model.embeddings.weight"], "model.norm.weight": w["model.norm.weight"],
              "lm_head.weight": output_matrix(w, c)}
    for layer in range(c.layers):
        at = f"model.layers.{layer}."
        mapped[at + "input_layernorm.weight"] = w[at + "attn_norm.weight"]
        mapped[at + "post_attention_layernorm.weight"] = w[at + "mlp_norm.weight"]
        for name, x in olmo_weights(w, at + "attn.").items():
            mapped[f"{at}linear_attn.{name}"] = x
        for name in ("gate", "up", "down"):
            mapped[f"{at}mlp.{name}_proj.weight"] = w[f"{at}mlp.{name}_proj.weight"]
    return functional_call(model, mapped, kwargs=dict(input_ids=tokens, use_cache=False)).logits


def cross_entropy(logits, c: Config, tokens):
    return F.cross_entropy(logits[..., :c.vocab].flatten(0, 1).to(torch.float64), tokens[:, 1:].flatten())


def olmo_loss(w: Parameters, c: Config, tokens):
    return cross_entropy(olmo_logits(w, c, tokens[:, :-1]), c, tokens)


def olmo_bf16_loss(w: Parameters, c: Config, tokens):
    """In float32 under bf16 autocast, as such a model is trained: what the number format costs without train_gdn."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = olmo_logits(w, c, tokens[:, :-1])
    return cross_entropy(logits, c, tokens)


def fla_config(c: Config, **options):
    from fla.models import GatedDeltaNetConfig

    return GatedDeltaNetConfig(hidden_size=c.width, expand_v=c.head_dim_v / c.head_dim_k, head_dim=c.head_dim_k,
                               num_heads=c.heads_k, num_v_heads=c.heads_v, allow_neg_eigval=c.neg_eigval,
                               intermediate_size=c.mlp_size, num_hidden_layers=c.layers, norm_eps=EPS,
                               vocab_size=c.padded_vocab, use_cache=False, **options)


def fla_class():
    """GatedDeltaNetForCausalLM. Where it lists its tied weights as transformers did before version 5, with their source."""
    from fla.models import GatedDeltaNetForCausalLM as model

    if isinstance(model._tied_weights_keys, list):
        model._tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}
    return model


@functools.lru_cache(1)
def fla_model(sizes: tuple):
    c = Config(**dict(sizes))
    model = fla_class()(fla_config(c, tie_word_embeddings=False))
    for layer in model.model.layers:
        layer.attn.o_norm.eps = o_norm_eps(c)
    return model.train()


def fla_loss(w: Parameters, c: Config, tokens):
    """In float32 under bf16 autocast, as fla trains."""
    model = fla_model(tuple(vars(c).items())).to(tokens.device)
    mapped = {**branches(w, c), "lm_head.weight": output_matrix(w, c)}
    with torch.autocast("cuda", torch.bfloat16):
        out = functional_call(model, mapped, kwargs=dict(input_ids=tokens[:, :-1], use_cache=False))
    return cross_entropy(out.logits, c, tokens)
