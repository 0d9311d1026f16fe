"""What `verify` checks of a committed block besides its rows: modules that keep something for blocks register a check.

So an optional section, such as that of sketches, is known to its own module alone.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from ...format import Slot
from ..protocols import Damage
from .mapped_file import MappedFile

BlockCheck = Callable[[MappedFile, int, Slot, Container[int | None]], Iterator[Damage]]
"""Yields what is wrong of a block: takes the file, the block, the commit, and the layers that are not to be checked."""

_checks: list[BlockCheck] = []


def register(check: BlockCheck) -> BlockCheck:
    """Add a check, and return it."""
    _checks.append(check)
    return check


def check_extras(mapped: MappedFile, block: int, slot: Slot, skip: Container[int | None]) -> Iterator[Damage]:
    """Yield what the registered checks find wrong of a block."""
    for check in _checks:
        yield from check(mapped, block, slot, skip)
