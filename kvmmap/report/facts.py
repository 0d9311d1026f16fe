"""The facts that `inspect` shows about a cache: dimensions, fill, sizes, model, commit state.

Read through the public face of a cache, so any storage will do. Nothing is formatted here; printing is the caller's.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ..cache import QuantizedKvCache
from ..metadata import ModelInfo
from ..ranges import compression_ratio
from ..storage.process import is_running
from .states import StatesReport, inspect_states

State = Literal["closed", "open for writing", "interrupted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """One layer."""

    index: int
    """Which one, from 0."""

    num_kv_heads: int
    """Key and value heads; 0 for a layer without rows."""

    head_dim: int
    """Numbers in a key row."""

    value_head_dim: int
    """Numbers in a value row."""

    key_codec: str
    """How key rows are quantised, by the name of the codec's byte in a file; "none" without rows."""

    key_transform: str
    """What key rows go through before that, by name."""

    value_codec: str
    """How value rows are quantised, likewise."""

    value_transform: str
    """What value rows go through before that, by name."""

    key_codec_name: str
    """What `create` calls codec and transform of key rows together, such as "int8-rotated"; "none" without rows."""

    value_codec_name: str
    """What it calls those of value rows."""

    memory_bytes: int
    """Bytes of codes and scales over the whole capacity."""

    stored_bytes: int
    """Bytes of codes and scales of the positions that are stored."""

    fp32_memory_bytes: int
    """Bytes that the whole capacity takes as f32."""

    compression_ratio: float
    """`fp32_memory_bytes` over `memory_bytes`; 1.0 at capacity 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReport:
    """What would survive power loss, and who is writing."""

    state: State
    """"closed": no writer has it open, and all is committed. "open for writing": a writer has it. "interrupted":
    its last writer, or the machine, ended without closing; the next writer continues from what is stored."""

    sequence: int
    """Number of the last commit."""

    committed_len: int
    """Positions that survive power loss."""

    uncommitted: int
    """Positions that are stored besides: they survive the writer's death, and not the machine's."""

    committed: datetime
    """When, in UTC."""

    generation: int
    """Changes when stored positions are truncated."""

    writer_pid: int | None
    """Process id of the writer, while it has the cache open or if it never closed it; None if it did, or if the id is
    damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParentReport:
    """A file that a cache continues."""

    path: str
    """Absolute path."""

    start: int
    """Position of the cache from which on the file has them."""

    stop: int
    """One past the last that it has."""

    disk_bytes: int
    """What the file really occupies on disk, all of its positions together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReport:
    """A whole cache, at one moment."""

    path: str | None
    """Absolute path; None in memory."""

    kind: str
    """"kvm" (a file) or "memory"."""

    format_version: int | None
    """Version of the file format; None in memory."""

    created: datetime | None
    """When the file was made, in UTC; None in memory."""

    num_layers: int
    """Transformer layers."""

    seq_len: int
    """Positions stored in every layer."""

    capacity: int
    """Positions reserved."""

    token_len: int
    """Positions, from 0, whose token ids are recorded."""

    block_tokens: int
    """Positions in a block, the unit of checksums."""

    recent_window: int
    """Last positions that are kept in 16 bits besides."""

    sinks: int
    """First positions that are kept in 16 bits besides."""

    recent_bytes: int
    """Bytes of these over all layers, whatever the length."""

    memory_bytes: int
    """Bytes of codes and scales over the whole capacity, all layers."""

    stored_bytes: int
    """Bytes of codes and scales of the positions that are stored, all layers."""

    fp32_memory_bytes: int
    """Bytes that the whole capacity takes as f32."""

    compression_ratio: float
    """`fp32_memory_bytes` over `memory_bytes`; 1.0 at capacity 0."""

    file_bytes: int | None
    """Apparent size of the file, holes included, without parents; None in memory."""

    disk_bytes: int | None
    """What the file really occupies on disk, without parents; None in memory."""

    parents: tuple[ParentReport, ...]
    """The files that the cache continues, from the first on; none of most caches."""

    model: ModelInfo | None
    """What made the cache, if that was recorded."""

    metadata: dict[str, Any]
    """The user's own notes, plain JSON."""

    commit: CommitReport | None
    """None in memory."""

    layers: tuple[LayerReport, ...]
    """One a layer, in order."""

    states: StatesReport | None = None
    """States and checkpoints; None if it has no states."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON types: nested dicts and lists, times as ISO 8601 in UTC."""
        plain = asdict(self)
        plain["created"] = _iso(self.created)
        if self.commit is not None:
            plain["commit"]["committed"] = _iso(self.commit.committed)
        plain["layers"], plain["parents"] = list(plain["layers"]), list(plain["parents"])
        return plain


def inspect(cache: QuantizedKvCache) -> CacheReport:
    """Report on an open cache.

    What another process writes meanwhile shows after `cache.refresh()`.

    Raises:
        CorruptCacheError: its metadata is damaged.
        CacheChangedError: the writer truncated since the last `refresh`.
        ClosedError: the cache is closed.
    """
    facts = cache.facts()
    length = cache.seq_len
    layers = tuple(_layer(cache, index, length) for index in range(cache.num_layers))
    return CacheReport(
        path=cache.path,
        kind=facts["kind"],
        format_version=facts.get("format_version"),
        created=_time(facts["created_ns"]) if "created_ns" in facts else None,
        num_layers=cache.num_layers,
        seq_len=length,
        capacity=cache.capacity,
        token_len=cache.token_len,
        block_tokens=cache.geometry.block_tokens,
        recent_window=cache.geometry.recent_window,
        sinks=cache.geometry.sinks,
        recent_bytes=cache.geometry.recent_bytes,
        memory_bytes=cache.memory_bytes,
        stored_bytes=sum(layer.stored_bytes for layer in layers),
        fp32_memory_bytes=cache.fp32_memory_bytes,
        compression_ratio=cache.compression_ratio,
        file_bytes=facts.get("file_bytes"),
        disk_bytes=facts.get("disk_bytes"),
        parents=tuple(ParentReport(**parent) for parent in facts.get("parents", ())),
        model=cache.model,
        metadata=cache.metadata,
        commit=_commit(facts, length) if "state" in facts else None,
        layers=layers,
        states=inspect_states(cache),
    )


def _layer(cache: QuantizedKvCache, index: int, length: int) -> LayerReport:
    geometry, capacity = cache.geometry.layers[index], cache.capacity
    memory, fp32 = capacity * geometry.position_bytes, capacity * geometry.fp32_position_bytes
    return LayerReport(
        index=index,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        value_head_dim=geometry.value_head_dim,
        key_codec=geometry.key_codec.id_name if geometry.has_rows else "none",
        key_transform=geometry.key_codec.transform_name,
        value_codec=geometry.value_codec.id_name if geometry.has_rows else "none",
        value_transform=geometry.value_codec.transform_name,
        key_codec_name=geometry.key_codec.name if geometry.has_rows else "none",
        value_codec_name=geometry.value_codec.name if geometry.has_rows else "none",
        memory_bytes=memory,
        stored_bytes=length * geometry.position_bytes,
        fp32_memory_bytes=fp32,
        compression_ratio=compression_ratio(fp32, memory),
    )


def _commit(facts: dict[str, Any], length: int) -> CommitReport:
    pid: int | None = facts["writer_pid"] or None
    state: State = facts["state"]
    # The file says that a writer has it until that writer closes it; one that was killed never does.
    if state == "open for writing" and pid is not None and not is_running(pid):
        state = "interrupted"
    return CommitReport(
        state=state,
        sequence=facts["commit_sequence"],
        committed_len=facts["committed_len"],
        uncommitted=max(0, length - facts["committed_len"]),
        committed=_time(facts["commit_ns"]),
        generation=facts["generation"],
        writer_pid=pid,
    )


def _time(nanoseconds: int) -> datetime:
    with contextlib.suppress(OverflowError, ValueError):  # a year beyond 9999
        return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
    return datetime.max.replace(tzinfo=UTC)


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")
