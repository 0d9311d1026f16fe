"""Whose keys and values a context of llama.cpp holds, and in which form."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp
import xxhash

from ...codecs import by_name
from ...errors import KvmmapError
from ...formats.llama_cpp.architectures import Order
from ...formats.llama_cpp.ggml import KV_TYPES, GgmlType, RowForm
from ...formats.llama_cpp.importing import codecs_of, window_of
from ...formats.llama_cpp.model import GgufModel, read_model
from ...geometry import LayerGeometry
from ...metadata import ModelInfo

ROPE_OVERRIDES = (
    "rope_scaling_type",
    "rope_freq_base",
    "rope_freq_scale",
    "yarn_ext_factor",
    "yarn_attn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_orig_ctx",
)
"""Parameters of a context that change keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextFacts:
    """What a context's rows depend on, and how they lie."""

    model: GgufModel
    info: ModelInfo
    facts: dict[str, Any]
    """What changes keys and values besides the weights, as plain JSON."""
    forms: list[tuple[RowForm, RowForm]]
    """Of each layer's keys and values."""
    key_type: GgmlType
    value_type: GgmlType
    rotated: bool

    def layers(self, preset: str) -> tuple[LayerGeometry, ...]:
        """Return the layers of a cache, with a preset's codecs."""
        codecs = codecs_of(preset, self.model, self.forms)
        return tuple(
            LayerGeometry(shape.num_kv_heads, shape.head_dim, shape.value_head_dim, by_name(keys), by_name(values))
            for shape, keys, values in zip(self.model.layers, codecs["key_codec"], codecs["value_codec"], strict=True)
        )

    def shape(self, preset: str) -> dict[str, Any]:
        """Return the arguments of `create` that give a cache these layers."""
        recent_window, sinks = window_of(preset)
        return {
            "num_layers": len(self.model.layers),
            "num_kv_heads": [layer.num_kv_heads for layer in self.model.layers],
            "head_dim": [layer.head_dim for layer in self.model.layers],
            "value_head_dim": [layer.value_head_dim for layer in self.model.layers],
            **codecs_of(preset, self.model, self.forms),
            "recent_window": recent_window,
            "sinks": sinks,
        }


def context_facts(llama: llama_cpp.Llama, *, order: Order | None = None) -> ContextFacts:
    """Look at a `Llama`: its GGUF file, types of keys and values, RoPE's parameters, overrides and adapter.

    Raises:
        UnsupportedModelError: a model whose states are not read.
        KvmmapError: types of keys and values that are not read.
    """
    model = read_model(llama.model_path, order=order)
    parameters = llama.context_params
    types = {found.number: found for found in KV_TYPES.values()}
    try:
        key_type, value_type = types[int(parameters.type_k)], types[int(parameters.type_v)]
    except KeyError as error:
        raise KvmmapError(
            f"keys or values of ggml's type {error} are not read: choose one of {', '.join(KV_TYPES)} by type_k and "
            "type_v"
        ) from None
    rotated = not _number(os.environ.get("LLAMA_ATTN_ROT_DISABLE", ""))
    forms = [
        (
            RowForm.of_keys(key_type, shape.head_dim, rotated=rotated, pairs=model.order == "pairs"),
            RowForm.of_values(value_type, shape.value_head_dim, rotated=rotated),
        )
        for shape in model.layers
    ]
    facts = {
        "key_type": key_type.name,
        "value_type": value_type.name,
        "rope": {name: _plain(getattr(parameters, name)) for name in ROPE_OVERRIDES},
        "overrides": {str(name): str(value) for name, value in (llama.kv_overrides or {}).items()},
        "adapter": _adapter(llama),
    }
    return ContextFacts(
        model=model,
        info=model.info(),
        facts={"llama_cpp": facts},
        forms=forms,
        key_type=key_type,
        value_type=value_type,
        rotated=rotated,
    )


def _adapter(llama: llama_cpp.Llama) -> list[Any] | None:
    if not llama.lora_path:
        return None
    digest = xxhash.xxh3_128()
    with open(llama.lora_path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return [digest.hexdigest(), float(llama.lora_scale)]


def _number(text: str) -> int:
    """Return what C's atoi makes of a text."""
    digits: Sequence[str] = text.strip().split(".")[:1]
    try:
        return int(digits[0])
    except ValueError:
        return 0


def _plain(value: Any) -> float | int:
    return value if isinstance(value, int | float) else int(value)
