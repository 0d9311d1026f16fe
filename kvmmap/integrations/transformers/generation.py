"""What `generate` of a model is called with, told to the cache that it is called with.

`generate` encodes images before the first forward pass, so hooks on passes don't see what stands behind placeholders;
and it computes positions from what the model remembers of the last prompt. So some of its steps go through functions
here: they do nothing for other caches.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from .media import media_tokens
from .sourced import SourcedSequence, encodes
from .sources import has_source

_INPUTS = "_prepare_model_inputs"
_POSITIONS = "_prepare_position_ids_for_generation"
_PREPARE = "prepare_inputs_for_generation"
_ENCODERS = "_maybe_prepare_encoder_kwargs_for_generation"


def announce_prompts(model: PreTrainedModel) -> None:
    """Have a model's `generate` tell an `IllustratedSequence` what it is called with, if the model takes images."""
    sourced = has_source(model.config)
    if not (sourced or media_tokens(model.config)) or not model.can_generate() or _INPUTS in vars(model):
        return
    if sourced:
        _announce_sources(model)
    holders, encoder_decoder = rope_holders(model), encodes(model)

    def inputs(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        ids, name, others = made
        cache = _cache_in(others)
        if cache is not None and encoder_decoder:
            cache.announce_source(True, {**others, name: ids})
        elif cache is not None and name == "input_ids" and isinstance(ids, torch.Tensor) and ids.shape[0] == 1:
            cache.announce(ids[0].cpu().numpy(), others)
        return made

    def positions(own: Callable[..., Any], inputs_tensor: Any, model_kwargs: Any) -> Any:
        cache = _cache_in(model_kwargs)
        if cache is not None and holders:
            cache.restore_deltas(holders)
        return own(inputs_tensor, model_kwargs)

    def encoders(own: Callable[..., Any], inputs_tensor: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        cache = _cache_in(model_kwargs)
        if cache is not None:
            model_kwargs = cache.without_stored(model_kwargs)
        return own(inputs_tensor, model_kwargs, *args, **kwargs)

    for name, function in ((_INPUTS, inputs), (_POSITIONS, positions), (_ENCODERS, encoders)):
        _wrap(model, name, function)


def _announce_sources(model: PreTrainedModel) -> None:
    """Have an encoder-decoder feed only what its cache lacks of the decoder's prompt; and BLIP announce its image.

    transformers slices a decoder's prompt only if a mask for it is given, whose length tells that it is all of it.
    """

    def prefill(
        own: Callable[..., Any], input_ids: torch.Tensor, config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        cache = _cache_in(model_kwargs)
        if cache is not None:
            config._mask_length = input_ids.shape[1] if input_ids.shape[1] > cache.seq_len else -1
        return own(input_ids, config, model_kwargs, *args, **kwargs)

    def generate(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(own).bind(*args, **kwargs).arguments
        cache = _cache_in({**given, **given.get("generate_kwargs", {})})
        if cache is not None:
            cache.announce_source(False, given)
        return own(*args, **kwargs)

    if encodes(model):
        _wrap(model, "_prefill", prefill)
    whole: Any = type(model)
    if model.config.model_type == "blip" and "pixel_values" in inspect.signature(whole.generate).parameters:
        _wrap(model, "generate", generate)


def slice_prompts(model: PreTrainedModel) -> None:
    """Have `generate` feed a model of states alone only what the cache lacks of a prompt, as it does for other models.

    Releases up to 5.23 look at the length of a cache only if it is called past_key_values, which these models' is not.
    """
    own = getattr(model, _PREPARE, None)
    if own is None or "cache_params" not in inspect.signature(own).parameters or _PREPARE in vars(model):
        return

    def prepare(own: Callable[..., Any], input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, mask = _cache_in(kwargs), kwargs.get("attention_mask")
        first = kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is None
        if cache is not None and first and (mask is None or mask.shape[1] == input_ids.shape[1] > cache.seq_len):
            kwargs["next_sequence_length"] = input_ids.shape[1] - cache.seq_len
        return own(input_ids, *args, **kwargs)

    _wrap(model, _PREPARE, prepare)


def rope_holders(model: torch.nn.Module) -> list[Any]:
    """The parts of a model that remember how far the positions of text are from where it is stored."""
    return [part for part in model.modules() if hasattr(part, "rope_deltas")]


def _wrap(model: Any, name: str, function: Callable[..., Any]) -> None:
    own = getattr(type(model), name)

    @functools.wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(functools.partial(own, self), *args, **kwargs)

    # Of this name, a bound method can be copied and pickled with its model.
    vars(model)[name] = types.MethodType(method, model)


def _cache_in(given: Mapping[str, Any]) -> SourcedSequence | None:
    return next((value for value in given.values() if isinstance(value, SourcedSequence)), None)
