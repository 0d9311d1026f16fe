"""Sessions for models of frameworks: an integration registers how one is opened, and `Library.session` asks here.

What a model is, is the integrations' business; none of them is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import KvmmapError

Opener = Callable[..., Any]
"""Takes a library, a model, token ids, and the keyword arguments of `Library.session`; returns a cache for the model,
or None if the model is not of its framework."""

_openers: list[Opener] = []


def register(opener: Opener) -> None:
    """Make a framework's models known. It is asked before those that were registered earlier."""
    _openers.insert(0, opener)


def open_for_model(library: Any, model: Any, token_ids: Any, **options: Any) -> Any:
    """Return a cache for a model that begins with what a library has of a prompt.

    Raises:
        KvmmapError: no framework's integration takes such a model.
    """
    for opener in _openers:
        cache = opener(library, model, token_ids, **options)
        if cache is not None:
            return cache
    raise KvmmapError(
        f"give a Namespace, or a model of a framework whose integration is imported (import "
        f"kvmmap.integrations.transformers), not a {type(model).__name__}"
    )
