"""Writing a cache as a safetensors file: a JSON header, and the arrays behind it.

The library writes a whole file's tensors at once; a cache may be larger than memory, so rows are written as they are
read. The format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..codecs import INT8
from ..errors import DtypeError, NoCheckpointError, ShapeMismatchError
from ..paths import PathLike, place_text
from ..ranges import check_range
from ..row_arrays import output_array, target_dtype
from ..storage.posix import PosixFile
from ..storage.protocols import Progress
from ..transfer.copying import opened
from .new_file import new_file, resolved
from .safetensors_rows import DTYPES as ROW_DTYPES
from .safetensors_rows import VERSION as ROWS_VERSION
from .safetensors_rows import ExportedRows, KeptRows
from .safetensors_states import DTYPES as STATE_DTYPES
from .safetensors_states import VERSION as STATES_VERSION
from .safetensors_states import ExportedStates

TensorDtype = Literal["float32", "float16", "bfloat16", "stored", "int8"]
"""What an export holds: rows as numbers, or as they are stored; "int8" is that of int8 rows alone."""

STEP_TOKENS = 4096
"""Positions of a layer that are converted at once."""

MARK = "kvmmap"
"""The key of a file's metadata that holds ours, as JSON."""

VERSION = 1
"""Of what is below that key, in a file without states."""

IDS = "token_ids"
"""The tensor that holds the token ids."""


DTYPES = ROW_DTYPES | STATE_DTYPES
"""What safetensors calls dtypes."""


class _Tensor(NamedTuple):
    """One tensor of a file to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))


def export_tensors(
    source: PathLike | QuantizedKvCache,
    path: PathLike,
    *,
    dtype: TensorDtype = "float16",
    start: int = 0,
    stop: int | None = None,
    layers: Sequence[int] | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a cache as a safetensors file: `layers.I.keys` and `layers.I.values`, [n, num_kv_heads, head_dim].

    With "stored" they are the arrays that the codecs make, such as `layers.I.key_codes`, `key_scales`, `value_codes`
    and `value_scales`, bit by bit, and what is kept in 16 bits besides as `recent.I.keys` and the like: an import makes
    the same cache of it. `token_ids`, int32 [n], come along, and model and metadata in the header. Of
    a cache with states the checkpoints come along, as `checkpoints.POSITION.LAYER.NAME`, and positions up to the last
    one that is not beyond `stop`.

    Args:
        source: path or URL of a cache, or an open one.
        path: where; the file appears when it is whole, with mode 0600. A pipe or a device (but no disk) is written to
            and stays what it is.
        dtype: "float32", "float16" or "bfloat16"; or "stored"; or "int8", which is "stored" for a cache of int8 rows,
            without what it keeps in 16 bits besides, and refused for others.
        start, stop: positions; all that are stored by default.
        layers: indices of the layers; all by default, numbered anew from 0.
        overwrite: replace a file that is there.
        storage_options: the source's.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CacheExistsError: there is something at `path`.
        DtypeError: no such dtype.
        PositionOutOfRangeError, LayerOutOfRangeError: there are no such positions or layers.
        NoCheckpointError: the source has states, and `start` is not 0.
        ShapeMismatchError: none of the layers has rows.
        CorruptCacheError: a block, or a checkpoint, does not match its checksum; nothing was written.
        CacheNotFoundError, FormatError, OSError: as in `open`.
    """
    stream = is_stream(place_text(path))
    path = resolved(place_text(path), overwrite=overwrite or stream)
    with opened(source, storage_options) as cache:
        start, stop = check_range(start, cache.seq_len if stop is None else stop, cache.seq_len)
        if cache.states:
            stop = _last_checkpoint(cache, start, stop)
        chosen = cache.layers.chosen(layers)
        states = ExportedStates.of(cache, chosen, stop)
        rows = ExportedRows.of(cache, chosen)
        if not any(layer.has_rows for layer in rows.layers):
            raise ShapeMismatchError(
                "no layer that is to be exported has rows: at least one must", expected=1, actual=0
            )
        stored = _is_stored(dtype)
        if stored and dtype == "int8":
            rows = _only_int8(rows)
        kept = _kept(cache, chosen, rows, start, stop) if stored else {}
        tensors = _plan(rows, stop - start, None if stored else dtype, kept, states)
        facts = {
            "version": VERSION if states is None else STATES_VERSION,
            "capacity": cache.capacity,
            "document": json.loads(cache.storage.document.encode()),
        }
        if states is not None:
            facts["states"] = states.facts()
        if stored and not rows.plain:
            facts |= {"version": ROWS_VERSION, "rows": rows.facts()}
        export = _Export(cache, chosen, start, stop, tensors, facts, kept, states, progress)
        cache.storage.verify_rows(start, stop)
        if stream:
            with _scratch_file() as file:
                export.write(file)
                _send(file, path)
            return
        with new_file(path, overwrite=overwrite) as file:
            export.write(file)


@contextlib.contextmanager
def _scratch_file() -> Iterator[PosixFile]:
    """Yield a file that is gone when the block ends."""
    file = PosixFile.create_beside(os.path.join(tempfile.gettempdir(), "tensors"))
    try:
        yield file
    finally:
        file.discard()


def is_stream(path: str) -> bool:
    """True for a pipe, a socket or a character device: what is written to it can't be removed or replaced."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def _send(file: PosixFile, path: str) -> None:
    """Write all of a file to a pipe or a device."""
    size, offset = file.stat().st_size, 0
    with open(path, "wb", buffering=0) as stream:
        while offset < size:
            data = memoryview(file.read(offset, 1 << 20))
            offset += len(data)
            while data:
                data = data[stream.write(data) :]


def _last_checkpoint(cache: QuantizedKvCache, start: int, stop: int) -> int:
    """Return where an export of a cache with states ends, as `kvmmap.copy` does."""
    if start:
        raise NoCheckpointError(
            f"a cache with states can be exported from position 0 only, and not from {start}: its states depend on all "
            "positions before",
            position=start,
            path=cache.path,
        )
    return cache.storage.checkpoints.last(stop)


def _is_stored(dtype: Any) -> bool:
    """True if rows are to be exported as they are stored, False if as numbers of a dtype.

    Raises:
        DtypeError: there is no such dtype.
    """
    if isinstance(dtype, str) and dtype in ("stored", "int8"):
        return True
    try:
        target_dtype(dtype)
    except DtypeError as error:
        names = "float32", "float16", "bfloat16", "stored", "int8"
        raise DtypeError(
            f'dtype must be "float32", "float16" or "bfloat16", "stored" or "int8", not {dtype!r}',
            expected=names,
            actual=error.actual,
        ) from None
    return False


def _only_int8(rows: ExportedRows) -> ExportedRows:
    """Return rows without what is kept in 16 bits besides.

    Raises:
        DtypeError: they are not all int8.
    """
    for number, layer in enumerate(rows.layers):
        for codec in (layer.key_codec, layer.value_codec):
            if codec is not INT8:
                raise DtypeError(
                    f'dtype "int8" exports int8 rows as they are stored, and layer {number} of the export stores '
                    f'{codec.name}: export "stored", or numbers: "float32", "float16" or "bfloat16"',
                    expected=INT8.name,
                    actual=codec.name,
                    layer=number,
                )
    return ExportedRows(rows.layers)


def _kept(
    cache: QuantizedKvCache, chosen: Sequence[int], rows: ExportedRows, start: int, stop: int
) -> dict[int, KeptRows]:
    """Return what each layer of an export keeps in 16 bits of positions [start, stop)."""
    if not rows.keeps_recent:
        return {}
    found = {}
    for number, layer in enumerate(chosen):
        source = cache.storage.layers[layer].recent_rows()
        if source is not None:
            found[number] = KeptRows.of(rows, number, source, start, stop)
    return found


def _plan(
    rows: ExportedRows, count: int, dtype: str | None, kept: Mapping[int, KeptRows], states: ExportedStates | None
) -> list[_Tensor]:
    """Return the tensors of an export: numbers of a dtype, or arrays of the codecs."""
    found = []
    for number, layer in enumerate(rows.layers):
        if not layer.has_rows:
            continue
        if dtype is not None:
            kind, heads = output_array((0,), dtype).dtype, layer.num_kv_heads
            found.append(_Tensor(f"layers.{number}.keys", kind, (count, heads, layer.head_dim)))
            found.append(_Tensor(f"layers.{number}.values", kind, (count, heads, layer.value_head_dim)))
            continue
        found += [_Tensor(f"layers.{number}.{slab.name}", slab.dtype, (count, *slab.shape)) for slab in layer.slabs]
    found.append(_Tensor(IDS, np.dtype("<i4"), (count,)))
    for number, one in kept.items():
        found += [_Tensor(name, array.dtype, array.shape) for name, array in one.named(number)]
    if states is not None:
        found += [_Tensor(name, spec.numpy_dtype, spec.shape) for _, spec, name in states.places()]
    return found


class _Export(NamedTuple):
    """What is written to a file."""

    cache: QuantizedKvCache
    layers: Sequence[int]
    """Numbers of the layers in the cache."""
    start: int
    stop: int
    tensors: Sequence[_Tensor]
    facts: Mapping[str, Any]
    kept: Mapping[int, KeptRows]
    states: ExportedStates | None
    progress: Progress | None

    def write(self, file: PosixFile) -> None:
        """Write the header, and the tensors behind it."""
        header: dict[str, Any] = {"__metadata__": {MARK: json.dumps(self.facts)}}
        places, end = {}, 0
        for tensor in self.tensors:
            size = tensor.row_bytes * tensor.shape[0]
            header[tensor.name] = {
                "dtype": DTYPES[tensor.dtype.name],
                "shape": list(tensor.shape),
                "data_offsets": [end, end + size],
            }
            places[tensor.name] = tensor, end
            end += size
        data = json.dumps(header).encode()
        data += b" " * (-len(data) % 8)
        base = 8 + len(data)
        file.write((0, 8), (len(data).to_bytes(8, "little"), data))
        done = 0
        for number, layer in enumerate(self.layers):
            if not self.cache.geometry.layers[layer].has_rows:
                continue
            for first, last in steps(self.start, self.stop):
                for name, rows in self._rows(layer, first, last):
                    tensor, offset = places[f"layers.{number}.{name}"]
                    file.write((base + offset + (first - self.start) * tensor.row_bytes,), (rows,))
                    done += rows.nbytes
                self.cache.storage.check()
                if self.progress:
                    self.progress(done, end)
        ids = self.cache.token_ids[self.start : self.stop].astype("<i4")
        for name, array in itertools.chain([(IDS, ids)], self._kept_and_states()):
            file.write((base + places[name][1],), (array,))
        if self.progress:
            self.progress(end, end)

    def _kept_and_states(self) -> Iterator[tuple[str, NDArray[Any]]]:
        for number, kept in self.kept.items():
            yield from kept.named(number)
        if self.states is not None:
            yield from self.states.arrays(self.cache, self.layers)

    def _rows(self, layer: int, start: int, stop: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the arrays of positions of a layer, with their names."""
        tensor = self.tensors[0]
        if not tensor.name.endswith(".keys"):
            for name, array in self.cache.storage.layers[layer].rows(start, stop).named():
                yield name, np.ascontiguousarray(array)
            return
        # As bits, because the buffer protocol knows no bfloat16.
        bits = f"u{tensor.dtype.itemsize}"
        yield "keys", self.cache.layers[layer].read_keys(start, stop, dtype=tensor.dtype).view(bits)
        yield "values", self.cache.layers[layer].read_values(start, stop, dtype=tensor.dtype).view(bits)


def steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Split positions [start, stop) into parts that are converted at once."""
    return itertools.pairwise([*range(start, stop, STEP_TOKENS), stop])
