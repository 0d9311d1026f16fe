"""mlx-lm's server with another prompt cache than its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import mlx_lm.server

from ...errors import UnsupportedModelError
from ...paths import PathLike
from .prompt_cache import KvmmapPromptCache

NAME = "LRUPromptCache"
"""What the server's module calls the class of its prompt cache, and looks up when it starts."""


@contextlib.contextmanager
def serving(path: PathLike, **options: Any) -> Iterator[None]:
    """Make every server that `mlx_lm.server` starts in the block keep its prompts in a directory.

    Args:
        path, options: as `KvmmapPromptCache`.

    Raises:
        UnsupportedModelError: this mlx-lm's server has no such class.
    """
    original = getattr(mlx_lm.server, NAME, None)
    if not (isinstance(original, type) and issubclass(KvmmapPromptCache, original)):
        raise UnsupportedModelError(
            f"mlx_lm.server has no class {NAME} to be replaced: kvmmap knows the server of mlx-lm 0.32"
        )
    setattr(mlx_lm.server, NAME, functools.partial(KvmmapPromptCache, path, **options))
    try:
        yield
    finally:
        setattr(mlx_lm.server, NAME, original)
