"""What `verify` has looked at, and what it found damaged."""

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
    """Return the damage of a position's row in 16 bits: nothing is lost, since its coded row is used instead."""
    what = f"layer {layer}, position {position} in 16 bits: checksum does not match; its coded row is used instead"
    return Damage(what, layer, position, position + 1)


@dataclass(slots=True)
class VerifyReport:
    """What `verify` looked at, and found."""

    path: str | None
    """The cache's path; None in memory."""

    seq_len: int
    """Positions stored."""

    verified: int
    """Positions, from 0, that checksums cover: those of the last commit. The rest is published and has none yet."""

    blocks: int = 0
    """Blocks looked at, over all layers and the token ids; the incomplete last one counts."""

    bytes: int = 0
    """Bytes of codes, scales and token ids looked at."""

    damages: list[Damage] = field(default_factory=list)
    """Empty if all is well."""

    @property
    def sound(self) -> bool:
        """True if nothing is damaged."""
        return not self.damages
