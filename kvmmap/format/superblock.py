"""The superblock: the geometry of a cache and its file's section map; written once.

Pure: bytes in, dataclasses out. Every count, offset and size is checked before anyone maps anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import CorruptCacheError, NotACacheError, ShapeMismatchError, VersionMismatchError
from ..geometry import CacheGeometry
from .layout import (
    REQUIRED_SECTIONS,
    decode_layout,
    features,
    sizes_of_cache,
    sizes_of_layer,
    sizes_of_slots,
    to_page,
)
from .records import (
    CHECKSUM,
    FORMAT_VERSION,
    HEADER,
    HOME_BYTES,
    LAYER_ENTRY,
    MAGIC,
    MAX_SUPERBLOCK_BYTES,
    OPTIONAL,
    PARENT_FEATURE,
    SECTION_ENTRY,
    STATE_ENTRY,
    STATES_FEATURE,
    WHOLE_CACHE,
    Extent,
    Section,
    checksum,
)
from .section_table import KNOWN_SECTIONS, SectionTable
from .states import CheckpointLayout, encode_states


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
        """The offsets within a checkpoint slot."""
        return CheckpointLayout.of(self.geometry.states)

    @property
    def has_sketches(self) -> bool:
        """True if the file keeps sketches; then it has all sections that belong to them."""
        return (Section.SKETCH_CHECKSUMS, WHOLE_CACHE) in self.sections

    @property
    def unknown_sections(self) -> tuple[int, ...]:
        """Kinds of section that this package does not know and so can't keep right: the file is for reading only."""
        sections = self.sections
        kinds = sections.kinds if isinstance(sections, SectionTable) else {kind for kind, _ in sections}
        return tuple(sorted(kinds - KNOWN_SECTIONS))

    @property
    def live_record(self) -> Extent:
        """The live record, with the `home` word behind it unless another section or the file's end is there."""
        extent = self.section(Section.LIVE)
        end = extent.offset + extent.size
        free = to_page(end)
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
        of_cache = sizes_of_cache(geometry, metadata_bytes, has_parent)
        sizes: dict[tuple[int, int], int] = {(kind, WHOLE_CACHE): bytes_ for kind, bytes_ in of_cache.items()}
        by_layer = {layer: sizes_of_layer(layer, geometry) for layer in set(geometry.layers)}
        for number, layer in enumerate(geometry.layers):
            sizes.update(((kind, number), bytes_) for kind, bytes_ in by_layer[layer].items())
        sizes.update(sizes_of_slots(geometry))
        size = HEADER.size + LAYER_ENTRY.size * geometry.num_layers + SECTION_ENTRY.size * len(sizes)
        size += STATE_ENTRY.size * len(geometry.states) + CHECKSUM.size
        sections: dict[tuple[int, int], Extent] = {}
        end = to_page(size)
        for key, section_size in sizes.items():
            sections[key] = Extent(end, section_size)
            end += to_page(section_size + (HOME_BYTES if key[0] == Section.LIVE else 0))
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
                    "features": features(geometry) | PARENT_FEATURE * self.has_parent,
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
            raise CorruptCacheError(f"{path}: superblock size {size} is out of range", path=path, actual=size)
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
        if real_bytes < header["file_bytes"]:
            raise CorruptCacheError(
                f"{path}: cut off: {real_bytes:,} of {header['file_bytes']:,} bytes are there; restore it from where "
                "it was copied",
                path=path,
                expected=header["file_bytes"],
                actual=real_bytes,
            )
        geometry, sections = decode_layout(data, path)
        return cls(
            geometry,
            header["file_id"],
            header["created_ns"],
            header["file_bytes"],
            len(data),
            sections,
            bool(header["features"] & PARENT_FEATURE),
        )
