#!/usr/bin/env python3
"""Writes the inputs of the given shapes, and the float64 results of a few heads: inputs.py [SHAPE ...] (common.py)."""

import sys

import numpy as np
import torch_tools
import torch

import common
from reference import gated_delta_rule_chunked


def write(shape: str) -> None:
    B, T, Hk, Hv, dk, dv = common.sizes(shape)
    at = common.folder(shape)
    if (at / "want.npz").exists():
        return
    at.mkdir(parents=True, exist_ok=True)
    r = torch.Generator(torch_tools.DEVICE).manual_seed(1)
    normal = lambda *s: torch.randn(*s, generator=r, device=torch_tools.DEVICE)  # noqa: E731
    uniform = lambda *s: torch.rand(*s, generator=r, device=torch_tools.DEVICE)  # noqa: E731
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    x = dict(q=unit(normal(B, T, Hk, dk)).bfloat16(), k=unit(normal(B, T, Hk, dk)).bfloat16(),
             v=normal(B, T, Hv, dv).bfloat16(), do=normal(B, T, Hv, dv).bfloat16(),
             g=-0.1 * uniform(B, T, Hv), beta=uniform(B, T, Hv))
    for name, y in x.items():
        y = y.cpu()
        np.save(at / f"{name}.npy", y.view(torch.uint16).numpy() if y.dtype == torch.bfloat16 else y.numpy())
    want, repeat = {}, Hv // Hk
    for n, pair in enumerate(common.pairs(shape)):
        part = {name: y[common.slice_of(shape, "d" + name if name in "qk" else name, pair)].double()[None]
                for name, y in x.items()}
        leaves = [part[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
        q, k, *rest = leaves
        o = gated_delta_rule_chunked(q.repeat_interleave(repeat, 2), k.repeat_interleave(repeat, 2), *rest, dk**-0.5)
        for name, y in zip(common.NAMES, (o, *torch.autograd.grad(o, leaves, part["do"]))):
            want[f"{name}_{n}"] = y[0].detach().float().cpu().numpy()
    np.savez(at / "want.npz", **want)
    torch_tools.free()


if __name__ == "__main__":
    for shape in sys.argv[1:] or common.SHAPES:
        write(shape)
        print(f"inputs of {shape}: {common.folder(shape)}", flush=True)
