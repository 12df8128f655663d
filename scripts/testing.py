"""What the tests of the scripts share: calls of a script, one-line errors, and what is skipped where a package is missing."""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

# A shell starts what it runs in the background with SIGINT ignored, and the scripts that are to be stopped would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = Path(__file__).resolve().parent
TRAIN_GDN = HERE.parent / "train_gdn"
needs_matplotlib = unittest.skipUnless(importlib.util.find_spec("matplotlib"), "matplotlib is missing")
needs_tiktoken = unittest.skipUnless(importlib.util.find_spec("tiktoken"), "tiktoken is missing")
needs_tokenizers = unittest.skipUnless(importlib.util.find_spec("tokenizers"), "tokenizers is missing")
needs_tensorboard = unittest.skipUnless(importlib.util.find_spec("tensorboardX"), "tensorboardX is missing")
needs_train_gdn = unittest.skipUnless(TRAIN_GDN.exists(), "./train_gdn is not built")


def call(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    words = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as f:
        return list(csv.DictReader(line for line in f if not line.startswith("#")))


class InFolder(unittest.TestCase):
    """Each test has an empty folder of its own."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def assert_one_line_error(self, done: subprocess.CompletedProcess, *words: str) -> None:
        """Exit code 1, no traceback, and `words` in the last line of standard error."""
        self.assertEqual(done.returncode, 1, done.stderr)
        last_line = done.stderr.strip().splitlines()[-1]
        self.assertNotIn("Traceback", done.stderr)
        for word in words:
            self.assertIn(word, last_line)
