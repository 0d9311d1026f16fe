"""The demo's sizes, and calculations that both of its processes share. Does not import torch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PROMPT_TOKENS = 2048
"""Tokens that are prefilled and saved."""

FOLLOWING_TOKENS = 768
"""Tokens of the text after them, to see how well the model reads on."""

GREEDY_TOKENS = 64
"""Tokens that the model makes up after the prompt."""

PREFILL_RUNS = 3
"""Times that prefilling is measured."""

LOAD_RUNS = 5
"""Times that reopening and loading are measured, after the one from the disk."""


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Return a call's result, and how many seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean of minus the log probabilities."""
    return math.exp(sum(losses) / len(losses))


def agreement(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of places where two sequences of equal length have the same token."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two sequences of equal length differ; None if they don't."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def drop_from_page_cache(path: Path) -> None:
    """Evict a file from the page cache, where the system can: the next read comes from the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
