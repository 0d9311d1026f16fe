"""The result of a verification: what was checked, and what is damaged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that `verify` found wrong."""

    what: str
    """In words."""

    layer: int | None = None
    """The layer, if it is in one."""

    start: int | None = None
    """First position of the damaged block, if it is in one."""

    stop: int | None = None
    """One past its last committed position."""

    parent: str | None = None
    """Path of the file that it is in, if that is one that the cache continues."""


def damaged_record(layer: int, position: int) -> Damage:
    """Return what is wrong with a position's row in 16 bits."""
    stop = position + 1
    what = f"layer {layer}, positions [{position}, {stop}): not exact: the rows in 16 bits do not match their checksums"
    return Damage(what, layer, position, stop)


@dataclass(slots=True)
class VerifyReport:
    """The result of a verification."""

    path: str | None
    """The cache's path; None in memory."""

    seq_len: int
    """Positions stored."""

    verified: int
    """Positions, from 0, that checksums cover: those of the last commit. The rest is published and has none yet."""

    blocks: int = 0
    """Blocks checked, over all layers and the token ids; the incomplete last one counts."""

    bytes: int = 0
    """Bytes of codes, scales and token ids checked."""

    damages: list[Damage] = field(default_factory=list)
    """Empty if all is well."""

    inexact: list[Damage] = field(default_factory=list)
    """Rows in 16 bits that do not match their checksums, as a crash leaves some. Nothing is lost: the coded rows, which
    are checked by themselves, are used in their place."""

    @property
    def sound(self) -> bool:
        """True if nothing is damaged."""
        return not self.damages
