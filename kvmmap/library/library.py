"""`Library`: many caches as one store, shared by any number of processes. `upkeep` has what looks after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..cache_reader import CacheReader
from ..errors import (
    CacheNotFoundError,
    CapacityExceededError,
    KvmmapError,
    MetadataError,
    NoCheckpointError,
    ShapeMismatchError,
    UnknownTokensError,
)
from ..inputs import check_token_ids
from ..opening import open_cache
from ..paths import PathLike
from ..ranges import index as whole
from .contents import read_own_tokens
from .hashing import Prompt
from .making import Tail, Vanished
from .matching import Match, Search
from .models import open_for_model
from .namespace import NOTES, Namespace, check_digest
from .segment import Segment
from .session import Session
from .shared import LibrarySharing

LEAST_CAPACITY = 8192
"""Positions that a new segment has room for, at least. It costs no disk."""

ATTEMPTS = 16
"""Matches whose segments vanish before they can be opened, before a session gives up."""

COPY_POSITIONS = 1024
"""Positions that `put` copies at a time."""


class SessionOptions(TypedDict, total=False):
    """Arguments of `Library.session` besides the prompt."""

    limit: int | None
    capacity: int | None
    metadata: Mapping[str, Any] | None


class Library(LibrarySharing):
    """A directory of caches that answers which of them has the longest prefix of a prompt.

    Any number of processes and threads use it at once, without a server. Segments are ordinary `.kvm` files; the index
    is an SQLite database that is rebuilt from them if it is lost.

    Args:
        path: of the directory. It is made if it is not there; one that has other things in it is refused.
        max_bytes: bytes on the disk to keep at most. The library remembers it; None leaves it as it is, and a new
            library without a limit.
        ttl: seconds after their last use for which new segments are kept; remembered likewise.
        create: make a library where there is none.
        remote: URL of a prefix of an object store, such as "s3://bucket/prefix", to share segments through with other
            machines; remembered likewise.
        storage_options: of the store, as in `kvmmap.create`; not remembered.
        write_through: push what is committed in the background; otherwise only `push` does.
        follow_every: seconds between looks in the background at what others have pushed; None: only `pull` looks, or a
            push.

    It is a context manager that closes.

    Raises:
        NotACacheError: there is something else at the path.
        CacheNotFoundError: there is no library, and `create` is False.
        VersionMismatchError: a newer kvmmap made the library.
        CorruptCacheError: its settings are damaged.
        OSError: the directory can't be made or written to.
    """

    # Looking up

    def match(self, namespace: Namespace | str, token_ids: Any, *, limit: int | None = None) -> Match:
        """Find the longest prefix of a prompt that can be restored. It is not a use of what is found.

        Args:
            namespace: only segments of this one count; or its digest, as `namespaces` has it.
            token_ids: the prompt, n whole numbers from 0 to 2**31 - 1.
            limit: match at most so many of them. A model needs one position to compute logits from: len(token_ids) - 1.

        Raises:
            ShapeMismatchError, DtypeError: not such numbers.
            MetadataError: the namespace's facts are no plain JSON; or it is neither a namespace nor a digest of one.
            ClosedError: the library is closed.
        """
        digest = namespace.digest if isinstance(namespace, Namespace) else check_digest(namespace)
        return self._match(digest, self._prompt(digest, token_ids, limit))

    def _prompt(self, digest: str, token_ids: Any, limit: int | None) -> Prompt:
        ids = check_token_ids(token_ids, None)
        if limit is not None:
            ids = ids[: max(0, whole(limit, "limit"))]
        return Prompt(bytes.fromhex(digest), ids)

    def _match(self, digest: str, prompt: Prompt) -> Match:
        number = self._open_index.namespace_id(digest)
        if number is None:
            return Match(length=0, common=0, chain=())
        return Search(self._open_index, number, prompt, read_own_tokens).run()

    def open(self, match: Match) -> QuantizedKvCache:
        """Open what a match found, for reading. Its first `match.length` positions are those of the prompt.

        This is a use of it. What is evicted meanwhile can still be read until it is closed.

        Raises:
            CacheNotFoundError: nothing matched, or it was evicted since: match again.
            FormatError, OSError: as in `kvmmap.open`.
        """
        if match.path is None:
            raise CacheNotFoundError(f"{self.path}: nothing matched, so there is nothing to open", path=self.path)
        cache = open_cache(match.path, record_use=False)
        self._use(match, 0)
        return cache

    # Sessions

    @overload
    def session(self, namespace: Namespace, token_ids: Any, **options: Unpack[SessionOptions]) -> Session: ...
    @overload
    def session(self, namespace: Any, token_ids: Any, **options: Unpack[SessionOptions]) -> Any: ...
    def session(
        self,
        namespace: Any,
        token_ids: Any,
        *,
        limit: int | None = None,
        capacity: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Any:
        """Open a cache that begins with what the library has of a prompt, to be continued.

            with library.session(namespace, token_ids, limit=len(token_ids) - 1) as cache:
                keys, values = compute(token_ids[cache.reused :])
                cache.extend(keys, values, token_ids[cache.reused :])

        What is appended is private until `flush` or `close` makes it part of the library. Where a segment of the
        library ends, it is appended to in place, unless another session does so already.

        Args:
            namespace, token_ids, limit: as in `match`. Or a model in place of the namespace, whose integration is
                imported: then the session is a cache that this model takes (`kvmmap.integrations.transformers`).
            capacity: positions that there is to be room for, with those of the prompt; by default twice the prompt's,
                at least 8,192. Room costs no disk.
            metadata: plain JSON, kept with a new segment; "library" is the library's own key.

        Returns:
            A cache open for appending that holds `reused` positions. Close it.

        Raises:
            ShapeMismatchError, DtypeError, MetadataError, ClosedError: as in `match`.
            LibraryFullError: there is no room for a new segment.
            OSError: the disk is failing.

            While appending, besides what `extend` raises:
            LibraryFullError: nothing more can be evicted; nothing was appended.
        """
        if not isinstance(namespace, Namespace):
            return open_for_model(self, namespace, token_ids, limit=limit, capacity=capacity, metadata=metadata)
        ids = check_token_ids(token_ids, None)
        room = max(LEAST_CAPACITY, 2 * len(ids)) if capacity is None else whole(capacity, "capacity")
        if room < len(ids):
            raise ShapeMismatchError(
                f"capacity is {room} positions, and the prompt alone has {len(ids)}", expected=len(ids), actual=room
            )
        sought = Prompt(namespace.seed, ids if limit is None else ids[: max(0, whole(limit, "limit"))])
        number = self._number(namespace)
        self._kick()
        for attempt in range(ATTEMPTS):
            match = self._match(namespace.digest, sought)
            if attempt == 0 and self._fetch_longer(namespace.digest, sought, match.length):
                match = self._match(namespace.digest, sought)
            try:
                tail = self._maker.tail(
                    namespace,
                    number,
                    match,
                    sought,
                    capacity=room,
                    metadata=_own(metadata),
                    ttl=self._settings.ttl,
                )
            except Vanished:
                if attempt == ATTEMPTS // 2:
                    self.check()
                continue
            self._use(match, len(ids) - match.length)
            return self._begin(namespace, match, tail, ids, may_repeat=0 < match.common == len(sought))
        raise KvmmapError(f"{self.path}: segments vanish as fast as they are found: is something else deleting them?")

    def _begin(
        self, namespace: Namespace, match: Match, tail: Tail, ids: NDArray[np.int32], *, may_repeat: bool
    ) -> Session:
        session = Session.of_storage(tail.cache.storage)
        assert isinstance(session, Session)
        session.begin(
            self._owner,
            name=tail.name,
            namespace=namespace,
            reused=match.length,
            parent=tail.parent,
            start=tail.start,
            continues=tail.continues,
            prompt=ids,
            may_repeat=may_repeat,
        )
        return session

    def _number(self, namespace: Namespace) -> int:
        number = self._open_index.namespace_id(namespace.digest)
        if number is None:
            os.makedirs(os.path.join(self.path, "caches", namespace.folder), mode=0o700, exist_ok=True)
            number = self._open_index.add_namespace(
                namespace.digest,
                namespace.folder,
                namespace.document,
                namespace.model.name or "",
                namespace.position_bytes,
            )
        return number

    def _use(self, match: Match, computed: int) -> None:
        self._open_index.use(match.chain, match.length, computed)
        self._metrics.session(match, computed)

    def put(
        self,
        cache: PathLike | CacheReader,
        namespace: Namespace | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> Segment:
        """Take an existing cache into the library: its rows are copied, as far as the library does not have them.

        If the cache has states, its checkpoints are copied, and positions up to the last checkpoint.

        Args:
            cache: path or URL of a cache, or an open one, of which every position has a token id.
            namespace: whose keys and values it holds; by default what the cache says, `Namespace.of(cache)`.
            metadata: as in `session`; by default the cache's.

        Returns:
            The segment that has its last position.

        Raises:
            UnknownTokensError: a position has no token id.
            NoCheckpointError: the cache has states, and no checkpoint to continue from.
            ShapeMismatchError: the namespace has other layers, codecs or states than the cache.
            LibraryFullError: there is no room for it.
            CorruptCacheError, FormatError, CacheNotFoundError, StoreError, OSError: as in `kvmmap.open` and `copy`.
        """
        with contextlib.ExitStack() as stack:
            if isinstance(cache, CacheReader):
                source = cache
            else:
                source = stack.enter_context(open_cache(cache, record_use=False))
            return self._take_in(source, namespace or Namespace.of(source), metadata)

    def _take_in(self, source: CacheReader, namespace: Namespace, metadata: Mapping[str, Any] | None) -> Segment:
        ids = source.token_ids
        unknown = np.flatnonzero(ids < 0)
        if len(unknown) or not len(ids):
            where = int(unknown[0]) if len(unknown) else 0
            raise UnknownTokensError(
                f"{source.path or 'the cache'}: position {where} has no token id, so nothing could ever match it: give "
                "token ids when appending",
                position=where,
                actual=len(ids),
                path=source.path,
            )
        if not isinstance(namespace, Namespace):
            raise MetadataError(f"give a Namespace, not a {type(namespace).__name__}")
        if (source.geometry.layers, source.states) != (namespace.layers, namespace.states):
            raise ShapeMismatchError(
                f"{source.path or 'the cache'}: its layers, codecs or states are not those of the namespace",
                expected=namespace.layers,
                actual=source.geometry.layers,
                path=source.path,
            )
        ids = ids[: source.restorable(min(len(ids), source.seq_len))]
        if not len(ids):
            raise NoCheckpointError(
                f"{source.path or 'the cache'}: has states and no checkpoint, so it could never be continued: call "
                "write_states() and checkpoint() when they are known",
                path=source.path,
            )
        notes = source.metadata if metadata is None else metadata
        notes = {key: value for key, value in notes.items() if key != NOTES}
        with self.session(namespace, ids, capacity=max(len(ids), source.capacity), metadata=notes) as session:
            _copy_rest(source, session, ids)
            name = session.name if len(ids) > session.reused or session.continues else None
        found = self._open_index.segment(name) if name else None
        if found is None:  # it was there already
            found = self._match(namespace.digest, Prompt(namespace.seed, ids)).segment
        if found is None:
            raise CacheNotFoundError(
                f"{self.path}: what was put in is evicted already: raise max_bytes", path=self.path
            )
        return found


def _copy_rest(source: CacheReader, session: Session, ids: NDArray[np.int32]) -> None:
    """Append what a session lacks of a cache, whose token ids these are, with its checkpoints."""
    stops = {len(ids): False}
    if source.states:
        stops = {found.position: found.pinned for found in source.checkpoints if found.position <= len(ids)}
    start = session.reused
    for end, pinned in stops.items():
        if end <= session.reused:
            continue
        while start < end:
            stop = min(start + COPY_POSITIONS, end)
            for layer, old in zip(session.layers, source.layers, strict=True):
                if layer.geometry.has_rows:
                    layer.extend_from(old, start, stop)
            session.push_token_ids(ids[start:stop])
            start = stop
        if source.states:
            session.write_states(source.read_states(end))
            try:
                session.checkpoint(pin=pinned)
            except CapacityExceededError:  # of those of a child, one stays where it begins
                session.checkpoint()


def _own(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metadata of a caller.

    Raises:
        MetadataError: it has the key that is the library's, or is not a mapping.
    """
    if not isinstance(metadata, Mapping | None):
        raise MetadataError(f"metadata must be a mapping, not a {type(metadata).__name__}", actual=metadata)
    found = dict(metadata or {})
    if NOTES in found:
        raise MetadataError(f"the key {NOTES!r} of the metadata is the library's own")
    return found
