"""Operations that work on `.kvm` files only: resize, compact, fork, repair."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from .cache import QuantizedKvCache
from .opening import check_durability, file_path
from .paths import PathLike
from .ranges import index
from .storage.file.resize import resize_file
from .storage.protocols import Durability, Progress

if TYPE_CHECKING:
    from .storage.file.repair import RepairReport


def resize(path: PathLike, capacity: int, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Give a cache file another capacity: a new file is built beside it, checked, and takes its place.

    Readers of the old file go on reading it until they `refresh`, which tells them.

    Args:
        path: the cache; no writer may have it open.
        capacity: positions to reserve.
        timeout: seconds to wait for a writer.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CapacityExceededError: more positions are stored.
        CorruptCacheError: a block does not match its checksum; nothing was changed.
        CacheLockedError, OSError, FormatError: as in `open`; nothing was changed.
    """
    resize_file(file_path(path), index(capacity, "capacity"), timeout=timeout, progress=progress)


def compact(path: PathLike, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Drop the capacity that is not used: `resize` to the positions stored."""
    resize_file(file_path(path), None, timeout=timeout, progress=progress)


def fork(
    source: PathLike,
    target: PathLike,
    *,
    length: int | None = None,
    capacity: int | None = None,
    durability: Durability = "publish",
    progress: Progress | None = None,
) -> QuantizedKvCache:
    """Make a private continuation of a shared prefix: a new cache file that begins with another's positions.

    The source is only read, and may have a writer meanwhile. On btrfs, XFS and the like the rows are shared on the
    disk, so a fork costs nearly nothing; elsewhere they are copied. Rows, token ids, model and metadata are copied,
    and so do checksums: what is damaged in the source is damaged in the fork, and not hidden.

    Args:
        source: the cache to begin with.
        target: where to make the new one; there must be nothing.
        length: keep so many positions of the source; all that are stored by default.
        capacity: positions to reserve; the source's by default.
        durability: as in `create`.
        progress: called with (bytes done, bytes in all) now and then.

    Returns:
        The new cache, open for appending; what it holds is committed.

    Raises:
        CacheExistsError: there is something at `target`.
        CacheNotFoundError: there is nothing at `source`, or no directory for `target`.
        PositionOutOfRangeError: fewer than `length` positions are stored.
        CapacityExceededError: `capacity` is less than `length`.
        CorruptCacheError: the block that is cut does not match its checksum; nothing was made.
        CacheChangedError: the source's writer truncated meanwhile; nothing was made.
        OSError: the disk is full or failing; nothing was made.
    """
    from .storage.file.clone import fork_file  # here, and not above: few programs need it

    storage = fork_file(
        file_path(source),
        file_path(target),
        length=length,
        capacity=None if capacity is None else index(capacity, "capacity"),
        durability=check_durability(durability),
        progress=progress,
    )
    return QuantizedKvCache.of_storage(storage)


def repair(
    path: PathLike,
    new_path: PathLike,
    *,
    zero: Collection[tuple[int | None, int]] = (),
    progress: Progress | None = None,
) -> RepairReport:
    """Save what is sound of a damaged cache file into a new one. The damaged one is only read.

    Positions are kept from 0 up to the first block (256 positions) that does not match its checksum in some layer: with
    a hole in the middle, later positions would move, or mean something else. Published positions that no commit covers
    come along if all before them does, as far as they would be shown. Token ids are kept up to the first block of
    them that does not hold. Records that lead to the rows may be damaged, also several of them; of a file whose
    superblock is damaged nothing can be saved.

    Args:
        path: the damaged file; no writer may have it open.
        new_path: where to put what is saved; there must be nothing.
        zero: (layer, block) that are to be zeros if they are damaged, so that what is behind them is not lost;
            (None, block) for token ids, which become -1. Attention gives rows of zeros a weight like any others, so
            leave them out with `positions`. Their token ids become -1, and the metadata's "kvmmap.repair" lists them.
        progress: called with (positions done, positions in all) now and then.

    Returns:
        What was kept, and what was found.

    Raises:
        CorruptCacheError: nothing can be saved; nothing was made.
        NotACacheError, VersionMismatchError: `path` is no cache file that this package reads.
        CacheExistsError: there is something at `new_path`.
        CacheLockedError: a writer has the damaged file open.
        OSError: the disk is full or failing; nothing was made.
    """
    from .storage.file.repair import repair_file  # here, and not above: few programs need it

    return repair_file(file_path(path), file_path(new_path), zero=zero, progress=progress)
