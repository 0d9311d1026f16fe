"""A Zarr-backed cache open for reading.

A reader sees the commit that it found when it last looked. Every block that it fetches is compared with the checksum
of this commit, so what a writer has changed since is noticed. Positions below a commit change only after `truncate`,
after which the next root has another generation. What a writer does besides is in `writer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, ReadOnlyError
from ...metadata import Document
from ..checkpoints import Checkpoints
from ..objects.lock import is_local
from ..objects.protocol import Objects
from ..protocols import LayerStore, Progress, VerifyReport
from ..readonly import ReadOnlyStorage
from ..rowless import RowlessLayer
from .checkpoints import ZarrCheckpoints
from .committed import BlockChecksums, read_tokens
from .handle import GroupHandle, read_root
from .layer import ZarrLayer
from .root import Root, layout_version
from .shard_cache import CACHE_BYTES, ShardCache
from .verify import verify_group


class ZarrReader(ReadOnlyStorage):
    """A group, open for reading.

    Args:
        objects: where it is.
        root: what was found there.
        tag: the root's version.
        cache_bytes: fetched rows to keep in memory.
    """

    kind = "zarr"
    writable = False

    def __init__(self, objects: Objects, root: Root, tag: str, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.handle = GroupHandle(objects, root, tag, writable=self.writable)
        self.checksums = BlockChecksums(self.handle)
        self.shards = ShardCache(self.handle, self.checksums, cache_bytes)
        self.objects = objects
        self.path: str = objects.url
        self.layout = root.layout
        self.geometry = root.layout.geometry
        self.lock = self.handle.lock
        self.token_len = root.token_len
        self._tokens: NDArray[np.int32] | None = None
        self.checkpoints: Checkpoints = ZarrCheckpoints(self.handle)
        self._prepare()
        self.layers: Sequence[LayerStore] = [
            self._make_layer(number) if layer.has_rows else RowlessLayer(self, number)
            for number, layer in enumerate(self.geometry.layers)
        ]
        self._show(root)

    @classmethod
    def open(cls, objects: Objects, *, cache_bytes: int = CACHE_BYTES) -> ZarrReader:
        """Read the root: one request."""
        return cls(objects, *read_root(objects), cache_bytes=cache_bytes)

    def _prepare(self) -> None:
        """Make what the layers of a writer share."""

    def _make_layer(self, number: int) -> ZarrLayer:
        return ZarrLayer(self, number, self.handle, self.shards)

    def _show(self, root: Root) -> None:
        """Make a root this handle's view: with states, the positions up to the last checkpoint."""
        length = self._continuable(root)
        self.token_len = min(root.token_len, length)
        self.handle.lengths[:] = [length] * len(self.handle.lengths)

    def _continuable(self, root: Root) -> int:
        if not root.checkpoints:
            return root.seq_len
        last = max([found.position for found in root.checkpoints if found is not None] + [0])
        self.rows_beyond = root.seq_len - last
        return last

    @property
    def root(self) -> Root:
        """The commit that this handle sees."""
        return self.handle.root

    @property
    def closed(self) -> bool:
        return self.handle.closed

    def check(self) -> None:
        self.handle.check()

    def version(self) -> int:
        return self.handle.truncations

    def validate(self, version: int) -> None:
        self.handle.validate(version)

    def refuse_write(self) -> NoReturn:
        self.check()
        raise ReadOnlyError(f'{self.path}: is open for reading; kvmmap.open(path, mode="a") appends', path=self.path)

    # Checksums

    @property
    def committed_len(self) -> int:
        return self.root.seq_len

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        with self.handle.watching_closing():
            return self.checksums.committed(first, stop)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every committed block, and compare it with its checksum."""
        self.check()
        with self.handle.watching_closing():
            return verify_group(self.handle, self.shards, self.checksums, progress)

    # Token ids and metadata

    @property
    def document(self) -> Document:
        return self.root.document

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        with self.handle.fetch_lock, self.handle.watching_closing():
            if self._tokens is None or len(self._tokens) < count:
                self._tokens = read_tokens(self.handle)
            return self._tokens[:count].copy()

    # Looking

    def refresh(self) -> bool:
        """Look again; True if there is another commit.

        Raises:
            CacheChangedError: another cache has taken this one's place.
        """
        with self.lock:
            return self._refresh()

    def _refresh(self) -> bool:
        self.check()
        handle = self.handle
        root, tag = read_root(self.objects)
        if root.cache_id != handle.root.cache_id:
            raise CacheChangedError(f"{self.path}: was replaced by another cache; open it again", path=self.path)
        if root.sequence == handle.root.sequence:
            return False
        with handle.fetch_lock:
            self.check()
            complete = min(root.seq_len, handle.root.seq_len) // self.geometry.block_tokens
            self.shards.drop(complete if root.generation == handle.root.generation else 0)
            self.checksums.clear()
            self._tokens = None
            before, handle.root, handle.tag = handle.root, root, tag
            self._show(root)
            if root.generation != before.generation:
                handle.truncations += 1
        return True

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` shows of the group."""
        root, owner = self.root, self.objects.owner()
        state = "open for writing" if owner is not None else "closed" if root.closed else "interrupted"
        return {
            "kind": self.kind,
            "format_version": layout_version(self.geometry),
            "created_ns": root.created_ns,
            "commit_sequence": root.sequence,
            "committed_len": root.seq_len,
            "commit_ns": root.commit_ns,
            "generation": root.generation,
            "state": state,
            "writer_pid": owner["pid"] if owner and is_local(owner) else 0,
        }

    def identity(self) -> str | None:
        return f"{self.root.cache_id}/{self.root.generation}"

    def close(self) -> None:
        """Release everything; views that were returned stay valid."""
        with self.lock:
            if not self.closed:
                self._release()

    def _release(self) -> None:
        self.handle.closed = True
        with self.handle.fetch_lock:
            self.shards.close()
            self._tokens = None
        self.handle.close_pool()
