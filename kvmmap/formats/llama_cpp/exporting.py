"""Writing a cache as a state of llama.cpp."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import KvmmapError, ModelMismatchError, ShapeMismatchError
from ...format import NO_TOKEN
from ...layer import QuantizedKvLayer
from ...paths import PathLike, place_text
from ...storage.posix import PosixFile
from ...storage.protocols import Progress
from ...transfer.copying import opened
from ..new_file import new_file, resolved
from ..portable import KEY
from ..safetensors import steps
from .architectures import Order
from .framing import VERSIONS, Frame, Kind, frame_bytes
from .ggml import RowForm, kv_type_named
from .memory import cell_dtype
from .model import GgufModel, read_model
from .notes import NOTES, StateForm


def export_llama_cpp(
    source: PathLike | QuantizedKvCache,
    path: PathLike,
    *,
    gguf: PathLike,
    kind: Kind | None = None,
    version: int | None = None,
    key_type: str | None = None,
    value_type: str | None = None,
    transposed: bool | None = None,
    rotated: bool | None = None,
    order: Order | None = None,
    accept_weights: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a cache as a file that llama.cpp loads.

    What is not said is as in the state that the cache was imported from; else it is a slot file of the newest
    version, with f16 keys and values, for flash attention. llama.cpp loads a state only into a context with the same
    types of keys and values and the same choice of flash attention.

    Args:
        source: path or URL of a cache in the portable form, or an open one.
        path: where; the file appears when it is whole, with mode 0600.
        gguf: path of the model that is to load it.
        kind: "slot" (a slot of llama-server, `llama_state_seq_save_file`), "session" (`llama_state_save_file`), or
            "sequence" or "context": what `llama_state_seq_set_data` and `llama_state_set_data` take.
        version: of the file: 2 or 3 of a slot, 9 or 10 of a session.
        key_type, value_type: "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0" or "q5_1".
        transposed: values for a context without flash attention.
        rotated: rotate rows of quantised types, as llama.cpp expects it unless LLAMA_ATTN_ROT_DISABLE is set.
        order: as in `import_llama_cpp`.
        accept_weights: the type of the weights that made the cache, such as "bfloat16", to go on with those of the GGUF
            file, which are of another type and so have given other keys and values.
        overwrite: replace a file that is there.
        storage_options: the source's.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        ModelMismatchError: another model made the cache; or the same with weights of another type, which is not
            accepted.
        ShapeMismatchError: its layers are not those of the model.
        KvmmapError: there is no such kind, version or combination of types.
        NonFiniteError: a number that the type can't hold.
        UnsupportedModelError, CacheExistsError, CacheNotFoundError, FormatError, OSError: as in `import_llama_cpp`.
    """
    path = resolved(place_text(path), overwrite=overwrite)
    model = read_model(gguf, order=order)
    with opened(source, storage_options) as cache:
        check_model(cache, model, accept_weights)
        form = form_of(
            cache,
            model,
            kind=kind,
            version=version,
            key_type=key_type,
            value_type=value_type,
            transposed=transposed,
            rotated=rotated,
        )
        cache.storage.verify_rows(0, cache.seq_len)
        with new_file(path, overwrite=overwrite) as file:
            write_state(_FileSink(file), cache, model, form, progress=progress)


def state_bytes(cache: QuantizedKvCache, model: GgufModel, form: StateForm, stop: int | None = None) -> bytearray:
    """Return a state as bytes; of the first `stop` positions."""
    sink = _MemorySink()
    write_state(sink, cache, model, form, stop=stop)
    return sink.data


def form_of(
    cache: QuantizedKvCache,
    model: GgufModel,
    *,
    kind: Kind | None = None,
    version: int | None = None,
    key_type: str | None = None,
    value_type: str | None = None,
    transposed: bool | None = None,
    rotated: bool | None = None,
) -> StateForm:
    """Return the form of a state: what is asked for, else what the cache was made of, else the newest."""
    notes = cache.metadata.get(NOTES)
    form = StateForm() if notes is None else StateForm.from_json(notes)
    if kind is not None and kind != form.kind:
        form = replace(form, kind=kind, version=VERSIONS.get(kind, (0,))[-1], streams=form.streams or 1)
    if version is not None and version != form.version:
        form = replace(form, version=version, streams=form.streams or 1)
    if form.key_type == "f16" and key_type is None and notes is None and value_type is not None:
        key_type = value_type
    chosen = {"key_type": key_type, "value_type": value_type, "transposed": transposed, "rotated": rotated}
    form = replace(form, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    if model.extension != bool(form.extension):
        newest = form.version == 0 or form.version == VERSIONS[form.kind][-1]
        form = replace(form, extension=(3 if newest else 2) if model.extension else 0)
    try:
        form.check()
    except ValueError as error:
        raise KvmmapError(f"llama.cpp has no such state: {error}") from None
    return form


def check_model(cache: QuantizedKvCache, model: GgufModel, accept_weights: str | None) -> None:
    """Refuse a cache that the model must not go on from.

    Raises:
        ModelMismatchError: another model made it, or weights of another type that are not accepted.
        ShapeMismatchError: its layers are not those of the model.
    """
    shapes = [layer.dims for layer in model.layers]
    found = [layer.dims for layer in cache.geometry.layers]
    if found != shapes:
        raise ShapeMismatchError(
            f"{cache.path or 'the cache'} has {len(found)} layers of (num_kv_heads, head_dim, value_head_dim) "
            f"{sorted(set(found))}, and the model {len(shapes)} of {sorted(set(shapes))}",
            expected=shapes,
            actual=found,
        )
    recorded = None if cache.model is None else cache.model.fingerprint
    if recorded == f"gguf:{model.fingerprint}":
        return
    notes = cache.metadata.get(KEY)
    notes = notes if isinstance(notes, Mapping) else {}
    here = model.member.portable_id()
    if notes.get("id") is None or here is None or notes["id"] != here:
        raise ModelMismatchError(
            f"{cache.path or 'the cache'} was made by another model ({recorded or 'none is recorded'}, portable id "
            f"{notes.get('id')}), and not by {model.path} (gguf:{model.fingerprint}, portable id {here}). Keys and "
            "values "
            "mean nothing to any but the model that made them; a cache of the same model's checkpoint needs its "
            "portable id",
            expected={"fingerprint": recorded, "portable_id": notes.get("id")},
            actual={"fingerprint": f"gguf:{model.fingerprint}", "portable_id": here},
            path=cache.path,
        )
    if notes.get("weights") not in (model.weights, accept_weights):
        raise ModelMismatchError(
            f"{cache.path or 'the cache'} was made by this model with weights of {notes.get('weights')}, and those of "
            f"{model.path} are {model.weights}, which give somewhat other keys and values: "
            f"accept_weights={notes.get('weights')!r} goes on all the same",
            expected={"weights": notes.get("weights")},
            actual={"weights": model.weights},
            path=cache.path,
        )


class _Sink(Protocol):
    def write(self, data: Any) -> None:
        """Append bytes."""


class _FileSink:
    def __init__(self, file: PosixFile) -> None:
        self._file, self._offset = file, 0

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._file.write((self._offset,), (view,))
        self._offset += len(view)


class _MemorySink:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Any) -> None:
        self.data += memoryview(data).cast("B")


def write_state(
    sink: _Sink,
    cache: QuantizedKvCache,
    model: GgufModel,
    form: StateForm,
    *,
    stop: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a state of a cache's first positions, all by default."""
    count = cache.seq_len if stop is None else stop
    ids = cache.token_ids[:count]
    head = io.BytesIO()
    tokens = ids if form.named and not (ids == NO_TOKEN).any() else ids[:0]
    if len(tokens) == count:
        tokens = np.concatenate([tokens, np.array(form.behind, np.int32)])
    head.write(
        frame_bytes(
            Frame(
                kind=form.kind,
                version=form.version,
                tokens=tokens,
                architecture=model.architecture,
                sequence=form.sequence,
                offset=0,
            )
        )
    )
    if form.streams:
        head.write(struct.pack("<I", form.streams))
    for _ in range(form.stream):
        head.write(struct.pack("<I", 0))
    head.write(struct.pack("<I", count))
    if count:
        head.write(_cells(count, form, ids))
        head.write(struct.pack("<II", form.transposed, len(model.layers)))
    sink.write(head.getvalue())
    if count:
        _write_rows(sink, cache, model, form, count, progress)
    sink.write(struct.pack("<I", 0) * (form.streams - form.stream - 1))


def _cells(count: int, form: StateForm, ids: NDArray[np.int32]) -> bytes:
    cells = np.zeros(count, cell_dtype(form.extension))
    cells["position"] = np.arange(count)
    cells["count"] = 1
    cells["sequence"] = form.sequence
    if form.extension:
        cells["extension"][:, :2] = np.arange(count)[:, None]
        if form.extension == 3:
            cells["extension"][:, 2] = ids
    return cells.tobytes()


def _write_rows(
    sink: _Sink,
    cache: QuantizedKvCache,
    model: GgufModel,
    form: StateForm,
    count: int,
    progress: Progress | None,
) -> None:
    key_type, value_type = kv_type_named(form.key_type), kv_type_named(form.value_type)
    done, whole = 0, 2 * len(model.layers)
    for number, layer in enumerate(cache.layers):
        shape = layer.geometry
        rows = RowForm.of_keys(key_type, shape.head_dim, rotated=form.rotated, pairs=model.order == "pairs")
        sink.write(struct.pack("<iQ", key_type.number, key_type.row_bytes(shape.num_kv_heads * shape.head_dim)))
        for start, stop in steps(0, count):
            sink.write(_rows(layer, rows, start, stop, number, keys=True))
        done += 1
        if progress:
            progress(done, whole)
    for number, layer in enumerate(cache.layers):
        shape = layer.geometry
        rows = RowForm.of_values(value_type, shape.value_head_dim, rotated=form.rotated)
        numbers = shape.num_kv_heads * shape.value_head_dim
        if form.transposed:
            sink.write(struct.pack("<iII", value_type.number, value_type.block_bytes, numbers))
            parts = [_rows(layer, rows, start, stop, number, keys=False) for start, stop in steps(0, count)]
            whole_rows = np.concatenate(parts).reshape(count, numbers, value_type.block_bytes)
            sink.write(np.ascontiguousarray(whole_rows.transpose(1, 0, 2)))
        else:
            sink.write(struct.pack("<iQ", value_type.number, value_type.row_bytes(numbers)))
            for start, stop in steps(0, count):
                sink.write(_rows(layer, rows, start, stop, number, keys=False))
        done += 1
        if progress:
            progress(done, whole)


def _rows(
    layer: QuantizedKvLayer, form: RowForm, start: int, stop: int, number: int, *, keys: bool
) -> NDArray[np.uint8]:
    """Return rows of keys or values as a state has them, [n, row_bytes]."""
    shape = layer.geometry
    dim = shape.head_dim if keys else shape.value_head_dim
    stored = shape.key_codec if keys else shape.value_codec
    if form.type.quantized and stored is form.codec(dim):
        arrays = layer.read_quantized(start, stop)
        codes = arrays[0] if keys else arrays[len(shape.key_slabs)]
        return np.ascontiguousarray(codes).reshape(stop - start, -1)
    read = layer.read_keys if keys else layer.read_values
    dtype: Any = np.float32
    if stored.name == form.type.name and stored.name in ("f16", "bf16"):
        dtype = "float16" if stored.name == "f16" else "bfloat16"
    return form.encode(read(start, stop, dtype=dtype), layer=number, start=start)
