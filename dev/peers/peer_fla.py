#!/usr/bin/env python3
"""flash-linear-attention: its Triton kernels for the gated delta rule, and its training step.

    peer_fla.py                answers drive.py over a pipe
    peer_fla.py compile SECONDS SHAPE ... [step:d,B,L ...]   compiles on all cores into TRITON_CACHE_DIR, launches nothing

fla refuses its gated backward on Hopper with Triton 3.4 to 3.7.0 (its issue 640): measured with the refusal removed, and with its
results held to float64. Its autotuner measures each configuration as long as it does for fla's users (Triton's 100 ms), with the
GPU to itself; the choice is kept in TRITON_CACHE_DIR. Its backward makes the states again. With tilelang installed fla takes
its TileLang kernel for a part of the backward by itself; FLA_TILELANG=0 keeps that away, FLA_FLASH_QLA=0 FlashQLA.
"""

import os
import sys
import time

os.environ.setdefault("FLA_CACHE_RESULTS", "1")  # before others.py, which keeps shortened autotuning out of the cache
import torch_tools  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402
import others  # noqa: E402
from reference import make_config  # noqa: E402


def rule(x: dict, norms: bool = False):
    if torch_tools.DEVICE == "cpu":  # a dry run
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule as naive

        q, k = (others.same_heads(x[name].float(), x["v"]) for name in "qk")
        return naive(q, k, x["v"].float(), x["beta"], x["g"])[0].to(x["v"].dtype)
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], use_qk_l2norm_in_kernel=norms)[0]


def gradients(o, x: dict, **options):
    return torch.autograd.grad(o, [x[name] for name in ("q", "k", "v", "g", "beta")], x["do"], **options)


def kept_mib(x: dict) -> float:
    """What autograd keeps beside the inputs."""
    mine, kept = {y.data_ptr() for y in x.values()}, {}

    def pack(y):
        if y.data_ptr() not in mine:
            kept[y.data_ptr()] = y.nbytes
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        rule(x)
    return sum(kept.values()) / 2**20


class Fla(torch_tools.Worker):
    eager = ("forward", "both")

    def __init__(self) -> None:
        super().__init__()
        self.refusal = others.allow_fla_on_hopper() if torch_tools.DEVICE == "cuda" else None

    def load(self, shape: str):
        x = torch_tools.inputs(shape, grad=True)

        def forward():
            with torch.no_grad():
                return rule(x)

        def both(norms: bool = False):
            o = rule(x, norms)
            return o, *gradients(o, x)

        self.calls = dict(forward=forward, forward_kept=lambda: rule(x),
                          backward=(lambda o: gradients(o, x, retain_graph=True), lambda: rule(x)), both=both,
                          both_norms=lambda: both(True))
        if self.refusal:
            self.notes["refusal"] = self.refusal
        return lambda: dict(zip(common.NAMES, both())), kept_mib(x)

    def about(self) -> dict:
        names = ("flash-linear-attention", "torch", "triton")
        return dict(version=", ".join(f"{name} {others.version(name)}" for name in names), refusal=self.refusal,
                    tilelang=others.version("tilelang"))

    def step(self, spec: str, steps: int, mode: str) -> dict:
        """mode: eager, compile (torch.compile) or graph (the whole step as a CUDA graph)."""
        try:
            return fla_step(spec, steps, mode)
        finally:
            torch_tools.free()


def fla_step(spec: str, steps: int, mode: str = "eager") -> dict:
    begin = time.time()
    width, batch, layers = map(int, spec.split(",")[:3])
    device, length = torch_tools.DEVICE, 1024 if torch_tools.DEVICE == "cuda" else 64
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    c = make_config(width, layers)
    torch_tools.free()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.device(device):
        model = others.fla_class()(others.fla_config(c, tie_word_embeddings=True)).train()
        tokens = torch.randint(c.vocab, (batch, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
                                  capturable=mode == "graph")
    forward = torch.compile(model) if mode == "compile" else model
    losses, parameters = [], sum(p.numel() for p in model.parameters())

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    with others.fla_configurations(c.head_dim_k):
        losses.append(step().item())
        first = time.time() - begin
        if mode == "graph":
            call = torch_tools.Graph(step)
            out = call.out
        else:
            call = step
            for _ in range(2):
                step()
        times = torch_tools.times(call, steps)
        host = torch_tools.host_ms(call, 3)
        losses.append((out if mode == "graph" else step()).item())
    gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return dict(ms=times, gib=gib, losses=losses, parameters=parameters, host_ms=host, first_s=round(first, 1), how=mode)


def compile_ahead(seconds: float, wanted: list[str]) -> None:
    import triton_ahead

    others.allow_fla_on_hopper()

    def shape_call(shape: str):
        def call():
            x = empty_inputs(shape)
            for norms in (False, True):
                gradients(rule(x, norms), x)

        return call

    def step_call(spec: str):
        width, batch, _ = spec.split(",")[:3]  # a model of two layers has the kernels of all
        return lambda: fla_step_once(f"{width},{batch},2")

    triton_ahead.compile_ahead([step_call(w[5:]) if w.startswith("step:") else shape_call(w) for w in wanted], seconds)


def empty_inputs(shape: str) -> dict:
    B, T, Hk, Hv, dk, dv = common.sizes(shape)
    bf16 = lambda *s: torch.zeros(*s, dtype=torch.bfloat16, device="cuda").requires_grad_()  # noqa: E731
    gate = lambda: torch.zeros(B, T, Hv, device="cuda").requires_grad_()  # noqa: E731
    return dict(q=bf16(B, T, Hk, dk), k=bf16(B, T, Hk, dk), v=bf16(B, T, Hv, dv), g=gate(), beta=gate(),
                do=torch.zeros(B, T, Hv, dv, dtype=torch.bfloat16, device="cuda"))


def fla_step_once(spec: str) -> None:
    width, batch, layers = map(int, spec.split(","))
    c = make_config(width, layers)
    with torch.device("cuda"), others.fla_configurations(c.head_dim_k):
        model = others.fla_class()(others.fla_config(c, tie_word_embeddings=True)).train()
        tokens = torch.randint(c.vocab, (batch, 1024))
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "compile":
        compile_ahead(float(sys.argv[2]), sys.argv[3:])
    else:
        common.serve(Fla())
