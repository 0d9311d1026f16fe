"""The live record: the few words of the file that are written through a map, and what trusting them takes.

Words are aligned 64 bits, stored and loaded whole in the compiled core. All but the boot id are sealed: a value and
24 bits that depend on it, so that a flipped bit is seen. Lengths are believed only while the boot id is this
machine's present one: after a crash of the machine nobody knows which of them reached the disk.
"""

from __future__ import annotations

import mmap
import os
import sys
from functools import cache

from ... import _core
from ...format import LIVE, LIVE_LENGTHS

_OFFSETS = {field.name: offset for offset, _, field in LIVE.rows()}
_BOOT_LOW = _OFFSETS["boot_id_low"]
_BOOT_HIGH = _OFFSETS["boot_id_high"]
_GENERATION = _OFFSETS["generation"]


@cache
def boot_id() -> int:
    """Return 128 bits that change when the machine starts anew; random where the system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return _number(file.read())
    except (OSError, ValueError):
        pass
    if sys.platform == "darwin":
        import subprocess

        found = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"], capture_output=True, text=True, check=False
        )
        try:
            return _number(found.stdout)
        except ValueError:
            pass
    return int.from_bytes(os.urandom(16), "little")


def _number(text: str) -> int:
    """Return the 128 bits of a UUID. (The uuid module takes longer to load than a cache to open.)"""
    digits = text.strip().replace("-", "")
    if len(digits) != 32:
        raise ValueError(f"not a UUID: {text!r}")
    return int(digits, 16)


class LiveRecord:
    """The record at `offset` of a map, writable or not."""

    def __init__(self, memory: mmap.mmap, offset: int, salt: int, num_layers: int) -> None:
        self._memory = memory
        self._offset = offset
        self._salt = salt
        self._num_layers = num_layers

    def trusted(self) -> bool:
        """True if lengths were published since this machine started, and not closed since."""
        low = _core.load_word(self._memory, self._offset + _BOOT_LOW)
        high = _core.load_word(self._memory, self._offset + _BOOT_HIGH)
        return (high << 64 | low) == boot_id()

    def in_use(self) -> bool:
        """True if no writer has closed the cache since one opened it."""
        low = _core.load_word(self._memory, self._offset + _BOOT_LOW)
        high = _core.load_word(self._memory, self._offset + _BOOT_HIGH)
        return bool(low or high)

    def trust(self) -> None:
        """Declare the lengths live; they must be right by now."""
        _core.store_word(self._memory, self._offset + _BOOT_LOW, boot_id() & (2**64 - 1))
        _core.store_word(self._memory, self._offset + _BOOT_HIGH, boot_id() >> 64)

    def distrust(self) -> None:
        """Declare that only commits count."""
        _core.store_word(self._memory, self._offset + _BOOT_HIGH, 0)
        _core.store_word(self._memory, self._offset + _BOOT_LOW, 0)

    def get(self, name: str) -> int:
        """Return a sealed value by its field's name; -1 if its seal is broken."""
        offset = _OFFSETS[name]
        return _core.load_sealed(self._memory, self._offset + offset, 1, offset // 8, self._salt)[0]

    def put(self, name: str, value: int) -> None:
        """Store a sealed value by its field's name."""
        offset = _OFFSETS[name]
        _core.publish(self._memory, self._offset + offset, value, offset // 8, self._salt)

    def lengths(self) -> list[int]:
        """Return each layer's published length; -1 for one whose seal is broken."""
        at = self._offset + LIVE_LENGTHS
        return _core.load_sealed(self._memory, at, self._num_layers, LIVE_LENGTHS // 8, self._salt)

    def publish(self, layer: int, length: int) -> None:
        """Store a layer's length: everything written before is visible to whoever sees it."""
        offset = LIVE_LENGTHS + 8 * layer
        _core.publish(self._memory, self._offset + offset, length, offset // 8, self._salt)

    def generation_word(self) -> int:
        """Return the generation as it lies there: equal words mean that nothing was taken back in between."""
        return _core.load_word(self._memory, self._offset + _GENERATION)

    def broken_seals(self) -> list[str]:
        """Name the words whose seals are broken."""
        sealed = ("generation", "acknowledged", "writer_pid", "superseded", "token_len")
        broken = [name for name in sealed if self.get(name) < 0]
        return broken + [f"length of layer {i}" for i, length in enumerate(self.lengths()) if length < 0]
