"""The parent record of a file whose positions follow some of another file. Pure: bytes in, a dataclass out."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from ..errors import CorruptCacheError
from .records import CHECKSUM, PARENT, checksum
from .superblock import Superblock

NAME_BYTES = 255
"""The longest file name; the record has room for a byte more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """Which positions of which file come before a file's own."""

    file_id: bytes
    """The parent's, when the file was made."""

    length: int
    """Positions of the parent that count, from the first of its chain on; at least one."""

    token_len: int
    """Positions of these whose token ids were recorded; at most `length`."""

    generation: int
    """The parent's, when the file was made."""

    checksum: int
    """Checksum of the checksums of these positions and token ids: see docs/format.md, Parents."""

    name: str
    """Name of the parent in the file's own folder."""

    tail_checksums: tuple[int, ...]
    """Checksums of the parent's last block up to `length`, if that ends inside the block: one a layer, then one of the
    token ids; 0 where there are none."""

    def encode(self) -> bytes:
        """Return the section's bytes."""
        head = PARENT.pack(
            {
                "file_id": self.file_id,
                "length": self.length,
                "token_len": self.token_len,
                "generation": self.generation,
                "checksum": self.checksum,
                "name": os.fsencode(self.name),
            }
        )
        body = head + struct.pack(f"<{len(self.tail_checksums)}Q", *self.tail_checksums)
        return body + CHECKSUM.pack(checksum(body))

    @classmethod
    def decode(cls, data: bytes, superblock: Superblock, path: str) -> Parent:
        """Read and check a section.

        Raises:
            CorruptCacheError: it is damaged, or says what can't be: a name that is none of a file in the same folder
                is never looked up.
        """
        tracks = superblock.geometry.num_layers + 1
        size = PARENT.size + 8 * tracks
        if len(data) < size + CHECKSUM.size or CHECKSUM.unpack_from(data, size)[0] != checksum(data[:size]):
            raise CorruptCacheError(f"{path}: parent record damaged: its checksum does not match", path=path)
        raw = PARENT.unpack(data)
        packed = raw["name"].rstrip(b"\0")
        name = os.fsdecode(packed)
        if wrong := name_fault(name):
            raise CorruptCacheError(f"{path}: parent record damaged: the name {name!r} {wrong}", path=path)
        if not 1 <= raw["length"] < 2**40 or raw["token_len"] > raw["length"] or raw["generation"] >= 2**40:
            raise CorruptCacheError(
                f"{path}: parent record damaged: {raw['length']} positions are out of range", path=path
            )
        return cls(
            file_id=raw["file_id"],
            length=raw["length"],
            token_len=raw["token_len"],
            generation=raw["generation"],
            checksum=raw["checksum"],
            name=name,
            tail_checksums=struct.unpack_from(f"<{tracks}Q", data, PARENT.size),
        )


def name_fault(name: str) -> str | None:
    """Say why a file name can't be a parent's; None if it can.

    It is a plain name in the child's own folder: no path, and not hidden, as temporary files are.
    """
    if not name:
        return "is empty"
    if "/" in name or "\0" in name:
        return "is a path, and not the name of a file in the same folder"
    if name.startswith("."):
        return "begins with a dot, as temporary files do"
    if len(os.fsencode(name)) > NAME_BYTES:
        return f"is longer than {NAME_BYTES} bytes"
    return None
