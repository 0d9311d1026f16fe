"""Hooks on a model, which report its forward passes to the cache that they are run with.

A cache receives keys and values layer by layer and sees no tokens, positions or masks. The hooks find it among a pass's
arguments under whatever name. They are on each part of a model that takes a cache: wrappers such as peft's call
`forward` of the parts inside directly, past the hooks of the outer ones. They do nothing in passes without a
`KvmmapCache`, and are registered once per model.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from .generation import announce_prompts, rope_holders, slice_prompts
from .graphs import outside_graph
from .illustrated import IllustratedSequence
from .sequence import WatchedCache
from .sourced import SourcedSequence
from .versions import CACHE_ARGUMENT, CACHE_NAMES

_watched: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_signatures: weakref.WeakKeyDictionary[torch.nn.Module, Mapping[str, inspect.Parameter]] = weakref.WeakKeyDictionary()

_MASKS = frozenset(["attention_mask", "mask"])
"""What attention modules call their mask."""

_SOURCES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""What attention modules call the source that they attend to, in place of the sequence."""

_holders: weakref.WeakKeyDictionary[torch.nn.Module, list[Any]] = weakref.WeakKeyDictionary()
"""The parts of a watched model that remember how far positions of text are from where it is stored."""


def watch(model: torch.nn.Module) -> None:
    """Report each forward pass of a model to the cache that it is run with."""
    if model in _watched:
        return
    _watched.add(model)
    for part in parts(model):
        if part is model or part not in _watched:
            _watched.add(part)
            part.register_forward_pre_hook(_before, with_kwargs=True)
            part.register_forward_hook(_after, with_kwargs=True, always_call=True)
    for part in parts(model):
        if hasattr(part.config, "original_max_position_embeddings") and part.can_generate():
            _keep_cache(part)
    for part in parts(model):
        announce_prompts(part)
        slice_prompts(part)
        _holders[part] = rope_holders(part)
    for attention in _attentions(model):
        if attention not in _watched:
            _watched.add(attention)
            attention.register_forward_pre_hook(_before_attention, with_kwargs=True)


def parts(model: torch.nn.Module) -> Iterator[PreTrainedModel]:
    """The transformers models in a model: itself, and what it wraps or has inside."""
    return (part for part in model.modules() if isinstance(part, PreTrainedModel))


def _attentions(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A model's attention modules, the first one of each kind: all of a kind get the same mask."""
    kinds = set()
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and _MASKS & {*_parameters(module)}:
            kind = (
                type(module),
                *(getattr(module, name, None) for name in ("sliding_window", "layer_type", "is_sliding")),
            )
            if repr(kind) not in kinds:
                kinds.add(repr(kind))
                yield module


def _keep_cache(model: PreTrainedModel) -> None:
    """Have a model not drop a cache silently, as models with "longrope" do in the step from one regime to the other."""
    own: Any = type(model).prepare_inputs_for_generation  # type: ignore[attr-defined]

    @functools.wraps(own)
    def prepare_inputs_for_generation(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        prepared = own(self, *args, **kwargs)
        cache = _cache_in(args, kwargs)
        if cache is not None and _cache_in((), prepared) is None:
            if cache.get_seq_length() == 0:
                return prepared | {CACHE_ARGUMENT: cache}
            warnings.warn(
                f"{type(self).__name__} changes its rotary embeddings beyond "
                f"{self.config.original_max_position_embeddings} positions, and goes on without the KvmmapCache, in "
                f"a new cache of its own. {cache!r} keeps its {cache.get_seq_length()} positions, which are valid in "
                "shorter sequences; to store a longer one, prefill all of it into a new KvmmapCache",
                RuntimeWarning,
                stacklevel=2,
            )
        return prepared

    # Of this name, a bound method can be copied and pickled with its model.
    vars(model)["prepare_inputs_for_generation"] = types.MethodType(prepare_inputs_for_generation, model)


@outside_graph
def _before(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = _cache_in(args, kwargs)
    if cache is None:
        return None
    parameters = _parameters(model)
    renamed = _renamed(model, parameters, kwargs)
    given = dict(zip(parameters, args, strict=False)) | renamed
    cache.begin_pass(model, given)
    if (own := cache.own_arguments(given)) is not given:
        args, renamed = (), own
    if _holders.get(model) and renamed.get("position_ids") is None and isinstance(cache, IllustratedSequence):
        cache.restore_deltas(_holders[model])
    return args, renamed


@outside_graph
def _after(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        if isinstance(cache, SourcedSequence):
            cache.note_output(output)
        cache.end_pass(model, failed=output is None)


@outside_graph
def _before_attention(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        given = dict(zip(_parameters(module), args, strict=False)) | kwargs
        if all(given.get(name) is None for name in _SOURCES):  # else the mask is that of a source
            cache.check_mask(module, given.get("attention_mask", given.get("mask")))


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> WatchedCache | None:
    """The cache among a forward pass's arguments, under whatever name."""
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, WatchedCache)), None)


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
    given = next((name for name, value in kwargs.items() if isinstance(value, WatchedCache)), None)
    if given is None or given in parameters:
        return kwargs
    taken = next((name for name in CACHE_NAMES if name in parameters), None)
    if taken is None:  # a wrapper, which passes all of its arguments on
        return kwargs
    if given not in CACHE_NAMES or kwargs.get(taken) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} would ignore the KvmmapCache that is given as {given}=: with transformers "
            f"{transformers.__version__} give it as {taken}=",
            expected=taken,
            actual=given,
        )
    return {taken if name == given else name: value for name, value in kwargs.items() if name != taken}
