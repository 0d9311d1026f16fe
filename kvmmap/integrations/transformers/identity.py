"""Whose cache it is: what is recorded of a model, and the refusal of a cache that another one made.

Keys and values mean something only to the weights that made them, under the same config. What is compared is the
weights themselves (a digest), and the config field by field, so that a refusal can say what differs. Names and
revisions are compared only where digests can't be: the same weights may lie under another name.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash

from ...errors import KvmmapError, ModelMismatchError
from ...metadata import ModelInfo
from .models import text_config

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


def describe(model: Any, fingerprint: str | None) -> tuple[ModelInfo, dict[str, Any]]:
    """Return what to record of a model: who it is, and its config's facts.

    Args:
        model: a model, or a config: then its weights are not known.
        fingerprint: the weights' digest if it is known; else it is computed, if there are weights.
    """
    whole = config_of(model)
    config = text_config(whole)
    if fingerprint is None and isinstance(model, torch.nn.Module):
        fingerprint = weights_fingerprint(model)
    facts = {name: _plain(value) for name, value in config.to_dict().items() if name not in _IRRELEVANT}
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


_fingerprints: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Return a digest of all of a model's weights, XXH3 with 128 bits, in hex.

    It reads them all once, at memory speed; asked again for weights that have not been touched, it is remembered.

    Raises:
        KvmmapError: weights that have no bytes here (on the meta device, or of a kind torch can't show as bytes).
    """
    weights = list(_weights(model))
    state = [(name, tensor.data_ptr(), _version(tensor)) for name, tensor in weights]
    known = _fingerprints.get(model)
    if known is not None and known[0] == state:
        return known[1]
    digest = xxhash.xxh3_128()
    for name, tensor in weights:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        try:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise KvmmapError(
                f"the weights can't be read to tell whose cache it is ({name}, {tensor.dtype} on {tensor.device}: "
                f"{error}): give fingerprint=, such as a digest of the weights' file"
            ) from error
        digest.update(data.data)
    found = digest.hexdigest()
    _fingerprints[model] = state, found
    return found


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the part that makes keys and values, by name, tied ones once: heads on top don't matter."""
    body = getattr(model, "base_model", model)
    seen = set()
    for name, tensor in body.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _version(tensor: torch.Tensor) -> int:
    """torch's count of changes in place; a tensor made in inference mode has none, and is not changed outside of it."""
    return -1 if tensor.is_inference() else tensor._version


def _plain(value: Any) -> Any:
    """Return a config's value as JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
