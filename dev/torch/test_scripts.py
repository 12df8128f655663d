"""Tests of the scripts in dev/torch; no GPU.

    python3 dev/torch/test_scripts.py

What needs PyTorch is skipped where that is missing.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
SCRIPTS = ["accuracy", "compare", "golden", "perplexity", "reference", "train_reference"]
PACKAGES = ["numpy", "safetensors", "torch"]
PEERS = HERE.parent / "peers"
needs_torch = unittest.skipUnless(all(map(importlib.util.find_spec, PACKAGES)), "PyTorch is missing")


def call(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(HERE / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


class Scripts(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_one_line_error(self, done: subprocess.CompletedProcess, *words: str) -> None:
        self.assertNotEqual(done.returncode, 0)
        self.assertNotIn("Traceback", done.stderr)
        for word in words:
            self.assertIn(word, done.stderr.strip().splitlines()[-1])

    def test_a_missing_package_is_named(self) -> None:
        for script in SCRIPTS:  # -S: without the packages that are installed
            words = [sys.executable, "-S", "-E", str(HERE / f"{script}.py"), "-h"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=60)
            self.assert_one_line_error(done, f"{script}.py: needs the package numpy", "dev/torch/requirements.txt")

    def test_every_script_is_pinned_the_same(self) -> None:
        def pins(path: Path) -> dict[str, str]:
            lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
            return dict(line.split("==") for line in lines)

        ours, scripts = pins(HERE / "requirements.txt"), pins(HERE.parents[1] / "scripts" / "requirements.txt")
        for package in ours.keys() & scripts.keys():
            self.assertEqual(ours[package], scripts[package], package)

    @needs_torch
    def test_help(self) -> None:
        for script in SCRIPTS:
            done = call(script, "-h")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn(f"usage: {script}.py", done.stdout)

    @needs_torch
    def test_reference_agrees_with_itself(self) -> None:
        done = call("reference", "check")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @needs_torch
    @unittest.skipUnless(importlib.util.find_spec("transformers"), "transformers is missing")
    def test_golden_files_are_these_numbers(self) -> None:
        done = call("golden", "--check")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @needs_torch
    def test_files_that_are_missing_or_wrong(self) -> None:
        self.assert_one_line_error(call("compare", self.folder / "none"), "none: no checkpoint there")
        self.assert_one_line_error(call("perplexity", self.folder, "x.bin"), "has no config.json")
        self.assert_one_line_error(call("train_reference", "--data", self.folder), "no file matches")
        (self.folder / "config.json").write_text("{}")
        self.assert_one_line_error(call("compare", self.folder), "config.json: not a configuration of train_gdn")
        self.assert_one_line_error(call("perplexity", self.folder, "x.bin", "--with", "torch"), "config.json")
        (self.folder / "a_train_0.bin").write_bytes(b"no shard")
        self.assert_one_line_error(call("train_reference", "--data", self.folder), "expected a token shard")
        sys.path.insert(0, str(HERE))
        from reference import read_safetensors

        for path in (self.folder / "none", self.folder / "a_train_0.bin"):
            with self.assertRaisesRegex(SystemExit, "No such file|not a safetensors file"):
                read_safetensors(str(path))

    @needs_torch
    def test_what_no_kernel_wrote_is_called_not_written(self) -> None:
        sys.path.insert(0, str(HERE))
        import torch

        import written

        class Double(torch.autograd.Function):
            launched = True

            @staticmethod
            def forward(ctx, x):
                return torch.empty_like(x).copy_(2 * x)

            @staticmethod
            def backward(ctx, d_y):
                d_x = d_y.new_empty(d_y.shape)
                return d_x.copy_(2 * d_y) if Double.launched else d_x  # as a kernel that was not launched

        def call(backwards: float = 1.0) -> dict:
            x = torch.linspace(-1, 1, 12).requires_grad_()
            y = Double.apply(x)
            (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, backwards))
            return dict(y=y, gradient=gradient)

        self.assertTrue(written.checked(call)["gradient"].eq(2).all())
        # a NaN of the peer's own is a result, and no fault of ours
        self.assertTrue(written.checked(lambda: call(float("nan")))["gradient"].isnan().all())
        Double.launched = False
        with self.assertRaisesRegex(written.NotWritten, "^not written: 100% of gradient$"):
            written.checked(call)
        # a part alone, and what is computed from it
        def half() -> dict:
            x = torch.empty(8)
            x[:6] = 1
            return dict(x=x, total=x.sum().reshape(1), whole=torch.empty_strided((2,), (1,)).zero_())

        with self.assertRaisesRegex(written.NotWritten, "^not written: 25% of x, 100% of total$"):
            written.checked(half)
        with written.poisoned(7.0):
            self.assertTrue(torch.empty(3).eq(7).all())
        self.assertEqual(torch.empty.__name__, "empty")  # PyTorch's own again

    @needs_torch
    @unittest.skipUnless(importlib.util.find_spec("triton"), "Triton is missing")
    def test_a_process_that_compiled_ahead_launches_nothing(self) -> None:
        code = """
import threading, triton, triton_ahead
from triton.runtime import _async_compile

@triton.jit
def kernel(x):
    pass

seen, refused = [], []

def fake(self, *args, grid, warmup, **options):  # Triton's launch, without a GPU
    seen.append((warmup, _async_compile.active_mode.get() is not None))
    _async_compile.active_mode.get().submit("key", lambda: None, None)

def launch():
    try:
        kernel[(1,)](1)
    except RuntimeError as e:
        refused.append(str(e))

def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()

triton_ahead.run_kernel, jobs = fake, {}
with triton_ahead.collecting(jobs):
    launch()
    in_a_thread(launch)  # as autograd's backward
assert seen == [(True, True)] * 2 and list(jobs) == ["key"] and not refused, (seen, jobs, refused)
launch()
in_a_thread(launch)
assert len(seen) == 2 and refused == [triton_ahead.REFUSAL] * 2, (seen, refused)
"""
        path = self.folder / "launches.py"  # Triton reads a kernel's source from its file
        path.write_text(code)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120,
                              env={**os.environ, "PYTHONPATH": str(HERE)})
        self.assertEqual(done.returncode, 0, done.stderr)

    @needs_torch
    def test_a_peer_that_is_off_is_not_timed(self) -> None:
        with mock.patch.object(sys, "path", [str(PEERS), *sys.path]):
            import common

            self.assertIsNone(common.verdict(dict(o=0.002, dq=0.004)))
            for found in (dict(o=0.002, dq=0.5), dict(o=float("nan")), dict(o=float("inf")), {}):
                self.assertIsNotNone(common.verdict(found))

    def test_the_report_shows_what_is_lost(self) -> None:
        shape, rows = "8,4096,16,32,128,128", []
        for peer, ms in (("ours", 2.0), ("fla", 5.0), ("flashqla", 1.0)):
            rows.append(dict(kind="check", peer=peer, shape=shape, errors=dict(o=1e-3, dq=2e-3), kept_mib=1.0, wrong=None))
            rows.append(dict(kind="time", peer=peer, shape=shape, case="both", ms=ms, least=ms, most=ms, rounds=[ms], runs=1))
        rows.append(dict(kind="check", peer="jla", shape=shape, errors=None, kept_mib=None, wrong="not written: 50% of dq"))
        code = "import json, sys, report; print(report.Report(json.load(sys.stdin)).text())"
        done = subprocess.run([sys.executable, "-c", code], input=json.dumps(rows), capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": str(PEERS)})
        if "No module named 'numpy'" in done.stderr:
            self.skipTest("NumPy is missing")
        self.assertEqual(done.returncode, 0, done.stderr)
        losses = done.stdout.split("## Where train_gdn loses")[1].split("##")[0]
        self.assertIn("FlashQLA 1.000 ms, train_gdn 2.000: 2.00 times its time", losses)
        self.assertNotIn("fla 5", losses)
        self.assertIn("**1.000 (1.000 to 1.000)**", done.stdout)
        self.assertIn("fla 2.50 (0.40); FlashQLA 0.50 (2.00)", done.stdout)
        self.assertIn("jax-linear-attention: our script or the peer, not timed: not written: 50% of dq", done.stdout)


if __name__ == "__main__":
    unittest.main()
