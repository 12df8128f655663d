"""Tests of gdn_torch.py on a GPU; skipped where there is none. With --times it also prints device and host times, beside fla's
where that is installed.

    make GPU_ARCH=90a libgdn.so && python3 scripts/test_gdn_torch_cuda.py [--times]

Errors are measured against the CPU's float64, in units of what rounding the float64 result to bf16 costs.
"""

import importlib.util
import sys
import threading
import time
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not importlib.util.find_spec("torch"):
    raise unittest.SkipTest("PyTorch is missing")

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    raise unittest.SkipTest("there is no GPU")

sys.path.insert(0, str(HERE))
import gdn_torch
from gdn_torch import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

GATES = ("g", "beta", "initial_state")
ROUNDING = 1.66e-3  # of bf16, relative error of a tensor


def inputs(batch=2, tokens=300, heads=2, values=4, dk=64, dv=128, count=None, seed=0, weakest=-0.5):
    """q, k, v, g, beta to 2, initial_state, d_o, d_final_state as leaves on the GPU."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=r)
    x = dict(q=F.normalize(normal(batch, tokens, heads, dk), dim=-1), k=F.normalize(normal(batch, tokens, heads, dk), dim=-1),
             v=normal(batch, tokens, values, dv), g=weakest * torch.rand(batch, tokens, values, generator=r),
             beta=2 * torch.rand(batch, tokens, values, generator=r), initial_state=normal(count or batch, values, dk, dv),
             d_o=normal(batch, tokens, values, dv), d_final_state=normal(count or batch, values, dk, dv))
    gpu = {name: (y if name in (*GATES, "d_final_state") else y.bfloat16()).cuda() for name, y in x.items()}
    return {name: y.requires_grad_() if not name.startswith("d_") else y for name, y in gpu.items()}


def results(x, states=True, function=chunk_gated_delta_rule, **options):
    """o, final_state and all gradients by name."""
    leaves = {name: x[name] for name in ("q", "k", "v", "g", "beta")}
    if states:
        leaves["initial_state"] = x["initial_state"]
    o, last = function(**leaves, output_final_state=states, **options)
    outputs, weights = ((o, last), (x["d_o"], x["d_final_state"])) if states else ((o,), (x["d_o"],))
    gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    names = ["d_initial_state" if name == "initial_state" else "d" + name for name in leaves]
    return {"o": o.detach(), **({"final_state": last.detach()} if states else {}), **dict(zip(names, gradients))}


def exact(x, states=True, cu_seqlens=None, normalized=False):
    y = {name: t.detach() for name, t in x.items()}
    return gdn_torch.delta_rule_float64(y["q"], y["k"], y["v"], y["g"], y["beta"], d_o=y["d_o"],
                                        initial_state=y["initial_state"] if states else None,
                                        d_final_state=y["d_final_state"] if states else None,
                                        cu_seqlens=cu_seqlens.cpu() if cu_seqlens is not None else None,
                                        use_qk_l2norm_in_kernel=normalized)


def relative(x, reference):
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm()).item()


class OnTheGpu(unittest.TestCase):
    def close(self, ours, reference, bound=2 * ROUNDING):
        for name, value in ours.items():
            self.assertEqual(value.shape, reference[name].shape, name)
            if reference[name].abs().max() == 0:  # dg of a single token without a state
                self.assertEqual(float(value.abs().max()), 0, name)
                continue
            self.assertLess(relative(value, reference[name]), bound, name)

    def test_against_float64(self):
        for sizes in (dict(), dict(batch=1, tokens=64, heads=4, values=4, dk=128, dv=128), dict(tokens=1),
                      dict(tokens=130, dk=32, dv=48), dict(tokens=200, heads=1, values=1, dk=256, dv=512),
                      dict(batch=1, tokens=5000, heads=1, values=1, dk=128, dv=128, weakest=-0.02)):
            for states in (False, True):
                with self.subTest(states=states, **sizes):
                    x = inputs(**sizes)
                    self.close(results(x, states), exact(x, states))

    def test_state_layouts_and_a_sequence_in_pieces(self):
        x = inputs()
        plain = results(x)
        y = {**x, **{n: x[n].detach().transpose(-1, -2).contiguous() for n in ("initial_state", "d_final_state")}}
        y["initial_state"].requires_grad_()
        flipped = results(y, state_v_first=True)
        for name, value in plain.items():
            other = flipped[name].transpose(-1, -2) if "state" in name else flipped[name]
            self.assertTrue(torch.equal(value, other), name)
        with torch.no_grad():  # 128 tokens, then the rest
            first = {n: x[n][:, :128] for n in ("q", "k", "v", "g", "beta")}
            rest = {n: x[n][:, 128:] for n in first}
            o1, s = chunk_gated_delta_rule(**first, initial_state=x["initial_state"], output_final_state=True)
            o2, s = chunk_gated_delta_rule(**rest, initial_state=s, output_final_state=True)
        self.assertLess(relative(torch.cat([o1, o2], 1), plain["o"]), 1e-3)
        self.assertLess(relative(s, plain["final_state"]), 1e-3)

    def test_documents_have_the_bits_of_each_alone(self):
        cu = torch.tensor([0, 1, 1, 65, 200, 300], device="cuda")
        x = inputs(batch=1, count=5)
        packed = results(x, cu_seqlens=cu)
        self.close(packed, exact(x, cu_seqlens=cu))
        bounds = cu.tolist()
        for n, (a, b) in enumerate(zip(bounds, bounds[1:])):
            if a == b:
                self.assertTrue(torch.equal(packed["final_state"][n], x["initial_state"][n]))
                continue
            alone = {name: (t[n:n + 1] if "state" in name else t[:, a:b]).detach().clone() for name, t in x.items()}
            alone = {name: t if name.startswith("d_") else t.requires_grad_() for name, t in alone.items()}
            for name, value in results(alone).items():
                part = packed[name][n:n + 1] if "state" in name else packed[name][:, a:b]
                self.assertTrue(torch.equal(value, part), (n, name))

    def test_decoding(self):
        x = {n: t.detach() for n, t in inputs(tokens=40).items()}
        five = {n: x[n] for n in ("q", "k", "v", "g", "beta")}
        o, last = fused_recurrent_gated_delta_rule(**five, initial_state=x["initial_state"], output_final_state=True)
        reference = exact(x)
        self.close({"o": o, "final_state": last}, reference)
        state, outs = x["initial_state"], []
        for t in range(40):
            step, state = fused_recurrent_gated_delta_rule(**{n: y[:, t:t + 1] for n, y in five.items()}, initial_state=state,
                                                           output_final_state=True)
            outs.append(step)
        self.assertTrue(torch.equal(torch.cat(outs, 1), o))
        self.assertTrue(torch.equal(state, last))

    def test_strides(self):
        x = inputs()
        expected = results(x)
        y = dict(x)
        y["q"] = x["q"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # is copied
        wide = torch.cat([x["k"].detach(), x["k"].detach()], -1)
        y["k"] = wide[..., :64].requires_grad_()  # is read where it lies
        y["v"] = torch.cat([x["v"].detach()] * 2, 2)[:, :, :4].requires_grad_()
        for name, value in results(y).items():
            self.assertTrue(torch.equal(value, expected[name]), name)

    def test_lengths_are_divided_by(self):
        x = inputs()
        with torch.no_grad():
            x["q"].mul_(3), x["k"].mul_(0.5)
        self.close(results(x, use_qk_l2norm_in_kernel=True), exact(x, normalized=True), 4 * ROUNDING)

    def test_float16_is_rounded_to_bfloat16(self):
        x = inputs()
        half = {n: t.detach().half().requires_grad_(t.requires_grad) if n in ("q", "k", "v", "d_o") else t for n, t in x.items()}
        found = results(half)
        for name, value in results(x).items():  # these inputs are bf16's numbers: nothing is lost on the way in
            self.assertEqual(found[name].dtype, torch.float16 if name in ("o", "dq", "dk", "dv") else torch.float32)
            self.assertTrue(torch.equal(found[name], value.to(found[name].dtype)), name)
        r = torch.Generator("cuda").manual_seed(1)
        for name in ("q", "k", "v", "d_o"):  # with all bits of fp16
            half[name] = (half[name].detach() * (1 + torch.rand(half[name].shape, generator=r, device="cuda") / 128)).half()
            half[name].requires_grad_(name != "d_o")
        self.close(results(half), exact(half), 4 * ROUNDING)
        half["v"] = torch.full_like(half["v"], 60000).requires_grad_()
        with torch.no_grad():
            half["q"][:], half["k"][:] = 1, 0.125
        self.assertTrue(results(half, False)["o"].isinf().any())  # above fp16's largest, as PyTorch converts

    def test_unaligned_and_odd_strides_are_copied(self):
        x = inputs(batch=1, tokens=1)
        expected = results(x)
        y = dict(x)
        for name in ("q", "k", "v"):
            flat = torch.empty(x[name].numel() + 1, dtype=torch.bfloat16, device="cuda")
            flat[1:] = x[name].detach().flatten()
            y[name] = flat[1:].view(x[name].shape).requires_grad_()  # begins on 2 bytes
        for name, value in results(y).items():
            self.assertTrue(torch.equal(value, expected[name]), name)
        odd = torch.empty(1, 1, *x["q"].shape[2:], dtype=torch.bfloat16, device="cuda").as_strided(x["q"].shape, (999, 333, 64, 1))
        odd.copy_(x["q"].detach())  # one token: PyTorch calls it contiguous, whatever its stride
        for name, value in results({**x, "q": odd.requires_grad_()}).items():
            self.assertTrue(torch.equal(value, expected[name]), name)

    def test_operator_gives_the_same(self):
        x = inputs()
        five = [x[n] for n in ("q", "k", "v", "g", "beta")]
        o, last, _ = torch.ops.gdn.delta_rule(*five, x["initial_state"], None, 64 ** -0.5, False, False, True, False, True)
        gradients = torch.autograd.grad((o, last), [*five, x["initial_state"]], (x["d_o"], x["d_final_state"]))
        found = dict(zip(("o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state"), (o, last, *gradients)))
        for name, value in results(x).items():
            self.assertTrue(torch.equal(value, found[name]), name)

    def test_compile_graph_streams_threads(self):
        x = inputs()
        expected = results(x)
        five = [x[n] for n in ("q", "k", "v", "g", "beta")]
        compiled = torch.compile(lambda *t: chunk_gated_delta_rule(*t[:5], initial_state=t[5], output_final_state=True),
                                 fullgraph=True)
        o, last = compiled(*five, x["initial_state"])
        self.assertTrue(torch.equal(o, expected["o"]) and torch.equal(last, expected["final_state"]))
        gradients = torch.autograd.grad((o, last), five, (x["d_o"], x["d_final_state"]))
        for name, value in zip(("dq", "dk", "dv", "dg", "dbeta"), gradients):
            self.assertTrue(torch.equal(value, expected[name]), name)

        static = {n: t.detach().clone().requires_grad_(not n.startswith("d_")) for n, t in x.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                results(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(static)
        graph.replay()
        torch.cuda.synchronize()
        for name, value in captured.items():
            self.assertTrue(torch.equal(value, expected[name]), name)

        failures = []

        def work():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(10):
                    mine = results(static)
                    stream.synchronize()
                    failures.extend(name for name, value in mine.items() if not torch.equal(value, expected[name]))
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(failures, [])

    def test_every_gpu(self):
        x = inputs()
        expected = results(x)
        for number in range(1, torch.cuda.device_count()):
            there = {n: t.detach().to(f"cuda:{number}").requires_grad_(not n.startswith("d_")) for n, t in x.items()}
            for name, value in results(there).items():
                self.assertTrue(torch.equal(value.cpu(), expected[name].cpu()), (number, name))

    def test_refusals(self):
        x = {n: t.detach() for n, t in inputs(dk=64, dv=128).items()}
        five = {n: x[n] for n in ("q", "k", "v", "g", "beta")}
        for change, text in ((dict(v=x["v"].float()), "v is torch.float32 on cuda:0, supported: bfloat16 and float16"),
                             (dict(q=x["q"][..., :40], k=x["k"][..., :40]), "K is 40 on cuda:0, supported: multiples of 16 to 256"),
                             (dict(v=x["v"][..., :8]), "V is 8 on cuda:0, supported: multiples of 16 to 512")):
            with self.subTest(text), self.assertRaises((TypeError, ValueError)) as raised:
                chunk_gated_delta_rule(**{**five, **change})
            self.assertIn(text, str(raised.exception))
        empty = {n: y[:, :0] for n, y in five.items()}
        self.assertTrue(torch.equal(chunk_gated_delta_rule(**empty, initial_state=x["initial_state"], output_final_state=True)[1],
                                    x["initial_state"]))

    @unittest.skipUnless(importlib.util.find_spec("transformers"), "transformers is missing")
    def test_qwen3_next_in_bf16(self):
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen
        torch.manual_seed(0)
        model = qwen.Qwen3NextForCausalLM(qwen.Qwen3NextConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
            num_hidden_layers=3, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, layer_types=["linear_attention", "linear_attention", "full_attention"],
            pad_token_id=0)).cuda().bfloat16()
        tokens = torch.randint(3, 64, (2, 150), device="cuda")
        plain = {name: getattr(qwen, name).__wrapped__ for name in gdn_torch._TRANSFORMERS}

        def run():
            model.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if "linear_attn" in n}
        from unittest import mock
        with mock.patch.multiple(qwen, **plain):
            loss, theirs = run()
        gdn_torch.install()
        self.addCleanup(gdn_torch.uninstall)
        our_loss, ours = run()
        self.assertAlmostEqual(loss, our_loss, delta=5e-3)
        for name, gradient in theirs.items():
            self.assertLess(relative(ours[name], gradient), 0.1, name)


def milliseconds(function, calls=20):
    """Device time of a call, queued back to back, and the host's for one."""
    for _ in range(5):
        function()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    device = begin.elapsed_time(end) / calls
    host = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        host.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return device, sorted(host)[calls // 2]


def times():
    functions = {"train_gdn": chunk_gated_delta_rule}
    if importlib.util.find_spec("fla"):
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as theirs
        functions["fla"] = theirs
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms: device queued back to back (eager), host of one call")
    for sizes in (dict(batch=32, tokens=1024, heads=6, values=6, dk=64, dv=128), dict(batch=32, tokens=1024, heads=6, values=6, dk=128, dv=256),
                  dict(batch=8, tokens=4096, heads=16, values=32, dk=128, dv=128), dict(batch=1, tokens=64, heads=2, values=2, dk=64, dv=64)):
        x = inputs(**sizes)
        five = [x[n].detach() for n in ("q", "k", "v", "g", "beta")]
        for name, function in functions.items():
            try:
                with torch.no_grad():
                    forward = milliseconds(lambda: function(*five))
                both = milliseconds(lambda: results(x, False, function))
                print(f"{sizes} {name}: forward {forward[0]:.3f}, host {forward[1]:.3f}; both {both[0]:.3f}, host {both[1]:.3f}", flush=True)
            except Exception as error:  # of any of the peers' own kinds
                print(f"{sizes} {name}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    if "--times" in sys.argv:
        sys.argv.remove("--times")
        times()
    unittest.main()
