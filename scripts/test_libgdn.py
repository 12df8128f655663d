"""libgdn.so called through ctypes with numpy's arrays, as any program may call it; skipped where ./libgdn.so is missing.

    make libgdn.so && python3 scripts/test_libgdn.py
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import unittest
from pathlib import Path

LIBRARY = Path(os.environ.get("GDN_LIBRARY", Path(__file__).resolve().parent.parent / "libgdn.so"))
if not importlib.util.find_spec("numpy"):
    raise unittest.SkipTest("numpy is missing")
if not LIBRARY.exists():
    raise unittest.SkipTest(f"{LIBRARY} is not built")

import numpy as np  # noqa: E402


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class DeltaRule(ctypes.Structure):
    """gdn_delta_rule of gdn/library.h."""

    _fields_ = [("size", ctypes.c_size_t), ("device", ctypes.c_int32), ("type", ctypes.c_int32), ("device_number", ctypes.c_int32),
                ("stream", ctypes.c_void_p), ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64), ("heads_k", ctypes.c_int32),
                ("heads_v", ctypes.c_int32), ("head_dim_k", ctypes.c_int32), ("head_dim_v", ctypes.c_int32),
                ("sequences", ctypes.c_int64), ("cu_seqlens", ctypes.c_void_p), ("scale", ctypes.c_double),
                ("normalized", ctypes.c_int32),
                *((name, Tensor) for name in ("q", "k", "v", "g", "beta", "initial_state", "o", "final_state", "d_o",
                                              "d_final_state", "dq", "dk", "dv", "dg", "dbeta", "d_initial_state")),
                ("saved", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]  # fmt: skip


FLOAT64 = 1


def place(x: np.ndarray) -> Tensor:
    return Tensor(x.ctypes.data, (ctypes.c_int64 * 4)(*(step // x.itemsize for step in x.strides)))


def call_of(x: dict[str, np.ndarray]) -> DeltaRule:
    call = DeltaRule(size=ctypes.sizeof(DeltaRule), type=FLOAT64, scale=0.5)
    call.batch, call.tokens, call.heads_k, call.head_dim_k = x["k"].shape
    call.heads_v, call.head_dim_v = x["v"].shape[2:]
    call.sequences = call.batch
    for name, array in x.items():
        setattr(call, name, place(array))
    return call


class Library(unittest.TestCase):
    def setUp(self) -> None:
        self.library = ctypes.CDLL(str(LIBRARY))
        self.library.gdn_last_error.restype = ctypes.c_char_p
        r = np.random.default_rng(0)
        batch, tokens, heads, values, dk, dv = 2, 70, 1, 2, 5, 3
        wide = r.standard_normal((batch, tokens, heads, 2 * dk))  # q and k are read where they lie
        self.x = dict(q=wide[..., :dk], k=wide[..., dk:] / 3, v=r.standard_normal((batch, tokens, values, dv)),
                      g=-r.random((batch, tokens, values)), beta=r.random((batch, tokens, values)),
                      initial_state=r.standard_normal((batch, values, dk, dv)))  # fmt: skip
        self.x |= dict(o=np.empty_like(self.x["v"]), final_state=np.empty_like(self.x["initial_state"]))

    def run_it(self, name: str, call: DeltaRule) -> str:
        """The error, or nothing."""
        failed = getattr(self.library, name)(ctypes.byref(call))
        self.assertIn(failed, (0, -1))
        return self.library.gdn_last_error().decode() if failed else ""

    def test_forward_in_chunks_and_token_by_token(self) -> None:
        x = self.x
        state, want = x["initial_state"].copy(), np.empty_like(x["o"])
        for b, h in np.ndindex(state.shape[:2]):
            for t in range(want.shape[1]):
                k, S = x["k"][b, t, 0], state[b, h]
                S *= np.exp(x["g"][b, t, h])
                S += np.outer(k, x["beta"][b, t, h] * (x["v"][b, t, h] - S.T @ k))
                want[b, t, h] = 0.5 * S.T @ x["q"][b, t, 0]
        for name in ("gdn_delta_rule_forward", "gdn_delta_rule_recurrent"):
            x["o"][:], x["final_state"][:] = np.nan, np.nan
            self.assertEqual(self.run_it(name, call_of(x)), "")
            np.testing.assert_allclose(x["o"], want, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(x["final_state"], state, rtol=1e-11, atol=1e-12)

    def test_backward_against_differences(self) -> None:
        x, r = self.x, np.random.default_rng(1)
        call = call_of(x)
        saved, scratch = ctypes.c_size_t(), ctypes.c_size_t()
        self.assertEqual(self.library.gdn_delta_rule_bytes(ctypes.byref(call), ctypes.byref(saved), ctypes.byref(scratch)), 0)
        kept = np.empty(saved.value, np.uint8)
        inputs = ("q", "k", "v", "g", "beta", "initial_state")
        back = dict(d_o=r.standard_normal(x["o"].shape), d_final_state=r.standard_normal(x["final_state"].shape))
        back |= {f"d_{n}" if n == "initial_state" else f"d{n}": np.empty_like(x[n]) for n in inputs}
        call = call_of(x | back)
        call.saved = kept.ctypes.data
        self.assertEqual(self.run_it("gdn_delta_rule_forward", call), "")
        self.assertEqual(self.run_it("gdn_delta_rule_backward", call), "")

        def loss(name: str, moved: np.ndarray) -> float:
            y = x | {name: moved, "o": np.empty_like(x["o"]), "final_state": np.empty_like(x["final_state"])}
            self.assertEqual(self.run_it("gdn_delta_rule_forward", call_of(y)), "")
            return float((y["o"] * back["d_o"]).sum() + (y["final_state"] * back["d_final_state"]).sum())

        for name in inputs:
            along = r.standard_normal(x[name].shape)
            difference = (loss(name, x[name] + 1e-5 * along) - loss(name, x[name] - 1e-5 * along)) / 2e-5
            gradient = float((back[f"d_{name}" if name == "initial_state" else f"d{name}"] * along).sum())
            self.assertAlmostEqual(gradient / difference, 1, delta=1e-6, msg=name)

    def test_errors_are_text(self) -> None:
        call = call_of(self.x)
        call.size -= 8
        self.assertIn(f"a struct of {call.size} bytes; this library's has {call.size + 8}", self.run_it("gdn_delta_rule_forward", call))
        call = call_of(self.x)
        call.heads_v = 0
        self.assertIn("heads_v 0, expected at least 1", self.run_it("gdn_delta_rule_forward", call))
        call = call_of(self.x)
        call.k = Tensor()
        self.assertIn("k is null", self.run_it("gdn_delta_rule_recurrent", call))


if __name__ == "__main__":
    unittest.main()
