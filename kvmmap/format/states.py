"""States in a `.kvm` file as bytes: the state table, checkpoint headers, and the entries by which commits name them.

Pure: bytes in, dataclasses out.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import CorruptCacheError, DtypeError, ShapeMismatchError, VersionMismatchError
from ..geometry import CacheGeometry
from ..state_spec import MAX_STATE_DIMS, STATE_DTYPES, StateSpec, aligned
from .records import CHECKPOINT_ENTRY, CHECKPOINT_HEADER, CHECKPOINT_MAGIC, CHECKSUM, PAGE, STATE_ENTRY, checksum

SPARE_SLOTS = 2
"""Checkpoint slots beside those of the checkpoints that are kept: one commit names up to as many as are kept, the other
one checkpoint more, and there must be room to write the next."""

_NUMBERS = {number: name for name, number in STATE_DTYPES.items()}
_SHAPE = struct.Struct(f"<{MAX_STATE_DIMS}Q")


def num_slots(geometry: CacheGeometry) -> int:
    """Return the checkpoint slots of a file; none without states."""
    return geometry.checkpoint_slots + SPARE_SLOTS if geometry.states else 0


# The state table


def encode_states(states: Iterable[StateSpec]) -> bytes:
    """Return the state entries of a superblock."""
    return b"".join(
        STATE_ENTRY.struct.pack(
            spec.layer,
            STATE_DTYPES[spec.dtype],
            len(spec.shape),
            _SHAPE.pack(*spec.shape, *[0] * (MAX_STATE_DIMS - len(spec.shape))),
            spec.name.encode(),
        )
        for spec in states
    )


@functools.lru_cache(maxsize=32)
def decode_states(data: bytes, path: str) -> tuple[StateSpec, ...]:
    """Read the state entries of a superblock, whose checksum matches.

    Raises:
        VersionMismatchError: a dtype that is unknown here.
        CorruptCacheError: an entry that can't be.
    """
    found = []
    for layer, number, dims, shape, name in STATE_ENTRY.struct.iter_unpack(data):
        if number not in _NUMBERS:
            raise VersionMismatchError(
                f"{path}: layer {layer} has a state of dtype {number}, unknown here: use a newer kvmmap",
                path=path,
                expected=tuple(_NUMBERS),
                actual=number,
                layer=layer,
            )
        try:
            sizes = _SHAPE.unpack(shape)
            if any(sizes[dims:]):
                raise ShapeMismatchError(f"its shape has more than {dims} axes")
            found.append(StateSpec(layer, name.rstrip(b"\0").decode(), _NUMBERS[number], sizes[:dims]))
        except (ShapeMismatchError, DtypeError, UnicodeDecodeError) as error:
            raise CorruptCacheError(
                f"{path}: superblock damaged: state {len(found)} is invalid: {error}", path=path, layer=layer
            ) from error
    return tuple(found)


# Checkpoints


@dataclass(frozen=True, slots=True)
class CheckpointLayout:
    """Where a checkpoint slot has its header and its tensors, in bytes from the slot's start."""

    header_size: int
    offsets: tuple[int, ...]
    """One a state, in the order of the table."""
    sizes: tuple[int, ...]
    """Likewise."""
    size: int

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def of(states: tuple[StateSpec, ...]) -> CheckpointLayout:
        """Lay out the states of a table."""
        header = CHECKPOINT_HEADER.size + 8 * len(states) + CHECKSUM.size
        end, offsets = -(-header // PAGE) * PAGE, []
        for spec in states:
            offsets.append(end)
            end += aligned(spec.nbytes)
        return CheckpointLayout(header, tuple(offsets), tuple([spec.nbytes for spec in states]), end)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointHeader:
    """The beginning of a checkpoint slot: what the tensors behind it are."""

    position: int
    """Positions that the states have seen."""
    generation: int
    written_ns: int
    checksums: tuple[int, ...]
    """xxh3_64 of each tensor."""
    checksum: int = 0
    """That of the header, once it was decoded or encoded."""

    def encode(self, file_id: bytes) -> tuple[bytes, int]:
        """Return the header's bytes, and its checksum."""
        body = CHECKPOINT_HEADER.struct.pack(
            CHECKPOINT_MAGIC, len(self.checksums), file_id, self.position, self.generation, self.written_ns
        )
        body += struct.pack(f"<{len(self.checksums)}Q", *self.checksums)
        digest = checksum(body)
        return body + CHECKSUM.pack(digest), digest

    @classmethod
    def decode(cls, data: bytes | memoryview, file_id: bytes, num_states: int) -> CheckpointHeader | None:
        """Read a header; None if it is torn, damaged or another file's."""
        size = CHECKPOINT_HEADER.size + 8 * num_states
        data = memoryview(data)[: size + CHECKSUM.size]
        if len(data) < size + CHECKSUM.size or CHECKSUM.unpack_from(data, size)[0] != (digest := checksum(data[:size])):
            return None
        raw = CHECKPOINT_HEADER.unpack(data)
        if (raw["magic"], raw["num_states"], raw["file_id"]) != (CHECKPOINT_MAGIC, num_states, file_id):
            return None
        return cls(
            position=raw["position"],
            generation=raw["generation"],
            written_ns=raw["written_ns"],
            checksums=struct.unpack_from(f"<{num_states}Q", data, CHECKPOINT_HEADER.size),
            checksum=digest,
        )


class CheckpointEntry(NamedTuple):
    """How a commit names what a checkpoint slot holds."""

    word: int
    """0 for none; else 1 + 2 * position, and 1 more if it is pinned."""
    checksum: int
    """Checksum of the header; 0 for none."""

    @classmethod
    def of(cls, position: int, pinned: bool, checksum: int) -> CheckpointEntry:
        """Name a checkpoint."""
        return cls(1 + 2 * position + pinned, checksum)

    @property
    def position(self) -> int:
        """Its position; -1 for none."""
        return (self.word - 1) // 2

    @property
    def pinned(self) -> bool:
        """True if it is never replaced."""
        return self.word > 0 and self.word % 2 == 0


NO_CHECKPOINT = CheckpointEntry(0, 0)


def checkpoint_entries_size(geometry: CacheGeometry) -> int:
    """Return the bytes that checkpoint entries take in a commit slot."""
    return CHECKPOINT_ENTRY.size * num_slots(geometry)


def encode_entries(entries: Sequence[CheckpointEntry]) -> bytes:
    """Return the entries of a commit slot."""
    return b"".join([CHECKPOINT_ENTRY.struct.pack(*entry) for entry in entries])


def decode_entries(data: bytes | memoryview) -> tuple[CheckpointEntry, ...]:
    """Read the entries of a commit slot, whose checksum matches."""
    return tuple([CheckpointEntry(*entry) for entry in CHECKPOINT_ENTRY.struct.iter_unpack(data)])
