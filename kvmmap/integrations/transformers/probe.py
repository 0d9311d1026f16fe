"""What a model with states keeps in its cache, found by running a few tokens over transformers' own.

Configs do not say which shapes states have, and formulas by family would go wrong with the next family.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from ...errors import DtypeError, ShapeMismatchError, UnsupportedModelError
from ...geometry import LayerGeometry
from ...state_spec import StateSpec
from .kinds import LayerKind
from .models import layer_kinds, text_config
from .own_caches import become_own
from .state_layers import state_tensors
from .versions import argument_of


def find_states(model: Any) -> tuple[list[LayerKind], tuple[StateSpec, ...]]:
    """Run a model over two tokens, and return what each layer keeps, and the states.

    Args:
        model: a model whose config has layers with states.

    Raises:
        UnsupportedModelError: it is a config alone, or the model does not keep its states where a cache can find them.
    """
    config: Any = getattr(model, "config", model)
    kinds, name = layer_kinds(config), text_config(config).model_type
    if not isinstance(model, torch.nn.Module):
        raise UnsupportedModelError(
            f"{name} keeps states, whose shapes are found by running the model over two tokens: make the cache with "
            "the model, and not with its config",
            actual=name,
        )
    cache = DynamicCache(config=config)
    become_own(cache, text_config(config))
    argument = _cache_argument(model, name)
    try:
        with _undisturbed(model), torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=_device(model))
            shapes = []
            for _ in range(2):
                model(input_ids=ids, use_cache=True, **{argument: cache})
                shapes.append(_shapes(cache))
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} keeps states, and does not run over a DynamicCache, which shows their shapes: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            actual=name,
        ) from error
    if shapes[0] != shapes[1]:
        raise UnsupportedModelError(f"{name} has states whose shapes change from token to token", actual=name)
    if len(cache.layers) != len(kinds):
        raise UnsupportedModelError(
            f"{name} has {len(cache.layers)} layers in its cache, and {len(kinds)} in its config"
        )
    found = [_kind_of(kind, layer, name) for kind, layer in zip(kinds, cache.layers, strict=True)]
    try:
        specs = tuple(StateSpec(*where, dtype, shape) for where, (dtype, shape) in shapes[0].items())
    except (DtypeError, ShapeMismatchError) as error:
        raise UnsupportedModelError(f"{name} has a state that can't be stored: {error}", actual=name) from error
    for number, kind in enumerate(found):
        if kind.states and not any(spec.layer == number for spec in specs):
            raise UnsupportedModelError(
                f"{name} keeps the states of layer {number} outside of the cache, where they can't be saved",
                actual=name,
            )
    return found, specs


def _kind_of(kind: LayerKind, layer: Any, name: str) -> LayerKind:
    """Return a layer's kind with the shape of the rows that it was found to have."""
    if kind.geometry is None:
        return kind
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.ndim != 4:
        raise UnsupportedModelError(f"{name} has a layer with attention that keeps no keys and values", actual=name)
    return replace(kind, geometry=LayerGeometry(keys.shape[1], keys.shape[3], values.shape[3] or 1))


def _shapes(cache: DynamicCache) -> dict[tuple[int, str], tuple[str, tuple[int, ...]]]:
    return {
        (number, name): (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for number, layer in enumerate(cache.layers)
        if isinstance(layer, LinearAttentionLayer)
        for name, tensor in state_tensors(layer).items()
    }


def _cache_argument(model: Any, name: str) -> str:
    known = inspect.signature(model.forward).parameters
    found = argument_of(model)
    if found in known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return found
    raise UnsupportedModelError(f"{name} takes no cache", actual=name)


def _device(model: torch.nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Leave attributes as they were that vision-language models set in a forward pass, and random numbers."""
    kept = [(part, part.rope_deltas) for part in model.modules() if hasattr(part, "rope_deltas")]
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for part, value in kept:
            part.rope_deltas = value
