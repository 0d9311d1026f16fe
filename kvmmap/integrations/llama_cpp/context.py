"""Rows out of a context of llama.cpp, and into it."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import CapacityExceededError, KvmmapError
from ...formats.llama_cpp.exporting import state_bytes
from ...formats.llama_cpp.framing import read_frames
from ...formats.llama_cpp.importing import choose_sequence, fill
from ...formats.llama_cpp.memory import read_memory
from ...formats.llama_cpp.notes import StateForm
from ...formats.llama_cpp.source import open_source
from .identity import ContextFacts, context_facts

SEQUENCE, SPARE = 0, 1
"""The sequence that a `Llama` computes, and one that it leaves alone."""


@contextlib.contextmanager
def spare_sequence() -> Iterator[None]:
    """Make every `Llama` that is created in the block with a spare sequence.

    Through it kvmmap copies new positions alone, instead of the whole state. It costs no memory worth mentioning: both
    sequences share one buffer of keys and values. `Llama` has no argument for it.
    """
    api = llama_cpp.llama_cpp  # where `Llama` looks for it
    original = api.llama_context_default_params

    def parameters() -> Any:
        found = original()
        found.n_seq_max = max(found.n_seq_max, 2)
        found.kv_unified = True
        return found

    api.llama_context_default_params = parameters
    try:
        yield
    finally:
        api.llama_context_default_params = original


class Context:
    """A `Llama`'s context.

    Raises:
        UnsupportedModelError, KvmmapError: as `context_facts`.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self.llama = llama
        self.facts: ContextFacts = context_facts(llama)
        parameters = llama.context_params
        self._unified = bool(parameters.kv_unified)
        self.has_spare = self._unified and llama_cpp.llama_n_seq_max(llama.ctx) > SPARE
        disabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._room = np.empty(0, np.uint8)
        self._transposed = int(parameters.flash_attn_type) == int(disabled)
        self.scoring = False
        """Whether the completion under way needs the logits of all its positions."""
        self._restored = False
        """Whether some of the positions that the context holds were restored."""

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Ids of the positions that the context has computed, [n], a copy."""
        ids: NDArray[np.int32] = np.array(self.llama.input_ids[: self.llama.n_tokens], np.int32)
        return ids

    def store(self, cache: QuantizedKvCache, count: int) -> None:
        """Append positions [len(cache), count) of the context to a cache, without token ids.

        Raises:
            KvmmapError: llama.cpp refuses, or the context does not hold these positions.
        """
        start = cache.seq_len
        if start >= count:
            return
        if self.has_spare and start:
            memory = llama_cpp.llama_get_memory(self.llama.ctx)
            llama_cpp.llama_memory_seq_rm(memory, SPARE, -1, -1)
            llama_cpp.llama_memory_seq_cp(memory, SEQUENCE, SPARE, start, count)
            try:
                state = self._state(SPARE)
            finally:
                llama_cpp.llama_memory_seq_rm(memory, SPARE, -1, -1)
            self._append(cache, state, start, 0, count - start)
        else:
            self._append(cache, self._state(SEQUENCE), 0, start, count)

    def append_state(self, cache: QuantizedKvCache, state: bytes, count: int) -> None:
        """Append positions [len(cache), count) of a state that was taken before."""
        self._append(cache, np.frombuffer(state, np.uint8), 0, cache.seq_len, count)

    def _append(self, cache: QuantizedKvCache, state: NDArray[np.uint8], base: int, start: int, stop: int) -> None:
        with open_source(state) as source:
            memory = read_memory(source, read_frames(source), self.facts.model)
            found = choose_sequence(memory, None, source, base)
            if len(found.cells) < stop:
                raise KvmmapError(
                    f"the context holds positions {base} to {base + len(found.cells)}, and {base + stop} are expected"
                )
            found = replace(found, cells=found.cells[:stop])
            self._transposed = found.stream.transposed
            fill(cache, source, found, self.facts.forms, None, start)

    def _state(self, sequence: int) -> NDArray[np.uint8]:
        size = llama_cpp.llama_state_seq_get_size(self.llama.ctx, sequence)
        if len(self._room) < size:
            self._room = np.empty(size, np.uint8)  # kept: new memory costs more than the copy
        data = self._room[:size]
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if not size or llama_cpp.llama_state_seq_get_data(self.llama.ctx, pointer, size, sequence) != size:
            raise KvmmapError("llama.cpp could not copy the state of the sequence: see its log")
        return data

    def restore(self, cache: QuantizedKvCache, count: int) -> None:
        """Replace what the context holds by a cache's first positions.

        Raises:
            CapacityExceededError: they don't fit into the context.
            KvmmapError: llama.cpp refuses them; the context is then empty.
        """
        room = self.llama.n_ctx()
        if count > room:
            raise CapacityExceededError(
                f"the cache holds {count} positions, and the context has room for {room}: give a larger n_ctx",
                capacity=room,
                expected=room,
                actual=count,
            )
        for transposed in (self._transposed, not self._transposed):
            if transposed and self.facts.value_type.quantized:
                continue
            if self._restore(cache, count, transposed):
                self._transposed = transposed
                return
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)
        self.llama.n_tokens = 0
        raise KvmmapError("llama.cpp refused the keys and values that were to be restored: see its log")

    def _restore(self, cache: QuantizedKvCache, count: int, transposed: bool) -> bool:
        streams = 1 if self._unified else max(1, llama_cpp.llama_n_seq_max(self.llama.ctx))
        form = StateForm(
            kind="sequence",
            version=0,
            key_type=self.facts.key_type.name,
            value_type=self.facts.value_type.name,
            rotated=self.facts.rotated,
            transposed=transposed,
            streams=streams,
            extension=3 if self.facts.model.extension else 0,
        )
        data = state_bytes(cache, self.facts.model, form, count)
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
        return bool(llama_cpp.llama_state_seq_set_data(self.llama.ctx, buffer, len(data), SEQUENCE))

    def begin(self, *, scored: bool) -> None:
        """Prepare for a completion; see `LlamaKvmmapCache.begin`."""
        self.scoring = scored
        if scored and self._restored:
            self.llama.reset()
            self._restored = False

    def computed(self, ids: NDArray[np.int32]) -> None:
        """Tell the `Llama` which tokens its context holds now."""
        self.llama.input_ids[: len(ids)] = ids
        self.llama.n_tokens = len(ids)
        self._restored = True
        if hasattr(self.llama, "_requires_eval"):
            self.llama._requires_eval = True  # the last position's logits were not restored
