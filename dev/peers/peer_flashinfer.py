#!/usr/bin/env python3
"""FlashInfer's gated delta rule for Hopper (C++/CUTLASS, forward only, dk = dv = 128, more value than key heads), built from its
wheel's sources as libgdn_fi_sm90.so (flashinfer_c.cu). It takes the decay exp(g), which is made beforehand, and always writes
the final states. One sequence is not cut into pieces."""

import ctypes
import os

import torch_tools
import torch

import common


class FlashInfer(torch_tools.Worker):
    def __init__(self) -> None:
        super().__init__()
        self.library = ctypes.CDLL(os.environ.get("GDN_FLASHINFER", "./libgdn_fi_sm90.so"))

    def load(self, shape: str):
        B, T, Hk, Hv, dk, dv = common.sizes(shape)
        if dk != 128 or dv != 128 or Hv <= Hk:
            raise ValueError("dk = dv = 128 and more value than key heads only")
        x = torch_tools.inputs(shape)
        q, k, v, beta = (x[name].contiguous() for name in ("q", "k", "v", "beta"))
        alpha, rows = x["g"].exp().contiguous(), B * T
        del x
        bounds = torch.arange(0, rows + 1, T, device="cuda", dtype=torch.int64)
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        work = torch.zeros(multiprocessors * 128, device="cuda", dtype=torch.uint8)
        o, states = torch.empty_like(v), torch.empty(B, Hv, dv, dk, device="cuda")

        def forward(o=o, states=states) -> None:
            pointers = [ctypes.c_void_p(y.data_ptr()) for y in (o, states, q, k, v, alpha, beta, bounds, work)]
            if self.library.gdn_fi(*pointers, B, Hk, Hv, dk, ctypes.c_long(rows), ctypes.c_float(dk**-0.5),
                                   multiprocessors, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)):
                raise RuntimeError("gdn_fi refused")

        def check() -> dict:
            out = torch.empty_like(v)
            forward(out)
            torch.cuda.synchronize()
            return dict(o=out)

        self.calls = dict(forward=forward)
        self.notes["work"] = "writes the final states too"
        return check, None

    def about(self) -> dict:
        return dict(version="FlashInfer 0.6.13")


if __name__ == "__main__":
    common.serve(FlashInfer())
