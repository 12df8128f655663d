#!/usr/bin/env python3
"""train_gdn's gated delta rule, through libgdn_ours.so (ours_c.cu), on the peers' inputs.

q, k and v lie side by side in rows, as train_gdn's short convolution leaves them. The forward that keeps saves the chunks'
states, which the backward reads; "nothing kept between" is the forward that saves nothing, then the forward again with saving,
then the backward, as with -recompute 1. q and k come normalised: train_gdn's norms are part of its short convolution.
"""

import ctypes
import os

import torch_tools
import torch

import common


class Ours(torch_tools.Worker):
    def __init__(self) -> None:
        super().__init__()
        self.library = ctypes.CDLL(os.environ.get("GDN_OURS", "./libgdn_ours.so"))
        self.library.ours_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments) -> None:
        pointers = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in arguments]
        if getattr(self.library, name)(*pointers):
            raise RuntimeError(f"{name}: {self.library.ours_error().decode()}")

    def load(self, shape: str):
        B, T, Hk, Hv, dk, dv = common.sizes(shape)
        numbers = (ctypes.c_int * 6)(B, T, Hk, Hv, dk, dv)
        x = torch_tools.inputs(shape)
        rows = B * T
        qkv = torch.cat([x[name].reshape(rows, -1) for name in "qkv"], 1).contiguous()
        g, beta, do = (x[name].contiguous() for name in ("g", "beta", "do"))
        del x
        saved_bytes, scratch_bytes = ctypes.c_long(), ctypes.c_long()
        self.call("ours_bytes", numbers, ctypes.byref(saved_bytes), ctypes.byref(scratch_bytes))
        byte = lambda n: torch.empty(max(n, 256), dtype=torch.uint8, device="cuda")  # noqa: E731
        saved, scratch, s = byte(saved_bytes.value), byte(scratch_bytes.value), ctypes.c_float(dk**-0.5)
        o, dqkv = torch.empty_like(do), torch.empty_like(qkv)
        dg, dbeta = torch.empty_like(g), torch.empty_like(beta)
        stream = lambda: ctypes.c_void_p(torch.cuda.current_stream().cuda_stream or 1)  # noqa: E731

        def forward(keep: bool, o=o) -> None:
            self.call("ours_forward", stream(), numbers, s, o, saved if keep else None, qkv, g, beta, scratch)

        def backward(dqkv=dqkv, dg=dg, dbeta=dbeta) -> None:
            self.call("ours_backward", stream(), numbers, s, dqkv, dg, dbeta, do, saved, qkv, g, beta, scratch)

        def both() -> None:
            forward(True)
            backward()

        def recomputed() -> None:
            forward(False)
            both()

        self.calls = dict(forward=lambda: forward(False), forward_kept=lambda: forward(True),
                          backward=(lambda _: backward(), lambda: forward(True)), both=both, both_recomputed=recomputed)

        def check() -> dict:
            out, gradient = torch.empty_like(do), torch.empty_like(qkv)
            gates = torch.empty_like(g), torch.empty_like(beta)
            saved.fill_(255), scratch.fill_(255)  # NaN, as bf16, half and float
            forward(True, out)
            backward(gradient, *gates)
            torch.cuda.synchronize()
            dq, dk_, dv_ = gradient.split([Hk * dk, Hk * dk, Hv * dv], 1)
            return dict(o=out, dq=dq.reshape(B, T, Hk, dk), dk=dk_.reshape(B, T, Hk, dk),
                        dv=dv_.reshape(B, T, Hv, dv), dg=gates[0], dbeta=gates[1])

        return check, saved_bytes.value / 2**20

    def about(self) -> dict:
        return dict(version="this checkout")


if __name__ == "__main__":
    common.serve(Ours())
