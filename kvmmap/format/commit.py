"""One commit of a cache, in every storage: its lengths, and its time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The part of a commit that all storages share. `Slot` is that of a file, a Zarr group's `Root` is another."""

    sequence: int
    """Grows with every commit."""

    seq_len: int
    """Positions committed in every layer."""

    token_len: int
    """Positions, from 0, whose token ids are recorded; at most `seq_len`."""

    generation: int
    """Grows with every truncation of committed positions."""

    commit_ns: int
    """When it was made, in nanoseconds since 1970."""

    closed: bool
    """True if its writer closed the cache with it."""
