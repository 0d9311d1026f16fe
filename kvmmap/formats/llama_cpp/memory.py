"""A state's keys and values: cells, and where each layer's rows lie.

    u32 streams (not in old builds), then of each stream
      u32 cells; if there are any:
      cells x (i32 position, u32 count, [extension], i32[count] sequences)
      u32 transposed, u32 layers
      layers x (i32 type, u64 bytes of a row, cells x row)                     keys
      layers x (i32 type, u64 bytes of a row, cells x row)                     values
          or x (i32 type, u32 bytes of a number, u32 numbers, numbers x cells) values, transposed

A cell's extension is there for M-RoPE: i32 x, i32 y, and since the newest versions i32 token. Which of the layouts a
file has is not recorded; it is the one that fits the file and the model to the last byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import KvmmapError, ModelMismatchError, NotACacheError, UnsupportedModelError
from .framing import Frame
from .ggml import GgmlType, kv_type
from .model import GgufModel
from .source import Reader, Source

MOST_SEQUENCES = 4096
"""Sequences that a cell may belong to; llama.cpp's own limit is lower."""

MOST_STREAMS = 4096


@dataclass(frozen=True, slots=True)
class Layout:
    """What of a layout varies from build to build."""

    streams: bool
    """Whether the number of streams is there."""

    extension: int
    """Numbers of a cell's extension: 0, 2 or 3."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where the keys of a layer lie, or its values."""

    type: GgmlType
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The cells of a stream, in the order in which they are stored."""

    positions: NDArray[np.int32]
    """[cells]."""

    owners: list[NDArray[np.int32]]
    """The sequences of each cell, if some cell has another number of them than one; else a single array, [cells]."""

    extension: NDArray[np.int32] | None
    """[cells, 2 or 3]."""

    transposed: bool
    """Whether values lie number by number, and not cell by cell."""

    keys: list[Part]
    values: list[Part]

    def cells_of(self, sequence: int) -> NDArray[np.int64]:
        """Return which cells belong to a sequence."""
        if len(self.owners) == 1 and len(self.positions) == len(self.owners[0]):
            return np.flatnonzero(self.owners[0] == sequence)
        return np.flatnonzero([sequence in owners for owners in self.owners])

    def sequences(self) -> set[int]:
        """Return all sequences that have cells."""
        return set(np.concatenate(self.owners).tolist()) if self.owners else set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All of a state behind its frame."""

    frame: Frame
    layout: Layout
    streams: list[Stream | None]
    """None for a stream without cells."""


def read_memory(source: Source, frames: Iterator[Frame], model: GgufModel) -> Memory:
    """Find the layout that fits, and read the cells.

    Raises:
        NotACacheError: no layout fits; the message is that of the likeliest one.
        ModelMismatchError: the rows are not this model's.
        UnsupportedModelError: of a model whose state has parts that are not read.
        DtypeError: rows of a type that is not read.
    """
    first: KvmmapError | None = None
    for frame in frames:
        if frame.architecture not in (None, model.architecture):
            raise ModelMismatchError(
                f"{source.name}: a state of a model of the architecture {frame.architecture!r}, and the GGUF file is "
                "of "
                f"{model.architecture!r}: give the GGUF file that made it",
                expected=frame.architecture,
                actual=model.architecture,
                path=source.name,
            )
        for layout in _layouts(frame, model):
            try:
                return _read(source, frame, layout, model)
            except (NotACacheError, ModelMismatchError) as error:
                first = first or error
    assert first is not None
    raise first


def _layouts(frame: Frame, model: GgufModel) -> Iterator[Layout]:
    sizes = (3, 2) if model.extension else (0,)
    for extension in sizes:
        yield Layout(True, extension)
    if frame.kind in ("slot", "session") and frame.version in (2, 9):
        for extension in sizes:
            yield Layout(False, extension)


def _read(source: Source, frame: Frame, layout: Layout, model: GgufModel) -> Memory:
    reader = Reader(source, frame.offset)
    count = reader.u32() if layout.streams else 1
    if not 1 <= count <= MOST_STREAMS:
        raise source.refused(f"it has {count} streams of cells")
    streams = [_stream(reader, layout, model) for _ in range(count)]
    if reader.left:
        raise source.refused(
            f"{reader.left} bytes follow the keys and values of {len(model.layers)} layers: another model's, or a "
            "state with "
            "parts that are not read"
        )
    return Memory(frame=frame, layout=layout, streams=streams)


def _stream(reader: Reader, layout: Layout, model: GgufModel) -> Stream | None:
    cells = reader.u32()
    if not cells:
        return None
    positions, owners, extension = _cells(reader, cells, layout.extension)
    transposed, layers = reader.u32(), reader.u32()
    if transposed > 1:
        raise reader.source.refused(f"its mark of transposed values is {transposed}")
    if layers != len(model.layers):
        raise ModelMismatchError(
            f"{reader.source.name}: has keys of {layers} layers, and the GGUF file's model keeps "
            f"{len(model.layers)}: give "
            "the GGUF file that made it",
            expected=len(model.layers),
            actual=layers,
            path=reader.source.name,
        )
    keys = _parts(reader, cells, [shape.num_kv_heads * shape.head_dim for shape in model.layers], "keys")
    counts = [shape.num_kv_heads * shape.value_head_dim for shape in model.layers]
    values = (
        [_transposed_part(reader, cells, count, f"values of layer {n}") for n, count in enumerate(counts)]
        if transposed
        else _parts(reader, cells, counts, "values")
    )
    return Stream(
        positions=positions,
        owners=owners,
        extension=extension,
        transposed=bool(transposed),
        keys=keys,
        values=values,
    )


def _cells(
    reader: Reader, cells: int, extension: int
) -> tuple[NDArray[np.int32], list[NDArray[np.int32]], NDArray[np.int32] | None]:
    kind = cell_dtype(extension)
    start = reader.offset
    if cells * kind.itemsize <= reader.left:
        found = reader.array(kind, cells)
        if (found["count"] == 1).all():
            return found["position"], [found["sequence"]], found["extension"] if extension else None
    if cells * 8 > reader.left + reader.offset - start:
        raise reader.source.refused(f"it ends at byte {reader.source.size}, and says that it has {cells} cells")
    reader.offset = start
    positions, owners, more = np.empty(cells, np.int32), [], np.empty((cells, extension), np.int32)
    for cell in range(cells):
        positions[cell] = reader.i32()
        count = reader.u32()
        if count > MOST_SEQUENCES:
            raise reader.source.refused(f"cell {cell} belongs to {count} sequences")
        if extension:
            more[cell] = reader.array("<i4", extension)
        owners.append(reader.array("<i4", count))
    return positions, owners, more if extension else None


def cell_dtype(extension: int) -> np.dtype[Any]:
    """Return the numbers of a cell that belongs to one sequence."""
    more = [("extension", "<i4", (extension,))] if extension else []
    return np.dtype([("position", "<i4"), ("count", "<u4"), *more, ("sequence", "<i4")])


_HEAD = np.dtype([("type", "<i4"), ("row", "<u8")])
"""What stands before the rows of a layer."""


def _parts(reader: Reader, cells: int, counts: list[int], what: str) -> list[Part]:
    """Return where the rows of all layers lie, each of so many numbers."""
    first = _part(reader, cells, counts[0], f"{what} of layer 0")
    row, more = first.type.row_bytes(counts[0]), len(counts) - 1
    step = _HEAD.itemsize + cells * row
    if len(set(counts)) == 1 and step * more <= reader.left:
        heads = reader.source.records(reader.offset, _HEAD, more, step)
        if (heads["type"] == first.type.number).all() and (heads["row"] == row).all():  # as usual
            reader.skip(step * more)
            return [Part(first.type, first.offset + step * n) for n in range(len(counts))]
    return [first, *(_part(reader, cells, count, f"{what} of layer {n}") for n, count in enumerate(counts[1:], 1))]


def _part(reader: Reader, cells: int, count: int, what: str) -> Part:
    type = kv_type(reader.i32(), reader.source.name)
    row = reader.u64()
    _check_row(reader, row, type.row_bytes(count), what)
    return Part(type, reader.skip(cells * row))


def _transposed_part(reader: Reader, cells: int, count: int, what: str) -> Part:
    type = kv_type(reader.i32(), reader.source.name)
    size, numbers = reader.u32(), reader.u32()
    if type.quantized:
        raise UnsupportedModelError(
            f"{reader.source.name}: the {what} are {type.name} and transposed, which no build writes"
        )
    _check_row(reader, size * numbers, type.row_bytes(count), what)
    return Part(type, reader.skip(cells * size * numbers))


def _check_row(reader: Reader, row: int, expected: int, what: str) -> None:
    if row != expected:
        raise ModelMismatchError(
            f"{reader.source.name}: the {what} take {row} bytes a position, and the GGUF file's model needs "
            f"{expected}: give "
            "the GGUF file that made it",
            expected=expected,
            actual=row,
            path=reader.source.name,
        )
