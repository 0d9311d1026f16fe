"""Making a cache of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..errors import CorruptCacheError, FormatError, NotACacheError, VersionMismatchError
from ..geometry import MAX_CAPACITY, LayerGeometry
from ..metadata import Document, ModelInfo, document
from ..opening import making
from ..paths import PathLike, place_text
from ..storage.protocols import Progress
from .safetensors import IDS, MARK, steps
from .safetensors_file import ID_DTYPES, ROW_DTYPES, TensorFile, open_tensors, shown
from .safetensors_states import PREFIX, ExportedStates
from .safetensors_states import VERSION as STATES_VERSION
from .tensor_names import place_of_tensor

INT8_ARRAYS = tuple(slab.name for slab in LayerGeometry(1, 1, 1).slabs)
"""Names of a layer's arrays where they are exported as int8 stores them."""


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
    transformers' [1, num_kv_heads, n, head_dim]. f32, f16 and bf16 are quantised; codes and scales are stored bit by
    bit, and so are states and their checkpoints. `token_ids`, whole numbers [n] or fewer, are recorded; -1 is a
    position without one.

    Args:
        path: the safetensors file.
        target: path or URL of the cache to make, as in `create`; it appears when it is whole.
        capacity: positions to reserve; what an export of ours says, else as many as there are.
        compressor, overwrite, storage_options: as in `create`.
        metadata, model: replace what an export of ours holds.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        NotACacheError: no safetensors file, or one whose tensors are no keys and values; says which.
        FormatError: what an export of ours says about itself is damaged.
        VersionMismatchError: a later kvmmap wrote it.
        NonFiniteError, DtypeError: numbers that can't be stored.
        CacheExistsError: there is something at `target`.
        MissingLibraryError: safetensors is not installed.
        CacheNotFoundError, OSError: the file can't be read.
    """
    with open_tensors(place_text(path)) as file:
        notes, reserved, states = _facts(file)
        layers = _layers(file, states)
        count = next(iter(layers.values())).shape[0]
        notes = document(notes.metadata if metadata is None else metadata, notes.model if model is None else model)
        ids = _token_ids(file, count)
        number = len(layers) if states is None else states.layers
        shapes = [layers[layer].shape[1:] if layer in layers else (0, 0, 0) for layer in range(number)]
        shape = {
            "num_layers": number,
            "capacity": max(reserved or 0, count) if capacity is None else capacity,
            "num_kv_heads": [heads for heads, _, _ in shapes],
            "head_dim": [dim for _, dim, _ in shapes],
            "value_head_dim": [dim for _, _, dim in shapes],
        }
        if states is not None and states.specs:
            shape |= {"states": states.specs, "checkpoint_slots": states.slots}
            if (states.checkpoints[-1].position if states.checkpoints else 0) != count:
                raise FormatError(
                    f"{file.path}: it has {count} positions, and its last checkpoint is not there", path=file.path
                )
        with making(
            target, shape, notes, compressor=compressor, overwrite=overwrite, storage_options=storage_options
        ) as cache:
            _fill(cache, layers, count, progress)
            _record(cache, ids)
            if states is not None:
                states.restore(cache, file)


class _Source(NamedTuple):
    """The tensors of one layer."""

    file: TensorFile
    names: dict[str, str]
    """Names of tensors, by those of our arrays: "keys" and "values", or the four of `Rows`."""
    heads_first: bool
    """True for [1, num_kv_heads, n, head_dim], as transformers has them; False for [n, num_kv_heads, head_dim]."""

    @property
    def quantized(self) -> bool:
        return "keys" not in self.names

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Positions, heads, and the dimensions of keys and of values."""
        arrays = ("key_codes", "value_codes") if self.quantized else ("keys", "values")
        keys, values = (self.file.shape(self.names[array]) for array in arrays)
        if self.heads_first:
            return keys[2], keys[1], keys[3], values[3]
        return keys[0], keys[1], keys[2], values[2]

    def read(self, array: str, start: int, stop: int) -> NDArray[Any]:
        """Return positions [start, stop) of an array, positions first."""
        name = self.names[array]
        if self.heads_first:
            part = self.file.read(name, (slice(None), slice(None), slice(start, stop)))
            rows: NDArray[Any] = part[0].transpose(1, 0, 2)
            return rows
        return self.file.read(name, slice(start, stop))


def _fill(cache: QuantizedKvCache, layers: Mapping[int, _Source], count: int, progress: Progress | None) -> None:
    each = sum(layer.position_bytes for layer in cache.geometry.layers)
    for start, stop in steps(0, count):
        for number, source in layers.items():
            layer = cache.layers[number]
            if source.quantized:
                layer.extend_quantized(*(source.read(name, start, stop) for name in INT8_ARRAYS))
            else:
                layer.extend(source.read("keys", start, stop), source.read("values", start, stop))
        if progress:
            progress(stop * each, count * each)


def _record(cache: QuantizedKvCache, ids: NDArray[Any]) -> None:
    """Record token ids; positions whose id is -1 get none."""
    known = np.flatnonzero(ids >= 0)
    for run in np.split(known, np.flatnonzero(np.diff(known) != 1) + 1):
        if run.size:
            cache.push_token_ids(ids[run[0] : run[-1] + 1], start=int(run[0]))


def _token_ids(file: TensorFile, count: int) -> NDArray[Any]:
    if IDS not in file.names():
        return np.empty(0, np.int64)
    file.check_dtype(IDS, ID_DTYPES)
    shape = file.shape(IDS)
    if len(shape) != 1 or shape[0] > count:
        raise NotACacheError(
            f"{file.path}: {IDS} is {list(shape)}, and must be [n], with n at most the {count} positions stored",
            path=file.path,
        )
    ids = file.read(IDS)
    if ids.size and (ids.min() < -1 or ids.max() >= 2**31):
        raise NotACacheError(
            f"{file.path}: {IDS} must lie in [-1, 2**31), not from {ids.min()} to {ids.max()}", path=file.path
        )
    return ids.astype(np.int64)


def _facts(file: TensorFile) -> tuple[Document, int | None, ExportedStates | None]:
    """Return model, metadata, capacity and states that the header of an export of ours has."""
    text = file.metadata().get(MARK)
    if text is None:
        return Document(None, {}), None, None
    try:
        facts = json.loads(text)
        version, capacity = facts["version"], facts["capacity"]
        if type(version) is int and version > STATES_VERSION:
            raise VersionMismatchError(
                f"{file.path}: a later kvmmap wrote it (version {version}; this one reads {STATES_VERSION}): update "
                "kvmmap",
                path=file.path,
                expected=STATES_VERSION,
                actual=version,
            )
        if type(version) is not int or version < 1:
            raise ValueError(f"its version is {version!r}")
        if type(capacity) is not int or not 0 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"its capacity is {str(capacity)[:40]}")
        states = ExportedStates.decode(facts["states"]) if version == STATES_VERSION else None
        return Document.decode(json.dumps(facts["document"]).encode(), file.path), capacity, states
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, CorruptCacheError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FormatError(f"{file.path}: its header's {MARK!r} is invalid ({reason})", path=file.path) from None


def _layers(file: TensorFile, states: ExportedStates | None) -> dict[int, _Source]:
    """Sort a file's tensors by layer, and check that they fit together."""
    found: dict[int, dict[str, str]] = {}
    for name in file.names():
        if name == IDS or (states is not None and name.startswith(PREFIX)):
            continue
        place = place_of_tensor(name)
        if place is None:
            raise NotACacheError(
                f"{file.path}: the name of tensor {shown(name)} says no layer, or neither keys nor values",
                path=file.path,
            )
        number, kind = place
        if kind in found.setdefault(number, {}):
            raise NotACacheError(
                f"{file.path}: tensor {shown(name)} is a second one for {kind} of layer {number}", path=file.path
            )
        found[number][kind] = name
    if not found:
        raise NotACacheError(f"{file.path}: has no layers", path=file.path)
    wanted = list(range(len(found))) if states is None else list(states.row_layers)
    missing = next((number for number in wanted if number not in found), None)
    if missing is None and len(found) > len(wanted):
        raise NotACacheError(
            f"{file.path}: has rows of {len(found)} layers, and its header says {len(wanted)}", path=file.path
        )
    if missing is not None:
        raise NotACacheError(
            f"{file.path}: has {len(found)} layers up to {max(found)}, and not all from 0 on: {missing} is missing",
            path=file.path,
        )
    sources = {number: _source(file, found[number], number) for number in wanted}
    lengths = {source.shape[0] for source in sources.values()}
    if len(lengths) > 1:
        raise NotACacheError(
            f"{file.path}: its layers hold from {min(lengths)} to {max(lengths)} positions", path=file.path
        )
    return sources


def _source(file: TensorFile, names: dict[str, str], number: int) -> _Source:
    """Check the tensors of one layer."""
    if set(names) == {"keys", "values"}:
        keys, values = (file.shape(names[array]) for array in ("keys", "values"))
        for name in names.values():
            file.check_dtype(name, ROW_DTYPES)
        if len(keys) == len(values) == 4 and keys[0] == values[0] == 1 and keys[:3] == values[:3]:
            return _Source(file, names, heads_first=True)
        if len(keys) == len(values) == 3 and keys[:2] == values[:2]:
            return _Source(file, names, heads_first=False)
        raise NotACacheError(
            f"{file.path}: keys and values of layer {number} are {list(keys)} and {list(values)}, and not "
            "[n, num_kv_heads, head_dim] or [1, num_kv_heads, n, head_dim]",
            path=file.path,
            layer=number,
        )
    if set(names) != set(INT8_ARRAYS):
        raise NotACacheError(
            f"{file.path}: layer {number} has {', '.join(sorted(names))}: not keys and values, nor codes and scales "
            "of both",
            path=file.path,
            layer=number,
        )
    shapes = {array: file.shape(name) for array, name in names.items()}
    rows = shapes["key_codes"][:2]
    for array, shape in shapes.items():
        codes = array.endswith("codes")
        file.check_dtype(names[array], ("I8",) if codes else ("F32",))
        if len(shape) != (3 if codes else 2) or shape[:2] != rows:
            raise NotACacheError(
                f"{file.path}: {array} of layer {number} are {list(shape)}, and not [n, num_kv_heads"
                f"{', head_dim' if codes else ''}] as the others",
                path=file.path,
                layer=number,
            )
    return _Source(file, names, heads_first=False)
