"""A whole cache: push_step, extend, flush, truncate, close. Reading is `CacheReader`'s.

Which kind of storage it is, is not known here: `opening` decides that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .cache_reader import CacheReader
from .closing import Closing
from .codecs.presets import Codecs
from .errors import PositionOutOfRangeError, ShapeMismatchError
from .format import NO_TOKEN
from .geometry import CacheGeometry
from .inputs import check_token_ids, one_step, per_layer
from .metadata import ModelInfo, document
from .ranges import check_range, check_room, index
from .state_spec import CHECKPOINT_SLOTS, StateSpec
from .states import StateWriter
from .storage.memory import MemoryStorage
from .storage.protocols import Storage
from .storage.refusals import not_pickled


class QuantizedKvCache(CacheReader, StateWriter, Closing):
    """The keys and values of all layers, in memory; `kvmmap.create` and `kvmmap.open` give the same over a file.

    Args:
        num_layers: transformer layers.
        capacity: positions to reserve.
        num_kv_heads: key and value heads; one number, or one a layer; 0 for a layer without rows.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        key_codec, value_codec: names of the codecs that keys and values are stored by; one for all, or one a layer; the
            preset's unless given.
        preset: a pair of codecs, and whether some positions are kept in 16 bits besides, as in `kvmmap.create`.
        recent_window, sinks: last and first positions to keep in 16 bits besides, 0 to 65,536; the preset's unless
            given.
        states: tensors of fixed size that layers overwrite at every position; see `write_states`.
        checkpoint_slots: checkpoints of all states to keep.
        metadata: plain JSON of your own.
        model: what made the cache.

    It is a context manager that closes. One thread at a time appends; others may read meanwhile.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
        DtypeError: there is no such codec, or no such preset.
        MetadataError: metadata that is not JSON.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        value_head_dim: int | Sequence[int] | None = None,
        *,
        key_codec: Codecs | None = None,
        value_codec: Codecs | None = None,
        preset: str = "int8",
        recent_window: int | None = None,
        sinks: int | None = None,
        states: Iterable[StateSpec] = (),
        checkpoint_slots: int = CHECKPOINT_SLOTS,
        metadata: Mapping[str, Any] | None = None,
        model: ModelInfo | None = None,
    ) -> None:
        geometry = CacheGeometry.of_preset(
            preset,
            num_layers=num_layers,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            key_codec=key_codec,
            value_codec=value_codec,
            recent_window=recent_window,
            sinks=sinks,
            states=states,
            checkpoint_slots=checkpoint_slots,
        )
        notes = document(metadata, model)
        notes.encode()
        self._attach(MemoryStorage(geometry, notes))

    def __reduce__(self) -> NoReturn:
        raise not_pickled(self.path)

    @classmethod
    def of_storage(cls, storage: Storage) -> QuantizedKvCache:
        """Make the cache of a storage that is open already."""
        cache = cls.__new__(cls)
        cache._attach(storage)
        return cache

    # Appending

    def push_step(self, keys: Any, values: Any, token_id: int | None = None) -> None:
        """Append one position to every layer: all or nothing.

        Args:
            keys: [num_layers, num_kv_heads, head_dim]; f32, f16 or bf16; numpy, torch or DLPack on the CPU. Where
                layers differ in shape: a sequence of one array a layer, None for a layer without rows.
            values: [num_layers, num_kv_heads, value_head_dim], likewise.
            token_id: the position's token, if you want it kept.

        Raises:
            ShapeMismatchError: wrong shapes, or layers that were pushed to on their own and are not level.
            DtypeError, NonFiniteError, CapacityExceededError, ReadOnlyError, ClosedError, OSError: as in `extend`.
        """
        self._append(one_step(keys), one_step(values), None if token_id is None else [token_id])

    def extend(self, keys: Any, values: Any, token_ids: Any = None) -> None:
        """Append many positions to every layer: all or nothing.

        Args:
            keys: [num_layers, n, num_kv_heads, head_dim]; f32, f16 or bf16; any strides; numpy, torch or DLPack on the
                CPU. Where layers differ in shape: a sequence of one array a layer, None for a layer without rows.
            values: [num_layers, n, num_kv_heads, value_head_dim], likewise.
            token_ids: n whole numbers from 0 to 2**31 - 1, or None.

        Raises:
            ShapeMismatchError: wrong shapes, or layers that were pushed to on their own and are not level.
            DtypeError: something else than f32, f16 or bf16, or not on the CPU.
            NonFiniteError: a NaN or an infinity; names layer, position and head.
            CapacityExceededError: more than fits.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
            OSError: the disk is full or failing.
        """
        self._append(per_layer(keys), per_layer(values), token_ids)

    def _append(self, keys: Sequence[Any], values: Sequence[Any], token_ids: Any) -> None:
        for name, arrays in (("keys", keys), ("values", values)):
            if len(arrays) != self.num_layers:
                raise ShapeMismatchError(
                    f"{name} hold {len(arrays)} layers, and the cache has {self.num_layers}",
                    expected=self.num_layers,
                    actual=len(arrays),
                )
        pairs = [
            (number, layer, layer.check_input(key, value))
            for number, (layer, key, value) in enumerate(zip(self._layers, keys, values, strict=True))
            if layer.geometry.has_rows or key is not None or value is not None
        ]
        first, _, pair = pairs[0]
        count = len(pair.keys)
        for number, _, pair in pairs:
            if len(pair.keys) != count:
                raise ShapeMismatchError(
                    f"layer {number} has {len(pair.keys)} positions and layer {first} has {count}: give as many to "
                    "each",
                    expected=count,
                    actual=len(pair.keys),
                    layer=number,
                )
        ids = None if token_ids is None else check_token_ids(token_ids, count)
        storage = self._storage
        with storage.lock:
            start = self._check_level(count)
            for _, layer, pair in pairs:
                layer.write_rows(start, pair)
            try:
                for _, layer, pair in pairs:
                    layer.keep_rows(start, pair)  # once nothing is refused any more
                if ids is not None:
                    self._record_tokens(start, ids)
            except BaseException:
                for store in storage.row_layers:
                    store.forget_recent(start)
                raise
            storage.publish_step(start + count)
            storage.appended()

    def _check_level(self, count: int) -> int:
        """Return the position that the next step gets in every layer."""
        starts = [store.begin(count) for store in self._storage.row_layers]
        if starts.count(starts[0]) < len(starts):
            raise ShapeMismatchError(
                f"layers are not level: they hold {min(starts)} to {max(starts)} positions; push to the others, or "
                f"truncate({min(starts)})",
                expected=max(starts),
                actual=min(starts),
                layer=self._storage.row_layers[starts.index(min(starts))].index,
            )
        return starts[0]

    def push_token_ids(self, token_ids: Any, start: int | None = None) -> None:
        """Record token ids of positions that have none: for callers that append to layers one by one.

        Args:
            token_ids: n whole numbers from 0 to 2**31 - 1. They may run ahead of the layers, and count for positions
                once these are complete.
            start: the first one's position, `token_len` by default. Skipped positions keep -1 permanently.

        Raises:
            DtypeError, ShapeMismatchError: not such numbers.
            PositionOutOfRangeError: `start` has an id already.
            CapacityExceededError: more than fit.
        """
        ids = check_token_ids(token_ids, None)
        with self._storage.lock:
            self._storage.layers[0].begin(0)
            recorded = self._storage.token_len
            start = recorded if start is None else index(start, "start")
            if start < recorded:
                raise PositionOutOfRangeError(
                    f"position {start} has its token id already: those of {recorded} positions are recorded",
                    position=start,
                    actual=recorded,
                )
            check_room(start, len(ids), self.capacity)
            self._record_tokens(start, ids)

    def _record_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        storage = self._storage
        first = min(storage.token_len, start)
        if storage.token_len < start:
            ids = np.concatenate([np.full(start - first, NO_TOKEN, np.int32), ids])
        storage.write_tokens(first, ids)
        storage.publish_tokens(first + len(ids))

    # Life

    def flush(self) -> None:
        """Make all positions that are complete in every layer survive power loss. No effect in memory.

        States that were written for the last position become a checkpoint, as in `checkpoint`; in memory, too.

        Raises:
            OSError: the disk is full or failing. After a failed sync the handle is poisoned: close and reopen.
            CorruptCacheError: the incomplete last block does not match its checksum.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
        """
        self._storage.commit()

    def truncate(self, length: int) -> int:
        """Keep the first `length` positions; removal of committed positions is durable on return.

        A cache with states goes to its last checkpoint that is not beyond `length`, unless nothing is to be removed.

        Returns:
            The positions kept: `length`, or with states `restorable(length)`.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            OSError, ReadOnlyError, ClosedError, CacheLockedError, PoisonedError, CorruptCacheError: as in `flush`.
        """
        self._storage.layers[0].begin(0)
        with self._storage.lock:
            most = max(store.length for store in self._storage.row_layers)
            _, length = check_range(0, length, most)
            if self.states and length < most:
                length = self._storage.checkpoints.last(length)
            self._storage.truncate(length)
        return length

    def close(self) -> None:
        """Commit what is complete, if this handle writes, and release everything. Closing twice is allowed.

        Views that were returned stay valid as long as they live.

        Raises:
            OSError: the commit failed; the cache is closed all the same, as of its last commit.
        """
        self._storage.close()
