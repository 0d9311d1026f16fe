"""Rows of device-resident layers on their way into the cache, in order, in a thread behind the model.

The rows wait in the layers' own tensors, so what waits takes no memory of its own, and a failed write loses nothing: it
is tried again when the cache is flushed. Knows tensors and a `QuantizedKvCache`; no models.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from .tensors import to_host

MOST_BEHIND = 1024
"""Positions of earlier passes that may wait when a pass begins to write; then it waits for the writer."""

TOGETHER = 16
"""Positions that are waited for, so that rows are transferred and encoded together."""

PATIENCE = 0.5
"""Seconds that fewer positions wait for others. Writing 16 positions of 30 layers takes little longer than writing one,
and the thread that writes takes a processor from the model's: a token takes 20 to 60 ms, so one that did not wait for
others would be written alone."""

_AT_ONCE = 512  # positions that are copied to the host at a time


class ResidentRows(Protocol):
    """What rows are taken from."""

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [start, stop): views, [num_kv_heads, n, dim], on the layer's device."""
        ...


class WriteBehind:
    """The thread that writes what layers hold into a cache, from the position that the cache holds already.

    Args:
        cache: where to.
        layers: where from, one a layer that has rows.
        first: the position of the sequence that is the cache's first.
    """

    def __init__(self, cache: QuantizedKvCache, layers: Sequence[ResidentRows], first: int) -> None:
        self._cache = cache
        self._layers = layers
        self._first = first
        self._written = self._wanted = first + cache.seq_len
        self._ids: deque[tuple[int, NDArray[np.int32]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        self._ready: Any = None  # the event after which the rows up to `_wanted` are computed
        self._busy = False  # the thread writes
        self._idle = False  # the thread waits for anything to write, not for company
        self._urgent = False
        self._stopped = False
        self._error: BaseException | None = None

    @property
    def written(self) -> int:
        """Positions of the sequence that the cache has."""
        return self._written

    def check(self) -> None:
        """Raise what writing earlier positions has raised; `settle` tries these again."""
        if self._error is not None:
            raise self._error

    def advance(self, length: int) -> None:
        """Have the positions up to `length` written, which all layers hold; return before that is done."""
        with self._changed:
            if self._error is None and self._wanted - self._written > MOST_BEHIND:
                self._wait(lambda: self._wanted - self._written <= MOST_BEHIND)
            self._ready = _mark(self._layers)
            self._wanted = length
            if self._thread is None:
                self._stopped = False
                self._thread = threading.Thread(target=self._run, name="kvmmap-write-behind", daemon=True)
                self._thread.start()
            self._wake()

    def record(self, start: int, ids: NDArray[np.int32]) -> None:
        """Have the token ids of positions from `start` on recorded once their rows are written."""
        with self._changed:
            self._ids.append((start, ids))
            self._wake()

    def settle(self) -> None:
        """Wait until all is written.

        Raises:
            OSError, NonFiniteError, CapacityExceededError, ...: what writing raises; what is written stays, and the
                rest waits.
        """
        if self._thread is None or os.getpid() != self._process:  # a fork has no such thread
            return
        with self._changed:
            self._error = None
            self._wait(lambda: not self._waiting())
            self.check()

    def drop(self, length: int) -> None:
        """Forget what waits from position `length` on, and wait for the rest; the caller then truncates the cache.

        Raises:
            As `settle`.
        """
        if self._wanted <= length:
            return
        with self._changed:
            self._wait(lambda: not self._busy)
            self._wanted = max(min(self._wanted, length), self._written)
            self._ids = deque((start, ids[: max(length - start, 0)]) for start, ids in self._ids if start < length)
        self.settle()
        with self._changed:
            self._written = self._wanted = min(self._written, length)
            self._first = min(self._first, length)

    def stop(self) -> None:
        """Write what waits, and end the thread.

        Raises:
            As `settle`; the thread has ended nevertheless.
        """
        thread = self._thread
        if thread is None or os.getpid() != self._process:
            return
        own = thread is threading.current_thread()  # garbage is collected in any thread
        try:
            if not own:
                self.settle()
        finally:
            with self._changed:
                self._stopped, self._thread = True, None
                self._changed.notify_all()
            if not own:
                thread.join()

    def _wait(self, done: Callable[[], bool]) -> None:
        """Wait, with the lock, until something holds or writing has failed; meanwhile nothing waits for company."""
        while not done() and self._error is None and self._thread is not None:
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait()

    def _run(self) -> None:
        while self._take():
            error: BaseException | None = None
            try:
                self._write()
            except BaseException as failure:
                error = failure
            with self._changed:
                self._busy, self._error = False, error
                self._changed.notify_all()

    def _take(self) -> bool:
        """Wait for something to write; False when the thread shall end."""
        with self._changed:
            while self._error is not None or not self._waiting():
                if self._stopped:
                    return False
                self._urgent = False
                self._idle = True
                self._changed.wait()
            self._idle = False
            self._changed.wait_for(self._worthwhile, PATIENCE)
            self._busy = self._waiting()
            return True

    def _wake(self) -> None:
        """Have the thread look again, with the lock, if it would go on."""
        if self._idle or self._worthwhile():
            self._changed.notify_all()

    def _worthwhile(self) -> bool:
        return self._urgent or self._stopped or self._wanted - self._written >= TOGETHER

    def _write(self) -> None:
        with self._changed:
            start, stop, ready = self._written, self._wanted, self._ready
        if ready is not None:
            ready.synchronize()
        for first in range(start, stop, _AT_ONCE):
            last = min(first + _AT_ONCE, stop)
            self._cache.extend(*self._on_host(first, last))
            with self._changed:
                self._written = last
        self._record_ids()

    def _waiting(self) -> bool:
        return self._busy or self._wanted > self._written or bool(self._ids)

    def _record_ids(self) -> None:
        while True:
            with self._changed:
                if not self._ids:
                    return
                start, ids = self._ids[0]
                if start + len(ids) > self._written:
                    return
                self._ids.popleft()
            if len(ids):
                self._cache.push_token_ids(ids, start - self._first)

    def _on_host(self, start: int, stop: int) -> tuple[list[NDArray[Any] | None], list[NDArray[Any] | None]]:
        """Keys and values of all layers, [n, num_kv_heads, dim] each; None for layers without rows."""
        geometry = self._cache.geometry
        keys: list[NDArray[Any] | None] = [None] * len(geometry.layers)
        values = list(keys)
        for number, layer in zip(geometry.row_layers, self._layers, strict=True):
            keys[number], values[number] = to_host(*(tensor.transpose(0, 1) for tensor in layer.rows(start, stop)))
        return keys, values


def _mark(layers: Sequence[ResidentRows]) -> Any:
    """An event of the accelerator that comes after all that was asked of it so far; None on the CPU."""
    device = layers[-1].rows(0, 0)[0].device
    if device.type == "cpu":
        return None
    event = torch.Event(device)
    event.record()
    return event
