"""Tests of gdn_torch.py on the CPU; skipped where PyTorch or ./libgdn.so (`make libgdn.so`) is missing, those against fla
and transformers where these are.

    python3 scripts/test_gdn_torch.py
"""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
LIBRARY = Path(os.environ.get("GDN_LIBRARY", HERE.parent / "libgdn.so"))
if not importlib.util.find_spec("torch"):
    raise unittest.SkipTest("PyTorch is missing")
if not LIBRARY.exists():
    raise unittest.SkipTest(f"{LIBRARY} is not built")

import torch
import torch.nn.functional as F

sys.path.insert(0, str(HERE))
import gdn_torch
from gdn_torch import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

torch.set_num_threads(1)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
needs_fla = unittest.skipUnless(importlib.util.find_spec("fla"), "flash-linear-attention is missing")
needs_transformers = unittest.skipUnless(importlib.util.find_spec("transformers"), "transformers is missing")


def inputs(batch=2, tokens=77, heads=2, values=4, dk=5, dv=3, count=None, dtype=torch.float64, seed=0, weakest=-1.0,
           unit=False):
    """q, k, v, g, beta to 2, initial_state; with `unit` q and k of length 1."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.float64)
    q, k = normal(batch, tokens, heads, dk), normal(batch, tokens, heads, dk)
    if unit:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    x = (q, k, normal(batch, tokens, values, dv), weakest * torch.rand(batch, tokens, values, generator=r, dtype=torch.float64),
         2 * torch.rand(batch, tokens, values, generator=r, dtype=torch.float64), normal(count or batch, values, dk, dv))
    return [t.to(dtype).requires_grad_() for t in x]


def naive(q, k, v, g, beta, state, scale=None, normalized=False):
    """The definition, token by token."""
    if normalized:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        u = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, :, :, None]).sum(-2))
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        out.append((state * q[:, t, :, :, None]).sum(-2) * (q.shape[-1] ** -0.5 if scale is None else scale))
    return torch.stack(out, 1), state


def gradients(outputs, x, seed=1):
    r = torch.Generator().manual_seed(seed)
    loss = sum((y * torch.randn(y.shape, generator=r, dtype=torch.float64).to(y.dtype)).sum() for y in outputs)
    return torch.autograd.grad(loss, x)


def relative(x, reference):
    x, reference = x.detach().double(), reference.detach().double()
    return ((x - reference).norm() / reference.norm().clamp_min(1e-300)).item()


class AgainstTheDefinition(unittest.TestCase):
    def compare(self, x, ours, theirs, bound):
        for name, a, b in zip(("o", "final_state"), ours, theirs):
            self.assertLess(relative(a, b), bound, name)
        for name, a, b in zip(NAMES, gradients(ours, x), gradients(theirs, x)):
            self.assertEqual(a.dtype, b.dtype)
            self.assertLess(relative(a, b), bound, "d" + name)

    def test_outputs_states_and_gradients(self):
        for tokens in (1, 63, 64, 65, 130):
            for normalized in (False, True):
                for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
                    with self.subTest(tokens=tokens, normalized=normalized, function=function.__name__):
                        x = inputs(tokens=tokens, unit=not normalized)
                        *five, state = x
                        ours = function(**dict(zip(NAMES, x)), output_final_state=True, use_qk_l2norm_in_kernel=normalized)
                        self.compare(x, ours, naive(*five, state, normalized=normalized), 1e-13)
                        with torch.no_grad():  # the recurrence itself, not in chunks
                            again = function(**dict(zip(NAMES, x)), output_final_state=True, use_qk_l2norm_in_kernel=normalized)
                        self.assertLess(relative(again[0], ours[0]), 1e-13)
                        self.assertLess(relative(again[1], ours[1]), 1e-13)

    def test_strong_decay_and_scale(self):
        x = inputs(tokens=100, weakest=-40.0, unit=True)
        ours = chunk_gated_delta_rule(*x[:5], scale=0.3, initial_state=x[5], output_final_state=True)
        self.compare(x, ours, naive(*x, scale=0.3), 1e-13)

    def test_float32_is_close_to_float64(self):
        x = inputs(tokens=200, dk=32, dv=48, dtype=torch.float32, unit=True)
        ours = chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)
        exact = [t.detach().double().requires_grad_() for t in x]
        theirs = naive(*exact)
        for a, b in zip((*ours, *gradients(ours, x)), (*theirs, *gradients(theirs, exact))):
            self.assertLess(relative(a, b), 1e-5)
            self.assertEqual(a.dtype, torch.float32)

    def test_gradcheck(self):
        for packed in (None, torch.tensor([0, 2, 2, 70])):
            x = inputs(batch=1, tokens=70, heads=1, values=2, dk=2, dv=2, count=3 if packed is not None else 1)

            def function(*x):
                return chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=True,
                                              cu_seqlens=packed)
            self.assertTrue(torch.autograd.gradcheck(function, x))

    def test_options_of_flas_functions(self):
        x = inputs()
        q, k, v, g, beta, state = x
        for function in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule):
            with self.subTest(function=function.__name__):
                plain = function(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
                flipped = function(q, k, v, g=g, beta=beta, initial_state=state.transpose(-1, -2).contiguous(),
                                   output_final_state=True, state_v_first=True)
                self.assertTrue(torch.equal(plain[0], flipped[0]))
                self.assertTrue(torch.equal(plain[1], flipped[1].transpose(-1, -2)))
                with self.assertWarns(DeprecationWarning):
                    older = function(q, k, v, g=g, beta=beta, initial_state=state.transpose(-1, -2), transpose_state_layout=True)
                self.assertTrue(torch.equal(plain[0], older[0]))
                self.assertIsNone(older[1])
                A_log, dt_bias = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
                raw = function(q, k, v, g=g, beta=beta, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
                               use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True)
                by_hand = function(q, k, v, g=-A_log.exp() * F.softplus(g + dt_bias), beta=2 * beta.sigmoid())
                self.assertLess(relative(raw[0], by_hand[0]), 1e-14)
        o, _ = fused_recurrent_gated_delta_rule(q, k, v)
        self.assertTrue(torch.equal(o, fused_recurrent_gated_delta_rule(q, k, v, torch.zeros_like(g), None, None,
                                                                        torch.ones_like(beta))[0]))

    def test_signatures_are_flas(self):
        expected = {
            "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
                                      "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu "
                                      "chunk_indices cp_context kwargs",
            "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state "
                                                "use_qk_l2norm_in_kernel use_gate_in_kernel A_log dt_bias "
                                                "use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens kwargs"}
        for name, parameters in expected.items():
            ours = inspect.signature(getattr(gdn_torch, name)).parameters
            self.assertEqual(list(ours), parameters.split())
            if importlib.util.find_spec("fla"):
                fla = inspect.signature(getattr(importlib.import_module("fla.ops.gated_delta_rule"), name)).parameters
                self.assertEqual([(p.name, p.default, p.kind) for p in ours.values()],
                                 [(p.name, p.default, p.kind) for p in fla.values()])


class Documents(unittest.TestCase):
    def test_packed_have_the_bits_of_each_alone(self):
        cu_seqlens = torch.tensor([0, 1, 1, 66, 200, 264])
        for dtype in (torch.float32, torch.float64):
            x = inputs(batch=1, tokens=264, count=5, dtype=dtype)
            packed = chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True, cu_seqlens=cu_seqlens)
            # weights of the loss by hand: the same for a document alone
            w, ws = (torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(3)) for y in packed)
            packed_gradients = torch.autograd.grad((packed[0] * w).sum() + (packed[1] * ws).sum(), x)
            for n, (a, b) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:])):
                alone = [t.detach()[:, a:b].requires_grad_() for t in x[:5]] + [x[5].detach()[n:n + 1].requires_grad_()]
                o, state = chunk_gated_delta_rule(*alone[:5], initial_state=alone[5], output_final_state=True)
                self.assertTrue(torch.equal(o, packed[0][:, a:b]))
                self.assertTrue(torch.equal(state, packed[1][n:n + 1]))
                own = torch.autograd.grad((o * w[:, a:b]).sum() + (state * ws[n:n + 1]).sum(), alone)
                for i, (theirs, mine) in enumerate(zip(packed_gradients, own)):
                    self.assertTrue(torch.equal(theirs[n:n + 1] if i == 5 else theirs[:, a:b], mine), (n, NAMES[i]))

    def test_int32_and_cu_seqlens_cpu(self):
        x = inputs(batch=1, tokens=80, count=2)
        call = dict(initial_state=x[5], output_final_state=True)
        expected = chunk_gated_delta_rule(*x[:5], cu_seqlens=torch.tensor([0, 30, 80]), **call)
        for other in (dict(cu_seqlens=torch.tensor([0, 30, 80], dtype=torch.int32)),
                      dict(cu_seqlens=torch.tensor([0, 30, 80]), cu_seqlens_cpu=torch.tensor([0, 30, 80]))):
            for a, b in zip(expected, chunk_gated_delta_rule(*x[:5], **call, **other)):
                self.assertTrue(torch.equal(a, b))

    def test_nothing(self):
        x = inputs(batch=2, tokens=0)
        o, state = chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)
        self.assertEqual(list(o.shape), [2, 0, 4, 3])
        self.assertTrue(torch.equal(state, x[5]))
        (o.sum() + state.sum()).backward()
        self.assertTrue(torch.equal(x[5].grad, torch.ones_like(x[5])))


class InPyTorch(unittest.TestCase):
    def test_operators_keep_pytorchs_rules(self):
        x = inputs(tokens=70)
        torch.library.opcheck(torch.ops.gdn.delta_rule.default, (*x, None, 0.3, True, False, True, False, True))
        y = inputs(batch=1, tokens=70, count=2)
        # documents whose chunks are as many as may be: all that is kept for the backward is then written
        torch.library.opcheck(torch.ops.gdn.delta_rule.default,
                              (*y, torch.tensor([0, 5, 70]), 0.3, False, False, False, False, True))

    def test_eager_calls_and_the_operator_give_the_same(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Count(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, function, types, arguments=(), options=None):
                self.seen += function.namespace == "gdn"
                return function(*arguments, **(options or {}))
        for documents in (None, torch.tensor([0, 5, 70])):
            x = inputs(batch=2 if documents is None else 1, tokens=70, count=2)

            def run():
                o, last = chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True, cu_seqlens=documents)
                return [o.detach(), last.detach(), *gradients((o, last), x)]
            with mock.patch.object(gdn_torch, "_Eager", wraps=gdn_torch._Eager) as eager:
                alone = run()
            self.assertTrue(eager.apply.called)
            with Count() as mode:  # somebody looks on: the operators run
                watched = run()
            self.assertEqual(mode.seen, 2)
            for a, b in zip(alone, watched):
                self.assertTrue(torch.equal(a, b))

    def test_part_of_the_outputs_and_second_derivatives(self):
        x = inputs(tokens=70)

        def call():
            return chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)
        d_state = torch.randn(call()[1].shape, dtype=torch.float64)
        zero = torch.zeros_like(call()[0])
        both = torch.autograd.grad(call(), x, (zero, d_state))
        for a, b in zip(torch.autograd.grad(call()[1], x, d_state, allow_unused=True), both):
            self.assertTrue(torch.equal(a, b))
        d_o = torch.randn(zero.shape, dtype=torch.float64)
        both = torch.autograd.grad(call(), x, (d_o, torch.zeros_like(d_state)))
        for a, b in zip(torch.autograd.grad(call()[0], x, d_o), both):
            self.assertTrue(torch.equal(a, b))
        first, = torch.autograd.grad(call()[0].sum(), x[0], create_graph=True)
        with self.assertRaisesRegex(RuntimeError, "a second derivative, supported: first ones"):
            torch.autograd.grad(first.sum(), x[1])

    def test_calls_of_one_signature_are_told_from_others(self):
        with torch.no_grad():
            x = inputs(tokens=70)
            for _ in range(2):
                for scale in (None, 0.3):
                    for tokens in (70, 3):
                        for turned in (False, True):
                            y = [t[:, :tokens] for t in x[:5]]
                            if turned:
                                y[0] = y[0].transpose(1, 2).contiguous().transpose(1, 2)
                            o, last = chunk_gated_delta_rule(*y, scale=scale, initial_state=x[5], output_final_state=True)
                            dense = [t.clone() for t in y]
                            reference = torch.ops.gdn.delta_rule(*dense, x[5], None, 5 ** -0.5 if scale is None else scale, False,
                                                                 False, True, False, False)
                            self.assertTrue(torch.equal(o, reference[0]) and torch.equal(last, reference[1]))
        with mock.patch.object(gdn_torch, "_MOST_PLANS", 4), mock.patch.dict(gdn_torch._plans, clear=True), \
                mock.patch.dict(gdn_torch._known, clear=True):
            for tokens in range(1, 20):
                chunk_gated_delta_rule(*(t.detach()[:, :tokens] for t in x[:5]))
            self.assertLessEqual(max(len(gdn_torch._plans), len(gdn_torch._known)), 4)
            self.assertGreater(min(len(gdn_torch._plans), len(gdn_torch._known)), 0)

    def test_lengths_are_divided_by_in_few_calls(self):
        """As the GPU's calls do it before the library: held to float64."""
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)):
            r = torch.Generator().manual_seed(0)
            x = torch.randn(2, 9, 3, 64, generator=r).to(dtype).transpose(1, 2).requires_grad_()
            dy = torch.randn(x.shape, generator=r).to(dtype)
            exact = x.detach().double().requires_grad_()
            y64 = exact / (exact.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            y = gdn_torch._Normalized.apply(x)
            self.assertEqual((y.dtype, y.shape), (dtype, x.shape))
            self.assertLess(relative(y, y64), bound)
            self.assertLess(relative(y, gdn_torch._normalized(x)), bound)
            dx, = torch.autograd.grad(y, x, dy)
            self.assertEqual(dx.dtype, dtype)
            self.assertLess(relative(dx, torch.autograd.grad(y64, exact, dy.double())[0]), bound)
        zero = torch.zeros(1, 1, 1, 16, requires_grad=True)
        y = gdn_torch._Normalized.apply(zero)
        self.assertTrue(torch.equal(y, zero))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), zero)[0], torch.full(zero.shape, 1e3))

    def test_strided_and_expanded_tensors(self):
        x = inputs(tokens=70)
        expected = chunk_gated_delta_rule(*x[:5], initial_state=x[5])[0]
        moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x[:3]]
        self.assertTrue(torch.equal(expected, chunk_gated_delta_rule(*moved, *x[3:5], initial_state=x[5])[0]))
        packed = torch.cat([t.flatten(2) for t in x[:3]], -1)
        views = [t.view(2, 70, heads, -1) for t, heads in zip(packed.split([10, 10, 12], -1), (2, 2, 4))]
        self.assertTrue(torch.equal(expected, chunk_gated_delta_rule(*views, *x[3:5], initial_state=x[5])[0]))
        one = x[5][:1].expand(2, -1, -1, -1)
        self.assertTrue(torch.equal(chunk_gated_delta_rule(*x[:5], initial_state=one)[0],
                                    chunk_gated_delta_rule(*x[:5], initial_state=one.contiguous())[0]))

    def test_compile_has_no_graph_break(self):
        def function(q, k, v, g, beta, state):
            o, last = chunk_gated_delta_rule(q.sin(), k, v, g, beta, initial_state=state, output_final_state=True,
                                             use_qk_l2norm_in_kernel=True)
            return o.cos(), last
        x = inputs(dtype=torch.float32)
        expected, compiled = function(*x), torch.compile(function, fullgraph=True, backend="aot_eager")(*x)
        for a, b in zip((*expected, *gradients(expected, x)), (*compiled, *gradients(compiled, x))):
            self.assertLess(relative(a, b), 1e-6)

    def test_autocast_and_half_types(self):
        for dtype in (torch.bfloat16, torch.float16):
            x = inputs(tokens=100, dtype=dtype, unit=True)
            g, beta = x[3].detach().float().requires_grad_(), x[4].detach().float().requires_grad_()
            call = [*x[:3], g, beta]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                o, state = chunk_gated_delta_rule(*call, output_final_state=True)
            self.assertEqual((o.dtype, state.dtype), (dtype, torch.float32))
            exact = [t.detach().float().requires_grad_() for t in call]
            o32, state32 = chunk_gated_delta_rule(*exact, output_final_state=True)
            self.assertTrue(torch.equal(o, o32.to(dtype)))
            self.assertTrue(torch.equal(state, state32))
            for name, t, a, b in zip(NAMES, call, gradients((o, state), call), gradients((o32.to(dtype), state32), exact)):
                self.assertEqual(a.dtype, t.dtype)
                self.assertTrue(torch.equal(a, b.to(a.dtype)), name)

    def test_activation_checkpointing(self):
        from torch.utils.checkpoint import checkpoint
        x = inputs()

        def function(*x):
            return chunk_gated_delta_rule(*x[:5], initial_state=x[5], output_final_state=True)
        expected = gradients(function(*x), x)
        for reentrant in (False, True):
            again = [t.detach().clone().requires_grad_() for t in x]
            r = torch.Generator().manual_seed(1)
            out = checkpoint(function, *again, use_reentrant=reentrant)
            sum((y * torch.randn(y.shape, generator=r, dtype=torch.float64)).sum() for y in out).backward()
            for a, b in zip(expected, again):
                self.assertTrue(torch.equal(a, b.grad))

    def test_without_gradients_nothing_is_kept(self):
        x = inputs()
        with mock.patch.object(gdn_torch, "_forward", wraps=gdn_torch._forward) as made, torch.no_grad():
            chunk_gated_delta_rule(*x[:5])
        self.assertFalse(made.call_args.args[-1])

    def test_threads(self):
        x = [t.detach() for t in inputs(tokens=200)]
        expected, failures = chunk_gated_delta_rule(*x[:5])[0], []

        def work():
            for _ in range(20):
                if not torch.equal(chunk_gated_delta_rule(*x[:5])[0], expected):
                    failures.append("other bits")
                try:
                    torch.ops.gdn.delta_rule(*x, torch.tensor([0, 3]), 1.0, False, False, False, False, False)
                    failures.append("no error")
                except RuntimeError as error:
                    if "cu_seqlens" not in str(error):
                        failures.append(str(error))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_ddp(self):
        program = f"""
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {str(HERE)!r})
import gdn_torch
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 3 * 8 + 4, dtype=torch.float64)
    def forward(self, x):
        q, k, v, g, b = self.linear(x).split([8, 8, 8, 2, 2], -1)
        q, k, v = (t.unflatten(-1, (2, 4)) for t in (q, k, v))
        return gdn_torch.chunk_gated_delta_rule(q, k, v, -g.exp(), b.sigmoid(), use_qk_l2norm_in_kernel=True)[0]
torch.manual_seed(0)
layer = Layer()
x = torch.randn(4, 70, 8, dtype=torch.float64)
whole = torch.autograd.grad(layer(x).square().sum() / 2, list(layer.parameters()))
parallel = torch.nn.parallel.DistributedDataParallel(layer)
parallel(x[2 * dist.get_rank():][:2]).square().sum().backward()
for a, p in zip(whole, layer.parameters()):
    assert ((a - p.grad).norm() / a.norm()) < 1e-13, (a - p.grad).norm() / a.norm()
print("equal")
"""
        with tempfile.TemporaryDirectory() as folder:
            ranks = [subprocess.Popen([sys.executable, "-c", program, folder + "/rendezvous", str(rank)],
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
            for rank in ranks:
                out, error = rank.communicate(timeout=300)
                self.assertEqual((rank.returncode, out.strip()), (0, "equal"), error)


class LayoutsOfTheGpu(unittest.TestCase):
    """What the GPU's operators hand to the library, read by the CPU's, which takes any strides."""

    def on_gpu(self, function, *arguments):
        def launch(plan, name, words, q, saved, documents):
            words[1] = gdn_torch._TYPES[q.dtype] << 32  # device 0, and the type
            self.assertEqual([words[i] % 16 for i in (gdn_torch._Q, gdn_torch._K, gdn_torch._V)], [0, 0, 0])
            if documents is not None:
                words[gdn_torch._SEQUENCES], words[gdn_torch._CU_SEQLENS] = plan.count, documents.data_ptr()
            if saved is not None:
                words[gdn_torch._SAVED] = saved.data_ptr()
            gdn_torch._run(name, words.buffer_info()[0])
        with mock.patch.object(gdn_torch, "_is_gpu", lambda x: True), mock.patch.object(gdn_torch, "_launch", launch), \
                mock.patch.dict(gdn_torch._plans, clear=True):
            return function(*arguments)

    def test_states_strides_documents(self):
        for tokens, packed in ((70, None), (70, torch.tensor([0, 3, 3, 70])), (0, None)):
            for v_first in (False, True):
                for given in (False, True):
                    x = [t.detach() for t in inputs(batch=1 if packed is not None else 2, tokens=tokens, dk=16, dv=32,
                                                    count=3 if packed is not None else 2, dtype=torch.float32)]
                    if v_first:
                        x[5] = x[5].transpose(-1, -2).contiguous()
                    x[0] = x[0].transpose(1, 2).contiguous().transpose(1, 2)
                    state, d_state = (x[5] if given else None), torch.randn(x[5].shape)
                    call = (*x[:5], state, packed, 0.3, False, v_first, True)
                    for recurrent in (False, True):
                        theirs = gdn_torch._delta_rule(*call, recurrent, False)
                        ours = self.on_gpu(gdn_torch._delta_rule, *call, recurrent, False)
                        for a, b in zip(theirs, ours):
                            self.assertEqual((a.shape, a.stride()), (b.shape, b.stride()))
                            self.assertTrue(torch.equal(a, b), (tokens, v_first, given, recurrent))
                    o, _, saved = self.on_gpu(gdn_torch._delta_rule, *call, False, True)
                    kept = gdn_torch._delta_rule(*call, False, True)[2:]
                    for d_final in (None, d_state):
                        backward = (torch.randn(o.shape), d_final, *call[:7], saved, 0.3, False, v_first)
                        for a, b in zip(gdn_torch._delta_rule_backward(*backward[:9], *kept, *backward[10:]),
                                        self.on_gpu(gdn_torch._delta_rule_backward, *backward)):
                            self.assertEqual((a.shape, a.stride()), (b.shape, b.stride()))
                            self.assertTrue(torch.equal(a, b), (tokens, v_first, given, d_final is None))

    def test_what_the_gpu_does_not_read_is_copied(self):
        x = [t.detach() for t in inputs(batch=1, tokens=1, dk=16, dv=32, dtype=torch.float32)]
        flat = torch.cat([torch.zeros(1), x[1].flatten()])
        shifted = flat[1:].view(x[1].shape)  # begins on 4 bytes
        odd = torch.zeros(999).as_strided(x[0].shape, (999, 333, 16, 1)).copy_(x[0])  # "contiguous", as it has one token
        self.assertTrue(shifted.data_ptr() % 16 and odd.is_contiguous())
        call = (None, 0.3, False, False, True, False, True)
        expected = gdn_torch._delta_rule(*x, *call)
        backward = (0.3, False, False)
        d_o, d_state = torch.randn(expected[0].shape), torch.randn(expected[1].shape)
        gradient = gdn_torch._delta_rule_backward(d_o, d_state, *x, None, expected[2], *backward)
        calls = []

        def both(y):
            found = gdn_torch._delta_rule(*y, *call)
            calls.extend(gdn_torch._plans.values())
            return [*found[:2], *gdn_torch._delta_rule_backward(d_o, d_state, *y, None, found[2], *backward)]
        for q, k in ((odd, x[1]), (x[0], shifted), (odd, shifted)):
            for a, b in zip(self.on_gpu(both, [q, k, *x[2:]]), [*expected[:2], *gradient]):
                self.assertEqual((a.shape, a.is_contiguous()), (b.shape, True))
                self.assertTrue(torch.equal(a, b))
        for plan in calls:  # what the library is told it may read
            for name in ("q", "k", "v"):
                self.assertEqual([step % 8 for step in getattr(plan.call, name).stride[:3]], [0, 0, 0])


class Refusals(unittest.TestCase):
    def test_with_the_value_and_what_is_supported(self):
        q, k, v, g, beta, state = [t.detach() for t in inputs()]
        zero = torch.zeros
        for call, expected in (
                (dict(k=k[:, :5]), "k has shape [2, 5, 2, 5], expected that of q, [2, 77, 2, 5]"),
                (dict(v=v[:, :, :3]), "v has shape [2, 77, 3, 3], expected heads a multiple of the 2 of q and k"),
                (dict(g=g[..., :2]), "g has shape [2, 77, 2], expected [2, 77, 4]"),
                (dict(beta=beta[..., None]), "beta has shape [2, 77, 4, 1], expected [2, 77, 4]"),
                (dict(initial_state=state[:1]), "initial_state has shape [1, 4, 5, 3], expected [2, 4, 5, 3]"),
                (dict(cu_seqlens=torch.tensor([0, 77])), "q has shape [2, 77, 2, 5], expected a batch of 1 with cu_seqlens"),
                (dict(q=q.long()), "q is torch.int64, expected float32, float64, bfloat16 or float16"),
                (dict(cp_context=object()), "cp_context, supported: None"),
                (dict(chunk_size=8), "chunk_size 8, expected 16, 32 or 64"),
                (dict(allow_neg_eigval=True), "allow_neg_eigval without use_beta_sigmoid_in_kernel"),
                (dict(use_gate_in_kernel=True), "use_gate_in_kernel without A_log"),
                (dict(q=q.to("meta")), "k is on cpu, expected meta, as q")):
            with self.subTest(expected=expected), self.assertRaises((ValueError, TypeError, NotImplementedError)) as raised:
                chunk_gated_delta_rule(**{**dict(q=q, k=k, v=v, g=g, beta=beta), **call})
            self.assertIn(expected, str(raised.exception))
        with self.assertRaisesRegex(NotImplementedError, r"gk \[1\], supported: None"):
            fused_recurrent_gated_delta_rule(q, k, v, gk=zero(1))
        one = [t[:1] for t in (q, k, v, g, beta)]
        for documents, expected in (([0, 50], "cu_seqlens ends with 50, expected the number of tokens, 77"),
                                    ([0, 50, 40, 77], "cu_seqlens[2] is 40 after 50, expected ascending numbers")):
            with self.assertRaises(RuntimeError) as raised:
                chunk_gated_delta_rule(*one, cu_seqlens=torch.tensor(documents))
            self.assertIn(expected, str(raised.exception))

    def test_library_that_is_not_there(self):
        done = subprocess.run([sys.executable, "-c", "import gdn_torch; gdn_torch.library()"], capture_output=True, text=True,
                              cwd=HERE, env={**os.environ, "GDN_LIBRARY": "/nowhere/libgdn.so"})
        self.assertIn("/nowhere/libgdn.so", done.stderr)
        self.assertIn("run `make libgdn.so`, or name it in GDN_LIBRARY", done.stderr)


class Float64(unittest.TestCase):
    """The functions that others' layers are held against."""

    def test_delta_rule(self):
        x = inputs(batch=1, tokens=70, count=2, dtype=torch.float32)
        cu_seqlens, d_o, d_state = [0, 10, 70], torch.randn(1, 70, 4, 3), torch.randn(2, 4, 5, 3)
        ours = gdn_torch.delta_rule_float64(*(t.detach().numpy() for t in x[:5]), d_o=d_o.numpy(), initial_state=x[5],
                                            d_final_state=d_state, cu_seqlens=cu_seqlens)
        exact = [t.detach().double().requires_grad_() for t in x]
        parts = [naive(*(t[:, a:b] for t in exact[:5]), exact[5][n:n + 1]) for n, (a, b) in enumerate(((0, 10), (10, 70)))]
        o, state = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])
        theirs = torch.autograd.grad((o * d_o).sum() + (state * d_state).sum(), exact)
        expected = {"o": o, "final_state": state, **{"d_initial_state" if n == "initial_state" else "d" + n: t
                                                     for n, t in zip(NAMES, theirs)}}
        self.assertEqual(ours.keys(), expected.keys())
        for name, value in expected.items():
            self.assertLess(relative(ours[name], value), 1e-13, name)

    def test_mixer(self):
        B, T, d, Hk, Hv, dk, dv = 2, 70, 6, 2, 4, 3, 5
        r = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=r, dtype=torch.float64, requires_grad=True)
        weights = dict(w_q=normal(Hk * dk, d), w_k=normal(Hk * dk, d), w_v=normal(Hv * dv, d), w_z=normal(Hv * dv, d),
                       w_a=normal(Hv, d), w_b=normal(Hv, d), taps=normal(2 * Hk * dk + Hv * dv, 4), A_log=normal(Hv),
                       dt_bias=normal(Hv), w_norm=normal(dv), w_o=normal(d, Hv * dv))
        h, dy, w = normal(B, T, d), normal(B, T, d).detach(), weights
        x = torch.cat([h @ w[n].T for n in ("w_q", "w_k", "w_v")], -1).transpose(1, 2)
        x = F.silu(F.conv1d(F.pad(x, (3, 0)), w["taps"][:, None], groups=x.shape[1])).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t, heads in zip(x.split([Hk * dk, Hk * dk, Hv * dv], -1), (Hk, Hk, Hv)))
        g = -w["A_log"].exp() * F.softplus(h @ w["w_a"].T + w["dt_bias"])
        state = torch.zeros(B, Hv, dk, dv, dtype=torch.float64)
        o, _ = naive(q, k, v, g, 2 * (h @ w["w_b"].T).sigmoid(), state, normalized=True)
        o = w["w_norm"] * o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5)
        y = (o.flatten(2) * F.silu(h @ w["w_z"].T)) @ w["w_o"].T
        names = ["h", *weights]
        expected = dict(zip(["d" + n for n in names], torch.autograd.grad((y * dy).sum(), [h, *weights.values()])), y=y)
        ours = gdn_torch.mixer_float64(weights, h, Hk, Hv, dy=dy, norm_eps=1e-5, beta_max=2.0)
        self.assertEqual(ours.keys(), expected.keys())
        for name, value in expected.items():
            self.assertLess(relative(ours[name], value), 1e-12, name)
        with self.assertRaisesRegex(ValueError, r"taps has shape \[31, 4\], expected \[32, 4\]"):
            gdn_torch.mixer_float64({**weights, "taps": weights["taps"][:31]}, h, Hk, Hv)


def plain_pytorch(module):
    """A transformers' model file with its PyTorch code, whatever packages are installed."""
    return mock.patch.multiple(module, **{name: getattr(module, name).__wrapped__ for name in gdn_torch._TRANSFORMERS})


@needs_transformers
class Transformers(unittest.TestCase):
    def tearDown(self):
        gdn_torch.uninstall()

    def models(self):
        from transformers.models.olmo_hybrid import modeling_olmo_hybrid as olmo
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen
        common = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
                      linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2)
        yield qwen, qwen.Qwen3NextForCausalLM(qwen.Qwen3NextConfig(
            **common, num_hidden_layers=3, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, layer_types=["linear_attention", "linear_attention", "full_attention"]))
        yield olmo, olmo.OlmoHybridForCausalLM(olmo.OlmoHybridConfig(
            **common, num_hidden_layers=3, layer_types=["linear_attention", "linear_attention", "full_attention"],
            linear_allow_neg_eigval=True))

    def test_same_loss_and_gradients_as_their_pytorch_code(self):
        torch.manual_seed(0)
        for module, model in self.models():
            with self.subTest(model=type(model).__name__):
                tokens = torch.randint(3, 64, (2, 150))

                def run():
                    model.zero_grad()
                    loss = model(tokens, labels=tokens).loss
                    loss.backward()
                    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                with plain_pytorch(module):
                    loss, theirs = run()
                self.assertTrue(gdn_torch.install())
                with mock.patch.object(gdn_torch, "_run", wraps=gdn_torch._run) as calls:
                    our_loss, ours = run()
                self.assertEqual([c.args[0] for c in calls.call_args_list],
                                 ["gdn_delta_rule_forward"] * 2 + ["gdn_delta_rule_backward"] * 2)
                gdn_torch.uninstall()
                self.assertAlmostEqual(loss, our_loss, delta=2e-6 * loss)
                self.assertEqual(theirs.keys(), ours.keys())
                for name, gradient in theirs.items():
                    self.assertLess(relative(ours[name], gradient), 1e-4, name)

    def test_decoding_gives_their_tokens(self):
        torch.manual_seed(0)
        for module, model in self.models():
            with self.subTest(model=type(model).__name__):
                prompt = torch.randint(3, 64, (2, 70))

                def generate():
                    return model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
                with plain_pytorch(module):
                    theirs = generate()
                gdn_torch.install()
                with mock.patch.object(gdn_torch, "_run", wraps=gdn_torch._run) as calls:
                    ours = generate()
                gdn_torch.uninstall()
                self.assertEqual([c.args[0] for c in calls.call_args_list].count("gdn_delta_rule_recurrent"), 2 * 11)
                self.assertTrue(torch.equal(ours, theirs))

    def test_chunk_function_and_theirs(self):
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen
        x = inputs(tokens=150, heads=4, values=4, dk=16, dv=24, dtype=torch.float32)
        options = dict(initial_state=x[5], output_final_state=True, use_qk_l2norm_in_kernel=True)
        theirs = qwen.torch_chunk_gated_delta_rule.__wrapped__(*x[:3], g=x[3], beta=x[4], **options)
        ours = chunk_gated_delta_rule(*x[:3], g=x[3], beta=x[4], **options)
        for a, b in zip((*ours, *gradients(ours, x)), (*theirs, *gradients(theirs, x))):
            self.assertLess(relative(a, b), 1e-5)

    def test_models_loaded_after_install(self):
        program = """
import sys; sys.path.insert(0, sys.argv[1])
import gdn_torch
names = gdn_torch.install()
from transformers.models.qwen3_5 import modeling_qwen3_5 as late
import torch
calls = []
gdn_torch._run, run = lambda name, call: (calls.append(name), run(name, call)), gdn_torch._run
x = [torch.randn(1, 5, 2, 4) for _ in range(3)] + [-torch.rand(1, 5, 2), torch.rand(1, 5, 2)]
late.torch_chunk_gated_delta_rule(*x[:3], g=x[3], beta=x[4])
late.torch_recurrent_gated_delta_rule(*x[:3], g=x[3], beta=x[4])
print(calls)
"""
        done = subprocess.run([sys.executable, "-c", program, str(HERE)], capture_output=True, text=True)
        self.assertEqual(done.stdout.strip(), "['gdn_delta_rule_forward', 'gdn_delta_rule_recurrent']", done.stderr)


@needs_fla
class Fla(unittest.TestCase):
    def test_install_and_uninstall(self):
        import fla.layers.gated_deltanet as layer
        import fla.ops
        theirs = fla.ops.chunk_gated_delta_rule
        self.addCleanup(gdn_torch.uninstall)
        names = gdn_torch.install()
        for name in ("fla.ops.chunk_gated_delta_rule", "fla.ops.chunk_gdn", "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
                     "fla.layers.gated_deltanet.chunk_gated_delta_rule",
                     "fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule"):
            self.assertIn(name, names)
        self.assertIs(layer.chunk_gated_delta_rule, chunk_gated_delta_rule)
        self.assertEqual(gdn_torch.install(), [])
        gdn_torch.uninstall()
        self.assertIs(layer.chunk_gated_delta_rule, theirs)
        self.assertIs(fla.ops.chunk_gdn, theirs)

    def test_against_flas_naive_functions(self):
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule, naive_recurrent_gated_delta_rule
        q, k, v, g, beta, state = x = inputs(tokens=150, heads=3, values=3, dk=16, dv=24, dtype=torch.float32, unit=True)
        ours = chunk_gated_delta_rule(*x[:5], initial_state=state, output_final_state=True)
        ours = (*ours, *gradients(ours, x))
        for theirs in (naive_recurrent_gated_delta_rule(q, k, v, beta, g, initial_state=state, output_final_state=True),
                       naive_chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)):
            for a, b in zip(ours, (*theirs, *gradients(theirs, x))):
                self.assertLess(relative(a, b), 1e-5)


if __name__ == "__main__":
    unittest.main()
