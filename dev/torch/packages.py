"""Imported first by every script here: says in one line which package of requirements.txt is missing."""

import importlib.util
import sys
from pathlib import Path

for name in ("numpy", "safetensors", "torch"):
    if importlib.util.find_spec(name) is None:
        sys.exit(f"{Path(sys.argv[0]).name}: needs the package {name}: pip install -r dev/torch/requirements.txt")
