"""The `.kvm` file as bytes: encode, decode, validate. Pure: no file is touched here."""

from .commit import Commit
from .records import (
    FORMAT_VERSION,
    HEADER,
    HOME_BYTES,
    LIVE,
    LIVE_LENGTHS,
    NO_TOKEN,
    PAGE,
    SECTION_ABOUT,
    SLAB_SECTIONS,
    WHOLE_CACHE,
    Extent,
    Section,
    block_checksum,
    checksum,
    checksum_of,
    slab_sections,
    tables,
)
from .slot import Slot
from .superblock import Superblock

__all__ = [
    "FORMAT_VERSION",
    "HEADER",
    "HOME_BYTES",
    "LIVE",
    "LIVE_LENGTHS",
    "NO_TOKEN",
    "PAGE",
    "SECTION_ABOUT",
    "SLAB_SECTIONS",
    "WHOLE_CACHE",
    "Commit",
    "Extent",
    "Section",
    "Slot",
    "Superblock",
    "block_checksum",
    "checksum",
    "checksum_of",
    "slab_sections",
    "tables",
]
