"""Numbers that all processes of a soak share: what readers may expect, and what each has counted."""

from __future__ import annotations

import mmap
import struct

_WORDS = ("truncations", "acknowledged", "cut_length", "cut_epoch", "holding", "stop")
COUNTS = ("refreshes", "opens", "rows", "attends", "verifies", "changed")
_WORD = struct.Struct("q")


class Board:
    """Shared memory, made before the processes are forked.

    `truncations` is odd while a writer truncates; then `acknowledged` (positions that are certainly
    published) and the cut (positions from `cut_length` on are of epochs above `cut_epoch`) change.
    """

    def __init__(self, readers: int) -> None:
        self._memory = mmap.mmap(-1, 8 * (len(_WORDS) + readers * len(COUNTS)))

    def get(self, name: str) -> int:
        value: int = _WORD.unpack_from(self._memory, 8 * _WORDS.index(name))[0]
        return value

    def put(self, name: str, value: int) -> None:
        _WORD.pack_into(self._memory, 8 * _WORDS.index(name), value)

    def count(self, reader: int, name: str, number: int = 1) -> None:
        at = self._at(reader, name)
        _WORD.pack_into(self._memory, at, _WORD.unpack_from(self._memory, at)[0] + number)

    def counted(self, reader: int, name: str) -> int:
        value: int = _WORD.unpack_from(self._memory, self._at(reader, name))[0]
        return value

    def _at(self, reader: int, name: str) -> int:
        return 8 * (len(_WORDS) + reader * len(COUNTS) + COUNTS.index(name))
