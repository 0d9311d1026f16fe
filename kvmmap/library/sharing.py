"""Sharing segments through an object store: push, follow, fetch, clean up. No server of ours, and no lock.

Objects are immutable and have unique names. A push stores a segment's parts first and names them in the log then, so
what the log names is there; a push that dies in between leaves parts that `clean_up` removes. What is fetched is
compared with a digest, takes its place when it is whole, and is matched like any other segment: by its token ids.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import CacheLockedError, CorruptCacheError, LibraryFullError, StoreError
from ..geometry import BLOCK_TOKENS
from ..storage.objects.protocol import MissingObjectError
from ..storage.posix import FILE_MODE
from ..storage.temporary import temporary_path
from .checking import Checker
from .contents import held, read_own_tokens
from .hashing import Prompt, block_hashes
from .manifests import ListedObjects, Log, Manifest, RemoteSegment
from .packing import AT_ONCE, Packed, Part, digest, unpack
from .remote_index import RemoteIndex
from .room import Room
from .segment import Segment, segment_path

SEGMENTS = "segments"
PIECE_BYTES = 1 << 20
ORPHAN_SECONDS = 24 * 3600.0
"""Age, by the server's clock, at which parts that no manifest names are removed: no push takes that long."""

COMPACT_EVERY = 128
"""Manifests, at least, after which a snapshot of all is put: a machine that joins late reads few manifests."""

ENTRIES_A_MANIFEST = 64
"""Segments of a snapshot, at most, for each manifest since the one before: snapshots of very many are made less often,
so that they cost little beside what is pushed."""

LEAST_GAIN = 64
"""Positions that a fetch must gain over what is here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanUp:
    """What a clean-up of an object store removed."""

    segments: tuple[str, ...]
    """Names of segments."""
    bytes: int
    """Their bytes."""
    orphans: int
    """Objects that an interrupted push had left."""
    manifests: int
    """Manifests that a snapshot has taken in."""


class Sharing:
    """A library's side of an object store.

    Args:
        folder: the library's.
        index: its index.
        room: keeps its budget.
        checker: takes files in.
        objects: the store, below the library's prefix.
    """

    def __init__(self, folder: str, index: RemoteIndex, room: Room, checker: Checker, objects: ListedObjects) -> None:
        self._folder = folder
        self._index = index
        self._room = room
        self._checker = checker
        self._objects = objects
        self._log = Log(objects)
        self.url = objects.url

    # The log

    def follow(self) -> int:
        """Take in what others have pushed since; return how many manifests there were.

        Raises:
            StoreError: the store can't be reached, or fails.
        """
        before = self._index.log_position(self.url)
        position, manifests, anew = self._log.follow(before)
        if position != before or anew:
            self._index.apply(self.url, before, position, manifests, anew)
        return len(manifests)

    def _append(self, manifest: Manifest) -> None:
        while (number := self._log.append(manifest, self._index.log_position(self.url))) is None:
            self.follow()
        self.follow()
        if number % COMPACT_EVERY == 0 and number % compact_every(self._index.remote_count()) == 0:
            with contextlib.suppress(StoreError):  # the next one does it
                self.compact_log()

    # Pushing

    def push(self) -> int:
        """Store every committed segment that the object store has not; return how many.

        Raises:
            StoreError: the store can't be reached, or fails. What was named in the log until then stays.
        """
        self.follow()
        pushed = 0
        for segment in self._index.unpushed():
            present = self._index.remote(segment.name)
            if present is not None and present.stop >= segment.stop:
                self._index.set_pushed(segment.name, present.stop)
                continue
            with contextlib.suppress(CacheLockedError, FileNotFoundError):  # being written, or evicted meanwhile
                pushed += self._push(segment)
        return pushed

    def _push(self, segment: Segment) -> int:
        # A session that would append to it meanwhile makes a child.
        with held(segment.path) as file:
            current = self._index.segment(segment.name)
            if current is None or current.broken or current.writing:
                return 0
            packed = Packed(file)
            folder = f"{SEGMENTS}/{current.namespace}/{current.name}-{current.stop}-{os.urandom(4).hex()}"
            parts = list(packed.parts())
            keys = [f"{folder}/{number}" for number in range(len(parts))]
            with ThreadPoolExecutor(min(AT_ONCE, len(parts))) as pool:
                digests = list(pool.map(self._put_part, keys, parts))
            entry = self._entry(current, packed, keys, digests)
        self._append(Manifest(added=[entry]))
        self._index.set_pushed(current.name, current.stop)
        return 1

    def _put_part(self, key: str, part: Part) -> str:
        self._objects.put(key, part)
        return digest(part)

    def _entry(self, segment: Segment, packed: Packed, keys: list[str], digests: list[str]) -> RemoteSegment:
        ids = np.empty(0, np.int32)
        for one in self._index.chain(segment):
            ids = np.concatenate([ids[: one.start], read_own_tokens(one, one.stop - one.start)])
        seed = bytes.fromhex(segment.namespace)
        hashes = list(block_hashes(seed, ids[: segment.stop], segment.start // BLOCK_TOKENS))
        whole, points = Prompt(seed, ids[: segment.stop]), None
        hashes.append(whole.hash_at(segment.stop))
        if segment.checkpoints is not None:
            points = {str(at): whole.hash_at(at).hex() for at in segment.checkpoints if at <= segment.stop}
        namespace = next(one for one in self._index.namespaces() if one.digest == segment.namespace)
        return RemoteSegment(
            name=segment.name,
            namespace=segment.namespace,
            document=dict(namespace.document),
            folder=os.path.basename(os.path.dirname(segment.path)),
            model=segment.model,
            position_bytes=namespace.position_bytes,
            parent=segment.parent,
            start=segment.start,
            stop=segment.stop,
            hashes=base64.b64encode(b"".join(hashes)).decode(),
            parts=keys,
            size=packed.size,
            digests=digests,
            disk_bytes=segment.bytes,
            checkpoints=points,
        )

    # Fetching

    def find(self, namespace: str, prompt: Prompt) -> tuple[int, RemoteSegment | None]:
        """Return how long a prefix of a prompt the object store has, by hashes alone, and the segment that ends it."""
        low, high = 0, prompt.blocks
        while low < high:
            middle = (low + high + 1) // 2
            if self._index.remote_with_prefix(prompt.hash(middle)):
                low = middle
            else:
                high = middle - 1
        boundary = low * BLOCK_TOKENS
        reached = self._index.remote_with_prefix(prompt.hash(low)) if low else self._short(prompt)
        best: tuple[int, RemoteSegment | None] = (0, None)
        seen: set[str] = set()
        while reached := [one for one in reached if one.namespace == namespace and one.name not in seen]:
            for one in reached:
                length = one.restorable(one.stop if _ends_in(one, prompt) else boundary, prompt)
                if length > best[0]:
                    best = length, one
            # What continues these may end before the next block boundary: then only the hash of its end finds it.
            names = {one.name for one in reached}
            seen |= names
            stops = self._index.remote_stops(sorted(names), boundary, len(prompt))
            ends = [one for stop in stops for one in self._index.remote_with_prefix(prompt.hash_at(stop))]
            reached = [one for one in ends if one.parent in names and _ends_in(one, prompt)]
        return best

    def _short(self, prompt: Prompt) -> list[RemoteSegment]:
        """Return segments that end in the first block and that a prompt begins with: only the hash of their end finds
        them."""
        stops = self._index.remote_ends(min(len(prompt), BLOCK_TOKENS - 1))
        return [one for stop in stops for one in self._index.remote_with_prefix(prompt.hash_at(stop))]

    def fetch(self, entry: RemoteSegment) -> int:
        """Bring a segment here, with those that it continues; return the bytes that were fetched.

        Raises:
            MissingObjectError: it was removed from the store since.
            CorruptCacheError: what the store has is damaged.
            LibraryFullError: there is no room for it.
            StoreError, OSError: the store or the disk fails.
        """
        fetched = 0
        for one in self._chain(entry):
            local = self._index.segment(one.name)
            if local is not None and not local.broken and local.stop >= one.stop and os.path.exists(local.path):
                continue
            try:
                self._fetch(one, local)
            except MissingObjectError:
                self._index.forget_remote(one.name)
                raise
            fetched += one.size
        return fetched

    def _chain(self, entry: RemoteSegment) -> list[RemoteSegment]:
        chain = [entry]
        while chain[0].parent is not None:
            parent = self._index.remote(chain[0].parent)
            if parent is None or len(chain) > 64:
                local = self._index.segment(chain[0].parent)
                if local is not None and not local.broken:
                    break
                raise MissingObjectError(
                    f"{self.url}: {chain[0].name} continues {chain[0].parent}, which is not there", path=self.url
                )
            chain.insert(0, parent)
        return chain

    def _fetch(self, entry: RemoteSegment, local: Segment | None) -> None:
        path = segment_path(self._folder, entry.folder, entry.name)
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        added = local is None
        if added:
            number = self._index.add_namespace(
                entry.namespace, entry.folder, entry.document, entry.model, entry.position_bytes
            )
            parent = self._index.segment(entry.parent) if entry.parent else None
            self._index.add(entry.name, number, parent=parent.id if parent else 0, start=entry.start, size=0, ttl=None)
        try:
            self._room.reserve(entry.name, entry.disk_bytes)
            self._download(entry, path)
        except BaseException:
            if added and not os.path.exists(path):
                self._index.remove(entry.name)
            raise
        self._checker.take_in(entry.name, path)
        self._index.set_pushed(entry.name, entry.stop)

    def _download(self, entry: RemoteSegment, path: str) -> None:
        temporary = temporary_path(path)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            try:
                unpack([functools.partial(self._pieces, key) for key in entry.parts], fd, path, entry.digests)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def _pieces(self, key: str) -> Iterator[memoryview]:
        for piece in self._objects.pieces(key, PIECE_BYTES):
            yield memoryview(piece).cast("B")

    # Cleaning up

    def compact_log(self) -> int:
        """Replace the manifests so far by one snapshot; return how many were deleted.

        Raises:
            StoreError: the store fails.
        """
        self.follow()
        return self._log.compact(self._index.log_position(self.url), self._index.remotes())

    def clean_up(self, max_bytes: int | None, older_than: float | None) -> CleanUp:
        """Remove segments from the store, the longest there first, and what interrupted pushes left.

        Ages are by the server's clock. A segment goes after those that continue it.

        Args:
            max_bytes: of packed segments to keep at most.
            older_than: seconds since they were pushed.

        Raises:
            StoreError: the store fails.
        """
        self.follow()
        listed = {key: (size, modified) for key, size, modified in self._objects.list_after(SEGMENTS, "")}
        self._objects.put("clock/now", [b"the time of this object is the server's"])
        now = max(modified for _, _, modified in self._objects.list_after("clock", ""))
        entries = {entry.name: entry for entry in self._index.remotes()}
        pushed = {
            name: min([listed[key][1] for key in entry.parts if key in listed], default=0.0)
            for name, entry in entries.items()
        }
        going = _going(entries, pushed, now, max_bytes, older_than)
        if going:
            self._append(Manifest(removed=[entry.name for entry in going]))
        named = {key for name, entry in entries.items() if entry not in going for key in entry.parts}
        mine = {key for entry in going for key in entry.parts}
        orphans = [
            key
            for key, (_, modified) in listed.items()
            if key not in named and key not in mine and now - modified > ORPHAN_SECONDS
        ]
        for key in [*mine, *orphans]:
            self._objects.delete(key)
        return CleanUp(
            segments=tuple(entry.name for entry in going),
            bytes=sum(entry.size for entry in going),
            orphans=len(orphans),
            manifests=self.compact_log(),
        )


def compact_every(segments: int) -> int:
    """Return after how many manifests a snapshot of so many segments is made: 128, 256, 512 and so on."""
    every = COMPACT_EVERY
    while every * ENTRIES_A_MANIFEST < segments:
        every *= 2
    return every


def _ends_in(entry: RemoteSegment, prompt: Prompt) -> bool:
    """Whether all of a segment is a prefix of a prompt, by its hash."""
    return entry.stop <= len(prompt) and prompt.hash_at(entry.stop) == entry.hash_list()[-1]


def _going(
    entries: dict[str, RemoteSegment],
    pushed: dict[str, float],
    now: float,
    max_bytes: int | None,
    older_than: float | None,
) -> list[RemoteSegment]:
    """Return which segments go, those that continue others before these."""
    children: dict[str, int] = {}
    for entry in entries.values():
        if entry.parent:
            children[entry.parent] = children.get(entry.parent, 0) + 1
    total = sum(entry.size for entry in entries.values())
    going: list[RemoteSegment] = []
    waiting = sorted((name for name in entries if not children.get(name)), key=lambda name: (pushed[name], name))
    while waiting:
        name = waiting.pop(0)
        entry = entries[name]
        old = older_than is not None and now - pushed[name] > older_than
        if not old and (max_bytes is None or total <= max_bytes):
            continue
        going.append(entry)
        total -= entry.size
        if entry.parent in entries:
            children[entry.parent] -= 1
            if not children[entry.parent]:
                waiting.append(entry.parent)
                waiting.sort(key=lambda name: (pushed[name], name))
    return going


FETCH_ERRORS = (MissingObjectError, CorruptCacheError, LibraryFullError, StoreError)
"""After these a session continues with what is here."""
