"""What a cache learns of a model's forward passes: which tokens are fed, at which positions, and whether a pass ended.

A cache receives keys and values layer by layer and sees no tokens; hooks on the model report them. They do nothing in
passes without a `KvmmapCache`, and are registered once per model.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from ...errors import UnsupportedModelError
from .sequence import OneSequence

_watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_signatures: weakref.WeakKeyDictionary[torch.nn.Module, Mapping[str, inspect.Parameter]] = weakref.WeakKeyDictionary()


_NAMES = ("cache", "past_key_values", "cache_params")
"""What models call their cache: since transformers 5.24, before, and in state space models before."""


def watch(model: torch.nn.Module) -> None:
    """Report each forward pass of a model to the cache that it is run with."""
    if model not in _watched:
        _watched.add(model)
        model.register_forward_pre_hook(_before, with_kwargs=True)
        model.register_forward_hook(_after, with_kwargs=True, always_call=True)


def _before(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache_in(args, kwargs)
    if cache is None:
        return None
    parameters = _parameters(model)
    renamed = _renamed(model, parameters, kwargs)
    given = dict(zip(parameters, args, strict=False)) | renamed
    cache.begin_pass(given.get("input_ids"), given.get("position_ids"))
    return args, renamed


def _after(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        cache.end_pass()


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> OneSequence | None:
    """The cache among a forward pass's arguments, under whatever name."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, OneSequence)), None)


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's forward pass, in order."""
    found = _signatures.get(model)
    if found is None:
        found = _signatures[model] = inspect.signature(model.forward).parameters
    return found


def _renamed(
    model: torch.nn.Module, parameters: Mapping[str, inspect.Parameter], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments with the cache under the name that the model has for it.

    Raises:
        UnsupportedModelError: the model would ignore the cache: it has no such parameter, or got another cache too.
    """
    given = next((name for name, value in kwargs.items() if isinstance(value, OneSequence)), None)
    if given is None or given in parameters:
        return kwargs
    taken = next((name for name in _NAMES if name in parameters), None)
    if taken is None:  # a wrapper, which passes all of its arguments on
        return kwargs
    if given not in _NAMES or kwargs.get(taken) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} would ignore the KvmmapCache that is given as {given}=: with transformers "
            f"{transformers.__version__} give it as {taken}=",
            expected=taken,
            actual=given,
        )
    return {taken if name == given else name: value for name, value in kwargs.items() if name != taken}
