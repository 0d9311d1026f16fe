"""The layout of a `.kvm` file as data: its records, field by field, its sections, and its checksums.

This is the only description of the bytes: structs are built from it, and so are the tables in `docs/format.md`
(`python -m kvmmap.format`, checked by a test). Everything is little-endian and unpadded.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import xxhash

from ..geometry import LayerGeometry

MAGIC = b"KVMMAP\x00\x01"
FORMAT_VERSION = 1
PAGE = 4096
"""Sections start on multiples of this."""

SLOT_MAGIC = 0x544F4C53  # "SLOT"
CHECKPOINT_MAGIC = 0x54504B43  # "CKPT"
STATES_FEATURE = 1  # bit of `features`
PARENT_FEATURE = 2  # likewise
WHOLE_CACHE = 0xFFFFFFFF  # the `layer` of a section that belongs to no layer
MAX_SUPERBLOCK_BYTES = 64 * 2**20
NO_TOKEN = -1
"""The token id of a position that was appended without one."""


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
    Field("file_id", "16s", "random, made with the file; slots and checked words depend on it"),
    Field("created_ns", "Q", "when the file was made, nanoseconds since 1970"),
    Field("file_bytes", "Q", "size of the file; a shorter file is damaged"),
    Field("capacity", "Q", "token positions reserved in every layer"),
    Field("block_tokens", "I", "positions in a block (256)"),
    Field("num_layers", "I", "layer entries that follow the header"),
    Field("num_sections", "I", "section entries that follow the layer entries"),
    Field(
        "features",
        "I",
        "bits a reader must know to read the file; bit 0 = states, or layers without rows; bit 1 = a parent",
    ),
)

LAYER_ENTRY = Record(
    "Layer entry",
    Field("num_kv_heads", "I", "key and value heads; 0 = the layer has no rows, and all else in the entry is 0 or 1"),
    Field("head_dim", "I", "numbers in a key row"),
    Field("value_head_dim", "I", "numbers in a value row"),
    Field("key_codec", "B", "by the table in *Codecs*; 1 = `int8-row`"),
    Field("key_transform", "B", "0 = `none`, 1 = `hadamard`"),
    Field("value_codec", "B", "by the table in *Codecs*; 1 = `int8-row`"),
    Field("value_transform", "B", "0 = `none`, 1 = `hadamard`"),
)

SECTION_ENTRY = Record(
    "Section entry",
    Field("kind", "H", "which section, by the table below"),
    Field("flags", "H", "bit 0: a program that does not know the kind may read, and must not write"),
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
    Field("metadata_half", "I", "which half of the metadata section is valid, 0 or 1"),
    Field("metadata_bytes", "I", "length of the JSON in it"),
    Field("metadata_checksum", "Q", "xxh3_64 of the JSON"),
)

RECENT_HEAD = Record(
    "Head of a row in 16 bits",
    Field("tag", "Q", "position + 1 in bits 0-39; form of keys in bits 40-47, of values in 48-55: 1 = f16, 2 = bf16"),
    Field("row_digest", "Q", "digest of the position's coded row"),
    Field("checksum", "Q", "xxh64 of tag, row_digest, xxh64 of the keys and xxh64 of the values"),
)

STATE_ENTRY = Record(
    "State entry",
    Field("layer", "I", "the layer that it belongs to"),
    Field("dtype", "H", "by the table in *States*; 1 = float32"),
    Field("dims", "H", "axes, 1 to 8"),
    Field("shape", "64s", "u64 by axis, and 0 for those that it does not have"),
    Field("name", "48s", "ASCII, then zeros"),
)

CHECKPOINT_HEADER = Record(
    "Checkpoint header",
    Field("magic", "I", '"CKPT"'),
    Field("num_states", "I", "as many as there are state entries"),
    Field("file_id", "16s", "as in the superblock"),
    Field("position", "Q", "positions that the states have seen"),
    Field("generation", "Q", "writer generation when it was written"),
    Field("written_ns", "Q", "when, nanoseconds since 1970"),
)

CHECKPOINT_ENTRY = Record(
    "Checkpoint entry",
    Field("checkpoint", "Q", "0 = none; else 1 + 2 * position, and 1 more if it is pinned"),
    Field("checksum", "Q", "of the checkpoint's header, which has those of its tensors; 0 where there is none"),
)

LIVE = Record(
    "Live record",
    Field("boot_id_low", "Q", "boot id of the machine while lengths are live; 0 when closed"),
    Field("boot_id_high", "Q", "its other half"),
    Field("generation", "Q", "checked; changes when published rows are truncated"),
    Field("acknowledged", "Q", "checked; sequence of the last commit known to be durable"),
    Field("writer_pid", "Q", "checked; process id of the last writer, for messages"),
    Field("superseded", "Q", "checked; 1 when another file has replaced this one"),
    Field("token_len", "Q", "checked; published token ids"),
    Field("named", "Q", "checked; digest of the name that was synced, see Committing; or 0"),
)
PARENT = Record(
    "Parent record",
    Field("file_id", "16s", "the parent's, when this file was made; another file with the same positions will do"),
    Field("length", "Q", "positions of the parent that come before this file's own, counted from the chain's first"),
    Field("token_len", "Q", "positions of these whose token ids the parent had recorded"),
    Field("generation", "Q", "the parent's, when this file was made"),
    Field("checksum", "Q", "xxh3_64 of the checksums of what this file needs of the parent, see Parents"),
    Field("name", "256s", "the parent's file name, in this file's folder; padded with 0x00"),
)
LIVE_LENGTHS = LIVE.size
"""Offset in the live record of the per-layer published lengths: checked words, one a layer."""
HOME_BYTES = 8
"""Size of the checked word `home`, which follows the live record."""


class Section(IntEnum):
    """Kinds of section."""

    SLOT_A = 1
    SLOT_B = 2
    LIVE = 3
    METADATA = 4
    TOKEN_IDS = 5
    CHECKSUMS = 6
    TOKEN_CHECKSUMS = 7
    SKETCH_CHECKSUMS = 8
    KEY_CODES = 16
    KEY_SCALES = 17
    VALUE_CODES = 18
    VALUE_SCALES = 19
    KEY_SKETCHES = 20
    RECENT_ROWS = 24
    SINK_ROWS = 25
    CHECKPOINT = 32
    PARENT = 40


SECTION_ABOUT = {
    Section.SLOT_A: "commit slot: header, a tail checksum (u64) per layer and one for token ids, a checkpoint "
    "entry per checkpoint slot, xxh3_64 of all before",
    Section.SLOT_B: "the other commit slot",
    Section.LIVE: "live record: header, then one checked word a layer, its published length, and one a checkpoint "
    "slot; behind it, `home`",
    Section.METADATA: "two halves of equal size, each room for one JSON document",
    Section.TOKEN_IDS: "int32 [capacity]; -1 where none was given",
    Section.CHECKSUMS: "u64 [block, layer], of complete blocks",
    Section.TOKEN_CHECKSUMS: "u64 [block], of complete blocks of token ids",
    Section.SKETCH_CHECKSUMS: "optional; u64 [block, layer], of the sketches of complete blocks",
    Section.KEY_CODES: "int8 [capacity, num_kv_heads, head_dim]",
    Section.KEY_SCALES: "f32 [capacity, num_kv_heads]",
    Section.VALUE_CODES: "int8 [capacity, num_kv_heads, value_head_dim]",
    Section.VALUE_SCALES: "f32 [capacity, num_kv_heads]",
    Section.KEY_SKETCHES: "optional; bf16 [block, num_kv_heads, 2, head_dim], of complete blocks: minimum, maximum",
    Section.RECENT_ROWS: "optional; records of the last positions in 16 bits: see Rows in 16 bits",
    Section.SINK_ROWS: "optional; records of the first positions",
    Section.CHECKPOINT: "checkpoint slot, whose number stands in `layer`: header, xxh3_64 (u64) per state, xxh3_64 of "
    "all before; from the next page on the tensors, see *States*",
    Section.PARENT: "parent record, a tail checksum (u64) per layer and one for token ids, xxh3_64 of all before",
}
SLAB_SECTIONS = tuple(range(Section.KEY_CODES, Section.VALUE_SCALES + 1))
"""Sections of a layer's arrays, keys' two and values' two. A codec with one array leaves its second one out."""


def slab_sections(geometry: LayerGeometry) -> tuple[Section, ...]:
    """Return the sections of a layer's arrays, in the order of `LayerGeometry.slabs`."""
    keys = len(geometry.key_slabs)
    return _sections_of(keys, len(geometry.slabs) - keys)


@functools.cache
def _sections_of(keys: int, values: int) -> tuple[Section, ...]:
    of_values = (Section.VALUE_CODES, Section.VALUE_SCALES)[:values]
    return (Section.KEY_CODES, Section.KEY_SCALES)[:keys] + of_values


CHECKSUM = struct.Struct("<Q")
OPTIONAL = 1  # section flag: a program that does not know the kind may read, and must not write
SKETCH_SECTIONS = frozenset({Section.SKETCH_CHECKSUMS, Section.KEY_SKETCHES})
"""Sections that a file may lack: all of them, or none."""
RECENT_SECTIONS = (Section.RECENT_ROWS, Section.SINK_ROWS)
"""Sections of every layer that a file may lack: each kind by itself."""
OPTIONAL_SECTIONS = SKETCH_SECTIONS.union(RECENT_SECTIONS)
"""Sections without which a file can be read as well."""


def checksum(data: bytes | memoryview) -> int:
    """Return the xxh3_64 of `data`."""
    return xxhash.xxh3_64_intdigest(data)


def checksum_of(pieces: Iterable[bytes | memoryview]) -> int:
    """Return the xxh3_64 of data that comes in pieces."""
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()


class Extent(NamedTuple):
    """A range of the file, in bytes."""

    offset: int
    size: int


_BLOCK_CHECKSUM = struct.Struct("<IIQ")


def block_checksum(track: int, block: int, rows: int, digests: Sequence[int]) -> int:
    """Return the checksum of one block of one track (a layer, or the token ids at index num_layers).

    Args:
        track: layer index, or num_layers for token ids.
        block: block index.
        rows: positions in it; fewer than block_tokens for a tail.
        digests: xxh3_64 of the block's part of each of its arrays, in the order of the sections.

    The track, the block and the row count are part of it, so that a sound block in a wrong place does not pass. That of
    a layer without rows is 0.
    """
    if not digests:
        return 0
    head = _BLOCK_CHECKSUM.pack(track, rows, block)
    return xxhash.xxh3_64_intdigest(head + struct.pack(f"<{len(digests)}Q", *digests))


def tables() -> str:
    """Return the layout as Markdown tables, for docs/format.md."""
    parts = []
    records = (
        HEADER,
        LAYER_ENTRY,
        SECTION_ENTRY,
        STATE_ENTRY,
        SLOT,
        CHECKPOINT_ENTRY,
        CHECKPOINT_HEADER,
        LIVE,
        RECENT_HEAD,
        PARENT,
    )
    for record in records:
        parts += [f"### {record.title} ({record.size} bytes)", "", "| offset | bytes | field | meaning |"]
        parts.append("|---:|---:|---|---|")
        parts += [f"| {offset} | {size} | `{f.name}` | {f.about} |" for offset, size, f in record.rows()]
        parts.append("")
    parts += ["### Sections", "", "| kind | name | contents |", "|---:|---|---|"]
    parts += [f"| {kind.value} | `{kind.name}` | {about} |" for kind, about in SECTION_ABOUT.items()]
    return "\n".join(parts) + "\n"
