"""The superblock: the geometry of a cache and its file's section map; written once.

Pure: bytes in, dataclasses out. Every count, offset and size is checked before anyone maps anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptCacheError, NotACacheError, ShapeMismatchError, VersionMismatchError
from ..geometry import MAX_LAYERS, CacheGeometry, LayerGeometry
from .layer_entries import decode_layers
from .records import (
    CHECKSUM,
    FORMAT_VERSION,
    HEADER,
    HOME_BYTES,
    LAYER_ENTRY,
    LIVE_LENGTHS,
    MAGIC,
    MAX_SUPERBLOCK_BYTES,
    OPTIONAL,
    OPTIONAL_SECTIONS,
    PAGE,
    PARENT,
    PARENT_FEATURE,
    RECENT_SECTIONS,
    SECTION_ENTRY,
    SKETCH_SECTIONS,
    SLOT,
    STATE_ENTRY,
    STATES_FEATURE,
    WHOLE_CACHE,
    Extent,
    Section,
    checksum,
    slab_sections,
)
from .section_table import KNOWN_SECTIONS, SectionTable
from .states import SPARE_SLOTS, CheckpointLayout, checkpoint_entries_size, decode_states, encode_states, num_slots

_NUM_KINDS = max(Section) + 1
REQUIRED_SECTIONS = KNOWN_SECTIONS - OPTIONAL_SECTIONS


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
    has_parent: bool = False
    """True if the file's positions follow some of another file."""

    def section(self, kind: Section, layer: int = WHOLE_CACHE) -> Extent:
        """Return the extent of a section."""
        return self.sections[kind, layer]

    @property
    def checkpoint_layout(self) -> CheckpointLayout:
        """Where a checkpoint slot has what."""
        return CheckpointLayout.of(self.geometry.states)

    @property
    def has_sketches(self) -> bool:
        """True if the file keeps sketches; then it has all sections that belong to them."""
        return (Section.SKETCH_CHECKSUMS, WHOLE_CACHE) in self.sections

    @property
    def unknown_sections(self) -> tuple[int, ...]:
        """Kinds of section that this package does not know and so can't keep right: the file is for reading only."""
        sections = self.sections
        kinds = sections.kinds.tolist() if isinstance(sections, SectionTable) else [kind for kind, _ in sections]
        return tuple(sorted(set(kinds) - KNOWN_SECTIONS))

    @property
    def live_record(self) -> Extent:
        """The live record, with the `home` word behind it unless another section or the file's end is there."""
        extent = self.section(Section.LIVE)
        end = extent.offset + extent.size
        free = _to_page(end)
        if free == end:  # a section may begin right there
            following = (other.offset for other in self.sections.values() if other.offset >= end)
            free = min(following, default=self.file_bytes)
        fits = end + HOME_BYTES <= min(free, self.file_bytes)
        return Extent(extent.offset, extent.size + HOME_BYTES) if fits else extent

    @property
    def salt(self) -> int:
        """The salt of checked words."""
        return int.from_bytes(self.file_id[:8], "little")

    @classmethod
    def plan(
        cls,
        geometry: CacheGeometry,
        *,
        file_id: bytes,
        created_ns: int,
        metadata_bytes: int,
        has_parent: bool = False,
    ) -> Superblock:
        """Lay out a new file; `metadata_bytes` is the room for one document."""
        of_cache = _sizes_of_cache(geometry, metadata_bytes, has_parent)
        sizes: dict[tuple[int, int], int] = {(kind, WHOLE_CACHE): bytes_ for kind, bytes_ in of_cache.items()}
        by_layer = {layer: _sizes_of_layer(layer, geometry) for layer in set(geometry.layers)}
        for number, layer in enumerate(geometry.layers):
            sizes.update(((kind, number), bytes_) for kind, bytes_ in by_layer[layer].items())
        sizes.update(_sizes_of_slots(geometry))
        size = HEADER.size + LAYER_ENTRY.size * geometry.num_layers + SECTION_ENTRY.size * len(sizes)
        size += STATE_ENTRY.size * len(geometry.states) + CHECKSUM.size
        sections: dict[tuple[int, int], Extent] = {}
        end = _to_page(size)
        for key, section_size in sizes.items():
            sections[key] = Extent(end, section_size)
            end += _to_page(section_size + (HOME_BYTES if key[0] == Section.LIVE else 0))
        if end >= 2**63:
            raise ShapeMismatchError(f"the file would be {end:,} bytes: lower the capacity", actual=end)
        return cls(geometry, file_id, created_ns, end, size, sections, has_parent)

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
                    "features": _features(geometry) | PARENT_FEATURE * self.has_parent,
                }
            )
        ]
        for layer in geometry.layers:
            shape = {name: getattr(layer, name) for name in ("num_kv_heads", "head_dim", "value_head_dim")}
            codecs = {
                "key_codec": layer.key_codec.id,
                "key_transform": layer.key_codec.transform,
                "value_codec": layer.value_codec.id,
                "value_transform": layer.value_codec.transform,
            }
            parts.append(LAYER_ENTRY.pack(shape | codecs))
        parts.extend(
            SECTION_ENTRY.struct.pack(
                kind, 0 if kind in REQUIRED_SECTIONS else OPTIONAL, layer, extent.offset, extent.size
            )
            for (kind, layer), extent in self.sections.items()
        )
        parts.append(encode_states(geometry.states))
        body = b"".join(parts)
        return body + CHECKSUM.pack(checksum(body))

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
        if not HEADER.size + CHECKSUM.size <= size <= MAX_SUPERBLOCK_BYTES:
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

        body = memoryview(data)[: -CHECKSUM.size]
        header = HEADER.unpack(data)
        if header["superblock_bytes"] != len(data):
            raise corrupt(f"it is cut off at {len(data)} of {header['superblock_bytes']} bytes")
        if CHECKSUM.unpack_from(data, len(body))[0] != checksum(body):
            raise corrupt("its checksum does not match")
        if unknown := header["features"] & ~(STATES_FEATURE | PARENT_FEATURE):
            raise VersionMismatchError(
                f"{path}: needs features {unknown:#x}, unknown here: use a newer kvmmap",
                path=path,
                expected=STATES_FEATURE | PARENT_FEATURE,
                actual=header["features"],
            )
        num_layers, num_sections = header["num_layers"], header["num_sections"]
        if not 1 <= num_layers <= MAX_LAYERS:
            raise corrupt(f"{num_layers} layers")
        states_at = HEADER.size + LAYER_ENTRY.size * num_layers + SECTION_ENTRY.size * num_sections
        with_states = bool(header["features"] & STATES_FEATURE) and states_at <= len(body)
        if (len(body) - states_at) % STATE_ENTRY.size if with_states else states_at != len(body):
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
        sections = SectionTable(body[sections_at:states_at], path)
        try:
            layers = decode_layers(body[HEADER.size : sections_at], path)
            geometry = CacheGeometry(
                capacity=header["capacity"],
                layers=layers,
                block_tokens=header["block_tokens"],
                recent_window=_recent_slots(sections, Section.RECENT_ROWS, layers),
                sinks=_recent_slots(sections, Section.SINK_ROWS, layers),
                states=decode_states(bytes(body[states_at:]), path),
                checkpoint_slots=int((sections.kinds == Section.CHECKPOINT).sum()) - SPARE_SLOTS,
            )
        except ShapeMismatchError as error:
            raise corrupt(str(error)) from error
        has_parent = bool(header["features"] & PARENT_FEATURE)
        if header["features"] & ~PARENT_FEATURE != _features(geometry):
            raise corrupt(f"features {header['features']:#x} are not those of its layers and states")
        _check_sections(sections, geometry, has_parent, len(data), header["file_bytes"], corrupt)
        return cls(
            geometry, header["file_id"], header["created_ns"], header["file_bytes"], len(data), sections, has_parent
        )


def _to_page(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _features(geometry: CacheGeometry) -> int:
    """Return the bits of what readers before states do not know."""
    has = bool(geometry.states) or len(geometry.row_layers) < geometry.num_layers
    return STATES_FEATURE if has else 0


def _sizes_of_cache(geometry: CacheGeometry, metadata_bytes: int, has_parent: bool) -> dict[Section, int]:
    """Return the sections that belong to no layer, in their order, with their sizes."""
    tracks = geometry.num_layers + 1
    slot = SLOT.size + 8 * tracks + checkpoint_entries_size(geometry) + CHECKSUM.size
    sizes = {
        Section.SLOT_A: slot,
        Section.SLOT_B: slot,
        Section.LIVE: LIVE_LENGTHS + 8 * (geometry.num_layers + num_slots(geometry)),
        Section.METADATA: 2 * _to_page(metadata_bytes),
        Section.TOKEN_IDS: 4 * geometry.capacity,
        Section.CHECKSUMS: 8 * geometry.num_layers * geometry.num_blocks,
        Section.TOKEN_CHECKSUMS: 8 * geometry.num_blocks,
        Section.SKETCH_CHECKSUMS: 8 * geometry.num_layers * geometry.num_blocks,
    }
    if has_parent:
        sizes[Section.PARENT] = PARENT.size + 8 * tracks + CHECKSUM.size
    return sizes


def _sizes_of_slots(geometry: CacheGeometry) -> dict[tuple[int, int], int]:
    """Return the checkpoint slots, whose numbers stand in the layers' place, with their sizes."""
    size = CheckpointLayout.of(geometry.states).size
    return {(Section.CHECKPOINT, number): size for number in range(num_slots(geometry))}


def _sizes_of_layer(layer: LayerGeometry, geometry: CacheGeometry) -> dict[int, int]:
    """Return the sections of such a layer, in their order, with their sizes."""
    if not layer.has_rows:
        return {}
    slabs = zip(slab_sections(layer), layer.slab_bytes(geometry.capacity), strict=True)
    recent = zip(RECENT_SECTIONS, (geometry.recent_window, geometry.sinks), strict=True)
    return {
        **dict[int, int](slabs),
        Section.KEY_SKETCHES: layer.sketch_bytes(geometry.num_blocks),
        **{kind: slots * layer.recent_bytes for kind, slots in recent if slots},
    }


def _recent_slots(sections: SectionTable, kind: Section, layers: tuple[LayerGeometry, ...]) -> int:
    """Return how many records a section of rows in 16 bits has, by its size in the first layer that has rows."""
    for number, layer in enumerate(layers):
        if layer.has_rows:
            extent = sections.get((kind, number))
            return extent.size // layer.recent_bytes if extent else 0
    return 0


def _check_sections(
    sections: SectionTable,
    geometry: CacheGeometry,
    has_parent: bool,
    superblock_bytes: int,
    file_bytes: int,
    corrupt: Any,
) -> None:
    """Every section is there, as large as the geometry says, on a page, inside the file, and overlaps no other."""
    metadata = sections.get((Section.METADATA, WHOLE_CACHE))
    if metadata is None or metadata.size % (2 * PAGE):
        raise corrupt("the metadata section is missing or of odd size")
    some = not SKETCH_SECTIONS.isdisjoint(sections.kinds.tolist())

    def check(kind: int, layer: int, size: int | None, expected: int) -> None:
        if size is None and (some or kind not in SKETCH_SECTIONS):
            raise corrupt(f"section {Section(kind).name} of layer {layer} is missing")
        if size is not None and size != expected:
            raise corrupt(f"section {Section(kind).name} has {size} bytes for {expected}")

    if not has_parent and (Section.PARENT, WHOLE_CACHE) in sections:
        raise corrupt(
            f"section {Section.PARENT.name} belongs to feature {PARENT_FEATURE}, which the file does not have"
        )
    for kind, expected in _sizes_of_cache(geometry, metadata.size // 2, has_parent).items():
        extent = sections.get((kind, WHOLE_CACHE))
        check(kind, WHOLE_CACHE, extent and extent.size, expected)
    for place, expected in _sizes_of_slots(geometry).items():
        extent = sections.get(place)
        check(*place, extent and extent.size, expected)
    sizes, wanted = sections.sizes_by_layer(geometry.num_layers, _NUM_KINDS), _sizes_by_layer(geometry)
    for kind in RECENT_SECTIONS:  # whose sizes in the first layer say how many records there are
        if (sizes[:, kind] >= 0).any() and (wanted[:, kind] < 0).all():
            raise corrupt(f"section {kind.name} of the first layer is missing, or too small for a record")
    wrong = (sizes != wanted) & (wanted >= 0)  # checkpoint slots, which are numbered by slot, have none wanted
    for number, column in np.argwhere(wrong).tolist() if wrong.any() else ():
        size = int(sizes[number, column])
        check(column, number, None if size < 0 else size, int(wanted[number, column]))
    misplaced = sections.misplaced(superblock_bytes, file_bytes)
    if misplaced is not None:
        raise corrupt(f"the section at {misplaced} is off its page, overlaps another, or leaves the file")


def _sizes_by_layer(geometry: CacheGeometry) -> NDArray[np.int64]:
    """Return the sizes that layers' sections must have, int64 [num_layers, _NUM_KINDS]; -1 for none."""
    rows: dict[int, int] = {}
    shapes: list[list[int]] = []
    for layer in geometry.layers:
        if id(layer) not in rows:  # one object a shape, as they were decoded
            rows[id(layer)] = len(shapes)
            sizes = _sizes_of_layer(layer, geometry)
            shapes.append([sizes.get(kind, -1) for kind in range(_NUM_KINDS)])
    return np.array(shapes, np.int64)[[rows[id(layer)] for layer in geometry.layers]]
