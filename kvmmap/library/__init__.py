"""Many caches as one store: which of them has the longest prefix of a prompt, within a budget, for many processes."""

from .checking import CheckReport
from .library import Library
from .matching import Match
from .metrics import LibraryStats
from .namespace import Namespace
from .policy import Choice
from .segment import Segment, StoredNamespace
from .session import Session
from .sharing import CleanUp

__all__ = [
    "CheckReport",
    "Choice",
    "CleanUp",
    "Library",
    "LibraryStats",
    "Match",
    "Namespace",
    "Segment",
    "Session",
    "StoredNamespace",
]
