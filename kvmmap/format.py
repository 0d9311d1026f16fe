"""The `.kvm` file as bytes: encode, decode, validate. Pure: bytes in, dataclasses out, no file is touched here.

The records below are the only description of the layout: the structs are built from them, and so are the tables in
`docs/format.md` (`python -m kvmmap.format`, checked by a test). Everything is little-endian and unpadded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import xxhash

from .errors import CorruptCacheError, NotACacheError, ShapeMismatchError, VersionMismatchError
from .geometry import MAX_LAYERS, CacheGeometry, LayerGeometry

MAGIC = b"KVMMAP\x00\x01"
FORMAT_VERSION = 1
PAGE = 4096
"""Sections start on multiples of this."""

SLOT_MAGIC = 0x544F4C53  # "SLOT"
WHOLE_CACHE = 0xFFFFFFFF  # the `layer` of a section that belongs to no layer
MAX_SUPERBLOCK_BYTES = 64 * 2**20
NO_TOKEN = -1
"""The token id of a position that was appended without one."""

CODECS = {1: "int8-row"}
TRANSFORMS = {0: "none"}


class Field(NamedTuple):
    """One field of a record."""

    name: str
    code: str  # as in the struct module
    about: str


class Record:
    """A fixed run of fields: packs from and unpacks to a mapping."""

    def __init__(self, title: str, *fields: Field) -> None:
        self.title = title
        self.fields = fields
        self.struct = struct.Struct("<" + "".join(field.code for field in fields))
        self.size = self.struct.size
        self._names = [field.name for field in fields]

    def pack(self, values: Mapping[str, Any]) -> bytes:
        return self.struct.pack(*(values[name] for name in self._names))

    def unpack(self, data: bytes | memoryview, offset: int = 0) -> dict[str, Any]:
        return dict(zip(self._names, self.struct.unpack_from(data, offset), strict=True))

    def rows(self) -> Iterable[tuple[int, int, Field]]:
        """Yield (offset, size, field)."""
        offset = 0
        for field in self.fields:
            size = struct.calcsize("<" + field.code)
            yield offset, size, field
            offset += size


HEADER = Record(
    "Superblock header",
    Field("magic", "8s", '"KVMMAP", 0x00, 0x01'),
    Field("format_version", "I", "1; a reader refuses a later one"),
    Field("superblock_bytes", "I", "header, layer entries, section entries and checksum together"),
    Field("file_id", "16s", "random, made with the file; slots and sealed words are bound to it"),
    Field("created_ns", "Q", "when the file was made, nanoseconds since 1970"),
    Field("file_bytes", "Q", "size of the file; a shorter file is damaged"),
    Field("capacity", "Q", "token positions reserved in every layer"),
    Field("block_tokens", "I", "positions in a block (256)"),
    Field("num_layers", "I", "layer entries that follow the header"),
    Field("num_sections", "I", "section entries that follow the layer entries"),
    Field("features", "I", "bits a reader must know to read the file; 0"),
)

LAYER_ENTRY = Record(
    "Layer entry",
    Field("num_kv_heads", "I", "key and value heads"),
    Field("head_dim", "I", "numbers in a key row"),
    Field("value_head_dim", "I", "numbers in a value row"),
    Field("key_codec", "B", "1 = `int8-row`"),
    Field("key_transform", "B", "0 = `none`"),
    Field("value_codec", "B", "1 = `int8-row`"),
    Field("value_transform", "B", "0 = `none`"),
)

SECTION_ENTRY = Record(
    "Section entry",
    Field("kind", "H", "which section, by the table below"),
    Field("flags", "H", "bit 0: a reader that does not know the kind may ignore it"),
    Field("layer", "I", "the layer it belongs to, or 0xFFFFFFFF"),
    Field("offset", "Q", "bytes from the start of the file; a multiple of 4096"),
    Field("bytes", "Q", "its size"),
)

SLOT = Record(
    "Commit slot header",
    Field("magic", "I", '"SLOT"'),
    Field("state", "I", "0 = in use, 1 = closed"),
    Field("file_id", "16s", "as in the superblock"),
    Field("sequence", "Q", "the valid slot with the higher one is the last commit"),
    Field("seq_len", "Q", "positions committed in every layer"),
    Field("token_len", "Q", "positions, from 0, whose token ids are recorded; at most `seq_len`"),
    Field("generation", "Q", "writer generation at the commit"),
    Field("commit_ns", "Q", "when, nanoseconds since 1970"),
    Field("metadata_half", "I", "which half of the metadata section counts, 0 or 1"),
    Field("metadata_bytes", "I", "length of the JSON in it"),
    Field("metadata_checksum", "Q", "xxh3_64 of the JSON"),
)

LIVE = Record(
    "Live record",
    Field("boot_id_low", "Q", "boot id of the machine while lengths are live; 0 when closed"),
    Field("boot_id_high", "Q", "its other half"),
    Field("generation", "Q", "sealed; changes when stored rows are taken back"),
    Field("acknowledged", "Q", "sealed; sequence of the last commit known to be durable"),
    Field("writer_pid", "Q", "sealed; process id of the last writer, to name it in messages"),
    Field("superseded", "Q", "sealed; 1 when another file has taken this one's place"),
    Field("token_len", "Q", "sealed; published token ids"),
    Field("reserved", "Q", "0"),
)
LIVE_LENGTHS = LIVE.size
"""Offset in the live record of the per-layer published lengths: sealed words, one a layer."""


class Section(IntEnum):
    """Kinds of section."""

    SLOT_A = 1
    SLOT_B = 2
    LIVE = 3
    METADATA = 4
    TOKEN_IDS = 5
    CHECKSUMS = 6
    TOKEN_CHECKSUMS = 7
    KEY_CODES = 16
    KEY_SCALES = 17
    VALUE_CODES = 18
    VALUE_SCALES = 19


SECTION_ABOUT = {
    Section.SLOT_A: "commit slot: header, a tail checksum (u64) per layer and one for token ids, xxh3_64 of all before",
    Section.SLOT_B: "the other commit slot",
    Section.LIVE: "live record: header, then one sealed word a layer, its published length",
    Section.METADATA: "two halves of equal size, each room for one JSON document",
    Section.TOKEN_IDS: "int32 [capacity]; -1 where none was given",
    Section.CHECKSUMS: "u64 [block, layer], of complete blocks",
    Section.TOKEN_CHECKSUMS: "u64 [block], of complete blocks of token ids",
    Section.KEY_CODES: "int8 [capacity, num_kv_heads, head_dim]",
    Section.KEY_SCALES: "f32 [capacity, num_kv_heads]",
    Section.VALUE_CODES: "int8 [capacity, num_kv_heads, value_head_dim]",
    Section.VALUE_SCALES: "f32 [capacity, num_kv_heads]",
}
SLAB_SECTIONS = tuple(range(Section.KEY_CODES, Section.VALUE_SCALES + 1))
"""A layer's four slabs, in the order in which everything lists them."""

_CHECKSUM = struct.Struct("<Q")
_OPTIONAL = 1


def checksum(data: bytes | memoryview) -> int:
    """Return the xxh3_64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


class Extent(NamedTuple):
    """A stretch of the file, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """The first section, written once: the geometry, and where everything is."""

    geometry: CacheGeometry
    file_id: bytes
    created_ns: int
    file_bytes: int
    size: int
    """Bytes of the superblock itself."""
    sections: Mapping[tuple[int, int], Extent]
    """(kind, layer or WHOLE_CACHE) -> extent."""

    def section(self, kind: Section, layer: int = WHOLE_CACHE) -> Extent:
        """Where a section lies."""
        return self.sections[kind, layer]

    @property
    def salt(self) -> int:
        """What sealed words are sealed with."""
        return int.from_bytes(self.file_id[:8], "little")

    @classmethod
    def plan(cls, geometry: CacheGeometry, *, file_id: bytes, created_ns: int, metadata_bytes: int) -> Superblock:
        """Lay out a new file; `metadata_bytes` is the room for one document."""
        sizes = _section_sizes(geometry, metadata_bytes)
        size = HEADER.size + LAYER_ENTRY.size * geometry.num_layers + SECTION_ENTRY.size * len(sizes)
        size += _CHECKSUM.size
        sections = {}
        end = _to_page(size)
        for key, section_size in sizes.items():
            sections[key] = Extent(end, section_size)
            end += _to_page(section_size)
        if end >= 2**63:
            raise ShapeMismatchError(f"the file would be {end:,} bytes: lower the capacity", actual=end)
        return cls(geometry, file_id, created_ns, end, size, sections)

    def encode(self) -> bytes:
        """Return the superblock's bytes."""
        geometry = self.geometry
        parts = [
            HEADER.pack(
                {
                    "magic": MAGIC,
                    "format_version": FORMAT_VERSION,
                    "superblock_bytes": self.size,
                    "file_id": self.file_id,
                    "created_ns": self.created_ns,
                    "file_bytes": self.file_bytes,
                    "capacity": geometry.capacity,
                    "block_tokens": geometry.block_tokens,
                    "num_layers": geometry.num_layers,
                    "num_sections": len(self.sections),
                    "features": 0,
                }
            )
        ]
        codec = {"key_codec": 1, "key_transform": 0, "value_codec": 1, "value_transform": 0}
        for layer in geometry.layers:
            shape = {name: getattr(layer, name) for name in ("num_kv_heads", "head_dim", "value_head_dim")}
            parts.append(LAYER_ENTRY.pack(shape | codec))
        parts.extend(
            SECTION_ENTRY.struct.pack(kind, 0, layer, extent.offset, extent.size)
            for (kind, layer), extent in self.sections.items()
        )
        body = b"".join(parts)
        return body + _CHECKSUM.pack(checksum(body))

    @staticmethod
    def peek(start: bytes, path: str) -> int:
        """Return the superblock's size from the file's first HEADER.size bytes.

        Raises:
            NotACacheError: they are not a cache's.
            VersionMismatchError: a version this package can't read.
            CorruptCacheError: a size that can't be.
        """
        if len(start) < HEADER.size or start[: len(MAGIC)] != MAGIC:
            what = f"it has {len(start)} bytes" if len(start) < HEADER.size else "its first bytes are not kvmmap's"
            raise NotACacheError(f"{path}: not a kvmmap cache ({what})", path=path)
        header = HEADER.unpack(start)
        if header["format_version"] != FORMAT_VERSION:
            raise VersionMismatchError(
                f"{path}: format version {header['format_version']}, and this kvmmap reads {FORMAT_VERSION}: "
                "use a newer kvmmap (or the file is damaged)",
                path=path,
                expected=FORMAT_VERSION,
                actual=header["format_version"],
            )
        size = header["superblock_bytes"]
        if not HEADER.size + _CHECKSUM.size <= size <= MAX_SUPERBLOCK_BYTES:
            raise CorruptCacheError(f"{path}: superblock size {size} can't be", path=path, actual=size)
        return int(size)

    @classmethod
    def decode(cls, data: bytes, path: str, real_bytes: int) -> Superblock:
        """Read and check a whole superblock, before anything is mapped.

        Args:
            data: exactly as many bytes as `peek` said.
            path: for messages.
            real_bytes: the file's real size.

        Raises:
            CorruptCacheError: the checksum, a count, an offset or a size is wrong.
            VersionMismatchError: a codec, a transform, a feature or a section this package does not know.
        """

        def corrupt(what: str) -> CorruptCacheError:
            return CorruptCacheError(f"{path}: superblock damaged: {what}", path=path)

        body = memoryview(data)[: -_CHECKSUM.size]
        header = HEADER.unpack(data)
        if header["superblock_bytes"] != len(data):
            raise corrupt(f"it is cut off at {len(data)} of {header['superblock_bytes']} bytes")
        if _CHECKSUM.unpack_from(data, len(body))[0] != checksum(body):
            raise corrupt("its checksum does not match")
        if header["features"]:
            raise VersionMismatchError(
                f"{path}: needs features {header['features']:#x}, unknown here: use a newer kvmmap",
                path=path,
                expected=0,
                actual=header["features"],
            )
        num_layers, num_sections = header["num_layers"], header["num_sections"]
        if not 1 <= num_layers <= MAX_LAYERS:
            raise corrupt(f"{num_layers} layers")
        tables = LAYER_ENTRY.size * num_layers + SECTION_ENTRY.size * num_sections
        if HEADER.size + tables != len(body):
            raise corrupt(f"{num_layers} layers and {num_sections} sections do not fill its size")
        if real_bytes < header["file_bytes"]:
            raise CorruptCacheError(
                f"{path}: cut off: {real_bytes:,} of {header['file_bytes']:,} bytes are there; restore it from where "
                "it was copied",
                path=path,
                expected=header["file_bytes"],
                actual=real_bytes,
            )
        sections_at = HEADER.size + LAYER_ENTRY.size * num_layers
        shapes = _decode_layers(body[HEADER.size : sections_at], path)
        try:
            # Most layers share one shape: one object serves them all, and opening stays under a millisecond.
            distinct = {shape: LayerGeometry(*shape) for shape in set(shapes)}
            layers = tuple([distinct[shape] for shape in shapes])
            geometry = CacheGeometry(
                capacity=header["capacity"],
                layers=layers,
                block_tokens=header["block_tokens"],
            )
        except ShapeMismatchError as error:
            raise corrupt(str(error)) from error
        sections = _decode_sections(body[sections_at:], path)
        _check_sections(sections, geometry, len(data), header["file_bytes"], corrupt)
        return cls(geometry, header["file_id"], header["created_ns"], header["file_bytes"], len(data), sections)


@dataclass(frozen=True, slots=True)
class Slot:
    """One commit."""

    sequence: int
    seq_len: int
    token_len: int
    generation: int
    commit_ns: int
    closed: bool
    metadata_half: int
    metadata_bytes: int
    metadata_checksum: int
    tail_checksums: tuple[int, ...]
    """One a layer, then one for token ids; 0 where there is no tail."""

    def encode(self, file_id: bytes) -> bytes:
        """Return the slot's bytes."""
        head = SLOT.struct.pack(
            SLOT_MAGIC,
            int(self.closed),
            file_id,
            self.sequence,
            self.seq_len,
            self.token_len,
            self.generation,
            self.commit_ns,
            self.metadata_half,
            self.metadata_bytes,
            self.metadata_checksum,
        )
        body = head + struct.pack(f"<{len(self.tail_checksums)}Q", *self.tail_checksums)
        return body + _CHECKSUM.pack(checksum(body))

    @classmethod
    def decode(cls, data: bytes | memoryview, superblock: Superblock) -> Slot | None:
        """Read a slot; None if it is torn, damaged or another file's."""
        tracks = superblock.geometry.num_layers + 1
        size = SLOT.size + 8 * tracks
        data = memoryview(data)[: size + _CHECKSUM.size]
        if len(data) < size + _CHECKSUM.size or _CHECKSUM.unpack_from(data, size)[0] != checksum(data[:size]):
            return None
        raw = SLOT.unpack(data)
        half = superblock.section(Section.METADATA).size // 2
        whole = (
            raw["magic"] == SLOT_MAGIC
            and raw["file_id"] == superblock.file_id
            and raw["state"] in (0, 1)
            and raw["token_len"] <= raw["seq_len"] <= superblock.geometry.capacity
            and raw["metadata_half"] in (0, 1)
            and raw["metadata_bytes"] <= half
            and max(raw["sequence"], raw["generation"]) < 2**40
        )
        if not whole:
            return None
        return cls(
            sequence=raw["sequence"],
            seq_len=raw["seq_len"],
            token_len=raw["token_len"],
            generation=raw["generation"],
            commit_ns=raw["commit_ns"],
            closed=raw["state"] == 1,
            metadata_half=raw["metadata_half"],
            metadata_bytes=raw["metadata_bytes"],
            metadata_checksum=raw["metadata_checksum"],
            tail_checksums=struct.unpack_from(f"<{tracks}Q", data, SLOT.size),
        )


BLOCK_CHECKSUM = struct.Struct("<IIQ")


def block_checksum(track: int, block: int, rows: int, digests: Sequence[int]) -> int:
    """Return the checksum of one block of one track (a layer, or the token ids at index num_layers).

    Args:
        track: layer index, or num_layers for token ids.
        block: block index.
        rows: positions in it; fewer than block_tokens for a tail.
        digests: xxh3_64 of the block's part of each of its arrays, in the order of the sections.

    The track, the block and the row count are part of it, so that a sound block in a wrong place does not pass.
    """
    head = BLOCK_CHECKSUM.pack(track, rows, block)
    return xxhash.xxh3_64_intdigest(head + struct.pack(f"<{len(digests)}Q", *digests))


def _to_page(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _section_sizes(geometry: CacheGeometry, metadata_bytes: int) -> dict[tuple[int, int], int]:
    tracks = geometry.num_layers + 1
    slot = SLOT.size + 8 * tracks + _CHECKSUM.size
    sizes: dict[tuple[int, int], int] = {
        (Section.SLOT_A, WHOLE_CACHE): slot,
        (Section.SLOT_B, WHOLE_CACHE): slot,
        (Section.LIVE, WHOLE_CACHE): LIVE_LENGTHS + 8 * geometry.num_layers,
        (Section.METADATA, WHOLE_CACHE): 2 * _to_page(metadata_bytes),
        (Section.TOKEN_IDS, WHOLE_CACHE): 4 * geometry.capacity,
        (Section.CHECKSUMS, WHOLE_CACHE): 8 * geometry.num_layers * geometry.num_blocks,
        (Section.TOKEN_CHECKSUMS, WHOLE_CACHE): 8 * geometry.num_blocks,
    }
    slabs = {layer: layer.slab_bytes(geometry.capacity) for layer in set(geometry.layers)}
    for number, layer in enumerate(geometry.layers):
        for kind, size in zip(SLAB_SECTIONS, slabs[layer], strict=True):
            sizes[kind, number] = size
    return sizes


def _decode_layers(data: memoryview, path: str) -> list[tuple[int, int, int]]:
    entries = list(LAYER_ENTRY.struct.iter_unpack(data))
    distinct = {entry[3:]: number for number, entry in reversed(list(enumerate(entries)))}
    for entry, number in distinct.items():
        for what, known, value in (
            ("key codec", CODECS, entry[0]),
            ("key transform", TRANSFORMS, entry[1]),
            ("value codec", CODECS, entry[2]),
            ("value transform", TRANSFORMS, entry[3]),
        ):
            if value not in known:
                raise VersionMismatchError(
                    f"{path}: layer {number} has {what} {value}, and this kvmmap knows {known}: use a newer kvmmap",
                    path=path,
                    expected=tuple(known),
                    actual=value,
                    layer=number,
                )
    return [entry[:3] for entry in entries]


def _decode_sections(data: memoryview, path: str) -> dict[tuple[int, int], Extent]:
    sections = {}
    known = {int(kind) for kind in Section}
    for kind, flags, layer, offset, size in SECTION_ENTRY.struct.iter_unpack(data):
        if kind not in known and not flags & _OPTIONAL:
            raise VersionMismatchError(
                f"{path}: has a section of kind {kind}, unknown here: use a newer kvmmap",
                path=path,
                expected=tuple(sorted(known)),
                actual=kind,
            )
        if (kind, layer) in sections:
            raise CorruptCacheError(f"{path}: superblock damaged: section {kind} of layer {layer} twice", path=path)
        sections[kind, layer] = Extent(offset, size)
    return sections


def _check_sections(
    sections: Mapping[tuple[int, int], Extent],
    geometry: CacheGeometry,
    superblock_bytes: int,
    file_bytes: int,
    corrupt: Any,
) -> None:
    """Every section is there, as large as the geometry says, on a page, inside the file, and overlaps no other."""
    metadata = sections.get((Section.METADATA, WHOLE_CACHE))
    if metadata is None or metadata.size % (2 * PAGE):
        raise corrupt("the metadata section is missing or of odd size")
    for key, size in _section_sizes(geometry, metadata.size // 2).items():
        if key not in sections:
            raise corrupt(f"section {Section(key[0]).name} of layer {key[1]} is missing")
        if sections[key].size != size:
            raise corrupt(f"section {Section(key[0]).name} has {sections[key].size} bytes for {size}")
    end = superblock_bytes
    for offset, size in sorted(sections.values()):
        if offset % PAGE or offset < end or offset + size > file_bytes:
            raise corrupt(f"the section at {offset} is off its page, overlaps another, or leaves the file")
        end = offset + size


def tables() -> str:
    """Return the layout as Markdown tables, for docs/format.md."""
    parts = []
    for record in (HEADER, LAYER_ENTRY, SECTION_ENTRY, SLOT, LIVE):
        parts += [f"### {record.title} ({record.size} bytes)", "", "| offset | bytes | field | meaning |"]
        parts.append("|---:|---:|---|---|")
        parts += [f"| {offset} | {size} | `{f.name}` | {f.about} |" for offset, size, f in record.rows()]
        parts.append("")
    parts += ["### Sections", "", "| kind | name | contents |", "|---:|---|---|"]
    parts += [f"| {kind.value} | `{kind.name}` | {about} |" for kind, about in SECTION_ABOUT.items()]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
