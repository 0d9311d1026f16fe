"""What stands before a state's keys and values: its kind, its version, and the tokens.

    slot file         u32 "ggsq", u32 version, u32 n, i32[n] tokens
    session file      u32 "ggsn", u32 version, u32 n, i32[n] tokens, u32 length and the architecture's name
    sequence buffer   u32 0xaf143cd8, i32 sequence            (llama_state_seq_get_data)
    context buffer    u32 length and the architecture's name  (llama_state_get_data)

Session files of older builds have outputs, logits and embeddings behind the name. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...errors import VersionMismatchError
from .source import Reader, Source

Kind = Literal["slot", "session", "sequence", "context"]

SLOT, SESSION, SEQUENCE = 0x67677371, 0x6767736E, 0xAF143CD8
VERSIONS: dict[Kind, tuple[int, ...]] = {"slot": (2, 3), "session": (9, 10)}
"""Versions that are read and written; buffers have none."""

_MAGICS: dict[int, Kind] = {SLOT: "slot", SESSION: "session"}
_OLD = {0x67676C61: "a lora adapter of an old llama.cpp", 0x46554747: "a GGUF file, the model itself"}

MOST_NAME = 256
"""Bytes of an architecture's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a state begins with."""

    kind: Kind
    version: int
    """0 for buffers."""

    tokens: NDArray[np.int32]
    """Token ids, [n]: those of the cells, and perhaps some behind them."""

    architecture: str | None
    """The model's, where it is named."""

    sequence: int
    """The sequence that a sequence buffer was taken from."""

    offset: int
    """Where the keys and values begin."""


def is_state(data: bytes) -> bool:
    """Whether a file that begins so is a slot or session file of llama.cpp, of whatever version."""
    return len(data) >= 4 and struct.unpack_from("<I", data)[0] in _MAGICS


def read_frames(source: Source) -> Iterator[Frame]:
    """Yield what a state may begin with, the likeliest first: versions alone don't say it.

    Raises:
        NotACacheError: it is no state.
        VersionMismatchError: of a version that is not read.
    """
    reader = Reader(source)
    magic = reader.u32()
    if magic in _OLD:
        raise source.refused(f"it is {_OLD[magic]}")
    if magic == SEQUENCE:
        sequence = reader.i32()
        yield Frame(
            kind="sequence",
            version=0,
            tokens=np.empty(0, np.int32),
            architecture=None,
            sequence=sequence,
            offset=reader.offset,
        )
        return
    if magic not in _MAGICS:
        reader.offset = 0
        name = _architecture(reader)
        if name is None:
            raise source.refused(f"it begins with {magic:#010x}, which is neither a slot's nor a session's mark")
        yield Frame(
            kind="context",
            version=0,
            tokens=np.empty(0, np.int32),
            architecture=name,
            sequence=0,
            offset=reader.offset,
        )
        return
    kind = _MAGICS[magic]
    version = reader.u32()
    if version not in VERSIONS[kind]:
        known = " and ".join(map(str, VERSIONS[kind]))
        raise VersionMismatchError(
            f"{source.name}: a {kind} file of llama.cpp of version {version}; this kvmmap reads {known}: update "
            "kvmmap, or "
            "save the state with another build",
            path=source.name,
            expected=VERSIONS[kind],
            actual=version,
        )
    tokens = reader.array("<i4", reader.u32())
    frame = Frame(kind=kind, version=version, tokens=tokens, architecture=None, sequence=0, offset=reader.offset)
    if kind == "slot":
        yield frame
        return
    name = _architecture(reader)
    if name is None:
        raise source.refused("no architecture is named behind its tokens")
    frame = replace(frame, architecture=name, offset=reader.offset)
    yield frame
    if version == VERSIONS["session"][0] and (offset := _behind_outputs(reader)) is not None:
        yield replace(frame, offset=offset)


def frame_bytes(frame: Frame) -> bytes:
    """Return the bytes of a frame, which the keys and values follow."""
    name = (frame.architecture or "").encode()
    named = struct.pack("<I", len(name)) + name
    if frame.kind == "sequence":
        return struct.pack("<Ii", SEQUENCE, frame.sequence)
    if frame.kind == "context":
        return named
    magic = SLOT if frame.kind == "slot" else SESSION
    head = struct.pack("<III", magic, frame.version, len(frame.tokens)) + frame.tokens.astype("<i4").tobytes()
    return head if frame.kind == "slot" else head + named


def _architecture(reader: Reader) -> str | None:
    if reader.left < 4:
        return None
    length = reader.u32()
    if not 0 < length <= min(MOST_NAME, reader.left):
        return None
    name = reader.take(length).tobytes()
    return name.decode() if all(32 < byte < 127 for byte in name) else None


def _behind_outputs(reader: Reader) -> int | None:
    """Return where an older session's keys and values begin: behind output ids, logits and embeddings."""
    start = reader.offset
    try:
        count = reader.u32() if reader.left >= 4 else 0
        if count * 4 > reader.left:
            return None
        reader.skip(4 * count)
        for _ in range(2):
            size = reader.u64() if reader.left >= 8 else 0
            if size * 4 > reader.left:
                return None
            reader.skip(4 * size)
        return reader.offset
    finally:
        reader.offset = start
