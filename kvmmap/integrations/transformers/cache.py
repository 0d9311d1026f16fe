"""KvmmapCache: a saved cache as the cache that transformers' models and `generate` take.

What lives here: opening and making caches for a model, their length, cropping, saving. What a layer does with keys and
values is `layer`'s; whose cache it is, `identity`'s; which functions attend, `attention`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import ModelMismatchError, UnsupportedModelError
from ...files import fork
from ...geometry import check_range
from ...metadata import ModelInfo
from ...opening import create, open_cache, place_of, remove
from ...storage.protocols import Durability
from .attention import MaskLength
from .layer import KvmmapLayer, Pattern
from .models import LayerKind
from .opening import NOTES, check_stored, own_notes, placeholders, record_known, room_beside, settings, spread
from .passes import watch
from .sequence import OneSequence
from .tensors import dtype_name
from .versions import CACHE_ARGUMENT


class KvmmapCache(OneSequence):
    """Keys and values of one sequence as int8, to be passed to a model or its `generate` as `cache`.

    transformers before 5.24 calls the argument `past_key_values`. `model.generate(input_ids, **cache.argument)` works
    with every release.

    `create` makes a new file, `open` goes on from one; the constructor makes a cache in memory. Everything that is
    attended over is what is stored, int8 rows, also within the prompt that is being prefilled, so that closing and
    reopening between two forward passes changes nothing.

    With `model.set_attn_implementation("kvmmap")` attention runs over the rows where they lie; with any other, `update`
    dequantises all of them for every layer and step.

    Args:
        model: the model that will use it, or its config. With the model, its weights' fingerprint is recorded, and the
            token ids of every forward pass of it; with the config alone, neither (see `record_token_ids`).
        capacity: positions to reserve; by default as many as the model is made for.
        metadata: plain JSON of your own.
        fingerprint: a digest of the weights, if you have one; else it is computed of all of them.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values.
        KvmmapError: not a model or config.
    """

    def __init__(
        self,
        model: Any,
        capacity: int | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        kinds, shapes = settings(model, capacity, metadata, fingerprint)
        self._attach(None, QuantizedKvCache(**shapes), kinds, model)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        capacity: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        durability: Durability = "publish",
        overwrite: bool = False,
        timeout: float = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a new file, or Zarr group, open for appending.

        Args:
            path: where; what ends with ".zarr" is a group in a directory, a URL one in an object store.
            model, capacity, metadata, fingerprint: as in the constructor.
            durability, overwrite, timeout, storage_options: as in `kvmmap.create`.

        Raises:
            UnsupportedModelError, KvmmapError: as in the constructor.
            CacheExistsError, CacheNotFoundError, CacheLockedError, OSError: as in `kvmmap.create`.
        """
        kinds, shapes = settings(model, capacity, metadata, fingerprint)
        stored = create(
            path,
            **shapes,
            durability=durability,
            overwrite=overwrite,
            timeout=timeout,
            storage_options=storage_options,
        )
        return cls._of(None, stored, kinds, model)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        model: Any = None,
        mode: Literal["r", "a"] = "r",
        *,
        room: int | None = None,
        fingerprint: str | None = None,
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
            fingerprint: as in the constructor.
            durability, timeout: with "a", as in `kvmmap.open`.
            storage_options: as in `kvmmap.open`.

        Raises:
            ModelMismatchError: another model, config or weights made it; says what differs.
            CacheNotFoundError, FormatError, CacheLockedError, OSError: as in `kvmmap.open`.
        """
        stored = open_cache(path, mode, durability=durability, timeout=timeout, storage_options=storage_options)
        try:
            kinds = check_stored(stored, model, fingerprint)
            if mode == "a":
                return cls._of(None, stored, kinds, model)
            room = room_beside(stored) if room is None else room
            own = QuantizedKvCache(**spread(stored.geometry.layers, room), model=stored.model)
            return cls._of(stored, own, kinds, model)
        except BaseException:
            stored.close()
            raise

    @classmethod
    def _of(cls, saved: QuantizedKvCache | None, own: QuantizedKvCache, kinds: Sequence[LayerKind], model: Any) -> Self:
        cache = cls.__new__(cls)
        cache._attach(saved, own, kinds, model)
        return cache

    def _attach(
        self, saved: QuantizedKvCache | None, own: QuantizedKvCache, kinds: Sequence[LayerKind], model: Any
    ) -> None:
        kept = saved.seq_len if saved is not None else 0
        patterns = {(kind.window, kind.latent): Pattern(kind.window, kind.latent) for kind in kinds}
        self._layers = [
            KvmmapLayer(
                kind,
                patterns[kind.window, kind.latent],
                saved.layers[number] if saved is not None else None,
                own.layers[number],
                kept,
            )
            for number, kind in enumerate(kinds)
        ]
        super().__init__(layers=list(self._layers))
        self._saved = saved
        self._own = own
        self._source = own if saved is None else saved
        self._kept = kept
        self._length = kept + own.seq_len  # complete in every layer; during a pass, as it was before
        self._patterns = list(patterns.values())
        self._config_checked = model is not None
        self._dtype_checked = False
        self.placeholders = placeholders(getattr(model, "config", model))
        self._fed: tuple[int, NDArray[np.int32]] | None = None
        if isinstance(model, torch.nn.Module):
            watch(model)

    # What it holds

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._kept + self._own.capacity

    @property
    def path(self) -> str | None:
        """The file's absolute path; None in memory."""
        return self._source.path

    @property
    def writable(self) -> bool:
        """True if what is appended goes to where the cache came from: a file, or memory."""
        return self._saved is None

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of your own notes; assign to replace them (saved with the next commit; not with mode="r")."""
        notes = self._source.metadata
        notes.pop(NOTES, None)
        return notes

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any]) -> None:
        notes = self._source.metadata.get(NOTES)
        self._source.metadata = own_notes(metadata) | ({} if notes is None else {NOTES: notes})

    @property
    def argument(self) -> dict[str, Self]:
        """The cache as a keyword argument of `generate` or a model, by the name that the installed transformers has."""
        return {CACHE_ARGUMENT: self}

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len], a copy; -1 where they are not known."""
        own = self._own.token_ids[: self._length - self._kept]
        return own if self._saved is None else np.concatenate([self._saved.token_ids[: self._kept], own])

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(self.path)
        return f"<KvmmapCache {where}: {len(self)} layers, {self._length}/{self.capacity} positions>"

    # Forward passes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append a layer's new keys and values; see `KvmmapLayer.update`.

        Raises:
            UnsupportedModelError: a batch of several sequences.
            ModelMismatchError: keys of another dtype than those that are stored.
            ShapeMismatchError, DtypeError, NonFiniteError, CapacityExceededError, OSError: nothing was appended.
        """
        layer = self._layers[layer_idx]
        if len(layer) != self._length:
            self._take_back(self._complete())  # an earlier pass stopped half way
        if not self._dtype_checked:
            self._check_dtype(key_states.dtype)
        if len(self._patterns) > 1 and len({pattern.in_place for pattern in self._patterns}) > 1:
            raise UnsupportedModelError(
                "this model attends with one mask in layers whose windows differ by its config, so it can't attend in "
                'place: model.set_attn_implementation("sdpa")'
            )
        result = layer.update(key_states, value_states, *args, **kwargs)
        if all(
            len(other) == len(layer) for other in reversed(self._layers)
        ):  # in models with loops the last is not last
            self._length = len(layer)
            self._end_patterns()
        return result

    def _complete(self) -> int:
        """Positions complete in every layer, as the layers have it."""
        return self._kept + self._own.seq_len

    def _end_patterns(self) -> None:
        for pattern in self._patterns:
            pattern.in_place = False

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Positions that a mask is for: all that are stored, and the new ones."""
        layer = self._layers[layer_idx]
        layer.pattern.in_place = False
        return MaskLength.of(self._length + query_length, self, layer), 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions complete in every layer: during a pass, as it was before."""
        return self._length

    def begin_pass(self, token_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
        """Note what a forward pass is about to feed; called before each one of a model that the cache was opened with.

        Raises:
            UnsupportedModelError: the tokens are not those that come next (padding, packed sequences, or a prompt that
                is fed again from its start).
        """
        if position_ids is not None and position_ids.ndim == 2 and position_ids.shape[0] == 1:
            first, last = int(position_ids[0, 0]), int(position_ids[0, -1])
            if first != self._length or last - first != position_ids.shape[1] - 1:
                raise UnsupportedModelError(
                    f"tokens are fed for positions {first} to {last}, and the cache goes on at {self._length}; it "
                    "takes no padding, no packed sequences, and not again what it has: give all token ids to "
                    "reuse(cache, input_ids), and then to generate",
                    expected=self._length,
                    actual=first,
                )
        if token_ids is not None and token_ids.ndim == 2 and token_ids.shape[0] == 1:
            self._fed = self._length, token_ids[0].to("cpu", torch.int32).numpy()

    def end_pass(self) -> None:
        """Record the token ids of a pass that reached all layers; take back one that did not."""
        fed, self._fed = self._fed, None
        self._end_patterns()
        if any(len(layer) != self._length for layer in self._layers):
            self._take_back(self._complete())
        elif fed is not None and self._length - fed[0] == len(fed[1]):
            self._own.push_token_ids(fed[1], fed[0] - self._kept)

    def record_token_ids(self, token_ids: Any) -> None:
        """Record token ids, where the cache was opened with a config and so does not see them.

        Args:
            token_ids: those of the whole sequence from its start, [n] or [1, n]; what is recorded already is not
                looked at, and what is beyond `seq_len` not recorded.
        """
        ids = np.asarray(token_ids).reshape(-1)[self._kept : self._length]
        known = self._own.token_len
        if len(ids) > known:
            self._own.push_token_ids(ids[known:])

    def check_config(self, config: Any) -> None:
        """Refuse to go on if another config made the cache; called in every forward pass that attends in place."""
        if not self._config_checked:
            if config is not None:
                check_stored(self._source, config, None)
            self._config_checked = True

    def _check_dtype(self, dtype: torch.dtype) -> None:
        name, info = dtype_name(dtype), self._own.model or ModelInfo()
        if info.source_dtype is None:
            self._own.model = replace(info, source_dtype=name)
        elif info.source_dtype != name:
            raise ModelMismatchError(
                f"{self.path or 'the cache'} was made in {info.source_dtype}, and this model runs in {name}: load it "
                f"with dtype={info.source_dtype!r}",
                expected={"source_dtype": info.source_dtype},
                actual={"source_dtype": name},
                path=self.path,
            )
        self._dtype_checked = True

    # Taking back

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions. With mode="r" this is only noted, and the file stays as it is.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            OSError, ReadOnlyError, ClosedError, CorruptCacheError: as in `kvmmap.QuantizedKvCache.truncate`.
        """
        _, length = check_range(0, length, self._length)
        self._take_back(length)
        self._end_patterns()

    def _take_back(self, length: int) -> None:
        self._own.truncate(max(length - self._kept, 0))
        self._kept = min(self._kept, length)
        for layer in self._layers:
            layer.kept = self._kept
        self._length = length

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (assisted generation does): minus how many, as transformers counts."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove:
            self.truncate(max(self._length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Take back everything: `truncate(0)`."""
        self.truncate(0)

    # Life

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
        source = self._source
        capacity = self.capacity if capacity is None else capacity
        if source.path is not None and os.path.isfile(source.path) and place_of(path).file_path is not None:
            length = self._length if self._saved is None else self._kept
            made = fork(source.path, path, length=length, capacity=capacity)
        else:
            shapes = spread(source.geometry.layers, capacity)
            made = create(path, **shapes, metadata=source.metadata, model=source.model)
        try:
            with made:
                done = made.seq_len
                for layer, copy in zip(self._layers, made.layers, strict=True):
                    for part, start, stop in layer.parts(done, self._length):
                        # Views: they raise if the file does not hold any more what it did when it was opened.
                        copy.extend_quantized(*part.read_quantized(start, stop))
                record_known(made, self.token_ids)
        except BaseException:
            remove(path)
            raise

    def flush(self) -> None:
        """Make what was appended survive power loss. Nothing to do in memory, or with mode="r"."""
        self._own.flush()

    def close(self) -> None:
        """Commit what is complete if this appends to a file, and let go of everything."""
        for cache in (self._own, self._saved):
            if cache is not None:
                cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
