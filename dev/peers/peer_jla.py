#!/usr/bin/env python3
"""jax-linear-attention: its Mosaic kernels for the gated delta rule, and its training step.

    peer_jla.py               answers drive.py over a pipe
    peer_jla.py compile SHAPE ... [step:d,B,L[,fp8] ...]   compiles into JAX_COMPILATION_CACHE_DIR, running nothing

Times of the kernels: programs queued back to back, the wall time from the first to the end of the last over their number; the
host's time to queue one is given beside it (where it is as long as the program's, the time is the host's and too long).
Its backward makes the states again from what the forward kept. On a CPU impl="chunked" stands in, for a dry run.
"""

import functools
import os
import statistics
import sys
import time

import ml_dtypes
import numpy as np

import common

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

ON_CPU = jax.devices()[0].platform == "cpu"
IMPL = "chunked" if ON_CPU else "mosaic_gpu"


def programs(norms: bool = False) -> dict:
    """case -> jitted function of (q, k, v, g, beta[, do])."""
    from jla import ops

    def op(q, k, v, g, beta):
        if ON_CPU:  # impl="chunked" takes as many key heads as value heads
            q, k = (jnp.repeat(y, v.shape[2] // y.shape[2], 2) for y in (q, k))
        return ops.linear_attention("gated_deltanet", q, k, v, g=g, beta=beta, impl=IMPL, use_qk_l2norm=norms)[0]

    def both(q, k, v, g, beta, do):
        o, pull = jax.vjp(op, q, k, v, g, beta)
        return o, *pull(do)

    def forward_kept(*x):
        """o and what is kept beside the inputs: a program that returned the inputs too would copy them."""
        o, pull = jax.vjp(op, *x)
        inputs = {(y.shape, y.dtype) for y in x}
        return o, [y for y in jax.tree.leaves(pull) if (y.shape, y.dtype) not in inputs]

    def gradients(q, k, v, g, beta, do):
        """Without o: XLA leaves out the kernel that makes it, as neither the backward nor the caller reads it."""
        return jax.vjp(op, q, k, v, g, beta)[1](do)

    return dict(forward=jax.jit(op), both=jax.jit(both), forward_kept=jax.jit(forward_kept), gradients=jax.jit(gradients),
                residuals=jax.jit(lambda *x: jax.vjp(op, *x)[1]), backward=jax.jit(lambda pull, do: pull(do)))


def avals(shape: str) -> list:
    B, T, Hk, Hv, dk, dv = common.sizes(shape)
    bf16 = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)  # noqa: E731
    gate = jax.ShapeDtypeStruct((B, T, Hv), jnp.float32)
    return [bf16(B, T, Hk, dk), bf16(B, T, Hk, dk), bf16(B, T, Hv, dv), gate, gate, bf16(B, T, Hv, dv)]


def compile_shape(shape: str) -> None:
    x, p = avals(shape), programs()
    p["both"].lower(*x).compile()
    p["forward"].lower(*x[:5]).compile()
    p["forward_kept"].lower(*x[:5]).compile()
    p["gradients"].lower(*x).compile()
    p["residuals"].lower(*x[:5]).compile()
    p["backward"].lower(jax.eval_shape(p["residuals"], *x[:5]), x[5]).compile()
    programs(True)["both"].lower(*x).compile()


# ---- the training step ------------------------------------------------------------------------------------------


@functools.lru_cache(1)
def step_parts(spec: str):
    """(model's maker, optimizer, step, batch's shape) of d,B,L[,fp8]: the sizes of train_gdn -w d -L L (6 heads, dv = 2 dk)."""
    import equinox as eqx
    from jla.models.config import AttentionConfig, LinearAttentionConfig, ModelConfig
    from jla.models.lm import build_model
    from jla.training.optimizers import create_optimizer
    from jla.training.step import LossConfig, build_train_step, lm_loss

    words = spec.split(",")
    d, B, L = map(int, words[:3])
    T, V = (64, 512) if ON_CPU else (1024, 50304)
    dk, fp8 = 3 * d // 24, "fp8" in words
    c = ModelConfig(vocab_size=V, d_model=d, n_layers=L, d_ff=-(-8 * d // 768) * 256, tie_embeddings=True, norm_eps=1e-6,
                    remat="none", attention=AttentionConfig(num_heads=16, num_kv_heads=4, head_dim=128),
                    linear_attention=LinearAttentionConfig(num_k_heads=6, num_v_heads=6, head_k_dim=dk, head_v_dim=2 * dk,
                                                           conv_init="normal"),
                    layer_types=("gated_deltanet",) * L, fp8="delayed" if fp8 else "off", fp8_fused=fp8)
    tx = create_optimizer(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), max_grad_norm=1.0)
    step = build_train_step(tx, lm_loss(LossConfig(impl="xla" if ON_CPU else "auto", grad_in_forward=not ON_CPU)))
    make_model = eqx.filter_jit(lambda key: build_model(c, key=key))
    make_optimizer = jax.jit(lambda arrays: tx.init(arrays))
    return make_model, make_optimizer, step, (1, B, T), V


def start_step(spec: str):
    """model, optimizer's state, batch, key."""
    import equinox as eqx

    make_model, make_optimizer, _, (n, B, T), V = step_parts(spec)
    model = make_model(jax.random.key(0))
    optimizer = make_optimizer(eqx.filter(model, eqx.is_inexact_array))
    tokens = jax.random.randint(jax.random.key(1), (n, B, T), 0, V)
    return model, optimizer, dict(input_ids=tokens, labels=jnp.roll(tokens, -1, axis=-1)), jax.random.key(2)


def compile_step(spec: str) -> None:
    """Needs the memory of the weights and moments (12 bytes a parameter), not of a step."""
    step_parts(spec)[2].lower(*start_step(spec)).compile()


# ---- the worker -------------------------------------------------------------------------------------------------


class Jla:
    def drop(self) -> dict:
        self.x, self.p, self.pull = None, None, None
        return {}

    def about(self) -> dict:
        import importlib.metadata as m

        def version(name: str) -> str:
            try:
                return m.version(name)
            except m.PackageNotFoundError:
                return "?"

        return dict(version=f"jax-linear-attention {version('jax-linear-attention')}, JAX {jax.__version__}")

    def prepare(self, shape: str) -> dict:
        bits = lambda name: common.load(shape, name).view(ml_dtypes.bfloat16)  # noqa: E731
        gates = [np.asarray(common.load(shape, name)) for name in ("g", "beta")]
        self.x = [jax.device_put(np.asarray(y)) for y in (bits("q"), bits("k"), bits("v"), *gates, bits("do"))]
        self.p = programs()
        self.p["both_norms"] = programs(True)["both"]
        o, *gradients = self.p["both"](*self.x)
        found = common.errors(shape, dict(zip(common.NAMES, (o, *gradients))),
                              lambda y: np.asarray(y.astype(jnp.float32)))
        del o, gradients
        self.pull = self.p["residuals"](*self.x[:5])
        kept = sum(y.nbytes for y in self.p["forward_kept"](*self.x[:5])[1])
        return dict(errors=found, wrong=common.verdict(found), kept_mib=kept / 2**20, eager=[],
                    cases=["forward", "forward_kept", "backward", "both", "both_norms", "gradients"],
                    notes={"times": "programs queued back to back"})

    def time(self, case: str, runs: int) -> dict:
        f = self.p[case]
        x = (self.pull, self.x[5]) if case == "backward" else self.x[:5] if case.startswith("forward") else self.x
        for _ in range(2):
            jax.block_until_ready(f(*x))
        out, queued = [], []
        each = 3 if ON_CPU else 10
        for _ in range(max(2, runs // each)):
            begin = time.perf_counter()
            for _ in range(each):
                r = f(*x)
            queued.append(1e3 * (time.perf_counter() - begin) / each)
            jax.block_until_ready(r)
            out.append(1e3 * (time.perf_counter() - begin) / each)
            del r
        return dict(ms=out, host_ms=statistics.median(queued))

    def step(self, spec: str, steps: int) -> dict:
        begin, losses = time.time(), []
        step = step_parts(spec)[2]
        model, optimizer, batch, key = start_step(spec)
        parameters = sum(x.size for x in jax.tree.leaves(model) if hasattr(x, "size") and jnp.issubdtype(x.dtype, jnp.inexact))
        model, optimizer, metrics, key = step(model, optimizer, batch, key)
        losses.append(float(metrics["loss"]))
        first = time.time() - begin
        for _ in range(2):
            model, optimizer, metrics, key = step(model, optimizer, batch, key)
        jax.block_until_ready(metrics)
        times = []
        for _ in range(2):  # queued, as a trainer queues them
            begin = time.perf_counter()
            for _ in range(steps):
                model, optimizer, metrics, key = step(model, optimizer, batch, key)
            jax.block_until_ready(metrics)
            times.append(1e3 * (time.perf_counter() - begin) / steps)
        losses.append(float(metrics["loss"]))
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
        del model, optimizer, metrics, batch
        return dict(ms=times, gib=peak, losses=losses, parameters=parameters, first_s=round(first, 1),
                    how="steps queued back to back, one compiled program each")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "compile":
        for what in sys.argv[2:]:
            begin = time.time()
            try:
                compile_step(what[5:]) if what.startswith("step:") else compile_shape(what)
                print(f"jla {what}: compiled in {time.time() - begin:.0f} s", flush=True)
            except Exception as e:  # of any of the packages' own kinds
                print(f"jla {what}: {common.one_line(e)}", flush=True)
    else:
        common.serve(Jla())
