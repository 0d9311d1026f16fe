"""The half of the connector that runs where vLLM's KV cache is: rows out of it into the library, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import ml_dtypes  # noqa: F401  # which gives numpy bfloat16 by its name
import torch
from numpy.typing import NDArray

from ...errors import CacheNotFoundError, KvmmapError
from ...formats.portable import KEY, portable_notes
from ...library import Library
from .blocks import PagedLayer, learn
from .identity import EngineFacts
from .jobs import Job, Jobs

log = logging.getLogger("kvmmap.vllm")

CHUNK = 1024
"""Positions that are copied at a time."""

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
"""Integers as wide as a dtype: numpy knows no bfloat16."""

_here: WeakValueDictionary[str, Worker] = WeakValueDictionary()


def worker_here(engine: str) -> Worker | None:
    """Return the worker of an engine if it lives in this process."""
    return _here.get(engine)


class Worker:
    """Saves and loads rows.

    Args:
        engine: the engine's id.
        facts: whose keys and values they are.
        library: where they are kept.
        capacity: positions of the longest request.
        block_size: positions of a block, as vLLM's scheduler counts them.
    """

    def __init__(self, engine: str, facts: EngineFacts, library: Library, capacity: int, block_size: int) -> None:
        self._facts, self._library, self._capacity, self._block_size = facts, library, capacity, block_size
        self._layers: list[PagedLayer] = []
        self._saved: set[str] = set()
        self._failed: set[int] = set()
        _here[engine] = self

    def learn(self, layers: Mapping[str, Any], caches: Mapping[str, torch.Tensor], blocks: int) -> None:
        """Find out where rows lie in vLLM's KV cache.

        Args:
            layers: vLLM's attention layers by their names, in the model's order.
            caches: their KV caches.
            blocks: that the scheduler gives out.

        Raises:
            UnsupportedModelError: the layout is not understood.
        """
        self._layers = [
            learn(name, layer, caches[name], geometry.dims, blocks * self._block_size)
            for (name, layer), geometry in zip(layers.items(), self._facts.layers, strict=True)
        ]

    def load(self, jobs: Jobs) -> None:
        """Load what the step needs; blocks of a request for which that fails are computed by vLLM."""
        for job in jobs.loads:
            try:
                self._load(job)
            except (KvmmapError, OSError) as error:
                log.warning("request %s: its stored tokens can't be loaded: %s", job.request, error)
                first = job.start // self._block_size
                self._failed.update(job.blocks[first : -(-job.stop // self._block_size)])

    def _load(self, job: Job) -> None:
        match = self._library.match(job.namespace, job.token_ids)
        if match.length < job.stop:
            raise CacheNotFoundError(f"{match.length} of {job.stop} tokens are left in the library")
        with self._library.open(match) as cache:
            cache.storage.verify_rows(0, job.stop)
            room = _Room(self._layers[0].cache.dtype)
            for start in range(job.start, job.stop, CHUNK):
                stop = min(start + CHUNK, job.stop)
                slots = self._slots(job, start, stop)
                for layer, stored in zip(self._layers, cache.layers, strict=True):
                    keys, key_rows = room.take("keys", stop - start, stored.num_kv_heads, stored.head_dim)
                    values, value_rows = room.take("values", stop - start, stored.num_kv_heads, stored.value_head_dim)
                    # One thread, since those of vLLM keep spinning for a while after a step.
                    stored.read_keys(start, stop, dtype=key_rows.dtype, out=key_rows, threads=1)
                    stored.read_values(start, stop, dtype=value_rows.dtype, out=value_rows, threads=1)
                    layer.write(slots, keys, values)

    def save(self, job: Job) -> None:
        """Save what a request has computed, as far as the library does not have it. A failure is logged alone."""
        try:
            self._save(job)
        except (KvmmapError, OSError) as error:
            log.warning("request %s: its tokens are not saved: %s", job.request, error)

    def _save(self, job: Job) -> None:
        if self._library.match(job.namespace, job.token_ids).length >= job.stop:
            return
        notes = {KEY: portable_notes("vLLM", self._facts.portable_id, self._facts.weights)}
        capacity = max(job.stop, self._capacity)
        with self._library.session(job.namespace, job.token_ids, capacity=capacity, metadata=notes) as session:
            for start in range(session.reused, job.stop, CHUNK):
                stop = min(start + CHUNK, job.stop)
                slots = self._slots(job, start, stop)
                rows = [layer.read(slots) for layer in self._layers]
                session.extend([keys for keys, _ in rows], [values for _, values in rows], job.token_ids[start:stop])

    def save_all(self, jobs: Jobs) -> None:
        """Save the requests that have finished."""
        for job in jobs.saves:
            self.save(job)
            self._saved.add(job.request)

    def take_saved(self) -> set[str]:
        """Return the requests whose blocks may be given to others."""
        saved, self._saved = self._saved, set()
        return saved

    def take_failed(self) -> set[int]:
        """Return the blocks that could not be loaded."""
        failed, self._failed = self._failed, set()
        return failed

    def _slots(self, job: Job, start: int, stop: int) -> torch.Tensor:
        positions = torch.arange(start, stop)
        blocks = torch.tensor(job.blocks)[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        return slots.to(self._layers[0].cache.device)

    def close(self) -> None:
        """Close the library."""
        self._library.close()


class _Room:
    """Memory that rows are decoded into, used again for each layer: new memory costs more than the decoding."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._parts: dict[tuple[str, int, int], torch.Tensor] = {}

    def take(self, part: str, count: int, heads: int, dim: int) -> tuple[torch.Tensor, NDArray[Any]]:
        """Return a tensor [count, heads, dim], and the same memory as an array."""
        key = part, heads, dim
        if key not in self._parts:
            self._parts[key] = torch.empty((CHUNK, heads, dim), dtype=self._dtype)
        found = self._parts[key][:count]
        return found, found.view(BITS[self._dtype]).numpy().view(str(self._dtype).removeprefix("torch."))
