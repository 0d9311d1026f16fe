"""Whose cache it is: what is recorded of a model, and the refusal of a cache that another one made.

Keys and values mean something only to the weights that made them, under the same config. What is compared is the
weights themselves (a digest), and the config field by field, so that a refusal can say what differs. Names and
revisions are compared only where digests can't be: the same weights may lie under another name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import KvmmapError, ModelMismatchError
from ...metadata import ModelInfo
from .models import text_config
from .weights import digested_weights, weights_fingerprint

__all__ = ["check_same", "config_of", "describe", "weights_fingerprint"]

# What a config also holds and keys and values don't depend on. All else is compared.
_IRRELEVANT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "embedding_dropout",
        "eos_token_id",
        "hidden_dropout",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "resid_dropout",
        "resid_pdrop",
        "return_dict",
        "router_aux_loss_coef",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


_SETTINGS = "module_settings"
"""A fact of a model that is no part of its config; empty where all modules are as the config makes them. It is not
known, and not compared, of a config alone, and of a model whose weights the caller has identified."""


def describe(model: Any, fingerprint: str | None) -> tuple[ModelInfo, dict[str, Any]]:
    """Return what to record of a model: who it is, and its config's facts.

    Args:
        model: a model, or a config: then its weights are not known.
        fingerprint: the weights' digest if it is known; else it is computed, if there are weights.
    """
    whole = config_of(model)
    config = text_config(whole)
    facts = {name: _plain(value) for name, value in config.to_dict().items() if name not in _IRRELEVANT}
    if fingerprint is None and isinstance(model, torch.nn.Module):
        weights = digested_weights(model)
        fingerprint = weights.digest
        facts[_SETTINGS] = _plain(weights.settings)
    if isinstance(model, torch.nn.Module):
        facts["weights_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    info = ModelInfo(
        name=getattr(whole, "name_or_path", None) or None,
        revision=getattr(whole, "_commit_hash", None),
        fingerprint=fingerprint,
        rope=_plain(getattr(config, "rope_parameters", None) or {}),
    )
    return info, facts


def config_of(model: Any) -> Any:
    """Return a model's config; a config is its own.

    Raises:
        KvmmapError: neither a model nor a config.
    """
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise KvmmapError(f"give a transformers model, or its config, not a {type(model).__name__}")
    return config


def check_same(
    stored: ModelInfo | None,
    stored_facts: Mapping[str, Any],
    info: ModelInfo,
    facts: Mapping[str, Any],
    path: str | None,
) -> None:
    """Refuse a cache that was made by another model, config or weights.

    Raises:
        ModelMismatchError: says what differs; `expected` is what the cache has, `actual` what the model has.
    """
    if stored_facts and _SETTINGS in facts:  # older files do not say so where there are none
        stored_facts = {_SETTINGS: {}} | dict(stored_facts)
    differing = {
        name: (stored_facts[name], facts[name])
        for name in stored_facts
        if facts.get(name, ...) not in (stored_facts[name], ...)
    }
    stored = stored or ModelInfo()
    if stored.fingerprint is not None and info.fingerprint is not None:
        if stored.fingerprint != info.fingerprint:
            differing["weights"] = (stored.fingerprint, info.fingerprint)
            differing |= _differing_names(stored, info)
    else:
        differing |= _differing_names(stored, info)
    if differing:
        shown = "; ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in differing.items())
        raise ModelMismatchError(
            f"{path or 'the cache'} was made by another model: {shown}. Keys and values mean nothing to any but the "
            "model that made them: open it with that one, or prefill a new cache",
            expected={name: old for name, (old, _) in differing.items()},
            actual={name: new for name, (_, new) in differing.items()},
            path=path,
        )


def _differing_names(stored: ModelInfo, info: ModelInfo) -> dict[str, tuple[Any, Any]]:
    pairs = {"name": (stored.name, info.name), "revision": (stored.revision, info.revision)}
    return {key: pair for key, pair in pairs.items() if None not in pair and pair[0] != pair[1]}


def _plain(value: Any) -> Any:
    """Return a config's value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
