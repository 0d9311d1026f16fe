"""Run histories from seeds, and search for one that goes wrong: what the tests of each kind of cache share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import kvmmap
from crash.history import History
from crash.machine import Mutation

H = TypeVar("H", bound=History)


def run_history(
    kind: Callable[[str, int, Mutation | None], H],
    folder: str,
    seed: int,
    mutation: Mutation | None = None,
    *,
    steps: int,
    images: int,
) -> H:
    """Run one history of a kind in a folder of its own beside `folder`; return it.

    Raises:
        PromiseError: it went wrong.
    """
    path = f"{folder}{seed}"
    os.makedirs(path, exist_ok=True)
    history = kind(path, seed, mutation)
    history.run(steps, images)
    return history


WRONG = (AssertionError, kvmmap.KvmmapError, OSError)
"""What a history that goes wrong raises; PromiseError is an AssertionError."""


def caught(attempt: Callable[[int], object], seeds: Iterable[int], errors: tuple[type[Exception], ...] = WRONG) -> bool:
    """Return whether `attempt` of one of the seeds raises one of the errors; stop at the first."""
    for seed in seeds:
        try:
            attempt(seed)
        except errors:
            return True
    return False
