"""Tests of the scripts in dev/torch; no GPU.

    python3 dev/torch/test_scripts.py

What needs PyTorch is skipped where that is missing.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ["accuracy", "compare", "fla_speed", "golden", "perplexity", "reference", "train_reference"]
PACKAGES = ["numpy", "safetensors", "torch"]
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


if __name__ == "__main__":
    unittest.main()
