"""A commit slot: what one commit covers. Pure: bytes in, a dataclass out."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from ..metadata import MAX_METADATA_BYTES
from .commit import Commit
from .records import CHECKSUM, SLOT, SLOT_MAGIC, Section, checksum
from .states import NO_CHECKPOINT, CheckpointEntry, checkpoint_entries_size, decode_entries, encode_entries, num_slots
from .superblock import Superblock


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot(Commit):
    """One commit of a file."""

    metadata_half: int
    metadata_bytes: int
    metadata_checksum: int
    tail_checksums: tuple[int, ...]
    """One a layer, then one for token ids; 0 where there is no tail."""

    checkpoints: tuple[CheckpointEntry, ...] = ()
    """One a checkpoint slot."""

    @staticmethod
    def none_named(superblock: Superblock) -> tuple[CheckpointEntry, ...]:
        """Return the entries of a commit without checkpoints."""
        return (NO_CHECKPOINT,) * num_slots(superblock.geometry)

    def encode(self, file_id: bytes) -> bytes:
        """Return the slot's bytes."""
        head = SLOT.struct.pack(
            SLOT_MAGIC,
            int(self.closed),
            file_id,
            self.sequence,
            self.seq_len,
            self.token_len,
            self.generation,
            self.commit_ns,
            self.metadata_half,
            self.metadata_bytes,
            self.metadata_checksum,
        )
        body = head + struct.pack(f"<{len(self.tail_checksums)}Q", *self.tail_checksums)
        body += encode_entries(self.checkpoints)
        return body + CHECKSUM.pack(checksum(body))

    def successor(self) -> Slot:
        """Return the same commit under the next sequence, for the other slot."""
        return replace(self, sequence=self.sequence + 1)

    @classmethod
    def decode(cls, data: bytes | memoryview, superblock: Superblock) -> Slot | None:
        """Read a slot; None if it is torn, damaged or another file's."""
        tracks = superblock.geometry.num_layers + 1
        entries_at = SLOT.size + 8 * tracks
        size = entries_at + checkpoint_entries_size(superblock.geometry)
        data = memoryview(data)[: size + CHECKSUM.size]
        if len(data) < size + CHECKSUM.size or CHECKSUM.unpack_from(data, size)[0] != checksum(data[:size]):
            return None
        raw = SLOT.unpack(data)
        checkpoints = decode_entries(data[entries_at:size])
        half = superblock.section(Section.METADATA).size // 2
        whole = (
            raw["magic"] == SLOT_MAGIC
            and raw["file_id"] == superblock.file_id
            and raw["state"] in (0, 1)
            and raw["token_len"] <= raw["seq_len"] <= superblock.geometry.capacity
            and raw["metadata_half"] in (0, 1)
            and raw["metadata_bytes"] <= min(half, MAX_METADATA_BYTES)
            and max(raw["sequence"], raw["generation"]) < 2**40
            and all(entry.position <= raw["seq_len"] for entry in checkpoints)
        )
        if not whole:
            return None
        return cls(
            sequence=raw["sequence"],
            seq_len=raw["seq_len"],
            token_len=raw["token_len"],
            generation=raw["generation"],
            commit_ns=raw["commit_ns"],
            closed=raw["state"] == 1,
            metadata_half=raw["metadata_half"],
            metadata_bytes=raw["metadata_bytes"],
            metadata_checksum=raw["metadata_checksum"],
            tail_checksums=struct.unpack_from(f"<{tracks}Q", data, SLOT.size),
            checkpoints=checkpoints,
        )
