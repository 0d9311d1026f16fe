"""One segment as the index knows it, and where its file lies. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CACHES = "caches"
"""Name of the folder of all segments, within a library's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A cache file of a library: positions [start, stop) of a sequence that begins with its parent's first `start`."""

    name: str
    """Unique among all libraries; that of its file without ".kvm"."""

    namespace: str
    """Digest of its namespace."""

    model: str
    """Name of the model, "" where none was recorded."""

    path: str
    """Path of its file."""

    parent: str | None
    """Name of the segment that its positions continue; None if it begins at position 0."""

    start: int
    """Its first own position."""

    stop: int
    """One past its last committed position whose token id is known."""

    depth: int
    """Segments of its chain, itself included."""

    bytes: int
    """On the disk, and reserved for who writes it."""

    children: int
    """Segments that continue it."""

    branches: int
    """Segments that have ever continued it."""

    writing: bool
    """A session has it open for appending, or had when its process died."""

    pinned: bool
    """Never evicted."""

    ttl: float | None
    """Seconds after its last use for which it is kept."""

    created: float
    """Seconds since 1970."""

    used: float
    """When a session last continued it, or made it; seconds since 1970."""

    hits: int
    """Sessions that continued it."""

    reused: int
    """Positions of its own that these did not compute."""

    seconds: float
    """Time that computing its own positions takes, as measured for this namespace; 0 where nothing was."""

    broken: str | None
    """What is wrong with it: then nothing matches it. None if it is sound."""

    pushed: int
    """Positions that the object store has; 0 without one."""

    id: int
    """Its number in the index."""

    parent_id: int
    """Its parent's number; 0 without one."""

    namespace_id: int
    """Its namespace's number."""

    token_offset: int
    """Byte of the file where the token id of position `start` is."""

    checkpoints: tuple[int, ...] | None
    """Lengths that a model with states can be restored at; None if every length can be."""

    spare_bytes: int
    """Bytes of old checkpoints, which eviction drops before the segment itself."""

    writer_pid: int
    """Process that appends to it, or last did; 0 if it closed it."""

    reserved: int
    """Of `bytes`, those that are not on the disk yet."""

    @property
    def positions(self) -> int:
        """Positions of its own."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNamespace:
    """A namespace as the index knows it."""

    digest: str
    """32 hexadecimal digits."""

    model: str
    """Name of the model, "" where none was recorded."""

    document: Mapping[str, Any]
    """What was digested: weights, RoPE, facts, layers."""

    segments: int
    """Segments of it."""

    bytes: int
    """Their bytes on the disk."""

    positions: int
    """Positions of their own."""

    position_bytes: int
    """Bytes of one position in all layers."""

    seconds_per_position: float
    """Time to compute a position, as measured; 0 where nothing was."""


def segment_path(folder: str, namespace_folder: str, name: str) -> str:
    """Return the path of a segment's file.

    Args:
        folder: the library's.
        namespace_folder: `Namespace.folder`.
        name: the segment's.
    """
    # One folder for all of a namespace: a file names its parent without a folder.
    return os.path.join(folder, CACHES, namespace_folder, f"{name}.kvm")
