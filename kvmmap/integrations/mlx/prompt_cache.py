"""`KvmmapPromptCache`: the prompt cache of mlx-lm's server, in memory as before, and in a library on the disk."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, LRUPromptCache
from numpy.typing import NDArray

from ...codecs import by_name
from ...codecs.presets import preset_codecs
from ...errors import CacheNotFoundError, KvmmapError, UnsupportedModelError
from ...formats.portable import KEY, portable_notes
from ...geometry import LayerGeometry
from ...library import Library, Match, Namespace
from ...paths import PathLike
from .identity import ModelFacts, model_facts

log = logging.getLogger("kvmmap.mlx")

LEAST_TOKENS = 16
"""Tokens from which on saving them, or loading them, is worth while."""

CHUNK = 512
"""Positions that are copied at a time."""

LEAST_CAPACITY = 8192
"""Positions that a segment reserves at least, which costs no disk: a conversation grows in place."""

NATIVE = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}
"""Codecs that keep a dtype's numbers bit by bit."""

NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class KvmmapPromptCache(LRUPromptCache):  # type: ignore[misc]
    """What `mlx_lm.server` keeps prompts in: its own cache in memory, and behind it a library on the disk.

    A prompt begins at the longest prefix that either has. What the server inserts is stored as well, its new positions
    alone, and survives power loss when `insert_cache` returns. Other weights, adapters and configs never match.

    Plain `KVCache`s of token ids are stored. Rotating, quantised and recurrent caches, those of draft models and
    prompts with images stay in memory, as in mlx-lm. A failing disk breaks no request: it is logged, by "kvmmap.mlx".

    Args:
        path: of the directory, a `kvmmap.Library`; made if it is not there. Any number of processes use it.
        max_size, max_bytes: of what is kept in memory, as mlx-lm has them.
        disk_bytes: bytes on the disk to keep at most; what is worth least goes first. None: no limit.
        codec: "native" keeps keys and values bit by bit; or a preset of `kvmmap.create`, without its recent
            window.
        salt: a tenant's secret: equal prompts of other tenants don't match.

    Raises:
        UnsupportedModelError: the server is distributed: each process has a part of the heads alone.
        DtypeError: there is no such preset.
        NotACacheError, OSError: as `Library`.
    """

    def __init__(
        self,
        path: PathLike,
        max_size: int = 10,
        max_bytes: int = 1 << 63,
        *,
        disk_bytes: int | None = None,
        codec: str = "native",
        salt: str | None = None,
    ) -> None:
        super().__init__(max_size, max_bytes)
        if mx.distributed.init().size() > 1:
            raise UnsupportedModelError("a distributed server's keys and values are not stored: run it in one process")
        self._codecs = None if codec == "native" else preset_codecs(codec)
        self._salt = salt
        self._models: dict[Any, ModelFacts | None] = {}
        self.library = Library(path, max_bytes=disk_bytes)
        """Where prompts are kept."""

    # What the server calls

    def fetch_nearest_cache(self, model: Any, tokens: Sequence[Any]) -> tuple[list[Any] | None, Sequence[Any]]:
        """Return a cache of the longest prefix, and the tokens that follow it; None if there is none."""
        cache, rest = super().fetch_nearest_cache(model, tokens)
        try:
            restored = self._restore(model, tokens, len(tokens) - len(rest))
        except (KvmmapError, OSError) as error:
            log.warning("the library can't be read, so a prompt is computed: %s", error)
            restored = None
        if restored is None:
            return cache, rest
        return restored, tokens[restored[0].offset :]

    def insert_cache(
        self, model: Any, tokens: Sequence[Any], prompt_cache: list[Any], *, cache_type: str = "assistant"
    ) -> None:
        """Keep a prompt's cache in memory, and on the disk as far as it is not there."""
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)
        try:
            self._store(model, tokens, prompt_cache)
        except (KvmmapError, OSError) as error:
            log.warning("a prompt is not stored: %s", error)

    # What it does

    def _restore(self, model: Any, tokens: Sequence[Any], known: int) -> list[Any] | None:
        """Return caches of more than `known` + LEAST_TOKENS positions, or None."""
        ids, facts = _ids(tokens), self._facts(model)
        if ids is None or facts is None or len(ids) - 1 < known + LEAST_TOKENS:
            return None
        matches = [(name, self.library.match(name, ids, limit=len(ids) - 1)) for name in self._namespaces(facts)]
        namespace, match = max(matches, key=lambda pair: pair[1].length, default=(None, None))
        if namespace is None or match is None or match.length < known + LEAST_TOKENS:
            return None
        try:
            return self._load(match, namespace.model.source_dtype or "float32")
        except CacheNotFoundError:
            return None  # evicted since

    def _load(self, match: Match, dtype: str) -> list[Any]:
        found, count = [], match.length
        with self.library.open(match) as stored:
            stored.storage.verify_rows(0, count)
            for layer in stored.layers:
                cache = KVCache()
                cache.keys = _to_mlx(layer.read_keys(0, count, dtype=dtype))
                cache.values = _to_mlx(layer.read_values(0, count, dtype=dtype))
                cache.offset = count
                found.append(cache)
        return found

    def _store(self, model: Any, tokens: Sequence[Any], caches: list[Any]) -> None:
        ids = _ids(tokens)
        if ids is None or not caches or any(type(cache) is not KVCache or cache.keys is None for cache in caches):
            return
        offsets, dtypes = {cache.offset for cache in caches}, {cache.keys.dtype for cache in caches}
        count = min(*offsets, len(ids))
        facts = self._facts(model)
        if facts is None or len(offsets) > 1 or len(dtypes) > 1 or count < LEAST_TOKENS:
            return
        codec = NATIVE[dtypes.pop()]
        names = self._codecs or (codec, codec)
        layers = tuple(
            LayerGeometry(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3], *map(by_name, names))
            for cache in caches
        )
        namespace = self._namespace(facts, layers, NAMES[codec])
        ids = ids[:count]
        if self.library.match(namespace, ids).length >= count:
            return
        notes = {KEY: portable_notes("mlx-lm", facts.portable_id(layers), facts.weights or NAMES[codec])}
        capacity = max(2 * count, LEAST_CAPACITY)
        with self.library.session(namespace, ids, capacity=capacity, metadata=notes) as session:
            for start in range(session.reused, count, CHUNK):
                stop = min(start + CHUNK, count)
                keys = [_to_numpy(cache.keys, start, stop) for cache in caches]
                values = [_to_numpy(cache.values, start, stop) for cache in caches]
                session.extend(keys, values, ids[start:stop])

    def _facts(self, model: Any) -> ModelFacts | None:
        if model not in self._models:
            facts = self._models[model] = model_facts(model)
            if facts is None:
                log.warning("%s: the files of its weights are not found, so nothing of it is stored", model)
        return self._models[model]

    def _namespace(self, facts: ModelFacts, layers: tuple[LayerGeometry, ...], dtype: str) -> Namespace:
        return Namespace(layers=layers, model=facts.info(dtype), facts=facts.facts, salt=self._salt)

    def _namespaces(self, facts: ModelFacts) -> list[Namespace]:
        """Return those of the library that are this model's: what layers it has is known once it has computed."""
        found = []
        for stored in self.library.namespaces():
            document = stored.document
            if document["weights"].get("fingerprint") == facts.fingerprint and document["source_dtype"]:
                layers = tuple(
                    LayerGeometry(heads, dim, value_dim, by_name(key), by_name(value))
                    for heads, dim, value_dim, key, value in document["layers"]
                )
                namespace = self._namespace(facts, layers, document["source_dtype"])
                if namespace.digest == stored.digest:
                    found.append(namespace)
        return found

    def close(self) -> None:
        """Close the library. The cache can't be used afterwards."""
        self.library.close()


def _ids(tokens: Sequence[Any]) -> NDArray[np.int32] | None:
    """Return token ids; None if some are none, as those of images."""
    if not len(tokens) or not all(isinstance(token, int) and 0 <= token < 2**31 for token in tokens):
        return None
    return np.array(tokens, np.int32)


def _to_mlx(rows: NDArray[Any]) -> mx.array:
    """Return rows, [n, heads, dim], as mlx-lm has them: [1, heads, n, dim]."""
    ordered = np.ascontiguousarray(rows.transpose(1, 0, 2))[None]
    if ordered.dtype == ml_dtypes.bfloat16:  # which mlx does not take from numpy
        return mx.array(ordered.view(np.uint16)).view(mx.bfloat16)
    return mx.array(ordered)


def _to_numpy(array: mx.array, start: int, stop: int) -> NDArray[Any]:
    """Return positions [start, stop) of [1, heads, n, dim] as rows, [n, heads, dim]."""
    part = array[0, :, start:stop, :].transpose(1, 0, 2)
    if part.dtype == mx.bfloat16:
        return np.array(mx.contiguous(part).view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(part)
