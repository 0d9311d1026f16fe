"""KvmmapCache: a saved cache as the cache that transformers' models and `generate` take.

What lives here: opening and making caches for a model, saving and copying them. What a model does with one is
`stored`'s; whose cache it is, `identity`'s; which functions attend, `attention`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from ...cache import QuantizedKvCache
from ...closing import Closing
from ...codecs.presets import Codecs
from ...errors import KvmmapError
from ...files import fork
from ...opening import create, open_cache, place_of, remove
from ...ranges import check_range
from ...storage.protocols import Durability
from . import rope
from .copies import in_memory, rebuilt
from .kinds import LayerKind
from .opening import Storing, check_stored, note_regimes, record_known, room_beside, settings, spread_like
from .own_caches import plain_class
from .resident import Resident, check_resident
from .stored import StoredSequence


class KvmmapCache(StoredSequence, Closing):
    """Keys and values of one sequence, quantised, to be passed to a model or its `generate` as `cache`.

    transformers before 5.24 calls the argument `past_key_values`. `model.generate(input_ids, **cache.argument)` works
    with every release.

    `create` makes a new file, `open` continues one; the constructor makes a cache in memory. Everything that is
    attended over is what is stored, also within the prompt that is being prefilled, so that closing and reopening
    between two forward passes changes nothing.

    With `model.set_attn_implementation("kvmmap")` attention runs over the rows where they lie; with any other, `update`
    dequantises all of them for every layer and step.

    Args:
        model: the model that will use it, or its config. With the model, its weights' fingerprint is recorded, and the
            token ids of every forward pass of it; with the config alone, neither (see `record_token_ids`).
        capacity: positions to reserve; by default as many as the model is made for.
        preset: how rows are stored, as in `kvmmap.create`; "fidelity" by default: rotated int8, and the last and first
            positions in 16 bits besides. Rows that can't be rotated, and latents, are plain int8.
        key_codec, value_codec: names of codecs; one for all layers, or one a layer; the preset's unless given.
        recent_window, sinks: last and first positions to keep in 16 bits besides; the preset's unless given.
        checkpoint_slots: checkpoints to keep of a model with states, 4 by default; see `checkpoint_bytes` for what each
            takes. Other models have none.
        metadata: plain JSON of your own.
        fingerprint: a digest of the weights, if you have one; else it is computed of all of them.
        resident: "device" keeps keys and values as tensors on the device that the model runs on, in its dtype, as
            transformers' own cache does, for attention implementations of the model's own. What is stored is decoded
            there in the first pass; new rows are written behind the model, and `flush`, `save`, `fork` and `close`
            wait for them. A pass attends over the new rows as they were computed.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values, or what can't be resident.
        KvmmapError: not a model or config.
    """

    def __init__(
        self,
        model: Any,
        capacity: int | None = None,
        *,
        preset: str | None = None,
        key_codec: Codecs | None = None,
        value_codec: Codecs | None = None,
        recent_window: int | None = None,
        sinks: int | None = None,
        checkpoint_slots: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        resident: Resident = "host",
    ) -> None:
        check_resident(resident)
        storing = Storing(
            preset=preset,
            key_codec=key_codec,
            value_codec=value_codec,
            recent_window=recent_window,
            sinks=sinks,
            checkpoint_slots=checkpoint_slots,
        )
        kinds, shapes = settings(model, capacity, metadata, fingerprint, storing)
        check_resident(resident, kinds)
        self._attach(None, QuantizedKvCache(**shapes), kinds, model, resident, digested=fingerprint is None)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        capacity: int | None = None,
        preset: str | None = None,
        key_codec: Codecs | None = None,
        value_codec: Codecs | None = None,
        recent_window: int | None = None,
        sinks: int | None = None,
        checkpoint_slots: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        resident: Resident = "host",
        durability: Durability = "publish",
        overwrite: bool = False,
        timeout: float = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a new file, or Zarr group, open for appending.

        Args:
            path: where; what ends with ".zarr" is a group in a directory, a URL one in an object store.
            model, capacity, preset, key_codec, value_codec, recent_window, sinks, checkpoint_slots: as in the
                constructor.
            metadata, fingerprint, resident: likewise.
            durability, overwrite, timeout, storage_options: as in `kvmmap.create`.

        Raises:
            UnsupportedModelError, KvmmapError: as in the constructor.
            CacheExistsError, CacheNotFoundError, CacheLockedError, OSError: as in `kvmmap.create`.
        """
        check_resident(resident)
        storing = Storing(
            preset=preset,
            key_codec=key_codec,
            value_codec=value_codec,
            recent_window=recent_window,
            sinks=sinks,
            checkpoint_slots=checkpoint_slots,
        )
        kinds, shapes = settings(model, capacity, metadata, fingerprint, storing)
        check_resident(resident, kinds)
        stored = create(
            path,
            **shapes,
            durability=durability,
            overwrite=overwrite,
            timeout=timeout,
            storage_options=storage_options,
        )
        return cls._of(None, stored, kinds, model, resident, digested=fingerprint is None)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Any = None,
        mode: Literal["r", "a"] = "r",
        *,
        room: int | None = None,
        fingerprint: str | None = None,
        resident: Resident = "host",
        durability: Durability = "publish",
        timeout: float = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open a saved cache, in constant time.

        Args:
            path: the file, Zarr group, or URL.
            model: the model that will use it, or its config. With the model, its weights are checked; with the config,
                only that; without either the config is checked in the first forward pass with attention "kvmmap", and
                token ids are not recorded.
            mode: "a" appends to the file. "r" reads it, beside any number of others, and keeps in memory what comes
                after: the file does not change, whatever is generated, cropped or reused.
            room: with "r", positions to reserve in memory; by default what the model is made for, 32,768 at most.
            fingerprint, resident: as in the constructor.
            durability, timeout: with "a", as in `kvmmap.open`.
            storage_options: as in `kvmmap.open`.

        Raises:
            ModelMismatchError: another model, config or weights made it; says what differs.
            CacheNotFoundError, FormatError, CacheLockedError, OSError: as in `kvmmap.open`.
        """
        check_resident(resident)
        stored = open_cache(path, mode, durability=durability, timeout=timeout, storage_options=storage_options)
        try:
            kinds = check_stored(stored, model, fingerprint)
            check_resident(resident, kinds)
            digested = fingerprint is None
            if mode == "a":
                return cls._of(None, stored, kinds, model, resident, digested=digested)
            room = room_beside(stored) if room is None else room
            own = QuantizedKvCache(**spread_like(stored, room, stored.seq_len), model=stored.model)
            return cls._of(stored, own, kinds, model, resident, digested=digested)
        except BaseException:
            stored.close()
            raise

    @classmethod
    def _of(
        cls,
        saved: QuantizedKvCache | None,
        own: QuantizedKvCache,
        kinds: Sequence[LayerKind],
        model: Any,
        resident: Resident = "host",
        *,
        digested: bool = False,
    ) -> Self:
        kind: type[Self] = plain_class(cls)
        cache = kind.__new__(kind)
        cache._attach(saved, own, kinds, model, resident, digested=digested)
        return cache

    # Life

    def fork(self, path: str | os.PathLike[str], length: int | None = None, *, capacity: int | None = None) -> Self:
        """Copy the first positions into a new file or Zarr group, and return that, open for appending.

        What this cache holds beyond them stays where it is: a way to continue with another prompt and lose nothing.

        Args:
            path: where; nothing may be there.
            length: how many positions; all by default.
            capacity: positions to reserve in it; as many as here by default.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            CacheExistsError, CacheNotFoundError, CapacityExceededError, CacheChangedError, OSError: as in `save`.
        """
        _, length = check_range(0, self._length if length is None else length, self._length)
        self._copy(path, self.restorable(length), capacity)
        resident: Resident = "host" if self._behind is None else "device"
        return self._of(None, open_cache(path, "a"), self._kinds, self._model(), resident)

    def save(self, path: str | os.PathLike[str], *, capacity: int | None = None) -> None:
        """Copy all positions into a new file or Zarr group, bit by bit; durable on return.

        What comes from a file is shared with it on the disk where the file system can, as by `kvmmap.fork`.

        Args:
            path: where; nothing may be there.
            capacity: positions to reserve in it; as many as here by default.

        Raises:
            CacheExistsError, CacheNotFoundError, CapacityExceededError, CacheChangedError, OSError: as in
                `kvmmap.fork`; nothing is left behind.
        """
        self._copy(path, self._length, capacity)

    def _copy(self, path: str | os.PathLike[str], length: int, capacity: int | None) -> None:
        self._settle()
        self.checkpoint()
        source = self._source
        capacity = self.capacity if capacity is None else capacity
        if source.path is not None and os.path.isfile(source.path) and place_of(path).file_path is not None:
            held = self._length if self._saved is None else self._kept
            for store in self._own.storage.layers:
                store.save_recent()  # what is in memory alone would not be in the copy
            made = fork(source.path, path, length=min(held, length), capacity=capacity)
        else:
            shapes = spread_like(source, capacity)
            made = create(path, **shapes, metadata=source.metadata, model=source.model)
        try:
            with made:
                done = made.seq_len
                for rows, number in zip(self._rows, made.geometry.row_layers, strict=True):
                    for part, start, stop in rows.parts(done, length):
                        # Views: they raise if the file does not hold any more what it did when it was opened.
                        made.layers[number].extend_from(part, start, stop)
                self._copy_checkpoints(made, length)
                record_known(made, self.token_ids[:length])
                if self._rope is not None:
                    note_regimes(made, rope.cut(self._regimes, length))
                self._copy_notes(made, length)
        except BaseException:
            remove(path)
            raise

    def _copy_checkpoints(self, made: QuantizedKvCache, length: int) -> None:
        """Copy the checkpoints up to a length that the copy lacks."""
        target = made.storage.checkpoints
        present = {one.position for one in target.all()}
        for one in self.checkpoints:
            if one.position <= length and one.position not in present:
                held, shift = (self._own, self._kept) if one.position > self._kept else (self._source, 0)
                target.write(one.position, list(held.read_states(one.position - shift).values()))
                target.name_staged(pin=one.pinned)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy or pickle a cache in memory.

        Raises:
            KvmmapError: it is that of a file.
        """
        if self.path is not None:
            raise KvmmapError(
                f"{self!r} is that of a file, and can't be copied or pickled: cache.save(path) copies it into another "
                'file, and KvmmapCache.open(path, model, mode="r") opens it in as many processes as you like'
            )
        self._settle()
        self.checkpoint()
        return rebuilt, (plain_class(type(self)), in_memory(self._own), self._kinds, self._told[: self._length])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        build, arguments = self.__reduce_ex__(4)
        made: Self = build(*arguments, self._model())
        memo[id(self)] = made
        return made

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def flush(self) -> None:
        """Make what was appended survive power loss. Nothing to do in memory, or with mode="r"."""
        self._settle()
        self.checkpoint()
        self._own.flush()

    def close(self) -> None:
        """Commit what is complete if this appends to a file, and release everything."""
        try:
            if self._behind is not None:
                self._behind.stop()
            if self._saved is None and self.path is not None and not self._own.closed:
                self.checkpoint()
        finally:
            for cache in (self._own, self._saved):
                if cache is not None:
                    cache.close()
