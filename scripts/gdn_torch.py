"""The gated delta rule of train_gdn as PyTorch functions, with fla's names, arguments and meaning.

    make libgdn.so
    import gdn_torch                                     # scripts/ on PYTHONPATH
    o, state = gdn_torch.chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    gdn_torch.install()                                  # or: fla's layers and transformers' models call it from here on

chunk_gated_delta_rule and fused_recurrent_gated_delta_rule take what flash-linear-attention 0.6.0's take and return what
they return: q, k [B,T,H,K], v [B,T,HV,V], g and beta [B,T,HV], states [N,HV,K,V], documents packed by cu_seqlens. They
are the operators gdn::delta_rule and gdn::delta_rule_backward, so that torch.compile, autocast, activation checkpointing
and DDP go through. On the CPU float32 and float64 are computed as they are, bfloat16 and float16 in float32; a GPU computes
bfloat16 (libgdn.so built with nvcc), K and V multiples of 16 to 256 and to 512, and rounds float16 to it. What is not
supported raises with the value and what is.

delta_rule_float64 and mixer_float64 give the results and gradients that another implementation can be held against
(scripts/check_layer.py). The library is GDN_LIBRARY, or libgdn.so in the repository's root.
"""
import array
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
                getattr(loaded, "gdn_" + name).argtypes = [ctypes.c_void_p if argument is _DeltaRule else ctypes.POINTER(argument)]
            loaded.gdn_delta_rule_bytes.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
            _library = loaded
    return _library


def _run(name, call):
    loaded = _library or library()
    if getattr(loaded, name)(call) != 0:
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


def _call(q, k, v, g, beta, initial_state, scale, normalized, v_first):
    """The struct of a call without documents: sizes, options, and where the inputs lie."""
    call = _DeltaRule(size=ctypes.sizeof(_DeltaRule), device=0, type=_TYPES[q.dtype])
    call.batch, call.tokens, call.heads_k, call.head_dim_k = k.shape
    call.heads_v, call.head_dim_v = v.shape[2:]
    call.sequences, call.cu_seqlens = call.batch, None
    call.scale, call.normalized = scale, normalized
    call.q, call.k, call.v, call.g, call.beta = map(_place, (q, k, v, g, beta))
    call.initial_state = _state(initial_state, v_first)
    return call


# Structs are filled once a signature (sizes, types and strides of the inputs, and options) and copied for a call, which
# then writes its addresses: they lie in words of eight bytes, at these numbers.

def _words(call):
    return array.array("q", bytes(call))


def _word(name):
    return getattr(_DeltaRule, name).offset // 8


_STREAM, _SEQUENCES, _CU_SEQLENS, _SAVED, _SCRATCH = map(_word, ("stream", "sequences", "cu_seqlens", "saved", "scratch"))
_Q, _K, _V, _G, _BETA, _INITIAL_STATE = map(_word, ("q", "k", "v", "g", "beta", "initial_state"))
_O, _FINAL_STATE, _D_O, _D_FINAL_STATE = map(_word, ("o", "final_state", "d_o", "d_final_state"))
_DQ, _DK, _DV, _DG, _DBETA, _D_INITIAL_STATE = map(_word, ("dq", "dk", "dv", "dg", "dbeta", "d_initial_state"))


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


def _output_sizes(q, v, cu_seqlens, v_first, gpu):
    """Shapes of o and final_state, and the size of what the backward needs: numbers of v's type, on the GPU bytes.
    Documents have no more chunks together than their tokens' and one more each."""
    batch, tokens, _, dk = q.shape
    heads, dv = v.shape[2:]
    count = _sequences(q, cu_seqlens)
    chunks = batch * ((tokens + CHUNK - 1) // CHUNK) if cu_seqlens is None else tokens // CHUNK + count
    state = (count, heads, dv, dk) if v_first else (count, heads, dk, dv)
    if gpu:  # states, E, exponents, N and P, gates, each on 256 bytes (gdn/kernels/delta_rule)
        kept = chunks * heads * (2 * dk * dv + dv // 4 + 17408) + 2 * batch * tokens * heads * dv + 1280 * count
    else:
        kept = chunks * heads * dk * dv
    return (batch, tokens, heads, dv), state, kept


@torch.library.register_fake("gdn::delta_rule")
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent, keep):
    gpu = v.device.type == "cuda"
    o, state, kept = _output_sizes(q, v, cu_seqlens, v_first, gpu)
    return (v.new_empty(o), g.new_empty(state if output_final_state else (0,)),
            v.new_empty((kept if keep else 0,), dtype=torch.uint8 if gpu else v.dtype))


def _gradients(q, k, v, g, beta, initial_state):
    """Of the inputs, dense and not yet computed; None for an initial state that is not there."""
    return tuple(None if x is None else x.new_empty(x.shape) for x in (q, k, v, g, beta, initial_state))


@torch.library.register_fake("gdn::delta_rule_backward")
def _(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, normalized, v_first):
    *gradients, d_initial_state = _gradients(q, k, v, g, beta, initial_state)
    return (*gradients, q.new_empty(0) if initial_state is None else d_initial_state)


# ---- calls of the library

# The GPU reads and writes states as [N,HV,V,K] float32, and token by token as [N,HV,K,V]; heads of q, k, v and o whose
# columns lie side by side on 16 bytes. Other layouts are copied, as fla copies all that is not contiguous.

def _fits(x):
    """Whether the GPU reads the strides of q, k, v, o or a gradient of theirs."""
    batch, token, head, column = x.stride()
    return column == 1 and token % 8 == 0 and head % 8 == 0 and (x.shape[0] == 1 or batch == x.shape[1] * token)


def _dense(x):
    return x.clone(memory_format=torch.contiguous_format)


def _flipped(state, flip):
    """A state with its last two dimensions in the other order, where `flip`; dense."""
    return None if state is None else (state.transpose(-1, -2) if flip else state).contiguous()


def _is_gpu(x):
    return x.is_cuda


def _stream(index):
    return torch._C._cuda_getCurrentRawStream(index)


class _Plan:
    """What all calls with inputs of one signature share: sizes, structs filled but for addresses, bytes of work space."""

    def __init__(self, q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent):
        self.options = scale, normalized, v_first, output_final_state, recurrent
        self.gpu, self.v_first = _is_gpu(q), v_first
        self.empty = q.shape[0] * q.shape[1] == 0
        self.index = q.device.index if q.is_cuda else 0
        batch, tokens, _, dk = q.shape
        heads, dv = v.shape[2:]
        self.count = _sequences(q, cu_seqlens)
        self.heads, self.dk, self.dv = heads, dk, dv
        self.o_shape, self.state_shape, self.kept = _output_sizes(q, v, cu_seqlens, v_first, self.gpu)
        self.saved_type = torch.uint8 if self.gpu else v.dtype
        self.output_final_state, self.recurrent = output_final_state, recurrent
        self.dense = all(x is None or x.stride() == x.new_empty(x.shape, device="meta").stride()
                         for x in (q, k, v, g, beta, initial_state))
        self.copies = ()  # which of q, k, v, g, beta are copied
        self.scratch_bytes = None  # not known: of documents it depends on their lengths
        self.documents = cu_seqlens is not None
        self.backwards = {}
        if self.gpu:
            self.copies = tuple(i for i, x in enumerate((q, k, v)) if not _fits(x)) + tuple(
                3 + i for i, x in enumerate((g, beta)) if not x.is_contiguous())
        inputs = self.readable((q, k, v, g, beta))
        self.call = _call(*inputs, None if self.gpu else initial_state, scale, normalized, v_first)
        if self.gpu:
            self.call.device, self.call.device_number = 1, self.index
        self.forwards = {}  # recurrent without keeping, or not -> words

    def readable(self, inputs):
        """q, k, v, g, beta as the library reads them."""
        if not self.copies:
            return inputs
        return tuple(_dense(x) if i in self.copies else x for i, x in enumerate(inputs))

    def gpu_state(self, by_token):
        """Strides of a state on the GPU, dense as the library has it, in the order [N,HV,K,V]."""
        n, dk, dv = self.heads, self.dk, self.dv
        return (ctypes.c_int64 * 4)(n * dk * dv, dk * dv, *((dv, 1) if by_token else (1, dk)))

    def forward_words(self, o, final_state, initial_state, by_token):
        call = _DeltaRule.from_buffer_copy(self.call)
        call.o = _place(o)
        if self.gpu:
            call.initial_state.stride = call.final_state.stride = self.gpu_state(by_token)
        elif final_state is not None:
            call.final_state = _state(final_state, self.v_first)
        return _words(call)

    def backward_words(self, d_o, d_final_state, gradients):
        call = _DeltaRule.from_buffer_copy(self.call)
        call.d_o = _place(d_o)
        call.dq, call.dk, call.dv, call.dg, call.dbeta = map(_place, gradients[:5])
        if self.gpu:
            call.d_final_state.stride = call.d_initial_state.stride = self.gpu_state(False)
        else:
            call.d_final_state = _state(d_final_state, self.v_first)
            if gradients[5] is not None:
                call.d_initial_state = _state(gradients[5], self.v_first)
        return _words(call)


_plans, _MOST_PLANS = {}, 1024
_known = {}  # what _recipe said of calls with such inputs, and their plan where nothing is to be converted


def _signature(x):
    return x.shape, x.stride(), x.dtype, x.device


def _key(q, k, v, g, beta, initial_state, cu_seqlens, *options):
    return (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(), v.dtype,
            v.device, g.shape, g.stride(), g.dtype, g.device, beta.shape, beta.stride(), beta.dtype, beta.device,
            None if initial_state is None else _signature(initial_state),
            None if cu_seqlens is None else (cu_seqlens.shape, cu_seqlens.dtype), options)


def _plan(q, k, v, g, beta, initial_state, cu_seqlens, *options):
    """The plan of inputs whose shapes and types were checked."""
    key = _key(q, k, v, g, beta, initial_state, cu_seqlens, *options)
    plan = _plans.get(key)
    if plan is None:
        plan = _Plan(q, k, v, g, beta, initial_state, cu_seqlens, *options)
        if len(_plans) >= _MOST_PLANS:  # of lengths that change from call to call
            _plans.clear()
        _plans[key] = plan
    return plan


def _launch(plan, name, words, q, saved, documents):
    """Runs a call, on the GPU with the work space that it wants; saved: what the backward reads, or None."""
    address = words.buffer_info()[0]
    if documents is not None:
        words[_SEQUENCES], words[_CU_SEQLENS] = plan.count, documents.data_ptr()
    if saved is not None:
        words[_SAVED] = saved.data_ptr()
    if plan.gpu:
        words[_STREAM] = _stream(plan.index)
        if name != "gdn_delta_rule_recurrent":
            size = plan.scratch_bytes
            if size is None:
                size = _work_space(plan, address)
            scratch = q.new_empty(size, dtype=torch.uint8)
            words[_SCRATCH] = scratch.data_ptr()
    _run(name, address)


def _work_space(plan, address):
    loaded = library()
    wanted, scratch_bytes = ctypes.c_size_t(), ctypes.c_size_t()
    if loaded.gdn_delta_rule_bytes(address, ctypes.byref(wanted), ctypes.byref(scratch_bytes)) != 0:
        raise RuntimeError(loaded.gdn_last_error().decode())
    if wanted.value > plan.kept:
        raise RuntimeError(f"gated delta rule: {wanted.value} bytes wanted for the backward, {plan.kept} there")
    if not plan.documents:
        plan.scratch_bytes = scratch_bytes.value
    return scratch_bytes.value


def _forward(plan, q, k, v, g, beta, initial_state, cu_seqlens, keep):
    """o; final_state or None; what the backward needs or None."""
    gpu = plan.gpu
    o = v.new_empty(plan.o_shape)
    saved = v.new_empty(plan.kept, dtype=plan.saved_type) if keep else None
    wanted = plan.output_final_state
    if plan.empty and gpu:
        final_state = g.new_empty(plan.state_shape) if wanted else None
        if wanted:
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return o, final_state, saved
    by_token = plan.recurrent and not keep
    if plan.copies:
        q, k, v, g, beta = plan.readable((q, k, v, g, beta))
    at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    begin, end = initial_state, None
    if gpu:
        if (at_q | at_k | at_v) % 16:
            q, k, v = _dense(q), _dense(k), _dense(v)
            plan = _plan(q, k, v, g, beta, initial_state, cu_seqlens, *plan.options)
            at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        flip = plan.v_first if by_token else not plan.v_first
        begin = _flipped(initial_state, flip)
        if wanted or by_token:
            n, heads, dk, dv = plan.count, plan.heads, plan.dk, plan.dv
            end = g.new_empty((n, heads, dk, dv) if by_token else (n, heads, dv, dk))
    elif wanted:
        end = g.new_empty(plan.state_shape)
    words = plan.forwards.get(by_token)
    if words is None:
        words = plan.forwards[by_token] = plan.forward_words(o, end, begin, by_token)
    words = words[:]
    words[_Q], words[_K], words[_V] = at_q, at_k, at_v
    words[_G], words[_BETA], words[_O] = g.data_ptr(), beta.data_ptr(), o.data_ptr()
    words[_INITIAL_STATE] = 0 if begin is None else begin.data_ptr()
    words[_FINAL_STATE] = 0 if end is None else end.data_ptr()
    _launch(plan, "gdn_delta_rule_recurrent" if by_token else "gdn_delta_rule_forward", words, q, saved, _host(cu_seqlens))
    if not wanted:
        return o, None, saved
    return o, _flipped(end, flip) if gpu else end, saved


def _backward(plan, d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved):
    if plan.dense:  # empty_like, which takes half as long, keeps the order of strides
        like = torch.empty_like
        gradients = (like(q), like(k), like(v), like(g), like(beta), None if initial_state is None else like(initial_state))
    else:
        gradients = _gradients(q, k, v, g, beta, initial_state)
    gpu = plan.gpu
    if plan.empty and gpu:
        if initial_state is not None:
            gradients[5].zero_() if d_final_state is None else gradients[5].copy_(d_final_state)
        return gradients
    if plan.copies:
        q, k, v, g, beta = plan.readable((q, k, v, g, beta))
    at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    begin, end = d_final_state, None
    if gpu:
        if (at_q | at_k | at_v) % 16:
            q, k, v = _dense(q), _dense(k), _dense(v)
            plan = _plan(q, k, v, g, beta, initial_state, cu_seqlens, *plan.options)
            at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if not _fits(d_o) or d_o.data_ptr() % 16:
            d_o = _dense(d_o)
        begin = _flipped(d_final_state, not plan.v_first)
        if initial_state is not None:
            end = g.new_empty((plan.count, plan.heads, plan.dv, plan.dk))
    elif initial_state is not None:
        end = gradients[5]
    key = d_o.stride(), None if begin is None else begin.stride()
    words = plan.backwards.get(key)
    if words is None:
        if len(plan.backwards) >= _MOST_PLANS:
            plan.backwards.clear()
        words = plan.backwards[key] = plan.backward_words(d_o, begin, gradients)
    words = words[:]
    words[_Q], words[_K], words[_V], words[_G], words[_BETA] = at_q, at_k, at_v, g.data_ptr(), beta.data_ptr()
    words[_DQ], words[_DK], words[_DV], words[_DG], words[_DBETA] = [x.data_ptr() for x in gradients[:5]]
    words[_INITIAL_STATE] = 0 if gpu or initial_state is None else initial_state.data_ptr()
    words[_D_O], words[_D_FINAL_STATE] = d_o.data_ptr(), 0 if begin is None else begin.data_ptr()
    words[_D_INITIAL_STATE] = 0 if end is None else end.data_ptr()
    _launch(plan, "gdn_delta_rule_backward", words, q, saved, _host(cu_seqlens))
    return (*gradients[:5], _flipped(end, not plan.v_first)) if gpu and end is not None else gradients


def _delta_rule(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent, keep):
    plan = _plan(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent)
    o, final_state, saved = _forward(plan, q, k, v, g, beta, initial_state, cu_seqlens, keep)
    return (o, g.new_empty(0) if final_state is None else final_state,
            v.new_empty(0, dtype=plan.saved_type) if saved is None else saved)


def _delta_rule_backward(d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved, scale, normalized, v_first):
    plan = _plan(q, k, v, g, beta, initial_state, cu_seqlens, scale, normalized, v_first, False, False)
    *gradients, d_initial_state = _backward(plan, d_o, d_final_state, q, k, v, g, beta, initial_state, cu_seqlens, saved)
    return (*gradients, q.new_empty(0) if initial_state is None else d_initial_state)


for _device in ("CPU", "CUDA"):
    torch.library.impl("gdn::delta_rule", _device, _delta_rule)
    torch.library.impl("gdn::delta_rule_backward", _device, _delta_rule_backward)


def _setup_context(ctx, inputs, output):
    *tensors, scale, normalized, v_first, output_final_state, _, keep = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.options = scale, normalized, v_first, output_final_state, keep


def _operator_backward(ctx, d_o, d_final_state, _):
    *inputs, saved = ctx.saved_tensors
    scale, normalized, v_first, output_final_state, keep = ctx.options
    if not keep:
        raise RuntimeError("gdn::delta_rule: a backward of a forward with keep=False")
    *gradients, d_initial_state = torch.ops.gdn.delta_rule_backward(
        d_o, d_final_state if output_final_state else None, *inputs, saved, scale, normalized, v_first)
    return (*gradients, None if inputs[5] is None else d_initial_state, *[None] * 7)


torch.library.register_autograd("gdn::delta_rule", _operator_backward, setup_context=_setup_context)


def _second_derivative(ctx, *gradients):
    raise RuntimeError("gated delta rule: a second derivative, supported: first ones")


torch.library.register_autograd("gdn::delta_rule_backward", _second_derivative)


# Called eagerly, the operators' way through PyTorch's dispatcher takes longer than everything else on the host: where
# nobody looks on, the library is called from a plain autograd.Function.

_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _onlooker(tensors):
    """Whether something wants to see the operator: torch.compile, a trace, a dispatch mode (fake tensors, counters,
    selective checkpointing), a transform of torch.func, or a tensor's subclass."""
    if torch.compiler.is_compiling() or _modes is None or _transforms is None:
        return True
    if _modes() or _transforms() or torch.jit.is_tracing():
        return True
    for x in tensors:
        if x is not None and type(x) not in _PLAIN:
            return True
    return False


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, q, k, v, g, beta, initial_state, cu_seqlens):
        o, final_state, saved = _forward(plan, q, k, v, g, beta, initial_state, cu_seqlens, True)
        ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, saved)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        return o, final_state

    @staticmethod
    def backward(ctx, d_o, d_final_state):
        plan, tensors = ctx.plan, ctx.saved_tensors
        if d_o is None:
            if d_final_state is None:
                return (None,) * 8
            d_o = tensors[2].new_zeros(plan.o_shape)
        if torch.is_grad_enabled() or _onlooker((d_o, d_final_state)):
            scale, normalized, v_first, _, _ = plan.options
            gradients = torch.ops.gdn.delta_rule_backward(d_o, d_final_state, *tensors, scale, normalized, v_first)
        else:
            gradients = _backward(plan, d_o, d_final_state, *tensors)
        dq, dk, dv, dg, dbeta, d_initial_state = gradients
        return None, dq, dk, dv, dg, dbeta, None if tensors[5] is None else d_initial_state, None


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
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"gated delta rule: {name} is {x.dtype} on {x.device}, supported: bfloat16 and float16")
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


class _Normalized(torch.autograd.Function):
    """The same in fewer calls of PyTorch: y = r x, r = 1 / sqrt(|x|^2 + 1e-6);  dx = r (dy - y <y, dy>)."""

    @staticmethod
    def forward(ctx, x):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().add_(1e-6).rsqrt_()
        ctx.save_for_backward(x, r)
        return torch.mul(x, r, out=torch.empty_like(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, r = ctx.saved_tensors
        y = x * r  # float32
        dx = torch.addcmul(dy.float(), y, (y * dy).sum(-1, keepdim=True), value=-1)
        return torch.mul(dx, r, out=torch.empty_like(x))


def _recipe(q, k, v, g, beta, scale, initial_state, normalized, v_first, cu_seqlens):
    """Checks a call. The types that it computes in, of q, k and v and of the rest; scale; whether q and k are divided by their
    lengths here, and by the library."""
    scale = float(k.shape[-1] ** -0.5 if scale is None else scale)
    compute = _compute_type(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    _check(q, k, v, g, beta, initial_state, cu_seqlens, v_first)
    if _is_gpu(q):
        return torch.bfloat16, torch.float32, scale, bool(normalized), False
    return compute, compute, scale, False, bool(normalized)


def _converted(tensors, low, compute, divide, eager):
    """The tensors in the types that are computed in."""
    q, k, *rest = tensors
    if divide:
        q, k = map(_Normalized.apply if eager else _normalized, (q, k))
    return [x if x is None or x.dtype == wanted else x.to(wanted)
            for x, wanted in zip((q, k, *rest), (low, low, low, compute, compute, compute))]


def _apply(q, k, v, g, beta, scale, initial_state, output_final_state, normalized, v_first, cu_seqlens, recurrent):
    tensors = q, k, v, g, beta, initial_state
    eager = not _onlooker(tensors)
    plan = None
    if eager:
        key = _key(*tensors, cu_seqlens, scale, normalized, v_first, output_final_state, recurrent)
        known = _known.get(key)
        if known is None:
            recipe = _recipe(q, k, v, g, beta, scale, initial_state, normalized, v_first, cu_seqlens)
        else:
            recipe, plan = known
        if plan is None:
            given = tensors
            low, compute, number, divide, in_library = recipe
            tensors = _converted(given, low, compute, divide, True)
            plan = _plan(*tensors, cu_seqlens, number, in_library, v_first, output_final_state, recurrent)
            if known is None:  # the plan is the next call's too where nothing is converted
                if len(_known) >= _MOST_PLANS:
                    _known.clear()
                _known[key] = recipe, plan if all([x is y for x, y in zip(tensors, given)]) else None
    else:
        low, compute, number, divide, in_library = _recipe(q, k, v, g, beta, scale, initial_state, normalized, v_first, cu_seqlens)
        tensors = _converted(tensors, low, compute, divide, False)
    keep = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
    if not eager:
        o, final_state, _ = torch.ops.gdn.delta_rule(*tensors, cu_seqlens, number, in_library, v_first, output_final_state,
                                                     recurrent, keep)
    elif keep:
        o, final_state = _Eager.apply(plan, *tensors, cu_seqlens)
    else:
        o, final_state, _ = _forward(plan, *tensors, cu_seqlens, False)
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
        _run("gdn_mixer_forward", ctypes.byref(call))
        return results
    dy = _double(dy).contiguous()
    _require(dy.shape == tensors["h"].shape, f"dy has shape {list(dy.shape)}, expected {shapes['h']}")
    call.dy = dy.data_ptr()
    for name, tensor in tensors.items():
        results["d" + name] = torch.empty_like(tensor)
        setattr(call, "d" + name, results["d" + name].data_ptr())
    _run("gdn_mixer_backward", ctypes.byref(call))
    return results
