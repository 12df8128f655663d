#!/usr/bin/env python3
"""FlashQLA (TileLang; dk = dv = 128): its own benchmark's calls, sequences one after another with their bounds, so that it may cut
long ones into pieces (it starts those a few chunks early from zero: an approximation that its error shows). The forward keeps
the chunks' matrices and the summed decays, the backward makes the states again.

    peer_flashqla.py                    answers drive.py over a pipe
    peer_flashqla.py compile SHAPE ...  runs each once, small, so that TileLang's kernels are in its cache
"""

import sys
import time

import torch_tools
import torch

import common


class FlashQla(torch_tools.Worker):
    def load(self, shape: str):
        B, T, Hk, Hv, dk, dv = common.sizes(shape)
        if dk != 128 or dv != 128:
            raise ValueError("dk = dv = 128 only")
        return self.load_tensors(torch_tools.inputs(shape), B, T, Hk, Hv, dk)

    def load_tensors(self, x: dict, B: int, T: int, Hk: int, Hv: int, dk: int):
        from flash_qla import chunk_gated_delta_rule_bwd, chunk_gated_delta_rule_fwd

        q, k, v, g, beta, do = (x[name].reshape(1, B * T, *x[name].shape[2:]).contiguous()
                                for name in ("q", "k", "v", "g", "beta", "do"))
        bounds = torch.arange(0, B * T + 1, T, device="cuda", dtype=torch.int32)
        options = dict(scale=dk**-0.5, cu_seqlens=bounds)

        def forward(train: bool):
            return chunk_gated_delta_rule_fwd(q, k, v, g, beta, output_final_state=False, is_train=train,
                                              enable_fwd_cp_cache=train, **options)

        def backward(kept):
            sums, A, _, _, _, cache = kept
            return chunk_gated_delta_rule_bwd(q, k, v, sums, beta, A, do, cp_cache=cache, **options)[:5]

        def both():
            return backward(forward(True))

        def check() -> dict:
            kept = forward(True)
            dq, dk_, dv_, dbeta, dg = backward(kept)
            whole = lambda y: y.reshape(B, T, *y.shape[2:])  # noqa: E731
            return {name: whole(y) for name, y in zip(common.NAMES, (kept[2], dq, dk_, dv_, dg, dbeta))}

        kept = forward(True)
        mib = sum(y.nbytes for y in kept[:2]) / 2**20
        del kept
        self.calls = dict(forward=lambda: forward(False), forward_kept=lambda: forward(True),
                          backward=(backward, lambda: forward(True)), both=both)
        return check, mib

    def about(self) -> dict:
        import importlib.metadata as m

        return dict(version=f"FlashQLA {m.version('flash-qla')}, tilelang {m.version('tilelang')}")

    def compile(self, shape: str) -> None:
        B, T, Hk, Hv, dk, dv = common.sizes(shape)
        n = lambda *s: torch.nn.functional.normalize(torch.randn(*s, device="cuda"), dim=-1).bfloat16()  # noqa: E731
        x = dict(q=n(B, T, Hk, dk), k=n(B, T, Hk, dk), v=n(B, T, Hv, dv), do=n(B, T, Hv, dv),
                 g=-0.1 * torch.rand(B, T, Hv, device="cuda"), beta=torch.rand(B, T, Hv, device="cuda"))
        self.load_tensors(x, B, T, Hk, Hv, dk)
        for name, call in self.calls.items():
            kept = call[1]() if isinstance(call, tuple) else None
            call[0](kept) if isinstance(call, tuple) else call()
        torch.cuda.synchronize()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "compile":
        for shape in sys.argv[2:]:
            begin = time.time()
            try:
                FlashQla().compile(shape)
                print(f"flashqla {shape}: compiled in {time.time() - begin:.0f} s", flush=True)
            except Exception as e:  # of any of the packages' own kinds
                print(f"flashqla {shape}: {common.one_line(e)}", flush=True)
    else:
        common.serve(FlashQla())
