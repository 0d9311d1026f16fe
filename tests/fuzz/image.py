"""Build a hostile file from a recipe: a valid file with changed fields and every checksum recomputed.

A recipe is plain JSON, so that a corpus of them is small and says what it is about.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import tempfile
from typing import Any

import numpy as np
import xxhash

import kvmmap
from kvmmap import _core
from kvmmap.format import LIVE, LIVE_LENGTHS, RECENT_SECTIONS, Section, Superblock, checksum
from kvmmap.format.records import (
    CHECKPOINT_ENTRY,
    CHECKSUM,
    HEADER,
    LAYER_ENTRY,
    SECTION_ENTRY,
    SLOT,
    STATE_ENTRY,
    STATES_FEATURE,
    Record,
)
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.metadata import Document, ModelInfo
from kvmmap.storage.file.writer import MappedWriter

Recipe = dict[str, Any]
"""`geometry`, [capacity, block_tokens, [[heads, dim, value_dim], ...]], and where rows are kept in 16 bits
besides, recent window and sinks; `length`, positions stored; `open`, whether its writer has not closed it; `changes`, a
list of lists: what, which, value."""

LARGEST = 4 << 20
"""Bytes of a file that is written out; what lies beyond is a hole."""

_LIVE_FIELDS = {field.name: offset for offset, _, field in LIVE.rows()}
_SLOTS = (Section.SLOT_A, Section.SLOT_B)


class Image:
    """A file in memory: its superblock and slots as fields, and the rest as bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.header = HEADER.unpack(data)
        at = HEADER.size
        self.layers = [LAYER_ENTRY.unpack(data, at + i * LAYER_ENTRY.size) for i in range(self.header["num_layers"])]
        at += LAYER_ENTRY.size * len(self.layers)
        count = self.header["num_sections"]
        self.sections = [SECTION_ENTRY.unpack(data, at + i * SECTION_ENTRY.size) for i in range(count)]
        at += SECTION_ENTRY.size * count
        states = (self.header["superblock_bytes"] - CHECKSUM.size - at) // STATE_ENTRY.size
        states *= bool(self.header["features"] & STATES_FEATURE)
        self.states = [STATE_ENTRY.unpack(data, at + i * STATE_ENTRY.size) for i in range(states)]
        self.places = {(entry["kind"], entry["layer"]): entry["offset"] for entry in self.sections}
        self.sizes = {(entry["kind"], entry["layer"]): entry["bytes"] for entry in self.sections}
        places = [self.places[kind, 0xFFFFFFFF] for kind in _SLOTS]
        checkpoints = sum(entry["kind"] == Section.CHECKPOINT for entry in self.sections)
        tails = struct.Struct(f"<{len(self.layers) + 1}Q")
        self.slots = [SLOT.unpack(data, at) for at in places]
        self.tails = [list(tails.unpack_from(data, at + SLOT.size)) for at in places]
        size, behind = CHECKPOINT_ENTRY.size, SLOT.size + tails.size
        self.entries = [  # of checkpoints, in each commit slot: word and checksum
            [list(CHECKPOINT_ENTRY.struct.unpack_from(data, at + behind + i * size)) for i in range(checkpoints)]
            for at in places
        ]
        self.live: dict[int, int] = {}  # offset in the record -> value, stored as a checked word
        self.raw: list[tuple[int, bytes]] = []  # last of all, with no checksum made right

    def at(self, kind: Section, layer: int = 0xFFFFFFFF) -> int:
        """Where a section lies, by what the superblock will say."""
        for entry in self.sections:
            if (entry["kind"], entry["layer"]) == (kind, layer):
                return int(entry["offset"])
        return self.places.get((kind, layer), 0)

    def put(self, offset: int, data: bytes) -> None:
        """Overwrite bytes, as far as they lie within what is written out."""
        if 0 <= offset < LARGEST:
            data = data[: LARGEST - offset]
            if len(self.data) < offset + len(data):
                self.data.extend(bytes(offset + len(data) - len(self.data)))
            self.data[offset : offset + len(data)] = data

    def encode(self) -> bytes:
        """Return the bytes."""
        self._move_sections()
        header = self.header
        body = _pack(HEADER, header) + b"".join(_pack(LAYER_ENTRY, entry) for entry in self.layers)
        body += b"".join(_pack(SECTION_ENTRY, entry) for entry in self.sections)
        body += b"".join(_pack(STATE_ENTRY, entry) for entry in self.states)
        self.put(0, body + CHECKSUM.pack(checksum(body)))
        for kind, slot, tails, entries in zip(_SLOTS, self.slots, self.tails, self.entries, strict=True):
            packed = _pack(SLOT, slot) + struct.pack(f"<{len(tails)}Q", *tails)
            packed += b"".join(CHECKPOINT_ENTRY.struct.pack(*entry) for entry in entries)
            self.put(self.at(kind), packed + CHECKSUM.pack(checksum(packed)))
        salt = int.from_bytes(header["file_id"][:8], "little")
        for offset, value in self.live.items():
            word = bytearray(8)
            _core.publish(word, 0, value % 2**40, offset // 8, salt)
            self.put(self.at(Section.LIVE) + offset, bytes(word))
        for offset, data in self.raw:
            self.put(offset, data)
        return bytes(self.data)

    def count(self) -> None:
        """Make the counts in the header those of the tables."""
        self.header["num_sections"] = len(self.sections)
        size = HEADER.size + LAYER_ENTRY.size * len(self.layers) + SECTION_ENTRY.size * len(self.sections)
        self.header["superblock_bytes"] = size + STATE_ENTRY.size * len(self.states) + CHECKSUM.size

    def _move_sections(self) -> None:
        """What a section holds goes along with it."""
        moves = []
        for entry in self.sections:
            key = entry["kind"], entry["layer"]
            old = self.places.get(key)
            if old is not None and old != entry["offset"]:
                moves.append((entry["offset"], bytes(self.data[old : old + self.sizes[key]])))
        for offset, data in moves:
            self.put(offset, data)


def build(recipe: Recipe) -> tuple[bytes, int]:
    """Return a recipe's file: its bytes, and its size, which may be more (a hole) or less."""
    geometry = recipe["geometry"]
    image = Image(_sound(json.dumps(geometry), recipe["length"], recipe["open"]))
    apply(image, recipe["changes"])
    data = image.encode()
    return data, image.size


def apply(image: Image, changes: list[list[Any]]) -> None:
    """Change an image."""
    for change in changes:
        _CHANGES[change[0]](image, *change[1:])


@functools.lru_cache(maxsize=64)
def _sound(geometry: str, length: int, open_: bool) -> bytes:
    """A sound file, made by kvmmap itself."""
    capacity, block_tokens, layers, *recent = json.loads(geometry)
    window, sinks = recent or (0, 0)
    shape = CacheGeometry(
        capacity,
        tuple(LayerGeometry(*numbers) for numbers in layers),
        block_tokens,
        recent_window=window,
        sinks=sinks,
    )
    note = Document(ModelInfo(name="some/model", rope={"theta": 1e4}), {"note": [1, "two", None]})
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        path = os.path.join(folder, "sound.kvm")
        cache = kvmmap.QuantizedKvCache.of_storage(MappedWriter.create(path, shape, note, metadata_room=6000))
        random = np.random.default_rng(length)
        _extend(cache, random, length // 2)
        cache.flush()
        _extend(cache, random, length - length // 2)
        return bytes_of(cache, path, open_)


def _extend(cache: kvmmap.QuantizedKvCache, random: np.random.Generator, count: int) -> None:
    keys, values = (
        [
            random.standard_normal((count, layer.num_kv_heads, dim(layer)), dtype=np.float32)
            for layer in cache.geometry.layers
        ]
        for dim in (lambda layer: layer.head_dim, lambda layer: layer.value_head_dim)
    )
    cache.extend(keys, values, np.arange(count))


def bytes_of(cache: kvmmap.QuantizedKvCache, path: str, open_: bool) -> bytes:
    """The bytes of a cache's file, while it is open or afterwards; it is closed then."""
    if not open_:
        cache.close()
    with open(path, "rb") as file:
        data = file.read(LARGEST)
    cache.close()
    return data


def memory_folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


@functools.cache
def _limits(record: Record) -> list[int]:
    return [256**size for _, size, _ in record.rows()]


def _pack(record: Record, values: dict[str, Any]) -> bytes:
    """Pack, with whole numbers cut to what their fields hold."""
    fields = zip(record.fields, _limits(record), strict=True)
    fitting = [values[field.name] % limit if field.code[-1] != "s" else values[field.name] for field, limit in fields]
    packed: bytes = record.struct.pack(*fitting)
    return packed


# Changes


def _header(image: Image, field: str, value: Any) -> None:
    image.header[field] = bytes.fromhex(value) if isinstance(value, str) else value


def _layer(image: Image, layer: int, field: str, value: int) -> None:
    image.layers[layer % len(image.layers)][field] = value


def _section(image: Image, number: int, field: str, value: int) -> None:
    if image.sections:
        image.sections[number % len(image.sections)][field] = value


def _swap(image: Image, first: int, second: int) -> None:
    """Two sections change places."""
    if image.sections:
        a, b = image.sections[first % len(image.sections)], image.sections[second % len(image.sections)]
        a["offset"], b["offset"] = b["offset"], a["offset"]


def _drop(image: Image, number: int, fix: bool) -> None:
    if image.sections:
        del image.sections[number % len(image.sections)]
        if fix:
            image.count()


def _add(image: Image, kind: int, flags: int, layer: int, offset: int, size: int) -> None:
    image.sections.append({"kind": kind, "flags": flags, "layer": layer, "offset": offset, "bytes": size})
    image.count()


def _plan(image: Image, capacity: int, block_tokens: int, kinds: list[list[int]], repeat: int, metadata: int) -> None:
    """Lay the file out anew, consistently, for another geometry: what it holds stays where it was as far as it can."""
    layers = kinds * repeat
    shape = CacheGeometry(capacity, tuple(LayerGeometry(*numbers) for numbers in layers), block_tokens)
    planned = Superblock.plan(shape, file_id=image.header["file_id"], created_ns=1, metadata_bytes=metadata % 2**22)
    encoded = planned.encode()
    image.header |= HEADER.unpack(encoded)
    image.layers = [LAYER_ENTRY.unpack(encoded, HEADER.size + i * LAYER_ENTRY.size) for i in range(len(layers))]
    image.sections = [
        {"kind": kind, "flags": 0, "layer": layer, "offset": extent.offset, "bytes": extent.size}
        for (kind, layer), extent in planned.sections.items()
    ]
    image.states, image.entries = [], [[], []]
    image.size = planned.file_bytes
    for tails in image.tails:
        tails[:] = (tails + [0] * (len(layers) + 1))[: len(layers) + 1]
    for layer in range(min(len(layers), 64)):
        image.live.setdefault(LIVE_LENGTHS + 8 * layer, 0)


def _slot(image: Image, which: int, field: str, value: Any) -> None:
    image.slots[which][field] = bytes.fromhex(value) if isinstance(value, str) else value


def _tail(image: Image, which: int, track: int, value: int) -> None:
    tails = image.tails[which]
    tails[track % len(tails)] = value % 2**64


def _live(image: Image, field: str, value: int) -> None:
    image.live[_LIVE_FIELDS[field]] = value


def _length(image: Image, layer: int, value: int) -> None:
    image.live[LIVE_LENGTHS + 8 * (layer % len(image.layers))] = value


def _lengths(image: Image, value: int) -> None:
    """The same in every place that says a length, consistently."""
    for slot in image.slots:
        slot["seq_len"] = value
        slot["token_len"] = min(slot["token_len"], value)
    for layer in range(min(len(image.layers), 64)):
        _length(image, layer, value)


def _metadata(image: Image, half: int, text: str) -> None:
    """Put a document into a half, and have the slots name it with the right checksum."""
    data = text.encode("utf-8", "surrogateescape")
    section = next((entry for entry in image.sections if entry["kind"] == Section.METADATA), None)
    if section is not None:
        image.put(section["offset"] + half * (section["bytes"] // 2), data)
    for slot in image.slots:
        slot |= {"metadata_half": half, "metadata_bytes": len(data), "metadata_checksum": checksum(data)}


def _bytes(image: Image, kind: int, layer: int, offset: int, data: str) -> None:
    """Change what a section holds."""
    image.raw.append((image.at(Section(kind), layer) + offset, bytes.fromhex(data)))


def _record(image: Image, which: int, layer: int, slot: int, word: int, value: int) -> None:
    """Change the tag, row digest or some numbers of a record of rows in 16 bits, and make its checksum right."""
    kind, layer = RECENT_SECTIONS[which], layer % len(image.layers)
    shape = image.layers[layer]
    heads = shape["num_kv_heads"]
    parts = [2 * heads * shape["head_dim"], 2 * heads * shape["value_head_dim"]]
    head = 24
    size = head + -(-sum(parts) // 8) * 8
    offset = image.at(kind, layer) + slot % 64 * size
    record = bytearray(image.data[offset : offset + size])
    if (kind, layer) not in image.places or len(record) < size or size > 1 << 16:
        return
    words = [0, 8, *range(head, size, 8)]
    struct.pack_into("<Q", record, words[word % len(words)], value % 2**64)
    keys, values = record[head : head + parts[0]], record[head + parts[0] : head + sum(parts)]
    digests = struct.pack("<2Q", xxhash.xxh64_intdigest(keys), xxhash.xxh64_intdigest(values))
    struct.pack_into("<Q", record, 16, xxhash.xxh64_intdigest(bytes(record[:16]) + digests))
    image.put(offset, bytes(record))


def _raw(image: Image, offset: int, data: str) -> None:
    """Change bytes wherever they are, and leave the checksums wrong."""
    image.raw.append((offset, bytes.fromhex(data)))


def _size(image: Image, value: int) -> None:
    image.size = value


_CHANGES = {
    "header": _header,
    "layer": _layer,
    "section": _section,
    "swap": _swap,
    "drop": _drop,
    "add": _add,
    "plan": _plan,
    "slot": _slot,
    "tail": _tail,
    "live": _live,
    "length": _length,
    "lengths": _lengths,
    "metadata": _metadata,
    "bytes": _bytes,
    "record": _record,
    "raw": _raw,
    "size": _size,
}
