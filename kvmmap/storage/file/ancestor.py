"""One file of a chain of which the first positions count, and whether it still holds them.

A file that continues a parent records a checksum over the checksums of what it needs of it. So a parent that was
truncated and rewritten, replaced by another file, or damaged is noticed when the chain is opened, and while it is open:
every truncation changes the generation.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import NoReturn

from ...errors import CacheChangedError, CorruptCacheError, ParentError
from ...format import Parent, checksum_of
from ..checksums import digest
from .reader import MappedReader

_PAIR = struct.Struct("<QQ")
_ONE = struct.Struct("<Q")


class Ancestor:
    """A file of a chain, open for reading.

    Args:
        reader: the file.
        record: the parent record of the file after it in the chain.
        child: path of that file, for messages.

    Raises:
        ParentError: it does not hold what the record says.
    """

    def __init__(self, reader: MappedReader, record: Parent, child: str) -> None:
        self.reader = reader
        self.record = record
        self.base = 0 if reader.parent is None else reader.parent.length
        """Position in the chain of the file's first own one."""
        self.count = record.length - self.base
        """Own positions of the file that count."""
        self.tokens = min(self.count, max(0, record.token_len - self.base))
        """Own token ids that count."""
        self.whole = self.count - self.count % reader.geometry.block_tokens
        """Positions in complete blocks; those after them have checksums of their own in the record."""
        self._child = child
        self._generation = -1
        self.verified_tails: set[int] = set()
        """Tracks whose positions after the complete blocks match their checksums."""
        self.word = reader.live.generation_word()
        self.check()

    @property
    def changed(self) -> bool:
        """True if the file was truncated since it was last checked."""
        return self.reader.live.generation_word() != self.word

    def check(self) -> None:
        """Compare what a chain needs of the file with the record.

        Raises:
            ParentError: the file does not hold it.
        """
        reader, slot = self.reader, self.reader.snapshot.slot
        if self.count < 1 or slot.seq_len < self.count:
            held = self.base + slot.seq_len
            self._refuse(f"it has positions {self.base} to {held} committed: it was truncated, or is another file")
        if slot.token_len < self.tokens:
            self._refuse(f"it has {slot.token_len} of {self.tokens} token ids: it was truncated, or is another file")
        if link_checksum(reader, self.count, self.tokens, self.record.tail_checksums) != self.record.checksum:
            self._refuse("its checksums differ: it was truncated and rewritten, or is another file")
        generation = reader.live.get("generation")
        known = (self.record.file_id, self.record.generation) == (reader.superblock.file_id, generation)
        if (not known and generation != self._generation) or reader.snapshot.verified is None:
            # The checksums above are those of complete blocks: the rest may have been rewritten.
            self.verified_tails = set()
            for track in range(reader.geometry.num_layers + 1):
                self.verify_tail(track)
        self._generation = generation

    def verify_tail(self, track: int) -> None:
        """Compare the positions after the complete blocks with the record, unless that was done before.

        Args:
            track: a layer, or the token ids at index num_layers.

        Raises:
            ParentError: they do not match.
        """
        if track in self.verified_tails:
            return
        if tail_checksum(self.reader, track, self.count, self.tokens) != self.record.tail_checksums[track]:
            layers = self.reader.geometry.num_layers
            what = "token ids differ" if track == layers else f"layer {track} differs"
            self._refuse(f"{what} in the block of position {self.count - 1}: it was rewritten or damaged", track)
        self.verified_tails.add(track)

    def settle(self) -> bool:
        """Check the file again after a truncation; True if what counts can't have changed meanwhile.

        Raises:
            ParentError: what the chain needs is gone.
        """
        with self.reader.lock:
            before = self._generation
            word = self.reader.live.generation_word()
            self.reader.look()
            self.check()
            self.word = word
            # One truncation that left what counts never touched it. After several it may have been something else in
            # between: each changes the generation by two.
            return 0 <= self._generation - before <= 2

    def _refuse(self, what: str, layer: int | None = None) -> NoReturn:
        raise ParentError(
            f"{self._child}: needs the first {self.record.length} positions of its parent {self.reader.path}, and "
            f"{what}; restore that file, or remove this one",
            path=self._child,
            actual=self.reader.path,
            layer=None if layer == self.reader.geometry.num_layers else layer,
        )


def link_checksum(reader: MappedReader, count: int, tokens: int, tails: tuple[int, ...]) -> int:
    """Return the checksum that a child records: see docs/format.md, Parents.

    Args:
        reader: the parent.
        count: own positions of the parent that count, all committed.
        tokens: own token ids of it that count.
        tails: as `tail_checksum` returns them, one a track.
    """
    slot, size = reader.snapshot.slot, reader.geometry.block_tokens
    pieces = [] if reader.parent is None else [_ONE.pack(reader.parent.checksum)]
    pieces.append(_PAIR.pack(count, tokens))
    pieces.append(reader.mapped.checksums(slot, 0, count // size).tobytes())
    pieces.append(reader.mapped.token_checksums(slot)[: tokens // size].tobytes())
    pieces.append(struct.pack(f"<{len(tails)}Q", *tails))
    return checksum_of(pieces)


def tail_checksum(reader: MappedReader, track: int, count: int, tokens: int) -> int:
    """Return the checksum of the positions of a track after its complete blocks; 0 if there are none."""
    size, layers = reader.geometry.block_tokens, reader.geometry.num_layers
    length = tokens if track == layers else count
    if not length % size:
        return 0
    arrays = [reader.mapped.token_ids()] if track == layers else reader.mapped.slabs(track)
    return digest(arrays, track, length // size, length - length % size, length)


@contextlib.contextmanager
def counted_from(base: int) -> Iterator[None]:
    """Add to errors of reading a file that its positions are counted from its own first one."""
    try:
        yield
    except (CorruptCacheError, CacheChangedError) as error:
        if error.position is not None and base:
            error.position += base
            error.args = (f"{error} (positions of this file, which begins after {base} of its parent's)",)
        raise


def parent_path(child: str, record: Parent) -> str:
    """Return the path of a file's parent: in the folder of the child, and nowhere else."""
    return os.path.join(os.path.dirname(child), record.name)
