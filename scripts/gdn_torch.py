"""The gated delta rule of train_gdn as PyTorch functions, with fla's names, arguments and meaning.

    make libgdn.so
    import gdn_torch                                     # scripts/ on PYTHONPATH
    o, state = gdn_torch.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    gdn_torch.install()                                  # or: fla's layers and transformers' models call it from here on

chunk_gated_delta_rule and fused_recurrent_gated_delta_rule take what flash-linear-attention 0.6.0's take and return what
they return: q, k [B,T,H,K], v [B,T,HV,V], g and beta [B,T,HV], states [N,HV,K,V], documents packed by cu_seqlens. They
are the operators gdn::delta_rule and gdn::delta_rule_backward, so that torch.compile, autocast, activation checkpointing
and DDP go through. On the CPU float32 and float64 are computed as they are, bfloat16 and float16 in float32; a GPU computes
bfloat16 (libgdn.so built with nvcc), K and V multiples of 16 to 256 and to 512. What is not supported raises with the value
and what is.

delta_rule_float64 and mixer_float64 give the results and gradients that another implementation can be held against
(scripts/check_layer.py). The library is GDN_LIBRARY, or libgdn.so in the repository's root.
"""
import ctypes
import functools
import importlib
import os
import sys
import threading
import warnings

import torch

CHUNK = 64  # tokens that the library handles at a time


# ---- the library (gdn/library.h)

class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class _DeltaRule(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("device", ctypes.c_int32), ("type", ctypes.c_int32),
                ("device_number", ctypes.c_int32), ("stream", ctypes.c_void_p),
                ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64),
                ("heads_k", ctypes.c_int32), ("heads_v", ctypes.c_int32),
                ("head_dim_k", ctypes.c_int32), ("head_dim_v", ctypes.c_int32),
                ("sequences", ctypes.c_int64), ("cu_seqlens", ctypes.c_void_p),
                ("scale", ctypes.c_double), ("normalized", ctypes.c_int32),
                *((name, _Tensor) for name in ("q", "k", "v", "g", "beta", "initial_state", "o", "final_state", "d_o",
                                               "d_final_state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state")),
                ("saved", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]


_MIXER_INPUTS = ("h", "w_q", "w_k", "w_v", "w_z", "w_a", "w_b", "taps", "A_log", "dt_bias", "w_norm", "w_o")
_MIXER_GRADIENTS = tuple("d" + name for name in _MIXER_INPUTS)


class _Mixer(ctypes.Structure):
    _fields_ = [("size", ctypes.c_size_t), ("device", ctypes.c_int32), ("type", ctypes.c_int32), ("stream", ctypes.c_void_p),
                ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64),
                *((name, ctypes.c_int32) for name in ("width", "heads_k", "heads_v", "head_dim_k", "head_dim_v")),
                ("sequences", ctypes.c_int64), ("cu_seqlens", ctypes.c_void_p),
                *((name, ctypes.c_double) for name in ("scale", "norm_eps", "beta_max")),
                *((name, ctypes.c_void_p) for name in (*_MIXER_INPUTS, "y", "dy", *_MIXER_GRADIENTS))]


_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
_library, _library_lock = None, threading.Lock()


def library():
    """The shared library, loaded at the first call."""
    global _library
    if _library is not None:
        return _library
    with _library_lock:
        if _library is None:
            root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            path = os.environ.get("GDN_LIBRARY", os.path.join(root, "libgdn.so"))
            try:
                loaded = ctypes.CDLL(path)
            except OSError as error:
                raise RuntimeError(f"gdn_torch: {error}; expected libgdn.so there: run `make libgdn.so`, "
                                   "or name it in GDN_LIBRARY") from None
            loaded.gdn_last_error.restype = ctypes.c_char_p
            for name, argument in (("delta_rule_forward", _DeltaRule), ("delta_rule_backward", _DeltaRule),
                                   ("delta_rule_recurrent", _DeltaRule), ("mixer_forward", _Mixer), ("mixer_backward", _Mixer)):
                getattr(loaded, "gdn_" + name).argtypes = [ctypes.POINTER(argument)]
            loaded.gdn_delta_rule_bytes.argtypes = [ctypes.POINTER(_DeltaRule), *[ctypes.POINTER(ctypes.c_size_t)] * 2]
            _library = loaded
    return _library


def _run(name, call):
    loaded = library()
    if getattr(loaded, name)(ctypes.byref(call)) != 0:
        raise RuntimeError(loaded.gdn_last_error().decode())


def _place(tensor, dimensions=None):
    """Where a tensor lies, its dimensions in the order given."""
    if tensor is None:
        return _Tensor()
    strides = tensor.stride() if dimensions is None else [tensor.stride(i) for i in dimensions]
    return _Tensor(tensor.data_ptr(), (ctypes.c_int64 * 4)(*strides))


def _state(tensor, v_first):
    return _place(tensor, (0, 1, 3, 2) if v_first else None)


def _host(cu_seqlens):
    """cu_seqlens as the library reads them: int64 on the host."""
    return None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous()


def _call(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first):
    """The inputs of a call; cu_seqlens (_host) must outlive it."""
    call = _DeltaRule(size=ctypes.sizeof(_DeltaRule), device=0, type=_TYPES[q.dtype])
    call.batch, call.tokens, call.heads_k, call.head_dim_k = k.shape
    call.heads_v, call.head_dim_v = v.shape[2:]
    call.sequences, call.cu_seqlens = call.batch, None
    if cu_seqlens is not None:
        call.sequences, call.cu_seqlens = len(cu_seqlens) - 1, cu_seqlens.data_ptr()
    call.scale, call.normalized = scale, normalized
    call.q, call.k, call.v, call.g, call.beta = map(_place, (q, k, v, g, beta))
    call.initial_state = _state(initial_state, v_first)
    return call


# ---- operators

torch.library.define(
    "gdn::delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool normalized, bool v_first, bool output_final_state, bool recurrent, bool keep) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "gdn::delta_rule_backward",
    "(Tensor d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor saved, float scale, bool normalized, bool v_first) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def _sequences(q, cu_seqlens):
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _outputs(q, v, g, cu_seqlens, v_first, output_final_state, keep):
    """o, final_state and what the backward needs, not yet computed; empty where not wanted. Documents have no more
    chunks together than their tokens' and one more each."""
    batch, tokens, _, dk = q.shape
    heads, dv = v.shape[2:]
    count = _sequences(q, cu_seqlens)
    chunks = batch * ((tokens + CHUNK - 1) // CHUNK) if cu_seqlens is None else tokens // CHUNK + count
    state = (count, heads, dv, dk) if v_first else (count, heads, dk, dv)
    if v.device.type == "cuda":  # states, E, exponents, N and P, gates, each on 256 bytes (gdn/kernels/delta_rule)
        size = chunks * heads * (2 * dk * dv + dv // 4 + 17408) + 2 * batch * tokens * heads * dv + 1280 * count
        saved = v.new_empty((size if keep else 0,), dtype=torch.uint8)
    else:
        saved = v.new_empty((chunks * heads * dk * dv if keep else 0,))
    return v.new_empty((batch, tokens, heads, dv)), g.new_empty(state if output_final_state else (0,)), saved


def _delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent, keep):
    o, final_state, saved = _outputs(q, v, g, cu_seqlens, v_first, output_final_state, keep)
    documents = _host(cu_seqlens)
    call = _call(q, k, v, g, beta, initial_state, documents, scale, normalized, v_first)
    call.o = _place(o)
    if output_final_state:
        call.final_state = _state(final_state, v_first)
    if keep:
        call.saved = saved.data_ptr()
    _run("gdn_delta_rule_recurrent" if recurrent and not keep else "gdn_delta_rule_forward", call)
    return o, final_state, saved


@torch.library.register_fake("gdn::delta_rule")
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent, keep):
    return _outputs(q, v, g, cu_seqlens, v_first, output_final_state, keep)


# The GPU reads and writes states as [N,HV,V,K] float32, and token by token as [N,HV,K,V]; heads of q, k, v and o whose
# columns lie side by side on 16 bytes. Other layouts are copied, as fla copies all that is not contiguous.

def _rows(x):
    batch, token, head, column = x.stride()
    if (column == 1 and token % 8 == 0 and head % 8 == 0 and x.data_ptr() % 16 == 0
            and (x.shape[0] == 1 or batch == x.shape[1] * token)):
        return x
    return x.contiguous()


def _flipped(state, flip):
    """A state with its last two dimensions in the other order, where `flip`; dense."""
    return None if state is None else (state.transpose(-1, -2) if flip else state).contiguous()


def _on_gpu(call, q):
    call.device, call.device_number = 1, q.device.index
    call.stream = torch._C._cuda_getCurrentRawStream(q.device.index)


def _with_scratch(name, call, q, saved):
    """Runs a call with the work space it wants."""
    wanted, scratch_bytes = ctypes.c_size_t(), ctypes.c_size_t()
    if library().gdn_delta_rule_bytes(ctypes.byref(call), ctypes.byref(wanted), ctypes.byref(scratch_bytes)) != 0:
        raise RuntimeError(library().gdn_last_error().decode())
    if saved is not None:
        if wanted.value > saved.numel():
            raise RuntimeError(f"gated delta rule: {wanted.value} bytes wanted for the backward, {saved.numel()} there")
        call.saved = saved.data_ptr()
    scratch = q.new_empty((scratch_bytes.value,), dtype=torch.uint8)
    call.scratch = scratch.data_ptr()
    _run(name, call)


def _delta_rule_cuda(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent,
                     keep):
    o, final_state, saved = _outputs(q, v, g, cu_seqlens, v_first, output_final_state, keep)
    if q.shape[0] * q.shape[1] == 0:
        if output_final_state:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return o, final_state, saved
    documents, by_token = _host(cu_seqlens), recurrent and not keep
    q, k, v, g, beta = _rows(q), _rows(k), _rows(v), g.contiguous(), beta.contiguous()
    flip = v_first if by_token else not v_first
    begin = _flipped(initial_state, flip)
    end = None
    if output_final_state or by_token:
        heads, dk, dv = v.shape[2], q.shape[3], v.shape[3]
        end = g.new_empty((_sequences(q, cu_seqlens), heads, dk, dv) if by_token else (_sequences(q, cu_seqlens), heads, dv, dk))
    call = _call(q, k, v, g, beta, None, documents, scale, normalized, False)
    _on_gpu(call, q)
    call.o = _place(o)
    call.initial_state, call.final_state = _state(begin, not by_token), _state(end, not by_token)
    if by_token:
        _run("gdn_delta_rule_recurrent", call)
    else:
        _with_scratch("gdn_delta_rule_forward", call, q, saved if keep else None)
    if output_final_state:
        final_state = _flipped(end, flip)
    return o, final_state, saved


def _delta_rule_backward_cuda(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, normalized,
                              v_first):
    gradients = _gradients(q, k, v, g, beta, initial_state)
    if q.shape[0] * q.shape[1] == 0:
        if initial_state is not None:
            gradients[5].zero_() if d_final_state is None else gradients[5].copy_(d_final_state)
        return gradients
    documents = _host(cu_seqlens)
    q, k, v, g, beta, d_o = _rows(q), _rows(k), _rows(v), g.contiguous(), beta.contiguous(), _rows(d_o)
    begin = _flipped(d_final_state, not v_first)
    call = _call(q, k, v, g, beta, None, documents, scale, normalized, False)
    _on_gpu(call, q)
    call.d_o, call.d_final_state = _place(d_o), _state(begin, True)
    call.dq, call.dk, call.dv, call.dg, call.dbeta = map(_place, gradients[:5])
    end = None
    if initial_state is not None:
        end = g.new_empty((_sequences(q, cu_seqlens), v.shape[2], v.shape[3], q.shape[3]))
        call.d_initial_state = _state(end, True)
    _with_scratch("gdn_delta_rule_backward", call, q, saved)
    return gradients if end is None else (*gradients[:5], _flipped(end, not v_first))


def _gradients(q, k, v, g, beta, initial_state):
    def empty(x):
        return x.new_empty(x.shape)
    return (*map(empty, (q, k, v, g, beta)), q.new_empty(0) if initial_state is None else empty(initial_state))


def _delta_rule_backward(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, normalized, v_first):
    gradients = _gradients(q, k, v, g, beta, initial_state)
    documents = _host(cu_seqlens)
    call = _call(q, k, v, g, beta, initial_state, documents, scale, normalized, v_first)
    call.d_o, call.saved = _place(d_o), saved.data_ptr()
    call.d_final_state = _state(d_final_state, v_first)
    call.dq, call.dk, call.dv, call.dg, call.dbeta = map(_place, gradients[:5])
    if initial_state is not None:
        call.d_initial_state = _state(gradients[5], v_first)
    _run("gdn_delta_rule_backward", call)
    return gradients


@torch.library.register_fake("gdn::delta_rule_backward")
def _(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, normalized, v_first):
    return _gradients(q, k, v, g, beta, initial_state)


torch.library.impl("gdn::delta_rule", "CPU", _delta_rule)
torch.library.impl("gdn::delta_rule", "CUDA", _delta_rule_cuda)
torch.library.impl("gdn::delta_rule_backward", "CPU", _delta_rule_backward)
torch.library.impl("gdn::delta_rule_backward", "CUDA", _delta_rule_backward_cuda)


def _setup_context(ctx, inputs, output):
    *tensors, scale, normalized, v_first, output_final_state, _, keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = scale, normalized, v_first, output_final_state, keep


def _backward(ctx, d_o, d_final_state, _):
    *inputs, saved = ctx.saved_tensors
    scale, normalized, v_first, output_final_state, keep = ctx.options
    if not keep:
        raise RuntimeError("gdn::delta_rule: a backward of a forward with keep=False")
    *gradients, d_initial_state = torch.ops.gdn.delta_rule_backward(
        d_o, d_final_state if output_final_state else None, *inputs, saved, scale, normalized, v_first)
    return (*gradients, None if inputs[5] is None else d_initial_state, *[None] * 7)


torch.library.register_autograd("gdn::delta_rule", _backward, setup_context=_setup_context)


# ---- fla's functions

def _require(condition, message):
    if not condition:
        raise ValueError("gated delta rule: " + message)


_COMPUTE_TYPES = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32,
                  torch.float16: torch.float32}


def _compute_type(**tensors):
    """The type that a call computes in, of all its tensors."""
    compute = torch.float32
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _COMPUTE_TYPES:
            raise TypeError(f"gated delta rule: {name} is {tensor.dtype}, expected float32, float64, bfloat16 or float16")
        if tensor.dtype == torch.float64:
            compute = torch.float64
    return compute


def _check_gpu(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != torch.bfloat16:
            raise TypeError(f"gated delta rule: {name} is {x.dtype} on {x.device}, supported: bfloat16")
    for name, size, most in (("K", q.shape[3], 256), ("V", v.shape[3], 512)):
        if size % 16 != 0 or size > most:
            raise ValueError(f"gated delta rule: {name} is {size} on {q.device}, supported: multiples of 16 to {most}")


def _check(q, k, v, g, beta, initial_state, cu_seqlens, v_first):
    def refuse(name, tensor, expected):
        raise ValueError(f"gated delta rule: {name} has shape {list(tensor.shape)}, expected {expected}")

    if q.dim() != 4:
        refuse("q", q, "[B,T,H,K]")
    batch, tokens, heads_k, dk = q.shape
    if k.shape != q.shape:
        refuse("k", k, f"that of q, {list(q.shape)}")
    if v.dim() != 4 or v.shape[0] != batch or v.shape[1] != tokens:
        refuse("v", v, f"[{batch},{tokens},HV,V], B and T those of q")
    heads, dv = v.shape[2], v.shape[3]
    if heads_k == 0 or heads % heads_k != 0:
        refuse("v", v, f"heads a multiple of the {heads_k} of q and k")
    if min(dk, dv) == 0:
        refuse("v" if dv == 0 else "k", v if dv == 0 else k, "heads of at least one number")
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != v.shape[:3]:
            refuse(name, gate, list(v.shape[:3]))
    if cu_seqlens is not None:
        if batch != 1:
            refuse("q", q, "a batch of 1 with cu_seqlens: documents one after the other")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            refuse("cu_seqlens", cu_seqlens, f"int32 or int64 [N+1] (it is {cu_seqlens.dtype})")
    if initial_state is not None:
        state = (_sequences(q, cu_seqlens), heads, dv, dk) if v_first else (_sequences(q, cu_seqlens), heads, dk, dv)
        if initial_state.shape != state:
            refuse("initial_state", initial_state, list(state))
    for name, tensor in (("k", k), ("v", v), ("g", g), ("beta", beta), ("initial_state", initial_state)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"gated delta rule: {name} is on {tensor.device}, expected {q.device}, as q")
    if q.device.type == "cuda":
        _check_gpu(q, k, v)
    elif q.device.type != "cpu":
        raise NotImplementedError(f"gated delta rule: tensors on {q.device}, supported: the CPU and NVIDIA's GPUs")


def _normalized(x):
    """x / sqrt(|x|^2 + 1e-6) per head, as the library does it on the CPU."""
    y = x.float()
    return (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _apply(q, k, v, g, beta, scale, initial_state, output_final_state, normalized, v_first, cu_seqlens, recurrent):
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    compute = _compute_type(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    _check(q, k, v, g, beta, initial_state, cu_seqlens, v_first)
    if q.device.type == "cuda":
        low, compute = torch.bfloat16, torch.float32
        if normalized:
            q, k, normalized = _normalized(q), _normalized(k), False
    else:
        low = compute
    inputs = [x if x is None or x.dtype == wanted else x.to(wanted)
              for x, wanted in zip((q, k, v, g, beta, initial_state), (low, low, low, compute, compute, compute))]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, final_state, _ = torch.ops.gdn.delta_rule(*inputs, cu_seqlens, scale, normalized, v_first, output_final_state,
                                                 recurrent, keep)
    return o if o.dtype == q.dtype else o.to(q.dtype), final_state if output_final_state else None


def _state_layout(kwargs, state_v_first):
    if "transpose_state_layout" not in kwargs:
        return bool(state_v_first)
    _require(not state_v_first, "both state_v_first and its older name transpose_state_layout, expected one")
    warnings.warn("`transpose_state_layout` is deprecated and renamed to `state_v_first`.", DeprecationWarning, stacklevel=3)
    return bool(kwargs["transpose_state_layout"])


def _log_decay(g, A_log, dt_bias, use_gate_in_kernel):
    if not use_gate_in_kernel:
        return g
    _require(A_log is not None, "use_gate_in_kernel without A_log")
    _require(g is not None, "use_gate_in_kernel without g")
    compute = _compute_type(g=g, A_log=A_log)
    raw = g.to(compute) if dt_bias is None else g.to(compute) + dt_bias.to(compute)
    return -A_log.to(compute).exp() * torch.nn.functional.softplus(raw)


def _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval):
    _require(use_beta_sigmoid_in_kernel or not allow_neg_eigval, "allow_neg_eigval without use_beta_sigmoid_in_kernel")
    if not use_beta_sigmoid_in_kernel:
        return beta
    beta = beta.to(_compute_type(beta=beta)).sigmoid()
    return 2 * beta if allow_neg_eigval else beta


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
                           state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None, cp_context=None,
                           **kwargs):
    """fla.ops.gated_delta_rule.chunk_gated_delta_rule: (o [B,T,HV,V] of q's type, final_state float32 or None).

    kwargs, as fla's: use_gate_in_kernel, A_log, dt_bias; chunk_size is checked and changes nothing, others are ignored.
    cp_context is not supported.
    """
    if cp_context is not None:
        raise NotImplementedError("gated delta rule: cp_context, supported: None")
    if "head_first" in kwargs:
        raise DeprecationWarning("head_first has been removed. Inputs must be in `[B, T, H, ...]` format.")
    if kwargs.get("chunk_size", 64) not in (16, 32, 64):
        raise ValueError(f"gated delta rule: chunk_size {kwargs['chunk_size']}, expected 16, 32 or 64")
    g = _log_decay(g, kwargs.get("A_log"), kwargs.get("dt_bias"), kwargs.get("use_gate_in_kernel", False))
    beta = _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    if cu_seqlens is not None and cu_seqlens_cpu is not None:
        cu_seqlens = cu_seqlens_cpu
    return _apply(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                  _state_layout(kwargs, state_v_first), cu_seqlens, False)


def fused_recurrent_gated_delta_rule(q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None,
                                     output_final_state=False, use_qk_l2norm_in_kernel=False, use_gate_in_kernel=False,
                                     A_log=None, dt_bias=None, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False,
                                     state_v_first=False, cu_seqlens=None, **kwargs):
    """fla.ops.gated_delta_rule.fused_recurrent_gated_delta_rule: token by token, for decoding. Where a gradient is asked
    for, which fla's refuses, it is computed in chunks. gk and gv, decays of single channels, are not supported."""
    for name, value in (("gk", gk), ("gv", gv)):
        if value is not None:
            raise NotImplementedError(f"gated delta rule: {name} {list(value.shape)}, supported: None, decays of heads (g)")
    g = _log_decay(g, A_log, dt_bias, use_gate_in_kernel)
    if g is None:
        g = v.new_zeros(v.shape[:3])
    if beta is None:
        beta = v.new_ones(v.shape[:3])
    beta = _write_strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    return _apply(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
                  _state_layout(kwargs, state_v_first), cu_seqlens, True)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


# ---- in the place of others' functions

_OURS = {"chunk_gated_delta_rule": chunk_gated_delta_rule,
         "fused_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule}
_TRANSFORMERS = {"torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
                 "torch_recurrent_gated_delta_rule": fused_recurrent_gated_delta_rule}
_installed = []  # (module, attribute, what was there)


def _replace(module, attribute, value):
    _installed.append((module, attribute, vars(module).get(attribute)))
    setattr(module, attribute, value)


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def install():
    """Puts chunk_gated_delta_rule and fused_recurrent_gated_delta_rule in the place of fla's, wherever a loaded module has
    them under any name, and of those that transformers' models call (Qwen3-Next, Qwen3.5, OLMo-hybrid, ...), in models
    loaded already or later. Returns the names that were replaced. uninstall() takes it back."""
    if _installed:
        return []
    library()  # so that what it lacks is said here, not where a model calls it
    replacements = []  # (function of others, ours)
    fla = _import("fla.ops.gated_delta_rule")
    if fla is not None:
        _import("fla.layers")
        replacements += [(getattr(fla, name), ours) for name, ours in _OURS.items()]
    hub = _import("transformers.integrations.hub_kernels")
    for name, module in list(sys.modules.items()):
        if module is None or module is sys.modules[__name__]:
            continue
        in_model = name.startswith("transformers.models.")
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            for original, ours in replacements:
                if value is original:
                    _replace(module, attribute, ours)
            if in_model and attribute in _TRANSFORMERS:
                _replace(module, attribute, _TRANSFORMERS[attribute])
    if hub is not None and hasattr(hub, "use_kernel_func_from_hub_with_fallback"):
        original = hub.use_kernel_func_from_hub_with_fallback

        @functools.wraps(original)
        def with_ours(func_name, *args, **kwargs):
            decorate = original(func_name, *args, **kwargs)
            if func_name not in _OURS:
                return decorate

            def decorate_ours(torch_function):
                theirs, ours = decorate(torch_function), _OURS[func_name]

                @functools.wraps(torch_function)
                def call(*args, **kwargs):
                    return (ours if _installed else theirs)(*args, **kwargs)
                return call
            return decorate_ours

        for module in (hub, sys.modules["transformers.integrations"]):
            _replace(module, "use_kernel_func_from_hub_with_fallback", with_ours)
    return [f"{module.__name__}.{attribute}" for module, attribute, _ in _installed]


def uninstall():
    """Puts back what install() replaced."""
    while _installed:
        module, attribute, value = _installed.pop()
        if value is None:
            delattr(module, attribute)
        else:
            setattr(module, attribute, value)


# ---- float64 results to hold others against

def _double(x):
    return None if x is None else torch.as_tensor(x).detach().to("cpu", torch.float64)


def delta_rule_float64(q, k, v, g, beta, d_o=None, scale=None, initial_state=None, d_final_state=None, cu_seqlens=None,
                       use_qk_l2norm_in_kernel=False):
    """o and final_state in float64 of inputs in any type (torch or numpy), and, where d_o is given, the gradients of
    sum(o d_o) + sum(final_state d_final_state): dq, dk, dv, dg, dbeta and, with an initial_state, d_initial_state."""
    inputs = dict(zip(("q", "k", "v", "g", "beta"), map(_double, (q, k, v, g, beta))))
    if initial_state is not None:
        inputs["initial_state"] = _double(initial_state)
    leaves = {name: x.clone().requires_grad_(d_o is not None) for name, x in inputs.items()}
    o, final_state = chunk_gated_delta_rule(**leaves, scale=scale, output_final_state=True,
                                            cu_seqlens=None if cu_seqlens is None else torch.as_tensor(cu_seqlens),
                                            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
    results = {"o": o.detach(), "final_state": final_state.detach()}
    if d_o is not None:
        loss = (o * _double(d_o)).sum()
        if d_final_state is not None:
            loss = loss + (final_state * _double(d_final_state)).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        results.update({"d_initial_state" if name == "initial_state" else "d" + name: x
                        for name, x in zip(leaves, gradients)})
    return results


def mixer_float64(weights, h, heads_k, heads_v, dy=None, scale=None, norm_eps=1e-6, beta_max=1.0, cu_seqlens=None):
    """The whole mixer (gdn/library.h, gdn_mixer) in float64: y [B,T,d] of h [B,T,d] and weights w_q, w_k, w_v, w_z, w_a,
    w_b, taps, A_log, dt_bias, w_norm, w_o (torch or numpy), and with dy the gradients dh, dw_q, ..., dw_o."""
    tensors = {name: _double(weights[name]).contiguous() for name in _MIXER_INPUTS[1:]}
    tensors["h"] = _double(h).contiguous()
    _require(tensors["h"].dim() == 3, f"h has shape {list(tensors['h'].shape)}, expected [B,T,d]")
    batch, tokens, width = tensors["h"].shape
    dk, dv = tensors["w_q"].shape[0] // heads_k, tensors["w_v"].shape[0] // heads_v
    shapes = {"h": [batch, tokens, width], "w_q": [heads_k * dk, width], "w_k": [heads_k * dk, width],
              "w_v": [heads_v * dv, width], "w_z": [heads_v * dv, width], "w_a": [heads_v, width], "w_b": [heads_v, width],
              "taps": [2 * heads_k * dk + heads_v * dv, 4], "A_log": [heads_v], "dt_bias": [heads_v], "w_norm": [dv],
              "w_o": [width, heads_v * dv]}
    for name, shape in shapes.items():
        _require(list(tensors[name].shape) == shape, f"{name} has shape {list(tensors[name].shape)}, expected {shape}")
    documents = _host(None if cu_seqlens is None else torch.as_tensor(cu_seqlens))
    call = _Mixer(size=ctypes.sizeof(_Mixer), device=0, type=_TYPES[torch.float64], batch=batch, tokens=tokens, width=width,
                  heads_k=heads_k, heads_v=heads_v, head_dim_k=dk, head_dim_v=dv, sequences=batch,
                  scale=dk ** -0.5 if scale is None else scale, norm_eps=norm_eps, beta_max=beta_max)
    if documents is not None:
        call.sequences, call.cu_seqlens = len(documents) - 1, documents.data_ptr()
    for name, tensor in tensors.items():
        setattr(call, name, tensor.data_ptr())
    results = {"y": torch.empty_like(tensors["h"])}
    call.y = results["y"].data_ptr()
    if dy is None:
        _run("gdn_mixer_forward", call)
        return results
    dy = _double(dy).contiguous()
    _require(dy.shape == tensors["h"].shape, f"dy has shape {list(dy.shape)}, expected {shapes['h']}")
    call.dy = dy.data_ptr()
    for name, tensor in tensors.items():
        results["d" + name] = torch.empty_like(tensor)
        setattr(call, "d" + name, results["d" + name].data_ptr())
    _run("gdn_mixer_backward", call)
    return results
