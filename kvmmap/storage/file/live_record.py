"""The live record: the few words of the file that are written through a map, and when they are valid.

Words are aligned 64 bits, stored and loaded whole in the compiled core. All but the boot id are checked words: a value
and 24 bits that depend on it, so that a flipped bit is detected. Lengths are valid only while the boot id is this
machine's present one, because after a crash of the machine it is unknown which of them reached the disk; and only in
the inode that they were published in, because a copy made beside a writer mixes rows of different moments.
"""

from __future__ import annotations

import mmap

from ... import _core
from ...format import HOME_BYTES, LIVE, LIVE_LENGTHS, Superblock, num_slots
from ..posix import PosixFile
from ..process import boot_id
from .page_cache import expect_few_pages

_OFFSETS = {field.name: offset for offset, _, field in LIVE.rows()}
_BOOT_LOW = _OFFSETS["boot_id_low"]
_BOOT_HIGH = _OFFSETS["boot_id_high"]
_GENERATION = _OFFSETS["generation"]


class LiveRecord:
    """The record at `offset` of a map, writable or not.

    Args:
        memory: the map.
        offset: where in it the record starts.
        superblock: the file's.
        file: the file itself, for the number of its inode.
    """

    def __init__(self, memory: mmap.mmap, offset: int, superblock: Superblock, file: PosixFile) -> None:
        self._memory = memory
        self._offset = offset
        self._salt = superblock.salt
        geometry = superblock.geometry
        self._num_layers = geometry.num_layers
        rows = geometry.row_layers
        self._row_layers = rows if len(rows) < geometry.num_layers else None
        self._num_slots = num_slots(geometry)
        self._words = LIVE_LENGTHS + 8 * self._num_layers
        """Offset of the words of checkpoint slots."""
        home = self._words + 8 * self._num_slots
        self._home = home if superblock.live_record.size >= home + HOME_BYTES else None
        self._inode = file.inode_id()

    def trusted(self) -> bool:
        """True if lengths were published in this inode since this machine started, and not closed since.

        Whether a damaged `home` was this inode is unknown: see `home`.
        """
        low = _core.load_word(self._memory, self._offset + _BOOT_LOW)
        high = _core.load_word(self._memory, self._offset + _BOOT_HIGH)
        return (high << 64 | low) == boot_id() and self.home() in (0, self._inode, -1, None)

    def home(self) -> int | None:
        """Return which inode the lengths were published in: 0 if its writer did not say, -1 if the word is damaged,
        None if there is no room for one."""
        if self._home is None:
            return None
        if not _core.load_word(self._memory, self._offset + self._home):
            return 0
        return _core.load_checked(self._memory, self._offset + self._home, 1, self._home // 8, self._salt)[0]

    def in_use(self) -> bool:
        """True if the last writer did not close the cache."""
        low = _core.load_word(self._memory, self._offset + _BOOT_LOW)
        high = _core.load_word(self._memory, self._offset + _BOOT_HIGH)
        return bool(low or high)

    def trust(self) -> None:
        """Make the published lengths valid; they must be right by now."""
        if self._home is not None:
            _core.publish(self._memory, self._offset + self._home, self._inode, self._home // 8, self._salt)
        _core.store_word(self._memory, self._offset + _BOOT_LOW, boot_id() & (2**64 - 1))
        _core.store_word(self._memory, self._offset + _BOOT_HIGH, boot_id() >> 64)

    def distrust(self) -> None:
        """Make published lengths invalid: only commits count."""
        _core.store_word(self._memory, self._offset + _BOOT_HIGH, 0)
        _core.store_word(self._memory, self._offset + _BOOT_LOW, 0)
        if self._home is not None:
            _core.store_word(self._memory, self._offset + self._home, 0)

    def get(self, name: str) -> int:
        """Return the value of a checked word by its field's name; -1 if its check fails."""
        offset = _OFFSETS[name]
        return _core.load_checked(self._memory, self._offset + offset, 1, offset // 8, self._salt)[0]

    def put(self, name: str, value: int) -> None:
        """Store a checked word by its field's name."""
        offset = _OFFSETS[name]
        _core.publish(self._memory, self._offset + offset, value, offset // 8, self._salt)

    def lengths(self) -> list[int]:
        """Return each layer's published length; -1 for one whose check fails. Layers without rows have the others'."""
        at = self._offset + LIVE_LENGTHS
        found = _core.load_checked(self._memory, at, self._num_layers, LIVE_LENGTHS // 8, self._salt)
        if self._row_layers is not None:
            least = min([found[layer] for layer in self._row_layers])
            lengths = [least] * self._num_layers
            for layer in self._row_layers:
                lengths[layer] = found[layer]
            return lengths
        return found

    def checkpoints(self) -> list[int]:
        """Return the word of each checkpoint slot, as commits have it; -1 for one whose check fails."""
        at = self._offset + self._words
        return _core.load_checked(self._memory, at, self._num_slots, self._words // 8, self._salt)

    def publish_checkpoint(self, slot: int, word: int) -> None:
        """Store the word of a checkpoint slot. Everything written before is visible to those who see the word."""
        offset = self._words + 8 * slot
        _core.publish(self._memory, self._offset + offset, word, offset // 8, self._salt)

    def publish(self, layer: int, length: int) -> None:
        """Store a layer's length. Everything written before is visible to those who see the length."""
        offset = LIVE_LENGTHS + 8 * layer
        _core.publish(self._memory, self._offset + offset, length, offset // 8, self._salt)

    def generation_word(self) -> int:
        """Return the generation's whole word: while it stays the same, nothing was truncated."""
        return _core.load_word(self._memory, self._offset + _GENERATION)

    def damaged_words(self) -> list[str]:
        """Name the words whose checks fail."""
        names = ("generation", "acknowledged", "writer_pid", "superseded", "token_len")
        broken = [name for name in names if self.get(name) < 0]
        broken += ["home"] if self.home() == -1 else []
        broken += [f"length of layer {i}" for i, length in enumerate(self.lengths()) if length < 0]
        return broken + [f"word of checkpoint slot {i}" for i, word in enumerate(self.checkpoints()) if word < 0]


def map_live(file: PosixFile, superblock: Superblock, *, writable: bool) -> LiveRecord:
    """Map the pages of the live record alone."""
    extent = superblock.live_record
    memory, offset = file.map(extent.offset, extent.size, writable=writable)
    expect_few_pages(memory, len(memory))
    return LiveRecord(memory, offset, superblock, file)
