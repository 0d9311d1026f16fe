"""The bytes of tensors in the process's memory: whether they are still what they were, by samples and by rotation.

torch leaves no trace of an edit through `.data`. To notice one, a few words of each tensor are compared at every look,
and chunks of all their bytes with digests, some at a look and others at the next. Knows no models.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

_SAMPLES = 8  # words of 8 bytes that are compared in each tensor at every look

LEAST = 2**18
"""Bytes compared with digests at every look, at least: all of a small model."""

SHARE = 1024
"""The part of larger models' bytes that is compared at every look is one in so many."""

THOROUGH = 2**22
"""Bytes compared at a thorough look, for something less than a millisecond."""

_CHUNK = 2**18

# The process's memory. Only bytes of tensors are read which have just told that they lie there.
# It begins behind the first page, as numpy takes address 0 for no memory.
_FIRST = 4096
_all: Any = (ctypes.c_uint64 * ((1 << 44) - _FIRST)).from_address(_FIRST)
_words: NDArray[np.uint64] = np.frombuffer(_all, np.uint64)
_bytes: NDArray[np.uint8] = _words.view(np.uint8)


class TensorBytes:
    """What lies in some tensors' memory, as it was when this was made.

    Only contiguous tensors on the CPU are looked at. The caller must know that they are still where they were.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        places = [(tensor.data_ptr() - _FIRST, tensor.nbytes) for tensor in tensors if _readable(tensor)]
        samples = [place // 8 + _spread(size // 8) for place, size in places if place % 8 == 0 and size >= 8]
        self._places = np.concatenate(samples) if samples else np.empty(0, np.intp)
        self._sample = self._read()
        self._chunks = list(_chunks(places))
        self._digests: list[int | None] = [None] * len(self._chunks)  # None: not read yet
        self._next = 0
        self._share = max(LEAST, sum(size for _, size in places) // SHARE)

    def unchanged(self, thorough: bool = False) -> bool:
        """Compare the samples, and the next chunks; with `thorough`, more of them."""
        return self._read() == self._sample and self._rotate(max(THOROUGH, self._share) if thorough else self._share)

    def read_all(self) -> None:
        """Take the digests of all chunks that have not been read yet."""
        for number, (start, stop) in enumerate(self._chunks):
            if self._digests[number] is None:
                self._digests[number] = xxhash.xxh3_64_intdigest(_bytes[start:stop].data)

    def _read(self) -> bytes:
        return bytes(_words[self._places].tobytes())

    def _rotate(self, size: int) -> bool:
        """Compare the next chunks, each once at most."""
        for _ in range(len(self._chunks)):
            number = self._next
            self._next = (number + 1) % len(self._chunks)
            start, stop = self._chunks[number]
            digest = xxhash.xxh3_64_intdigest(_bytes[start:stop].data)
            if self._digests[number] is None:
                self._digests[number] = digest
            elif self._digests[number] != digest:
                return False
            size -= stop - start
            if size <= 0:
                break
        return True


def _readable(tensor: torch.Tensor) -> bool:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.is_sparse:
        return False
    return tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0


def _spread(words: int) -> NDArray[np.intp]:
    """Return a few indices below a number, from the first to the last."""
    return np.unique(np.linspace(0, words - 1, _SAMPLES).astype(np.intp))


def _chunks(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Return chunks of memory as [start, stop); tensors that share memory count once."""
    for place, size in sorted(set(places)):
        for start in range(place, place + size, _CHUNK):
            yield start, min(start + _CHUNK, place + size)
