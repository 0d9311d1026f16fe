"""Making a cache of a prompt cache of mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..codecs.presets import preset_codecs, preset_recent
from ..errors import KvmmapError
from ..inputs import check_token_ids
from ..metadata import ModelInfo, document
from ..opening import making
from ..paths import PathLike, place_text
from ..storage.protocols import Progress
from .mlx import read_layers, user_notes
from .portable import KEY, portable_notes
from .safetensors import steps
from .safetensors_file import open_tensors


def import_mlx(
    path: PathLike,
    target: PathLike,
    *,
    token_ids: Any = None,
    preset: str = "native",
    capacity: int | None = None,
    compressor: str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    model: ModelInfo | None = None,
    portable_id: str | None = None,
    weights: str = "unknown",
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a cache of a prompt cache that mlx-lm saved, by `mlx_lm.cache_prompt` or `save_prompt_cache`.

    Room beyond the positions is left out, rings are put in order, and quantised caches are decoded.

    Args:
        path: the safetensors file, of mlx-lm 0.32 or before.
        target: path or URL of the cache to make, as in `create`; it appears when it is whole.
        token_ids: ids of the positions, [n]: mlx-lm does not save them.
        preset: "native" keeps f32, f16 and bf16 bit by bit, and what was quantised as decoded; else one of `create`'s.
        capacity: positions to reserve; as many as there are by default.
        compressor, overwrite, storage_options: as in `create`.
        metadata: plain JSON of your own.
        model: what made the cache: mlx-lm does not say it.
        portable_id: the model's identity across programs; see `docs/format.md`.
        weights: the type of the model's weights, such as "bfloat16".
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        NotACacheError: no prompt cache of mlx-lm, or one whose arrays don't fit together.
        UnsupportedModelError: recurrent states, batches and the like, or a ring that has dropped positions.
        DtypeError, NonFiniteError: numbers that can't be stored.
        CacheExistsError: there is something at `target`.
        MissingLibraryError: safetensors is not installed.
        CacheNotFoundError, OSError: the file can't be read.
    """
    with open_tensors(place_text(path)) as file:
        layers = read_layers(file)
        count = layers[0].positions
        notes = user_notes(file)
        ids = notes.get("token_ids") if token_ids is None else token_ids
        known = None
        if ids is not None and (token_ids is not None or isinstance(ids, list)):
            try:
                known = check_token_ids(np.asarray(ids), count)
            except KvmmapError:
                if token_ids is not None:
                    raise
        shapes = [layer.shape for layer in layers]
        native = [layer.codec for layer in layers]
        keys, values = (None, None) if preset == "native" else preset_codecs(preset)
        recent_window, sinks = (0, 0) if preset == "native" else preset_recent(preset)
        shape = {
            "num_layers": len(layers),
            "capacity": count if capacity is None else capacity,
            "num_kv_heads": [heads for heads, _, _ in shapes],
            "head_dim": [dim for _, dim, _ in shapes],
            "value_head_dim": [dim for _, _, dim in shapes],
            "key_codec": native if keys is None else [keys] * len(layers),
            "value_codec": native if values is None else [values] * len(layers),
            "recent_window": recent_window,
            "sinks": sinks,
        }
        own = {KEY: portable_notes("mlx-lm", portable_id, weights)}
        with making(
            target,
            shape,
            document({**(metadata or {}), **own}, model),
            compressor=compressor,
            overwrite=overwrite,
            storage_options=storage_options,
        ) as cache:
            each, done = sum(layer.position_bytes for layer in cache.geometry.layers), 0
            for layer, source in zip(cache.layers, layers, strict=True):
                for start, stop in steps(0, count):
                    layer.extend(source.read("keys", start, stop), source.read("values", start, stop))
                    done += (stop - start) * layer.geometry.position_bytes
                    if progress:
                        progress(done, each * count)
            if known is not None:
                cache.push_token_ids(known)
