"""A decoding step of one layer of a file: a position appended, and its queries attended, by one compiled call each.

In a model, code and data of a step are out of the caches when it comes: a model's weights have gone through them since
the last layer's. So what counts there is how much is touched, and `push` and `attend`, which take anything and check
everything, touch several times as much as the arithmetic does.
"""

from __future__ import annotations

from typing import Any

from ._core import Step
from .storage.protocols import LayerStore, Storage
from .threads import threads_of


class DecodeStep:
    """One layer's decoding steps, on tensors as a model has them. Made by `QuantizedKvLayer.decode_step`.

    Each method returns False or None, and has done nothing, where it can't do what `QuantizedKvLayer.push` and `attend`
    do: of tensors elsewhere, of other shapes or dtypes, or with numbers that these refuse.
    """

    __slots__ = ("_step", "_storage", "_store", "_threads")

    def __init__(self, storage: Storage, store: LayerStore, step: Step) -> None:
        self._storage = storage
        self._store = store
        self._step = step
        self._threads: int | None = None

    @property
    def length(self) -> int:
        """Positions stored."""
        return self._store.length

    def prepare(self, like: Any, threads: int | None = None) -> None:
        """Make the tensor that `attend` returns next, if it has returned one before.

        Called for all layers before a pass, that takes a fraction of the time that it takes in each.

        Args:
            like: a tensor of the device, dtype and mode (inference mode) that the queries will have.
            threads: the most that `attend` takes from now on; by `threads_of` by default.
        """
        self._threads = threads
        self._step.prepare(like)

    def push(self, keys: Any, values: Any) -> bool:
        """Append one position.

        Args:
            keys: [1, num_kv_heads, 1, head_dim].
            values: [1, num_kv_heads, 1, value_head_dim].

        Raises:
            CapacityExceededError, ReadOnlyError, ClosedError, OSError: as `QuantizedKvLayer.push`.
        """
        store = self._store
        with self._storage.lock:
            position = store.begin(1)
            if not store.write_step(self._step, position, keys, values):
                return False
            store.publish(position + 1)
            self._storage.appended()
        return True

    def attend(self, query: Any, scale: float, softcap: float | None, window: int | None) -> Any:
        """Attend with the last position's queries, as `QuantizedKvLayer.attend` does.

        Args:
            query: [1, num_q_heads, 1, head_dim].
            scale, softcap, window: those of `QuantizedKvLayer.attend`.

        Returns:
            A new tensor [1, 1, num_q_heads, value_head_dim] of the queries' dtype.

        Raises:
            CacheChangedError, ClosedError: as `QuantizedKvLayer.attend`.
        """
        store = self._store
        version = store.version()  # before the length: see `LayerStore`
        length = store.length
        if not length or not store.is_verified(length):
            return None
        threads = self._threads
        if threads is None:
            threads = threads_of(None)
        out = self._step.attend(query, store.slabs(), length, scale, softcap or 0.0, window or 0, threads)
        store.validate(version)  # the rows were still the cache's when they had been read
        return out
