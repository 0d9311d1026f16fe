"""The rows of one store: those kept of a saved cache that is only read (none, where there is no such cache), and after
them those that were appended.

Where these are files, and what holds for all stores, is the cache's business.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import UnsupportedModelError
from ...layer import QuantizedKvLayer
from ...ranges import check_room
from ...recent import RecentRows
from ...row_arrays import as_bits, target_dtype
from .team import model_threads
from .tensors import as_array, to_host


class StoredRows:
    """Keys and values by position: a store of rows."""

    def __init__(self, saved: QuantizedKvLayer | None, own: QuantizedKvLayer, kept: int) -> None:
        self.saved = saved
        """The layer of a file that is only read, if there is one."""
        self.own = own
        """What is appended to."""
        self.kept = kept
        """Positions that count of `saved`; `own` has those from there on."""
        self.chunk: RecentRows | None = None
        """What queries of the positions appended last see in 16 bits; None once they have attended."""
        self._chunk_start = 0  # the first of these positions

    def __len__(self) -> int:
        """Positions that the store has, also those of a pass that has not reached all layers yet."""
        return self.kept + len(self.own)

    def cut(self, length: int, kept: int) -> None:
        """Note that the first `length` positions are kept, the first `kept` of these in the saved cache."""
        self.kept = kept
        self.chunk = None

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Encode and append, all positions or none.

        Args:
            key_states: [1, num_kv_heads, n, head_dim]; f32, f16 or bf16.
            value_states: [1, num_kv_heads, n, value_head_dim].
        """
        self._check_batch(key_states)
        keys, values = to_host(key_states, value_states)
        if keys.shape[2] == 1:
            self.own.push(keys[0, :, 0], values[0, :, 0])
            self.chunk = None
        else:
            rows = keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1)
            self.chunk, self._chunk_start = self.own.chunk_rows(*rows), len(self)
            self.own.extend(*rows)

    def _check_batch(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != 1:
            raise UnsupportedModelError(
                f"a KvmmapCache holds one sequence, and this is a batch of {key_states.shape[0]}: use "
                "KvmmapBatch([cache, ...]) for several prompts, and KvmmapBatch.branches(cache, count) for beam search "
                "and num_return_sequences",
                expected=1,
                actual=key_states.shape[0],
            )

    def read(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantise all positions: two tensors [1, num_kv_heads, n, dim], views of [n, heads, dim]."""
        shape = self.own.geometry
        keys = torch.empty(len(self), shape.num_kv_heads, shape.head_dim, dtype=dtype)
        values = torch.empty(len(self), shape.num_kv_heads, shape.value_head_dim, dtype=dtype)
        key_rows, value_rows = as_array(keys), as_array(values)
        done, threads = 0, model_threads()
        newest = len(self) if self.chunk is None else self._chunk_start  # where the recent window of saved rows ends
        for part, first, stop in self.parts(0, len(self)):
            place = slice(done, done + stop - first)
            length = newest if part is self.saved else None
            part.read_keys(first, stop, dtype=key_rows.dtype, out=key_rows[place], threads=threads, length=length)
            part.read_values(first, stop, dtype=value_rows.dtype, out=value_rows[place], threads=threads, length=length)
            done = place.stop
        if self.chunk is not None:  # what some query of these sees in 16 bits, all do: tensors are the same for all
            held, number = len(self.own), target_dtype(key_rows.dtype)[1]
            self.chunk.overlay("keys", 0, held, held, as_bits(key_rows[self.kept :]), number)
            self.chunk.overlay("values", 0, held, held, as_bits(value_rows[self.kept :]), number)
            self.chunk = None
        return keys.to(device).transpose(0, 1)[None], values.to(device).transpose(0, 1)[None]

    def parts(self, start: int, stop: int) -> list[tuple[QuantizedKvLayer, int, int]]:
        """Return the layers that hold positions [start, stop), each with its own range of positions."""
        kept = self.kept
        found = [] if self.saved is None else [(self.saved, start, min(stop, kept))]
        found.append((self.own, max(start, kept) - kept, stop - kept))
        return [(part, first, last) for part, first, last in found if first < last]


class IndexRows(StoredRows):
    """Index keys by position, in 16 bits: rows of fewer bits select other positions."""

    def extended(self, keys: torch.Tensor) -> torch.Tensor:
        """Append index keys, and return all there are now.

        Args:
            keys: [1, n, index_head_dim], or [1, 1, n, index_head_dim].

        Returns:
            The same with all positions, as they are stored.
        """
        rows: Any = keys if keys.ndim == 4 else keys[:, None]
        middle = self.own.geometry.head_dim
        self.append(rows[..., :middle].contiguous(), rows[..., middle:].contiguous())
        return self.all(keys)

    def all(self, like: torch.Tensor) -> torch.Tensor:
        """Return all index keys with a tensor's dtype, device and number of axes."""
        found = torch.cat(self.read(like.dtype, like.device), -1)
        return found if like.ndim == 4 else found[:, 0]


class PositionRows(StoredRows):
    """Rows of zeros that count the positions of a model without keys and values: see `kinds.POSITIONS`."""

    def check(self, fed: torch.Tensor, length: int) -> None:
        """Refuse a pass that can't be counted, before it changes states.

        Args:
            fed: token ids or embeddings, [1, n, ...].
            length: positions stored.

        Raises:
            UnsupportedModelError: a batch of several sequences.
            CapacityExceededError: there is no room for it.
        """
        self._check_batch(fed)
        check_room(length - self.kept, fed.shape[1], self.own.capacity, layer=None)

    def count(self, positions: int) -> None:
        """Append so many positions, all or none.

        Raises:
            OSError: as `append`.
        """
        zeros = torch.zeros(1, 1, positions, 1)
        self.append(zeros, zeros)
