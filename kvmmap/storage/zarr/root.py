"""The root of a Zarr-backed cache: its group's zarr.json, which holds the geometry, the last commit and the metadata.

It is what a commit replaces, in one put, after everything that it counts is in place. Whatever it does not carry
itself it carries digests of, so that nothing older, newer or damaged passes for a part of this commit. Pure.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...codecs import INT8, by_name, names
from ...errors import CorruptCacheError, KvmmapError, NotACacheError, VersionMismatchError
from ...format import Commit, checksum, num_slots
from ...geometry import CacheGeometry, LayerGeometry
from ...metadata import Document
from .layout import COMPRESSORS, MAX_SHARD_BYTES, Layout
from .root_states import GroupCheckpoint, decode_checkpoints, decode_states, encode_states

LAYOUT_VERSION = 1

STATES_VERSION = 2
"""The version of a group that has states, or layers without rows; older readers refuse it."""

PER_LAYER = "per layer"
"""Stands for codec and transform in a root whose "codecs" name those of each layer; older readers refuse it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root(Commit):
    """A commit, and all that is fixed with the cache."""

    layout: Layout

    cache_id: str
    """Random, made with the cache."""

    created_ns: int
    document: Document

    tails: tuple[int, ...]
    """Checksum of each layer's incomplete block, 0 where there is none."""

    sums_digests: tuple[int, ...]
    """Of each chunk of block checksums, as far as its blocks are complete."""

    token_digests: tuple[int, ...]
    """Of each chunk of token ids, as far as they are recorded."""

    checkpoints: tuple[GroupCheckpoint | None, ...] = ()
    """One a checkpoint slot."""

    copying: str | None = None
    """While a copy fills the cache: its stamp, so that the same copy, started again, continues it."""

    others: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The rest of zarr.json, which belongs to the user and to other programs; its "attributes" without ours."""

    @classmethod
    def new(cls, layout: Layout, document: Document, *, copying: str | None = None) -> Root:
        """The root of an empty cache."""
        now = time.time_ns()
        return cls(
            layout=layout,
            cache_id=secrets.token_hex(16),
            created_ns=now,
            sequence=1,
            seq_len=0,
            token_len=0,
            generation=1,
            commit_ns=now,
            closed=True,
            document=document,
            tails=(0,) * layout.geometry.num_layers,
            sums_digests=(),
            token_digests=(),
            checkpoints=(None,) * num_slots(layout.geometry),
            copying=copying,
        )

    def successor(self, **changes: Any) -> Root:
        """The next commit."""
        return replace(self, sequence=self.sequence + 1, commit_ns=time.time_ns(), **changes)

    @property
    def commit_id(self) -> tuple[str, int, int, int]:
        """What no other commit has, of this cache or of another."""
        return self.cache_id, self.sequence, self.generation, self.commit_ns

    def encode(self) -> bytes:
        """Return the group's zarr.json.

        Raises:
            MetadataError: the document is not plain JSON.
        """
        geometry = self.layout.geometry
        facts = {
            "version": layout_version(geometry),
            "cache_id": self.cache_id,
            "created_ns": self.created_ns,
            "capacity": geometry.capacity,
            "block_tokens": geometry.block_tokens,
            "shard_blocks": self.layout.shard_blocks,
            "compressor": self.layout.compressor,
            **_codecs(geometry),
            **_recent(geometry),
            "layers": [[layer.num_kv_heads, layer.head_dim, layer.value_head_dim] for layer in geometry.layers],
            "sequence": self.sequence,
            "seq_len": self.seq_len,
            "token_len": self.token_len,
            "generation": self.generation,
            "commit_ns": self.commit_ns,
            "closed": self.closed,
            "tails": _hex(self.tails),
            "sums_digests": _hex(self.sums_digests),
            "token_digests": _hex(self.token_digests),
            "copying": self.copying,
            **encode_states(geometry, self.checkpoints),
            "document": json.loads(self.document.encode()),
        }
        facts["checksum"] = _digest(facts)
        attributes = {**self.others.get("attributes", {}), "kvmmap": facts}
        ours = {"zarr_format": 3, "node_type": "group"}
        whole = {**ours, **self.others, **ours, "attributes": attributes}
        return json.dumps(whole, indent=1).encode()

    @classmethod
    def decode(cls, data: Any, url: str) -> Root:
        """Read what `encode` made, or another program has stored again.

        Raises:
            NotACacheError: it is some other group.
            VersionMismatchError: it needs a newer kvmmap.
            CorruptCacheError: it is damaged.
        """
        try:
            others = json.loads(bytes(data))
            facts = others["attributes"].pop("kvmmap")
            version = facts["version"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NotACacheError(f"{url}: not a kvmmap cache (its zarr.json does not say so)", path=url) from None
        if version not in (LAYOUT_VERSION, STATES_VERSION):
            raise VersionMismatchError(
                f"{url}: its layout is version {version!r}, and this kvmmap reads {STATES_VERSION}",
                path=url,
                expected=STATES_VERSION,
                actual=version,
            )
        stated = facts.pop("checksum", None)
        if stated != _digest(facts):
            raise CorruptCacheError(f"{url}: the root's zarr.json is damaged: its checksum does not match", path=url)
        _refuse_unknown(facts, url)
        try:
            return replace(cls._of_facts(facts, url), others=others)
        except (CorruptCacheError, VersionMismatchError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, KvmmapError) as error:
            raise CorruptCacheError(f"{url}: the root's zarr.json is invalid: {error!r}", path=url) from None

    @classmethod
    def _of_facts(cls, facts: dict[str, Any], url: str) -> Root:
        geometry = CacheGeometry(
            capacity=facts["capacity"],
            layers=tuple(
                LayerGeometry(*numbers, *(by_name(name) for name in codecs))
                for numbers, codecs in zip(facts["layers"], _layer_codecs(facts), strict=True)
            ),
            block_tokens=facts["block_tokens"],
            recent_window=facts.get("recent_window", 0),
            sinks=facts.get("sinks", 0),
            **decode_states(facts),
        )
        if facts["version"] != layout_version(geometry):
            raise VersionMismatchError(
                f"{url}: its layout is version {facts['version']}, and its layers and states are those of version "
                f"{layout_version(geometry)}",
                path=url,
                expected=layout_version(geometry),
                actual=facts["version"],
            )
        layout = Layout(geometry, facts["shard_blocks"], facts["compressor"])
        root = cls(
            layout=layout,
            document=Document.decode(json.dumps(facts["document"]).encode(), url),
            tails=_numbers(facts["tails"]),
            sums_digests=_numbers(facts["sums_digests"]),
            token_digests=_numbers(facts["token_digests"]),
            checkpoints=decode_checkpoints(facts, geometry),
            **{name: facts[name] for name in _PLAIN},
        )
        root._check()
        return root

    def _check(self) -> None:
        """Refuse what can't be."""
        geometry = self.layout.geometry
        numbers = (self.created_ns, self.sequence, self.seq_len, self.token_len, self.generation, self.commit_ns)
        if not all(type(number) is int and number >= 0 for number in (*numbers, self.layout.shard_blocks)):
            raise ValueError("a number is not one")
        if not self.token_len <= self.seq_len <= geometry.capacity:
            raise ValueError("lengths do not fit the capacity")
        # Shards get their room whole, so what is small must not say that it needs much.
        most = max(1, -(-geometry.capacity // geometry.block_tokens))
        if not 1 <= self.layout.shard_blocks <= most or self.layout.shard_bytes > MAX_SHARD_BYTES:
            raise ValueError("shards are larger than they can be")
        complete = self.seq_len // geometry.block_tokens
        counts = (len(self.tails), len(self.sums_digests), len(self.token_digests))
        shards = (-(-complete // self.layout.shard_blocks), -(-self.token_len // self.layout.shard_tokens))
        if any(found is not None and found.position > self.seq_len for found in self.checkpoints):
            raise ValueError("a checkpoint lies beyond the positions")
        expected = (geometry.num_layers, *shards)
        if counts != expected:
            raise ValueError(f"there are {counts} digests for {expected}")


_PLAIN = (
    "cache_id",
    "created_ns",
    "sequence",
    "seq_len",
    "token_len",
    "generation",
    "commit_ns",
    "closed",
    "copying",
)


def layout_version(geometry: CacheGeometry) -> int:
    """Return the version that a group of a geometry has."""
    return STATES_VERSION if geometry.states or len(geometry.row_layers) < geometry.num_layers else LAYOUT_VERSION


def _codecs(geometry: CacheGeometry) -> dict[str, Any]:
    """Return the facts that name the codecs: int8's alone where there is no other, as groups always had them."""
    if all(layer.key_codec is layer.value_codec is INT8 for layer in geometry.layers):
        return {"codec": INT8.id_name, "transform": INT8.transform_name}
    codecs = [[layer.key_codec.name, layer.value_codec.name] for layer in geometry.layers]
    return {"codec": PER_LAYER, "transform": PER_LAYER, "codecs": codecs}


def _recent(geometry: CacheGeometry) -> dict[str, int]:
    """Return the facts that say what is kept in 16 bits; none where nothing is, as groups always had them."""
    return {"recent_window": geometry.recent_window, "sinks": geometry.sinks} if geometry.keeps_recent else {}


def _layer_codecs(facts: dict[str, Any]) -> list[list[str]]:
    """Return the names of each layer's key codec and value codec."""
    if facts["codec"] != PER_LAYER:
        return [[INT8.name] * 2] * len(facts["layers"])
    found: list[list[str]] = facts["codecs"]
    return found


def _refuse_unknown(facts: dict[str, Any], url: str) -> None:
    known = {"codec": INT8.id_name, "transform": INT8.transform_name}
    if facts.get("codec") == PER_LAYER:
        known = {"codec": PER_LAYER, "transform": PER_LAYER}
        codecs = facts.get("codecs")
        for layer, pair in enumerate(codecs if isinstance(codecs, list) else ()):
            for part, codec in zip(("key", "value"), pair if isinstance(pair, list) else (), strict=False):
                if isinstance(codec, str) and codec not in names():
                    raise VersionMismatchError(
                        f"{url}: layer {layer} has {part} codec {codec!r}, and this kvmmap knows "
                        f"{', '.join(names())}: use a newer kvmmap",
                        path=url,
                        expected=names(),
                        actual=codec,
                        layer=layer,
                    )
    for name, value in known.items():
        if facts.get(name) != value:
            raise VersionMismatchError(
                f"{url}: its {name} is {facts.get(name)!r}, and this kvmmap reads {value!r}", path=url
            )
    if facts.get("compressor") not in list(COMPRESSORS):  # what is no key need not be hashable
        raise VersionMismatchError(f"{url}: its compressor {facts.get('compressor')!r} is unknown here", path=url)


def _digest(facts: dict[str, Any]) -> str:
    """Return the checksum of the values, independent of the order, blanks and escapes that they are stored with."""
    return f"{checksum(json.dumps(facts, sort_keys=True, separators=(',', ':')).encode()):016x}"


def _hex(numbers: tuple[int, ...]) -> list[str]:
    return [f"{number:016x}" for number in numbers]


def _numbers(texts: list[str]) -> tuple[int, ...]:
    return tuple(int(text, 16) for text in texts)
