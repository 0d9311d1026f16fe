"""Caches as safetensors files: for programs that know tensors and not caches, and back.

The only importer of safetensors. Files are written here, row by row as they come, because the library takes a whole
file's tensors at once, and a cache may be larger than memory; it is a JSON header and the arrays behind it
(https://huggingface.co/docs/safetensors). They are read with the library.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..errors import CacheExistsError, CacheNotFoundError, FormatError, MissingLibraryError, NotACacheError
from ..geometry import check_range
from ..metadata import Document, ModelInfo, document
from ..opening import making
from ..paths import PathLike, place_text
from ..quantize import output_array
from ..storage.posix import PosixFile
from ..storage.protocols import Progress, Rows
from ..transfer.copying import opened

TensorDtype = Literal["float32", "float16", "bfloat16", "int8"]
"""What an export holds: rows as numbers, or codes and scales as they are stored."""

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "int32": "I32"}
"""What safetensors calls dtypes."""

STEP_TOKENS = 4096
"""Positions of a layer that are converted at once."""

MARK = "kvmmap"
"""The key of a file's metadata that holds ours, as JSON."""


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

    With "int8" they are `layers.I.key_codes`, `key_scales`, `value_codes` and `value_scales`, bit by bit. `token_ids`,
    int32 [n], come along, and model and metadata in the header.

    Args:
        source: path or URL of a cache, or an open one.
        path: where; the file appears when it is whole, with mode 0600.
        dtype: "float32", "float16", "bfloat16" or "int8".
        start, stop: positions; all that are stored by default.
        layers: indices of the layers; all by default, numbered anew from 0.
        overwrite: replace a file that is there.
        storage_options: the source's.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CacheExistsError: there is something at `path`.
        DtypeError: no such dtype.
        PositionOutOfRangeError, LayerOutOfRangeError: there are no such positions or layers.
        CorruptCacheError: a block does not match its checksum; nothing was written.
        CacheNotFoundError, FormatError, OSError: as in `open`.
    """
    path = os.path.abspath(place_text(path))
    if os.path.lexists(path) and not overwrite:
        raise CacheExistsError(f"{path}: exists already; overwrite=True replaces it", path=path)
    path = os.path.realpath(path)  # what a link names is replaced, and not the link
    with opened(source, storage_options) as cache:
        start, stop = check_range(start, cache.seq_len if stop is None else stop, cache.seq_len)
        chosen = [cache.layers.check(layer) for layer in (range(cache.num_layers) if layers is None else layers)]
        tensors = _plan(cache, chosen, stop - start, dtype)
        facts = {"version": 1, "capacity": cache.capacity, "document": json.loads(cache.storage.document.encode())}
        cache.storage.verify_rows(start, stop)
        try:
            file = PosixFile.create_beside(path)
        except FileNotFoundError:
            raise CacheNotFoundError(f"{os.path.dirname(path)}: there is no such directory", path=path) from None
        try:
            _write(file, cache, chosen, (start, stop), tensors, facts, progress)
            file.sync()
            file.replace(path) if overwrite else file.link_to(path)
        except BaseException as error:
            file.discard()
            if isinstance(error, FileExistsError):
                raise CacheExistsError(f"{path}: exists already; overwrite=True replaces it", path=path) from None
            raise
        file.close()


def _plan(cache: QuantizedKvCache, layers: Sequence[int], count: int, dtype: str) -> list[_Tensor]:
    kind = np.dtype(np.int8) if dtype == "int8" else output_array((0,), dtype).dtype
    found = []
    for number, layer in enumerate(layers):
        geometry = cache.geometry.layers[layer]
        for name, dim in (("key", geometry.head_dim), ("value", geometry.value_head_dim)):
            shape = (count, geometry.num_kv_heads, dim)
            if dtype == "int8":
                found.append(_Tensor(f"layers.{number}.{name}_codes", kind, shape))
                found.append(_Tensor(f"layers.{number}.{name}_scales", np.dtype("<f4"), shape[:2]))
            else:
                found.append(_Tensor(f"layers.{number}.{name}s", kind, shape))
    return [*found, _Tensor("token_ids", np.dtype("<i4"), (count,))]


def _write(
    file: PosixFile,
    cache: QuantizedKvCache,
    layers: Sequence[int],
    span: tuple[int, int],
    tensors: Sequence[_Tensor],
    facts: Mapping[str, Any],
    progress: Progress | None,
) -> None:
    start, stop = span
    header: dict[str, Any] = {"__metadata__": {MARK: json.dumps(facts)}}
    places, end = {}, 0
    for tensor in tensors:
        size = tensor.row_bytes * tensor.shape[0]
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype.name],
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
    for number, layer in enumerate(layers):
        for first, last in _steps(start, stop):
            for name, rows in _converted(cache, layer, first, last, tensors[0].dtype):
                tensor, offset = places[f"layers.{number}.{name}"]
                file.write((base + offset + (first - start) * tensor.row_bytes,), (rows,))
                done += rows.nbytes
            cache.storage.check()
            if progress:
                progress(done, end)
    file.write((base + places["token_ids"][1],), (cache.token_ids[start:stop].astype("<i4"),))
    if progress:
        progress(end, end)


def _converted(
    cache: QuantizedKvCache, layer: int, start: int, stop: int, dtype: np.dtype[Any]
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the arrays of positions of a layer, with their names."""
    if dtype == np.int8:
        for name, array in cache.storage.layers[layer].rows(start, stop).named():
            yield name, np.ascontiguousarray(array)
        return
    # As bits, because the buffer protocol knows no bfloat16.
    bits = f"u{dtype.itemsize}"
    yield "keys", cache.layers[layer].read_keys(start, stop, dtype=dtype).view(bits)
    yield "values", cache.layers[layer].read_values(start, stop, dtype=dtype).view(bits)


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return itertools.pairwise([*range(start, stop, STEP_TOKENS), stop])


class _Source(NamedTuple):
    """The tensors of one layer in a file that is read."""

    arrays: dict[str, Any]
    """By our names: "keys" and "values", or the four of `Rows`; slices, as safetensors gives them."""
    heads_first: bool
    """True for [1, num_kv_heads, n, head_dim], as transformers has them, and not [n, num_kv_heads, head_dim]."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Positions, heads, and the dimensions of keys and of values."""
        names = ("key_codes", "value_codes") if "key_codes" in self.arrays else ("keys", "values")
        keys, values = (self.arrays[name].get_shape() for name in names)
        if self.heads_first:
            return keys[2], keys[1], keys[3], values[3]
        return keys[0], keys[1], keys[2], values[2]

    def read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        array = self.arrays[name]
        if self.heads_first:
            part: NDArray[Any] = array[:, :, start:stop][0].transpose(1, 0, 2)
            return part
        rows: NDArray[Any] = array[start:stop]
        return rows


def import_tensors(
    path: PathLike,
    target: PathLike,
    *,
    capacity: int | None = None,
    compressor: str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    model: ModelInfo | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a cache of a safetensors file: one that `export_tensors` wrote, or a transformers `DynamicCache`'s.

    A tensor belongs to the layer, and to keys or values, that its name says: `layers.3.keys`, `key_cache.3`,
    `past_key_values.3.key`, `3.value` and the like. Ours are [n, num_kv_heads, head_dim]; with four axes they are
    transformers' [1, num_kv_heads, n, head_dim]. f32, f16 and bf16 are quantised; codes and scales are taken as they
    are, bit by bit.

    Args:
        path: the safetensors file.
        target: path or URL of the cache to make, as in `create`; it is there when it is whole.
        capacity: positions to reserve; what an export of ours says, else as many as there are.
        compressor, overwrite, storage_options: as in `create`.
        metadata, model: replace what an export of ours holds.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        NotACacheError: no safetensors file, or one whose tensors are no keys and values; says which.
        NonFiniteError, DtypeError: numbers that can't be stored.
        CacheExistsError: there is something at `target`.
        MissingLibraryError: safetensors is not installed.
        CacheNotFoundError, OSError: the file can't be read.
    """
    path = place_text(path)
    with _reading(path) as file:
        layers = _layers(file, path)
        count = layers[0].shape[0]
        notes, reserved = _facts(file, path)
        notes = document(notes.metadata if metadata is None else metadata, notes.model if model is None else model)
        shape = {
            "num_layers": len(layers),
            "capacity": max(reserved or 0, count) if capacity is None else capacity,
            "num_kv_heads": [layer.shape[1] for layer in layers],
            "head_dim": [layer.shape[2] for layer in layers],
            "value_head_dim": [layer.shape[3] for layer in layers],
        }
        ids = file.get_tensor("token_ids") if "token_ids" in file.keys() else None  # noqa: SIM118
        with making(
            target, shape, notes, compressor=compressor, overwrite=overwrite, storage_options=storage_options
        ) as cache:
            for start, stop in _steps(0, count):
                for layer, source in zip(cache.layers, layers, strict=True):
                    if "keys" in source.arrays:
                        layer.extend(source.read("keys", start, stop), source.read("values", start, stop))
                    else:
                        layer.extend_quantized(*(source.read(name, start, stop) for name in Rows._fields))
                if progress:
                    size = cache.storage.geometry.layers
                    each = sum(one.position_bytes for one in size)
                    progress(stop * each, count * each)
            if ids is not None and (known := int(np.argmax(ids < 0)) if (ids < 0).any() else len(ids)):
                cache.push_token_ids(ids[:known])


@contextlib.contextmanager
def _reading(path: str) -> Iterator[Any]:
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        raise MissingLibraryError(
            f"this needs safetensors, which can't be imported ({error}): pip install 'kvmmap[safetensors]'",
            expected="safetensors",
        ) from error
    if not os.path.exists(path):
        raise CacheNotFoundError(f"{path}: there is no such file", path=path)
    try:
        file = library.safe_open(path, "numpy")
    except (library.SafetensorError, IsADirectoryError) as error:
        raise NotACacheError(f"{path}: not a safetensors file: {error}", path=path) from None
    with file:
        yield file


def _facts(file: Any, path: str) -> tuple[Document, int | None]:
    """Return model, metadata and capacity, where one of ours says them."""
    text = (file.metadata() or {}).get(MARK)
    if text is None:
        return Document(None, {}), None
    try:
        facts = json.loads(text)
        return Document.decode(json.dumps(facts["document"]).encode(), path), int(facts["capacity"])
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: its header's {MARK!r} makes no sense: {error!r}", path=path) from None


_LAYER_FIRST = re.compile(r"(?:^|.*[._/])(\d+)[._/](?:\w+[._/])*?(key|value|k|v)s?(_codes|_scales|_cache|_states)?")
_KIND_FIRST = re.compile(r"(?:^|.*[._/])(key|value|k|v)s?(?:_cache|_states)?[._/](\d+)")


def _layers(file: Any, path: str) -> list[_Source]:
    """Sort a file's tensors by layer, and see that they fit together."""
    found: dict[int, dict[str, Any]] = {}
    for name in file.keys():  # noqa: SIM118
        if name == "token_ids":
            continue
        number, kind = _place(name, path)
        if kind in found.setdefault(number, {}):
            raise NotACacheError(f"{path}: tensor {name!r} is a second one for {kind} of layer {number}", path=path)
        found[number][kind] = file.get_slice(name)
    if sorted(found) != list(range(len(found))) or not found:
        raise NotACacheError(f"{path}: holds layers {sorted(found)}, and not all from 0 on", path=path)
    sources = [_source(found[number], number, path) for number in range(len(found))]
    lengths = {source.shape[0] for source in sources}
    if len(lengths) > 1:
        raise NotACacheError(f"{path}: its layers hold from {min(lengths)} to {max(lengths)} positions", path=path)
    return sources


def _place(name: str, path: str) -> tuple[int, str]:
    """Return layer and kind of a tensor."""
    if match := _LAYER_FIRST.fullmatch(name):
        number, kind, part = match.groups()
    elif match := _KIND_FIRST.fullmatch(name):
        (kind, number), part = match.groups(), None
    else:
        raise NotACacheError(f"{path}: tensor {name!r} says no layer, or neither keys nor values", path=path)
    kind = {"k": "key", "v": "value"}.get(kind, kind)
    return int(number), kind + part if part in ("_codes", "_scales") else f"{kind}s"


def _source(arrays: dict[str, Any], number: int, path: str) -> _Source:
    if set(arrays) == {"keys", "values"}:
        shapes = [arrays[name].get_shape() for name in ("keys", "values")]
        axes = {len(shape) for shape in shapes}
        if axes == {4} and all(shape[0] == 1 for shape in shapes) and shapes[0][:3] == shapes[1][:3]:
            return _Source(arrays, heads_first=True)
        if axes == {3} and shapes[0][:2] == shapes[1][:2]:
            return _Source(arrays, heads_first=False)
        raise NotACacheError(
            f"{path}: keys and values of layer {number} are {shapes[0]} and {shapes[1]}, and not "
            "[n, num_kv_heads, head_dim] or [1, num_kv_heads, n, head_dim]",
            path=path,
            layer=number,
        )
    if set(arrays) == set(Rows._fields):
        if len(arrays["key_codes"].get_shape()) == len(arrays["value_codes"].get_shape()) == 3:
            return _Source(arrays, heads_first=False)
        raise NotACacheError(f"{path}: codes of layer {number} are not [n, num_kv_heads, head_dim]", path=path)
    raise NotACacheError(f"{path}: layer {number} has {sorted(arrays)}: not keys and values", path=path, layer=number)
