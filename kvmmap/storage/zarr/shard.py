"""One shard of a Zarr array as bytes: its chunks, one after the other, and the index behind them. Pure.

The `sharding_indexed` codec of Zarr v3 (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/),
as zarr-python writes it by default: the index is at the end, offset and size of every chunk as little-endian u64 and
then a crc32c. It is done here because chunks of rows are slabs already: a shard goes out as the rows themselves, and
comes in as one read into their place. zarr-python's own pipeline takes 5 to 10 times as long (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..libraries import crc32c, zstd

Bytes1D = NDArray[np.uint8]

ABSENT = 2**64 - 1


class ShardError(ValueError):
    """What was read is no shard of this shape, or lacks a chunk."""


class Run(NamedTuple):
    """Neighbouring chunks that lie as they do in memory, and so are read at once."""

    offset: int
    """Where they start in the shard."""
    size: int
    first: int
    """The first chunk of them."""


def index_size(chunks: int) -> int:
    """Bytes of the index of a shard of so many chunks."""
    return 16 * chunks + 4


def encode_shard(rows: Bytes1D, chunk_bytes: int, chunks: int, level: int | None) -> list[Any]:
    """Return the parts of a shard that holds `rows`; the last chunk is filled up with zeros.

    Args:
        rows: u8, the first `len(rows) / chunk_bytes` chunks, not more than `chunks`.
        level: zstd's, or None to store chunks as they are.
    """
    used = -(-len(rows) // chunk_bytes)
    whole = len(rows) // chunk_bytes * chunk_bytes
    parts: list[Any] = [rows[:whole]] if whole else []
    if whole < len(rows):
        last = np.zeros(chunk_bytes, np.uint8)
        last[: len(rows) - whole] = rows[whole:]
        parts.append(last)
    sizes = np.full(used, chunk_bytes, np.uint64)
    if level is not None:
        codec = zstd(level)
        each = [codec.encode(part[i : i + chunk_bytes]) for part in parts for i in range(0, len(part), chunk_bytes)]
        sizes = np.array([len(chunk) for chunk in each], np.uint64)
        parts = [b"".join(each)]
    index = np.full((chunks, 2), ABSENT, "<u8")
    index[:used, 1] = sizes
    index[:used, 0] = np.cumsum(sizes) - sizes
    data = index.tobytes()
    return [*parts, data + crc32c(data).to_bytes(4, "little")]


def decode_index(data: Any, chunks: int) -> NDArray[np.uint64]:
    """Return [chunks, 2], offsets and sizes, of a shard's last bytes."""
    data = memoryview(data).cast("B")
    size = index_size(chunks)
    if len(data) < size:
        raise ShardError("is too short to be a shard")
    body, check = data[-size:-4], data[-4:]
    if crc32c(bytes(body)) != int.from_bytes(check, "little"):
        raise ShardError("has a damaged index")
    return np.frombuffer(body, "<u8").reshape(chunks, 2)


def runs(index: NDArray[np.uint64], wanted: Sequence[int], chunk_bytes: int, *, packed: bool) -> list[Run]:
    """Return where the wanted chunks (rising) lie; those that are not `packed` have neighbours drawn together."""
    found: list[Run] = []
    for chunk in wanted:
        offset, size = (int(number) for number in index[chunk])
        if offset == ABSENT and size == ABSENT:
            raise ShardError(f"lacks chunk {chunk}")
        if packed and size > 2 * chunk_bytes + 1024:
            raise ShardError(f"has {size} bytes for chunk {chunk}, more than it unpacks to")
        if not packed:
            if size != chunk_bytes:
                raise ShardError(f"has {size} bytes for chunk {chunk} in place of {chunk_bytes}")
            last = found[-1] if found else None
            if last and last.offset + last.size == offset and last.first + last.size // chunk_bytes == chunk:
                found[-1] = last._replace(size=last.size + size)
                continue
        found.append(Run(offset, size, chunk))
    return found


def unpack(data: Any, target: memoryview) -> None:
    """Decompress one chunk into its place."""
    try:
        zstd(0).decode(data, out=np.frombuffer(target, np.uint8))
    except (RuntimeError, ValueError) as error:
        raise ShardError(f"has a chunk that does not decompress: {error}") from None
