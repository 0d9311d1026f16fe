"""The states of a writer."""

from __future__ import annotations

from enum import Enum, auto


class WriterState(Enum):
    """The state of a handle that is open for writing.

    OPENED -> READY: the incomplete blocks of the last commit match their checksums.
    READY -> INTERRUPTED: an operation stopped between two of its steps (Ctrl-C, a full disk).
    INTERRUPTED -> OPENED: state was reloaded from the file, and what was incomplete rolled back.
    Any but CLOSED -> POISONED: a sync failed. Only closing is possible.
    Any -> CLOSED.
    """

    OPENED = auto()
    READY = auto()
    INTERRUPTED = auto()
    POISONED = auto()
    CLOSED = auto()
