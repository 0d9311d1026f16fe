"""Making a cache of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..codecs.presets import Codecs
from ..errors import CorruptCacheError, DtypeError, FormatError, NotACacheError, VersionMismatchError
from ..geometry import MAX_CAPACITY, LayerGeometry
from ..metadata import Document, ModelInfo, document
from ..opening import making
from ..paths import PathLike, place_text
from ..storage.protocols import Progress
from .safetensors import DTYPES, IDS, MARK, steps
from .safetensors_file import ID_DTYPES, ROW_DTYPES, TensorFile, open_tensors, shown
from .safetensors_rows import PREFIX as KEPT_PREFIX
from .safetensors_rows import VERSION as ROWS_VERSION
from .safetensors_rows import ExportedRows, KeptRows, check_tensor
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
    preset: str | None = None,
    key_codec: Codecs | None = None,
    value_codec: Codecs | None = None,
    recent_window: int | None = None,
    sinks: int | None = None,
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
    transformers' [1, num_kv_heads, n, head_dim]. f32, f16 and bf16 are encoded; what was exported as it was stored is
    stored bit by bit, and so are states and their checkpoints. `token_ids`, whole numbers [n] or fewer, are recorded;
    -1 is a position without one.

    Args:
        path: the safetensors file.
        target: path or URL of the cache to make, as in `create`; it appears when it is whole.
        capacity: positions to reserve; what an export of ours says, else as many as there are.
        preset, key_codec, value_codec, recent_window, sinks: how f32, f16 and bf16 are encoded, as in `create`. An
            export that is "stored" has codecs already: leave them out.
        compressor, overwrite, storage_options: as in `create`.
        metadata, model: replace what an export of ours holds.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        NotACacheError: no safetensors file, or one whose tensors are no keys and values; says which.
        FormatError: what an export of ours says about itself is damaged.
        VersionMismatchError: a later kvmmap wrote it, or a codec that is not known here.
        NonFiniteError, DtypeError: numbers that can't be stored; there is no such codec, or another one is asked for
            than an export that is "stored" has.
        ShapeMismatchError: a codec that can't have rows of a layer's dims.
        CacheExistsError: there is something at `target`.
        MissingLibraryError: safetensors is not installed.
        CacheNotFoundError, OSError: the file can't be read.
    """
    with open_tensors(place_text(path)) as file:
        facts = _facts(file)
        states, notes = facts.states, facts.document
        layers = _layers(file, facts)
        count = next(iter(layers.values())).shape[0]
        notes = document(notes.metadata if metadata is None else metadata, notes.model if model is None else model)
        ids = _token_ids(file, count)
        number = len(layers) if states is None else states.layers
        shapes = [layers[layer].shape[1:] if layer in layers else (0, 0, 0) for layer in range(number)]
        rows = facts.rows or ExportedRows(tuple([LayerGeometry(*shape) for shape in shapes]))
        rows = rows.recoded(preset, key_codec, value_codec, recent_window, sinks)
        for at, source in layers.items():
            source.check_codecs(rows.layers[at], at)
        shape = {
            "num_layers": number,
            "capacity": max(facts.capacity or 0, count) if capacity is None else capacity,
            "num_kv_heads": [layer.num_kv_heads for layer in rows.layers],
            "head_dim": [layer.head_dim for layer in rows.layers],
            "value_head_dim": [layer.value_head_dim for layer in rows.layers],
            "key_codec": [layer.key_codec.name for layer in rows.layers],
            "value_codec": [layer.value_codec.name for layer in rows.layers],
            "recent_window": rows.recent_window,
            "sinks": rows.sinks,
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
            if facts.rows is not None and facts.rows.keeps_recent:
                for at in layers:
                    cache.storage.layers[at].take_recent(KeptRows.read(file, facts.rows, at, count), 0, count)
            if states is not None:
                states.restore(cache, file)


class _Facts(NamedTuple):
    """What the header of an export of ours says."""

    document: Document = Document(None, {})
    capacity: int | None = None
    states: ExportedStates | None = None
    rows: ExportedRows | None = None
    """Of which codecs the tensors are arrays; None if they are numbers, or int8's arrays."""


class _Source(NamedTuple):
    """The tensors of one layer."""

    file: TensorFile
    names: dict[str, str]
    """Names of tensors, by those of our arrays, in order: "keys" and "values", or what codecs make."""
    heads_first: bool = False
    """True for [1, num_kv_heads, n, head_dim], as transformers has them; False for [n, num_kv_heads, head_dim]."""
    layer: LayerGeometry | None = None
    """The shape and codecs of what is as a cache stored it; None for numbers."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Positions, heads, and the dimensions of keys and of values."""
        if self.layer is not None:
            return self.file.shape(next(iter(self.names.values())))[0], *self.layer.dims
        keys, values = (self.file.shape(self.names[array]) for array in ("keys", "values"))
        if self.heads_first:
            return keys[2], keys[1], keys[3], values[3]
        return keys[0], keys[1], keys[2], values[2]

    def check_codecs(self, wanted: LayerGeometry, number: int) -> None:
        """Refuse to encode anew what is as a cache stored it.

        Raises:
            DtypeError: other codecs are asked for.
        """
        if self.layer is None:
            return
        for has, asked in (
            (self.layer.key_codec, wanted.key_codec),
            (self.layer.value_codec, wanted.value_codec),
        ):
            if has is not asked:
                raise DtypeError(
                    f"{self.file.path}: layer {number} has rows as {has.name} stores them, and {asked.name} is asked "
                    "for: import it as it is, and give the codecs to kvmmap.copy",
                    expected=has.name,
                    actual=asked.name,
                    layer=number,
                )

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
            if source.layer is not None:
                layer.extend_quantized(*(source.read(name, start, stop) for name in source.names))
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


def _decoded_rows(facts: Any, path: str) -> ExportedRows:
    """Return how rows were stored.

    Raises:
        VersionMismatchError: by a codec that is not known here.
        ValueError, KeyError, TypeError: `facts` are damaged.
    """
    try:
        return ExportedRows.decode(facts)
    except DtypeError as error:
        raise VersionMismatchError(
            f"{path}: {error}. A later kvmmap wrote it, or one with a codec of another package",
            path=path,
            expected=error.expected,
            actual=error.actual,
        ) from None


def _facts(file: TensorFile) -> _Facts:
    """Return what the header of an export of ours says."""
    text = file.metadata().get(MARK)
    if text is None:
        return _Facts()
    try:
        facts = json.loads(text)
        version, capacity = facts["version"], facts["capacity"]
        if type(version) is int and version > ROWS_VERSION:
            raise VersionMismatchError(
                f"{file.path}: a later kvmmap wrote it (version {version}; this one reads {ROWS_VERSION}): update "
                "kvmmap",
                path=file.path,
                expected=ROWS_VERSION,
                actual=version,
            )
        if type(version) is not int or version < 1:
            raise ValueError(f"its version is {version!r}")
        if type(capacity) is not int or not 0 <= capacity <= MAX_CAPACITY:
            raise ValueError(f"its capacity is {str(capacity)[:40]}")
        stored = version == ROWS_VERSION
        has_states = version == STATES_VERSION or (stored and "states" in facts)
        return _Facts(
            Document.decode(json.dumps(facts["document"]).encode(), file.path),
            capacity,
            ExportedStates.decode(facts["states"]) if has_states else None,
            _decoded_rows(facts["rows"], file.path) if stored else None,
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, CorruptCacheError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise FormatError(f"{file.path}: its header's {MARK!r} is invalid ({reason})", path=file.path) from None


def _stored_layers(file: TensorFile, rows: ExportedRows, states: ExportedStates | None) -> dict[int, _Source]:
    """Check the arrays of codecs in a file, all of which its header names."""
    row_layers = tuple([number for number, layer in enumerate(rows.layers) if layer.has_rows])
    wanted = (
        (len(rows.layers), tuple(range(len(rows.layers)))) if states is None else (states.layers, states.row_layers)
    )
    if wanted != (len(rows.layers), row_layers) or not row_layers:
        raise FormatError(f"{file.path}: its header contradicts itself on layers with rows", path=file.path)
    found, count, known = {}, None, {IDS}
    for number in row_layers:
        layer = rows.layers[number]
        names = {slab.name: f"layers.{number}.{slab.name}" for slab in layer.slabs}
        for slab in layer.slabs:
            check_tensor(file, names[slab.name], DTYPES[slab.dtype.name], slab.shape, count, number)
            count = file.shape(names[slab.name])[0]
        known.update(names.values())
        found[number] = _Source(file, names, layer=layer)
    for name in file.names():
        if name not in known and not name.startswith((KEPT_PREFIX, PREFIX)):
            raise NotACacheError(f"{file.path}: its header does not name tensor {shown(name)}", path=file.path)
    return found


def _layers(file: TensorFile, facts: _Facts) -> dict[int, _Source]:
    """Sort a file's tensors by layer, and check that they fit together."""
    if facts.rows is not None:
        return _stored_layers(file, facts.rows, facts.states)
    states = facts.states
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
            return _Source(file, names)
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
    layer = LayerGeometry(rows[1], shapes["key_codes"][2], shapes["value_codes"][2])
    return _Source(file, {array: names[array] for array in INT8_ARRAYS}, layer=layer)
