"""The log of a shared library: small manifests, numbered without a gap, each put only if its number is free.

    log/0000000000000001.json      what one push added, or one clean-up removed
    snapshot.json                  all that the first so many manifests add up to

What the segments of one namespace have in common, such as its document, is in a manifest once.

A conditional put orders writers; no clock does. Followers list what comes after the last number that they know. Numbers
that a snapshot covers may be deleted: a follower that finds a gap reads the snapshot.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol

from ..errors import StoreError
from ..storage.objects.protocol import MissingObjectError, ObjectChangedError, Objects
from .hashing import Prompt

LOG = "log"
SNAPSHOT = "snapshot.json"
VERSION = 2
"""Version 1 had all fields in every entry; it is still read."""
AT_ONCE = 16
"""Manifests that are fetched at once."""

ATTEMPTS = 100
"""Numbers that other writers may take first, before a put gives up."""


class ListedObjects(Objects, Protocol):
    """Objects that can be listed from a key on."""

    def list_after(self, folder: str, after: str) -> Iterator[tuple[str, int, float]]:
        """Yield key, size and time of writing of the objects in a folder after a key, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSegment:
    """A segment that the object store has: positions [start, stop), as packed parts."""

    name: str
    namespace: str
    document: dict[str, Any]
    folder: str
    model: str
    position_bytes: int
    parent: str | None
    start: int
    stop: int
    hashes: str
    """Hashes of the block boundaries in (start, stop] and of the prefix that ends at `stop`; 16 bytes each, base64."""
    parts: list[str]
    """Keys, in order; fetched side by side."""
    size: int
    """Bytes of the stream."""
    digests: list[str]
    """Checksums of the parts, in their order."""
    disk_bytes: int
    """Bytes that its file takes on the disk."""
    checkpoints: dict[str, str] | None = None
    """Positions at which a model with states can continue it, with the hashes of the prefixes that end there; None if
    it can be continued at every position."""

    def hash_list(self) -> list[bytes]:
        """Return the hashes."""
        data = base64.b64decode(self.hashes)
        return [data[at : at + 16] for at in range(0, len(data), 16)]

    def restorable(self, length: int, prompt: Prompt) -> int:
        """Return at which length it can be continued for a prompt.

        Args:
            length: positions of it that are certainly the prompt's.
            prompt: for a model with states, its hashes find a checkpoint that may be somewhat further on.
        """
        if self.checkpoints is None:
            return length
        points = sorted((int(at) for at in self.checkpoints if int(at) <= len(prompt)), reverse=True)
        same = (at for at in points if prompt.hash_at(at).hex() == self.checkpoints[str(at)])
        return next(same, 0)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON, whole."""
        return {name: getattr(self, name) for name in _NAMES}  # `asdict` copies all that is inside

    @classmethod
    def of_json(cls, entry: Any) -> RemoteSegment | None:
        """Read what `to_json` returned; None for what a later version or another program wrote."""
        try:
            points = entry.get("checkpoints")
            if points is not None:
                points = {str(int(at)): str(hash) for at, hash in points.items()}
            found = cls(**{name: entry[name] for name in _NAMES if name != "checkpoints"}, checkpoints=points)
            names = [found.name, found.namespace, found.folder, *found.parts, *found.digests]
            names += [found.parent] if found.parent else []
            joined = "\n".join(names)  # what is no text can't be joined
            if "" in names or ".." in joined or joined.count("\n") >= len(names):
                return None
            if "/" in found.name + found.folder + (found.parent or "") or len(bytes.fromhex(found.namespace)) != 16:
                return None
            if not isinstance(found.document, dict) or not isinstance(found.model + found.hashes, str):
                return None
            if min(found.size, found.disk_bytes, found.position_bytes) < 0:
                return None
            if not 0 <= found.start < found.stop or len(base64.b64decode(found.hashes, validate=True)) % 16:
                return None
        except (TypeError, KeyError, ValueError, AttributeError, binascii.Error):
            return None
        return found


COMMON = ("namespace", "document", "folder", "model", "position_bytes")
"""Fields that segments of one namespace have in common."""

_NAMES = tuple([each.name for each in fields(RemoteSegment)])
_OWN = tuple([name for name in _NAMES if name not in COMMON])


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one number of the log says."""

    added: Sequence[RemoteSegment] = ()
    removed: Sequence[str] = ()

    def encode(self, **more: Any) -> bytes:
        """Return it as JSON, with other keys besides."""
        groups: dict[str, int] = {}
        added = []
        for entry in self.added:
            common = json.dumps({name: getattr(entry, name) for name in COMMON}, sort_keys=True)
            added.append(
                {name: getattr(entry, name) for name in _OWN} | {"group": groups.setdefault(common, len(groups))}
            )
        found = {"version": VERSION, "groups": [json.loads(common) for common in groups], "added": added}
        return json.dumps(found | {"removed": list(self.removed)} | more, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Read it; what can't be understood is left out."""
        try:
            return cls.of_json(json.loads(data))
        except ValueError:
            return cls()

    @classmethod
    def of_json(cls, raw: Any) -> Manifest:
        """Read its JSON, as `decode` does."""
        try:
            groups = raw.get("groups", [])
            found = [RemoteSegment.of_json(_whole(entry, groups)) for entry in raw["added"]]
            removed = [name for name in raw["removed"] if isinstance(name, str)]
        except (TypeError, KeyError, AttributeError):
            return cls()
        return cls(added=[entry for entry in found if entry is not None], removed=removed)


def _whole(entry: Any, groups: Any) -> Any:
    """Return an entry with what its group has in common; None if there is no such group."""
    try:
        return entry if "group" not in entry else entry | groups[entry["group"]]
    except (TypeError, KeyError, IndexError):
        return None


class Log:
    """The log in an object store.

    Args:
        objects: the store, below the library's prefix.
    """

    def __init__(self, objects: ListedObjects) -> None:
        self._objects = objects

    def append(self, manifest: Manifest, position: int) -> int | None:
        """Add a manifest after a position; return its number. Numbers that others took meanwhile are skipped.

        Returns:
            None, and nothing was added, if the log was compacted beyond the position: follow, and append again.

        Raises:
            StoreError: the store fails, or has no conditional puts.
        """
        data = manifest.encode()
        for number in range(position + 1, position + 1 + ATTEMPTS):
            try:
                self._objects.put_if(key_of(number), data, None)
            except ObjectChangedError:
                continue
            if self._is_covered(number):
                self._objects.delete(key_of(number))
                return None
            return number
        raise StoreError(f"{self._objects.url}: {ATTEMPTS} others wrote to the log meanwhile", path=self._objects.url)

    def _is_covered(self, number: int) -> bool:
        """True if a number was free because compacting had deleted its manifest: followers would not see another."""
        # Manifests are deleted in order, and the last one stays, so then the one before is gone.
        try:
            self._objects.get(key_of(number - 1) if number > 1 else SNAPSHOT)
            return number == 1
        except MissingObjectError:
            return number > 1

    def follow(self, position: int) -> tuple[int, list[Manifest], bool]:
        """Return what came after a position: the new position, manifests in order, and True if they begin anew.

        Raises:
            StoreError: the store fails.
        """
        try:
            return self._follow(position, False)
        except MissingObjectError:  # compacted between listing and fetching
            return self._follow(position, True)

    def _follow(self, position: int, gap: bool) -> tuple[int, list[Manifest], bool]:
        numbers = self._numbers(position)
        anew = False
        found: list[Manifest] = []
        if gap or (numbers and numbers[0] != position + 1) or (not numbers and position == 0):
            snapshot = self._snapshot()
            if snapshot is not None and snapshot[0] > position:
                position, manifest = snapshot
                found, anew = [manifest], True
                numbers = [number for number in numbers if number > position] or self._numbers(position)
        # Up to a gap: what is behind it was put before what fills it, or the snapshot is about to cover it.
        count = next((at for at, number in enumerate(numbers) if number != position + 1 + at), len(numbers))
        numbers = numbers[:count]
        if len(numbers) > 2:
            with ThreadPoolExecutor(min(AT_ONCE, len(numbers))) as pool:
                found += pool.map(self._get, numbers)
        else:
            found += map(self._get, numbers)
        return position + len(numbers), found, anew

    def _numbers(self, position: int) -> list[int]:
        listed = self._objects.list_after(LOG, key_of(position))
        names = (key.rpartition("/")[2].removesuffix(".json") for key, _, _ in listed)
        return sorted(int(name) for name in names if name.isdecimal() and int(name) > position)

    def _get(self, number: int) -> Manifest:
        return Manifest.decode(bytes(self._objects.get(key_of(number))))

    def _snapshot(self) -> tuple[int, Manifest] | None:
        try:
            return _decode_snapshot(bytes(self._objects.get(SNAPSHOT)))
        except MissingObjectError:
            return None

    def compact(self, position: int, entries: Sequence[RemoteSegment]) -> int:
        """Put a snapshot of everything up to a position, and delete the manifests that it covers; return how many.

        Nothing happens if another snapshot covers as much.

        Raises:
            StoreError: the store fails.
        """
        tag = None
        try:
            data, tag = self._objects.get_tagged(SNAPSHOT)
            present = _decode_snapshot(bytes(data))
            if present is not None and present[0] >= position:
                return 0
        except MissingObjectError:
            pass
        try:
            self._objects.put_if(SNAPSHOT, Manifest(added=entries).encode(position=position), tag)
        except ObjectChangedError:
            return 0
        covered = [key for key, _, _ in self._objects.list_after(LOG, "") if key <= key_of(position)]
        # The last one stays: followers that know it need no snapshot.
        for key in covered[:-1]:
            self._objects.delete(key)
        return len(covered[:-1])


def _decode_snapshot(data: bytes) -> tuple[int, Manifest] | None:
    try:
        raw = json.loads(data)
        return int(raw["position"]), Manifest.of_json(raw)
    except (ValueError, TypeError, KeyError):
        return None


def key_of(number: int) -> str:
    """Return the key of a number of the log."""
    return f"{LOG}/{number:016d}.json"
