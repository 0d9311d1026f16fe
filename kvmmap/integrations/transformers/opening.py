"""What a cache is made with for a model, and whether a saved one may be used by a model.

Between `models` and `identity`, which know configs and weights, and `kvmmap`'s own caches, which know shapes and notes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...codecs import by_name
from ...codecs.presets import UNROTATED, Codecs, chosen_codecs, chosen_recent, preset_codecs
from ...errors import MetadataError, ModelMismatchError, ShapeMismatchError, UnsupportedModelError
from ...geometry import LayerGeometry
from ...metadata import ModelInfo
from ...per_layer import one_a_layer
from ...state_spec import StateSpec
from .identity import check_same, config_of, describe
from .kinds import LayerKind, as_notes, from_notes, has_states, states_alone, store_geometries
from .models import layer_kinds, max_positions
from .probe import find_states
from .sources import has_source, why_source
from .tensors import dtype_name

NOTES = "transformers"
"""Key in a cache's metadata under which is what this integration records."""

DEFAULT_CAPACITY = 4096
"""Positions reserved where neither the caller nor the config says how many."""

MOST_ROOM = 32_768
"""Positions at most for which memory is reserved unasked beside a file that is only read."""

DEFAULT_PRESET = "fidelity"
"""How rows are stored where the caller says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storing:
    """How the caller of `KvmmapCache` wants rows to be stored; None where nothing was said."""

    preset: str | None = None
    key_codec: Codecs | None = None
    value_codec: Codecs | None = None
    recent_window: int | None = None
    sinks: int | None = None
    checkpoint_slots: int | None = None


def settings(
    model: Any,
    capacity: int | None,
    metadata: Mapping[str, Any] | None,
    fingerprint: str | None,
    storing: Storing,
) -> tuple[list[LayerKind], dict[str, Any]]:
    """Return a model's layers, and the arguments to make a cache for it with."""
    config = config_of(model)
    kinds = layer_kinds(config)
    states: tuple[StateSpec, ...] = ()
    if has_states(kinds):
        kinds, states = find_states(model)
    if has_source(config) and not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{config.model_type} {why_source(config)}: what it attends to besides its tokens is seen by hooks on the "
            "model; make the cache with the model, and not with its config",
            actual=config.model_type,
        )
    if capacity is None:
        capacity = max_positions(config) or DEFAULT_CAPACITY
    info, facts = describe(model, fingerprint)
    notes = {
        "config": facts,
        **as_notes(kinds),
        **({"source": {}} if has_source(config) else {}),
        "max_positions": max_positions(config),
    }
    preset = DEFAULT_PRESET if storing.preset is None else storing.preset
    chosen = chosen_codecs(preset, storing.key_codec, storing.value_codec)
    window, first = chosen_recent(preset, storing.recent_window, storing.sinks, *chosen)
    if states_alone(kinds):
        window = first = 0
    shapes = spread(store_geometries(kinds), capacity, window, first) | {"states": states}
    if storing.checkpoint_slots is not None:
        shapes["checkpoint_slots"] = storing.checkpoint_slots
    own = [kind for kind in kinds if states or kind.geometry is not None]
    asked = storing.key_codec, storing.value_codec
    for part, named, codec in zip(("key", "value"), asked, preset_codecs(preset), strict=True):
        dims = shapes["head_dim" if part == "key" else "value_head_dim"]
        fitting: Codecs = [_fitting(codec, dim, kind.latent) for dim, kind in zip(dims, own, strict=False)]
        name = f"{part}_codec"  # of rows of indexes, which follow, they are chosen already
        shapes[name][: len(own)] = one_a_layer(fitting if named is None else named, len(own), name)
    return kinds, shapes | {"metadata": own_notes(metadata or {}) | {NOTES: notes}, "model": info}


def _fitting(codec: str, dim: int, latent: bool) -> str:
    """Return a preset's codec for rows of a model: latents lose more if they are rotated, and odd rows can't be."""
    plain = UNROTATED.get(codec, codec)
    if latent or not dim:
        return plain
    try:
        by_name(codec).check_dim(dim)
    except ShapeMismatchError:
        return plain
    return codec


def own_notes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's metadata as a dict.

    Raises:
        MetadataError: it has the key that is this integration's.
    """
    if NOTES in metadata:
        raise MetadataError(f"the key {NOTES!r} of the metadata is this integration's own")
    return dict(metadata)


def spread(layers: Sequence[LayerGeometry], capacity: int, recent_window: int = 0, sinks: int = 0) -> dict[str, Any]:
    """Return the arguments that make a cache of such layers."""
    return {
        "num_layers": len(layers),
        "capacity": capacity,
        "num_kv_heads": [layer.num_kv_heads for layer in layers],
        "head_dim": [layer.head_dim for layer in layers],
        "value_head_dim": [layer.value_head_dim for layer in layers],
        "key_codec": [layer.key_codec.name for layer in layers],
        "value_codec": [layer.value_codec.name for layer in layers],
        "recent_window": recent_window,
        "sinks": sinks,
    }


def spread_like(cache: QuantizedKvCache, capacity: int, start: int = 0) -> dict[str, Any]:
    """Return the arguments that make a cache of a cache's layers, for its positions from `start` on."""
    geometry = cache.geometry
    shapes = spread(geometry.layers, capacity, geometry.recent_window, max(0, geometry.sinks - start))
    if geometry.states:
        shapes |= {"states": geometry.states, "checkpoint_slots": geometry.checkpoint_slots}
    return shapes


def check_stored(stored: QuantizedKvCache, model: Any, fingerprint: str | None) -> list[LayerKind]:
    """Return the layers of a saved cache, if the model may use it.

    Args:
        stored: the cache.
        model: a model, a config, or None: then only what is stored is looked at.
        fingerprint: the weights' digest if it is known.

    Raises:
        ModelMismatchError: another model, config or weights made it.
        ShapeMismatchError: its layers are not those of the model.
        UnsupportedModelError: no model is given, and none was recorded.
    """
    notes = stored.metadata.get(NOTES)
    sourced = "source" in (notes or {})
    if (stored.states or sourced) and not hasattr(model, "config"):
        what = "belongs to a source, which is seen by hooks on the model" if sourced else "has states, which hooks take"
        raise UnsupportedModelError(
            f"{stored.path or 'the cache'} {what}: open it with the model, and not with its config or without"
        )
    if model is None:
        if notes is None:
            raise UnsupportedModelError(
                f"{stored.path or 'the cache'} was not made by a KvmmapCache, and does not say which positions its "
                "layers see: open it with the model, or its config"
            )
        return from_notes(notes, stored.geometry.layers)
    info, facts = describe(model, fingerprint)
    check_same(stored.model, notes["config"] if notes else {}, info, facts, stored.path)
    kinds = layer_kinds(config_of(model))
    layers = stored.geometry.layers
    if stored.states and [kind.geometry is not None for kind in kinds] == [layer.has_rows for layer in layers]:
        # Their shapes were found by running the model.
        found = [replace(kind, geometry=layer) for kind, layer in zip(kinds, layers, strict=True)]
        kinds = [new if new.geometry and new.geometry.has_rows else old for new, old in zip(found, kinds, strict=True)]
    shapes = store_geometries(kinds)
    if [shape.dims for shape in shapes] != [layer.dims for layer in stored.geometry.layers]:
        raise ShapeMismatchError(
            f"{stored.path or 'the cache'} has layers of other shapes than the model's: "
            f"{_shapes(stored.geometry.layers)}, and the model {_shapes(shapes)}",
            expected=stored.geometry.layers,
            actual=shapes,
        )
    return kinds


def _shapes(layers: Sequence[LayerGeometry]) -> str:
    kinds = sorted({(layer.num_kv_heads, layer.head_dim, layer.value_head_dim) for layer in layers})
    return f"{len(layers)} of (num_kv_heads, head_dim, value_head_dim) {', '.join(map(str, kinds))}"


def room_beside(stored: QuantizedKvCache) -> int:
    """Return how many positions to reserve in memory after those of a file that is only read."""
    made_for = (stored.metadata.get(NOTES) or {}).get("max_positions")
    left = (made_for or stored.capacity) - stored.seq_len
    return min(left, MOST_ROOM) if left > 0 else DEFAULT_CAPACITY


def record_known(cache: QuantizedKvCache, token_ids: NDArray[np.int32]) -> None:
    """Record token ids of the positions that have none, leaving out those that are -1, not known."""
    known = np.flatnonzero(token_ids >= 0)
    known = known[known >= cache.token_len]
    if len(known):
        for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            cache.push_token_ids(token_ids[run[0] : run[-1] + 1], int(run[0]))


def note_regimes(cache: QuantizedKvCache, regimes: list[list[int]]) -> None:
    """Record by which frequencies keys were rotated."""
    notes = cache.metadata
    cache.metadata = notes | {NOTES: (notes.get(NOTES) or {}) | {"rope": regimes}}


def note_source(cache: QuantizedKvCache, source: Mapping[str, Any]) -> None:
    """Record which source rows were computed with."""
    notes = cache.metadata
    cache.metadata = notes | {NOTES: (notes.get(NOTES) or {}) | {"source": dict(source)}}


def note_media(cache: QuantizedKvCache, media: Mapping[str, Any]) -> None:
    """Record which images and the like rows were computed from."""
    notes = cache.metadata
    own = {name: value for name, value in (notes.get(NOTES) or {}).items() if name != "media"}
    cache.metadata = notes | {NOTES: own | ({"media": dict(media)} if media else {})}


def check_dtype(cache: QuantizedKvCache, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Refuse keys of another dtype than those that a cache was made of, or note it in a cache that has none yet.

    Args:
        cache: what is appended to.
        dtype: that of the keys.
        autocast: what operations compute in beside; None without autocast.

    Raises:
        ModelMismatchError: they differ.
    """
    name, info = dtype_name(dtype), cache.model or ModelInfo()
    if autocast is not None:
        name += f" under autocast to {dtype_name(autocast)}"
    if info.source_dtype is None:
        cache.model = replace(info, source_dtype=name)
    elif info.source_dtype != name:
        raise ModelMismatchError(
            f"{cache.path or 'the cache'} was made in {info.source_dtype}, and this model runs in {name}: load it "
            f"with dtype={info.source_dtype.partition(' ')[0]!r}, and use autocast for both or for neither",
            expected={"source_dtype": info.source_dtype},
            actual={"source_dtype": name},
            path=cache.path,
        )
