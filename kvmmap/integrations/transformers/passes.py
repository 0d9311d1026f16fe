"""What a cache learns of a model's forward passes: which tokens are fed, at which positions, and whether a pass ended.

A cache is handed keys and values layer by layer and sees no tokens; hooks on the model tell it. They do nothing in
passes without a `KvmmapCache`, and are put on a model once.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

_watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


@runtime_checkable
class Watching(Protocol):
    """A cache that wants to be told."""

    def begin_pass(self, token_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> None: ...

    def end_pass(self) -> None: ...


def watch(model: torch.nn.Module) -> None:
    """Have a model tell each cache that it is run with what it feeds to it."""
    if model not in _watched:
        _watched.add(model)
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)


def _before(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Watching):
        cache.begin_pass(kwargs.get("input_ids", args[0] if args else None), kwargs.get("position_ids"))


def _after(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    cache = kwargs.get("past_key_values")
    if isinstance(cache, Watching):
        cache.end_pass()
