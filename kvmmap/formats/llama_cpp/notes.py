"""The record of the state that a cache was imported from, from which the same state can be written again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import MetadataError
from .framing import VERSIONS, Frame, Kind
from .ggml import KV_TYPES, RowForm
from .memory import Memory, Stream

NOTES = "llama_cpp"
"""The metadata's key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateForm:
    """The form of a state."""

    kind: Kind = "slot"

    version: int = 3
    """0 for buffers."""

    key_type: str = "f16"
    value_type: str = "f16"

    rotated: bool = True
    """Whether rows of quantised types are rotated, where head_dim is a multiple of 64."""

    transposed: bool = False
    """Whether values are transposed, as llama.cpp has them without flash attention."""

    streams: int = 1
    """Streams of cells; 0 for an old build's state, which does not count them."""

    stream: int = 0
    """The one that has the cells."""

    sequence: int = 0

    extension: int = 0
    """Numbers of a cell's extension."""

    behind: tuple[int, ...] = ()
    """Tokens behind the last cell's."""

    named: bool = True
    """Whether token ids are there."""

    @classmethod
    def of(
        cls,
        memory: Memory,
        stream: Stream,
        number: int,
        sequence: int,
        forms: tuple[RowForm, RowForm],
        rotated: bool,
        behind: NDArray[np.int32],
    ) -> StateForm:
        """Return the form of a state that was read."""
        frame: Frame = memory.frame
        return cls(
            kind=frame.kind,
            version=frame.version,
            key_type=forms[0].type.name,
            value_type=forms[1].type.name,
            rotated=rotated,
            transposed=stream.transposed,
            streams=len(memory.streams) if memory.layout.streams else 0,
            stream=number,
            sequence=sequence,
            extension=memory.layout.extension,
            behind=tuple(behind.tolist()),
            named=bool(len(frame.tokens)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON."""
        return asdict(self) | {"behind": list(self.behind)}

    @classmethod
    def from_json(cls, notes: Any) -> StateForm:
        """Read what `to_json` made.

        Raises:
            MetadataError: it is not such.
        """
        try:
            if not isinstance(notes, Mapping):
                raise TypeError("no object")
            found = cls(**{**notes, "behind": tuple(notes.get("behind", ()))})
            found.check()
            return found
        except (TypeError, ValueError) as error:
            raise MetadataError(f"the metadata's {NOTES!r} is invalid: {error}") from None

    def check(self) -> None:
        """Raise ValueError if there can be no such state."""
        if self.kind not in ("slot", "session", "sequence", "context"):
            raise ValueError(f"unknown kind of state {self.kind!r}: slot, session, sequence or context")
        if self.version not in VERSIONS.get(self.kind, (0,)):
            raise ValueError(f"a {self.kind} has version {VERSIONS.get(self.kind, (0,))}, not {self.version!r}")
        if self.key_type not in KV_TYPES or self.value_type not in KV_TYPES:
            raise ValueError(f"types of keys and values are {', '.join(KV_TYPES)}")
        if self.transposed and KV_TYPES[self.value_type].quantized:
            raise ValueError(f"values of {self.value_type} need flash attention: they can't be transposed")
        numbers = (self.streams, self.stream, self.sequence, self.extension, *self.behind)
        if not all(type(number) is int and -(2**31) <= number < 2**31 for number in numbers):
            raise ValueError("streams, sequence, extension and tokens are whole numbers")
        if (
            self.extension not in (0, 2, 3)
            or not 0 <= self.streams <= 4096
            or not 0 <= self.stream < max(1, self.streams)
        ):
            raise ValueError(f"extension {self.extension}, {self.streams} streams")
