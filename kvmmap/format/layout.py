"""The part of a superblock that shapes alone determine: which sections a file has, and how large each of them is.

A section table is checked against the shapes before anything is mapped. Files of the same shapes have the same table,
and a program opens many of them, or one many times: so the last few are remembered by their bytes.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..codecs import RowCodec
from ..codecs.registry import by_id
from ..errors import CorruptCacheError, ShapeMismatchError
from ..geometry import MAX_LAYERS, CacheGeometry, LayerGeometry
from .layer_entries import decode_layers
from .records import (
    CHECKSUM,
    HEADER,
    LAYER_ENTRY,
    LIVE_LENGTHS,
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
    Section,
    slab_sections,
)
from .section_table import KNOWN_SECTIONS, NUM_KINDS, SectionTable
from .states import SPARE_SLOTS, CheckpointLayout, checkpoint_entries_size, decode_states, num_slots

REQUIRED_SECTIONS = KNOWN_SECTIONS - OPTIONAL_SECTIONS

_SHAPES_AT = next(offset for offset, _, field in HEADER.rows() if field.name == "file_bytes")
"""Where in a superblock begins what the layout follows from; what precedes names the file."""

_REMEMBERED, _REMEMBERED_BYTES = 32, 64 << 10
_remembered: dict[bytes, tuple[tuple[CacheGeometry, SectionTable], frozenset[RowCodec]]] = {}
"""With the codecs that were registered for the layers' bytes."""


def decode_layout(data: bytes, path: str) -> tuple[CacheGeometry, SectionTable]:
    """Read and check geometry and section table of a whole superblock, whose checksum matches.

    Args:
        data: the superblock.
        path: for messages.

    Raises:
        CorruptCacheError: a count, an offset or a size is wrong.
        VersionMismatchError: a codec, a transform or a section this package does not know.
    """
    key = bytes(data[_SHAPES_AT : -CHECKSUM.size])
    found, codecs = _remembered.get(key, (None, frozenset[RowCodec]()))
    if found is None or not all(by_id(codec.id, codec.transform) is codec for codec in codecs):
        found = _decode(memoryview(data)[: -CHECKSUM.size], path)
        if len(key) <= _REMEMBERED_BYTES:
            if len(_remembered) >= _REMEMBERED:
                _remembered.clear()
            layers = {id(layer): layer for layer in found[0].layers}.values()
            _remembered[key] = found, frozenset([codec for one in layers for codec in (one.key_codec, one.value_codec)])
    return found


def _decode(body: memoryview, path: str) -> tuple[CacheGeometry, SectionTable]:
    header = HEADER.unpack(body)
    num_layers, num_sections = header["num_layers"], header["num_sections"]
    if not 1 <= num_layers <= MAX_LAYERS:
        _refuse(path, f"{num_layers} layers")
    sections_at = HEADER.size + LAYER_ENTRY.size * num_layers
    states_at = sections_at + SECTION_ENTRY.size * num_sections
    with_states = bool(header["features"] & STATES_FEATURE) and states_at <= len(body)
    if (len(body) - states_at) % STATE_ENTRY.size if with_states else states_at != len(body):
        _refuse(path, f"{num_layers} layers and {num_sections} sections do not fill its size")
    sections = SectionTable(body[sections_at:states_at], num_layers, path)
    try:
        layers = decode_layers(body[HEADER.size : sections_at], path)
        geometry = CacheGeometry(
            capacity=header["capacity"],
            layers=layers,
            block_tokens=header["block_tokens"],
            recent_window=_recent_slots(sections, Section.RECENT_ROWS, layers),
            sinks=_recent_slots(sections, Section.SINK_ROWS, layers),
            states=decode_states(bytes(body[states_at:]), path),
            checkpoint_slots=sections.count(Section.CHECKPOINT) - SPARE_SLOTS,
        )
    except ShapeMismatchError as error:
        raise CorruptCacheError(f"{path}: superblock damaged: {error}", path=path) from error
    if header["features"] & ~PARENT_FEATURE != features(geometry):
        _refuse(path, f"features {header['features']:#x} are not those of its layers and states")
    has_parent = bool(header["features"] & PARENT_FEATURE)
    superblock_bytes = len(body) + CHECKSUM.size
    _check_sections(sections, geometry, has_parent, superblock_bytes, header["file_bytes"], path)
    return geometry, sections


def _refuse(path: str, what: str) -> NoReturn:
    raise CorruptCacheError(f"{path}: superblock damaged: {what}", path=path)


def to_page(size: int) -> int:
    """Return a size rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def features(geometry: CacheGeometry) -> int:
    """Return the bits of what readers before states do not know."""
    has = bool(geometry.states) or len(geometry.row_layers) < geometry.num_layers
    return STATES_FEATURE if has else 0


def sizes_of_cache(geometry: CacheGeometry, metadata_bytes: int, has_parent: bool) -> dict[Section, int]:
    """Return the sections that belong to no layer, in their order, with their sizes."""
    tracks = geometry.num_layers + 1
    slot = SLOT.size + 8 * tracks + checkpoint_entries_size(geometry) + CHECKSUM.size
    sizes = {
        Section.SLOT_A: slot,
        Section.SLOT_B: slot,
        Section.LIVE: LIVE_LENGTHS + 8 * (geometry.num_layers + num_slots(geometry)),
        Section.METADATA: 2 * to_page(metadata_bytes),
        Section.TOKEN_IDS: 4 * geometry.capacity,
        Section.CHECKSUMS: 8 * geometry.num_layers * geometry.num_blocks,
        Section.TOKEN_CHECKSUMS: 8 * geometry.num_blocks,
        Section.SKETCH_CHECKSUMS: 8 * geometry.num_layers * geometry.num_blocks,
    }
    if has_parent:
        sizes[Section.PARENT] = PARENT.size + 8 * tracks + CHECKSUM.size
    return sizes


def sizes_of_slots(geometry: CacheGeometry) -> dict[tuple[int, int], int]:
    """Return the checkpoint slots, whose numbers stand in the layers' place, with their sizes."""
    size = CheckpointLayout.of(geometry.states).size
    return {(Section.CHECKPOINT, number): size for number in range(num_slots(geometry))}


def sizes_of_layer(layer: LayerGeometry, geometry: CacheGeometry) -> dict[int, int]:
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
    path: str,
) -> None:
    """Every section is there, as large as the geometry says, on a page, inside the file, and overlaps no other."""
    metadata = sections.get((Section.METADATA, WHOLE_CACHE))
    if metadata is None or metadata.size % (2 * PAGE):
        _refuse(path, "the metadata section is missing or of odd size")
    some = not SKETCH_SECTIONS.isdisjoint(sections.kinds)

    def check(kind: int, layer: int, size: int | None, expected: int) -> None:
        if size is None and (some or kind not in SKETCH_SECTIONS):
            _refuse(path, f"section {Section(kind).name} of layer {layer} is missing")
        if size is not None and size != expected:
            _refuse(path, f"section {Section(kind).name} has {size} bytes for {expected}")

    if not has_parent and (Section.PARENT, WHOLE_CACHE) in sections:
        _refuse(
            path, f"section {Section.PARENT.name} belongs to feature {PARENT_FEATURE}, which the file does not have"
        )
    for kind, expected in sizes_of_cache(geometry, metadata.size // 2, has_parent).items():
        extent = sections.get((kind, WHOLE_CACHE))
        check(kind, WHOLE_CACHE, extent and extent.size, expected)
    for place, expected in sizes_of_slots(geometry).items():
        extent = sections.get(place)
        check(*place, extent and extent.size, expected)
    sizes, wanted = sections.sizes_by_layer(), _wanted_by_layer(geometry)
    for kind in sections.kinds.intersection(RECENT_SECTIONS):
        # Their sizes in the first layer say how many records there are.
        if (sizes[:, kind] >= 0).any() and (wanted[:, kind] < 0).all():
            _refuse(path, f"section {Section(kind).name} of the first layer is missing, or too small for a record")
    wrong = (sizes != wanted) & (wanted >= 0)  # checkpoint slots, which are numbered by slot, have none wanted
    for number, column in np.argwhere(wrong).tolist() if wrong.any() else ():
        size = int(sizes[number, column])
        check(column, number, None if size < 0 else size, int(wanted[number, column]))
    misplaced = sections.misplaced(superblock_bytes, file_bytes)
    if misplaced is not None:
        _refuse(path, f"the section at {misplaced} is off its page, overlaps another, or leaves the file")


def _wanted_by_layer(geometry: CacheGeometry) -> NDArray[np.int64]:
    """Return the sizes that layers' sections must have, int64 [num_layers, NUM_KINDS]; -1 for none."""
    shapes = {id(layer): layer for layer in geometry.layers}  # one object a shape, as they were decoded
    sizes = np.full((len(shapes), NUM_KINDS), -1, np.int64)
    for row, layer in enumerate(shapes.values()):
        of_layer = sizes_of_layer(layer, geometry)
        sizes[row, list(of_layer)] = list(of_layer.values())
    if len(shapes) == 1:
        return sizes.repeat(geometry.num_layers, axis=0)
    rows = {key: row for row, key in enumerate(shapes)}
    return sizes[[rows[id(layer)] for layer in geometry.layers]]
