"""The `.kvm` file as bytes: encode, decode, validate. Pure: no file is touched here."""

from .records import (
    CODECS,
    FORMAT_VERSION,
    HEADER,
    HOME_BYTES,
    LIVE,
    LIVE_LENGTHS,
    NO_TOKEN,
    PAGE,
    SECTION_ABOUT,
    SLAB_SECTIONS,
    TRANSFORMS,
    WHOLE_CACHE,
    Extent,
    Section,
    block_checksum,
    checksum,
    checksum_of,
    tables,
)
from .slot import Slot
from .superblock import Superblock

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "HEADER",
    "HOME_BYTES",
    "LIVE",
    "LIVE_LENGTHS",
    "NO_TOKEN",
    "PAGE",
    "SECTION_ABOUT",
    "SLAB_SECTIONS",
    "TRANSFORMS",
    "WHOLE_CACHE",
    "Extent",
    "Section",
    "Slot",
    "Superblock",
    "block_checksum",
    "checksum",
    "checksum_of",
    "tables",
]
