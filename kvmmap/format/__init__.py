"""The `.kvm` file as bytes: encode, decode, validate. Pure: no file is touched here."""

from .commit import Commit
from .parent import Parent, name_fault
from .records import (
    FORMAT_VERSION,
    HEADER,
    HOME_BYTES,
    LIVE,
    LIVE_LENGTHS,
    NO_TOKEN,
    PAGE,
    RECENT_SECTIONS,
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
from .states import NO_CHECKPOINT, CheckpointEntry, CheckpointHeader, CheckpointLayout, num_slots
from .superblock import Superblock

__all__ = [
    "FORMAT_VERSION",
    "HEADER",
    "HOME_BYTES",
    "LIVE",
    "LIVE_LENGTHS",
    "NO_CHECKPOINT",
    "NO_TOKEN",
    "PAGE",
    "RECENT_SECTIONS",
    "SECTION_ABOUT",
    "SLAB_SECTIONS",
    "WHOLE_CACHE",
    "CheckpointEntry",
    "CheckpointHeader",
    "CheckpointLayout",
    "Commit",
    "Extent",
    "Parent",
    "Section",
    "Slot",
    "Superblock",
    "block_checksum",
    "checksum",
    "checksum_of",
    "name_fault",
    "num_slots",
    "slab_sections",
    "tables",
]
