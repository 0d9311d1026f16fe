"""Making a cache of a state of llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...codecs.presets import preset_codecs, preset_recent
from ...errors import DtypeError, KvmmapError, ShapeMismatchError, UnsupportedModelError
from ...geometry import LayerGeometry
from ...inputs import check_quantized, check_token_ids
from ...metadata import document
from ...opening import making
from ...paths import PathLike
from ...storage.protocols import Progress
from ..portable import KEY, portable_notes
from ..safetensors import steps
from .architectures import Order
from .framing import read_frames
from .ggml import GgmlType, RowForm
from .memory import Memory, Part, Stream, read_memory
from .model import GgufModel, read_model
from .notes import NOTES, StateForm
from .source import Source, open_source

NATIVE = "native"
"""The preset that keeps rows as they are in the state."""

TOGETHER = 256
"""Positions that are appended to all layers at once, at most."""


def import_llama_cpp(
    state: PathLike | bytes | bytearray | memoryview | NDArray[np.uint8],
    target: PathLike,
    *,
    gguf: PathLike,
    sequence: int | None = None,
    token_ids: Any = None,
    rotated: bool = True,
    order: Order | None = None,
    preset: str = NATIVE,
    capacity: int | None = None,
    compressor: str | None = None,
    overwrite: bool = False,
    metadata: Mapping[str, Any] | None = None,
    portable_id: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Make a cache of a state of llama.cpp: a slot or session file, or the bytes of a sequence or a context.

    Rows become those of a transformers checkpoint: values in order of position, keys in the checkpoint's order, and the
    rotation of quantised types undone. With the preset "native" their numbers are kept bit by bit, so that
    `export_llama_cpp` makes the same state again, byte by byte.

    Args:
        state: the path of a file, or the bytes that `llama_state_seq_get_data` or `llama_state_get_data` gave.
        target: path or URL of the cache to make, as in `create`; it appears when it is whole.
        gguf: path of the model that made the state: shapes and the order of keys are not in the state.
        sequence: which sequence to take, of a state that has several.
        token_ids: ids of the positions, [n], for states that have none, which buffers are.
        rotated: whether llama.cpp rotated rows of quantised types, as it does where head_dim is a multiple of 64,
            since April 2026, unless LLAMA_ATTN_ROT_DISABLE is set. Nothing in the state says so.
        order: of keys' numbers, "pairs" or "halves"; for architectures that this kvmmap does not know.
        preset: "native", one of `create`'s, or the codecs of keys and values, as "int8-rotated:int6-rotated".
        capacity: positions to reserve; as many as there are by default.
        compressor, overwrite, storage_options: as in `create`.
        metadata: plain JSON of your own.
        portable_id: identity of the model across programs, where norms alone don't tell it.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        NotACacheError: no state, or one that no layout fits.
        VersionMismatchError: a version of the file that is not read.
        ModelMismatchError: the GGUF file is not the model that made it.
        UnsupportedModelError: several sequences, positions that don't count from 0, image positions, or a model whose
            states have other parts (recurrent, hybrid, indexed, latent, sliding windows); says which.
        DtypeError: rows of a type that is not read.
        NonFiniteError: rows with a NaN or an infinity.
        CacheExistsError: there is something at `target`.
        MissingLibraryError: gguf is not installed.
        CacheNotFoundError, OSError: the files can't be read.
    """
    model = read_model(gguf, order=order)
    with open_source(state) as source:
        memory = read_memory(source, read_frames(source), model)
        found = choose_sequence(memory, sequence, source)
        ids, behind = _tokens(memory, found, source, token_ids)
        forms = [_forms(found.stream, number, model, rotated) for number in range(len(model.layers))]
        notes = StateForm.of(memory, found.stream, found.number, found.sequence, forms[0], rotated, behind)
        if any((keys.type, values.type) != (forms[0][0].type, forms[0][1].type) for keys, values in forms):
            raise UnsupportedModelError(f"{source.name}: its layers have rows of different types")
        recent_window, sinks = window_of(preset)
        shape = {
            "num_layers": len(model.layers),
            "capacity": len(found.cells) if capacity is None else capacity,
            "num_kv_heads": [layer.num_kv_heads for layer in model.layers],
            "head_dim": [layer.head_dim for layer in model.layers],
            "value_head_dim": [layer.value_head_dim for layer in model.layers],
            **codecs_of(preset, model, forms),
            "recent_window": recent_window,
            "sinks": sinks,
        }
        own = {
            NOTES: notes.to_json(),
            KEY: portable_notes("llama.cpp", portable_id or model.member.portable_id(), model.weights),
        }
        facts = document({**(metadata or {}), **own}, model.info())
        with making(
            target, shape, facts, compressor=compressor, overwrite=overwrite, storage_options=storage_options
        ) as cache:
            fill(cache, source, found, forms, progress)
            if len(ids):
                cache.push_token_ids(ids)


@dataclass(frozen=True)
class Found:
    """One sequence of a state."""

    stream: Stream
    number: int
    """The stream's."""
    sequence: int
    cells: NDArray[np.int64]
    """Its cells, by position."""

    @cached_property
    def together(self) -> bool:
        """Whether the cells lie one behind another."""
        return bool((np.diff(self.cells) == 1).all())


def choose_sequence(memory: Memory, sequence: int | None, source: Source, base: int = 0) -> Found:
    """Return the cells of a sequence, by position from `base` on; of the only one if none is asked for.

    Raises:
        UnsupportedModelError: there are several, its positions don't count from 0 on, or have images.
        NotACacheError: there is none.
    """
    present = [
        (number, stream, owner)
        for number, stream in enumerate(memory.streams)
        if stream is not None
        for owner in sorted(stream.sequences())
    ]
    if not present:
        raise source.refused("it has no cells: the sequence is empty")
    if sequence is None and len(present) > 1:
        names = ", ".join(str(owner) for _, _, owner in present[:20])
        raise UnsupportedModelError(f"{source.name}: has several sequences ({names}): choose one by sequence=")
    chosen = [entry for entry in present if sequence in (None, entry[2])]
    if not chosen:
        raise source.refused(f"it has no sequence {sequence}")
    number, stream, owner = chosen[0]
    cells = stream.cells_of(owner)
    cells = cells[np.argsort(stream.positions[cells], kind="stable")]
    positions = stream.positions[cells]
    if len(np.unique(positions)) < len(positions):
        raise UnsupportedModelError(f"{source.name}: several cells have one position, as images have: not read")
    if not np.array_equal(positions, np.arange(base, base + len(positions))):
        raise UnsupportedModelError(
            f"{source.name}: its positions go from {positions[0]} to {positions[-1]}, and are {len(positions)}: only "
            "sequences "
            "that are complete from position 0 on are read (not what a context shift or a window has cut)"
        )
    if stream.extension is not None and (stream.extension[cells, :2] != positions[:, None]).any():
        raise UnsupportedModelError(f"{source.name}: has positions in two dimensions, as images have: not read")
    return Found(stream, number, owner, cells)


def _tokens(memory: Memory, found: Found, source: Source, given: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the ids of the cells, and those behind them."""
    tokens = memory.frame.tokens
    count = len(found.cells)
    if len(tokens) and tokens[0] == -1:
        raise UnsupportedModelError(
            f"{source.name}: its tokens are packed with images or audio, as llama-server's multimodal slots are: not "
            "read"
        )
    if given is not None:
        if len(tokens):
            raise KvmmapError(f"{source.name}: has token ids of its own: leave out token_ids")
        return check_token_ids(given, count), tokens[:0]
    extension = found.stream.extension
    if not len(tokens) and extension is not None and extension.shape[1] == 3:
        tokens = extension[found.cells, 2]
    if (tokens < 0).any():
        raise UnsupportedModelError(f"{source.name}: some of its tokens have no id, as images have: not read")
    return tokens[:count], tokens[count:] if len(memory.frame.tokens) else tokens[:0]


def _forms(stream: Stream, number: int, model: GgufModel, rotated: bool) -> tuple[RowForm, RowForm]:
    shape = model.layers[number]
    keys = RowForm.of_keys(stream.keys[number].type, shape.head_dim, rotated=rotated, pairs=model.order == "pairs")
    return keys, RowForm.of_values(stream.values[number].type, shape.value_head_dim, rotated=rotated)


def codecs_of(preset: str, model: GgufModel, forms: list[tuple[RowForm, RowForm]]) -> dict[str, list[str]]:
    """Return the codecs of a cache's layers, by the names of `create`'s arguments."""
    if preset == NATIVE:
        return {
            "key_codec": [
                keys.codec(shape.head_dim).name for (keys, _), shape in zip(forms, model.layers, strict=True)
            ],
            "value_codec": [
                values.codec(shape.value_head_dim).name for (_, values), shape in zip(forms, model.layers, strict=True)
            ],
        }
    keys, colon, values = preset.partition(":")
    if not colon:
        keys, values = preset_codecs(preset)
    return {"key_codec": [keys] * len(forms), "value_codec": [values] * len(forms)}


def window_of(preset: str) -> tuple[int, int]:
    """Return how many of the last and of the first positions a preset keeps in 16 bits besides."""
    return (0, 0) if preset == NATIVE or ":" in preset else preset_recent(preset)


def fill(
    cache: QuantizedKvCache,
    source: Source,
    found: Found,
    forms: list[tuple[RowForm, RowForm]],
    progress: Progress | None,
    start: int = 0,
) -> None:
    """Append the rows of a sequence from position `start` on.

    Few of them, as a turn of a conversation has, are appended to all layers at once.
    """
    shapes, count = cache.geometry.layers, len(found.cells)
    if count - start <= TOGETHER:
        layers = [_LayerRows(source, found, number, shape, forms[number]) for number, shape in enumerate(shapes)]
        if all(layer.kept for layer in layers):
            return _append_codes(cache, [layer.codes(start, count) for layer in layers])
        if not any(layer.kept for layer in layers):
            pairs = [layer.numbers(start, count) for layer in layers]
            return cache.extend([keys for keys, _ in pairs], [values for _, values in pairs])
    done, whole = 0, sum(shape.position_bytes for shape in shapes) * (count - start)
    for number, target in enumerate(cache.layers):
        layer = _LayerRows(source, found, number, shapes[number], forms[number])
        for first, last in steps(start, count):
            if layer.kept:
                target.extend_quantized(*layer.codes(first, last))
            else:
                target.extend(*layer.numbers(first, last))
            done += (last - first) * target.geometry.position_bytes
            if progress:
                progress(done, whole)
    return None


def _append_codes(cache: QuantizedKvCache, codes: list[tuple[NDArray[Any], ...]]) -> None:
    """Append rows as the codecs store them to all layers, all or none. The next commit comes before `codes` change."""
    storage, count = cache.storage, len(codes[0][0])
    rows = [
        check_quantized(arrays, shape, number)
        for number, (arrays, shape) in enumerate(zip(codes, cache.geometry.layers, strict=True))
    ]
    with storage.lock:
        starts = {store.begin(count) for store in storage.row_layers}
        if len(starts) > 1:
            raise ShapeMismatchError(
                f"layers are not level: they hold {min(starts)} to {max(starts)} positions; truncate({min(starts)})",
                expected=max(starts),
                actual=min(starts),
            )
        start = starts.pop()
        for store, part in zip(storage.row_layers, rows, strict=True):
            store.write(start, part)
        storage.publish_step(start + count)
        storage.appended()


class _LayerRows:
    """The rows of a layer."""

    def __init__(
        self, source: Source, found: Found, number: int, shape: LayerGeometry, forms: tuple[RowForm, RowForm]
    ) -> None:
        stream = found.stream
        self._shape, (self._key_form, self._value_form) = shape, forms
        self._keys = _Rows(source, found, stream.keys[number], shape.num_kv_heads * shape.head_dim)
        self._values = _Rows(
            source,
            found,
            stream.values[number],
            shape.num_kv_heads * shape.value_head_dim,
            transposed=stream.transposed,
        )
        codecs = self._key_form.codec(shape.head_dim), self._value_form.codec(shape.value_head_dim)
        self.kept = (shape.key_codec, shape.value_codec) == codecs
        """Whether the cache stores what `codes` returns."""

    def codes(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return positions [start, stop) as the forms' codecs store them."""
        shape = self._shape
        keys = _codes(self._key_form, self._keys.read(start, stop), shape.num_kv_heads, shape.head_dim)
        values = _codes(self._value_form, self._values.read(start, stop), shape.num_kv_heads, shape.value_head_dim)
        return keys, values

    def numbers(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return positions [start, stop) as numbers, [n, num_kv_heads, dim]."""
        shape = self._shape
        keys = self._key_form.decode(self._keys.read(start, stop), shape.num_kv_heads, shape.head_dim)
        values = self._value_form.decode(self._values.read(start, stop), shape.num_kv_heads, shape.value_head_dim)
        return keys, values


def _codes(form: RowForm, rows: NDArray[np.uint8], heads: int, dim: int) -> NDArray[Any]:
    """Return rows as the form's codec stores them."""
    if form.type.quantized:
        return rows.reshape(len(rows), heads, -1)
    dtype = form.codec(dim).arrays(dim)[0].dtype
    numbers = form.decode(rows, heads, dim) if form.pairs else rows
    return numbers.view(dtype).reshape(len(rows), heads, dim)


class _Rows:
    """The rows of a layer's keys or values, by position, as bytes."""

    def __init__(self, source: Source, found: Found, part: Part, count: int, *, transposed: bool = False) -> None:
        self._source, self._part, self._cells = source, part, found.cells
        self._row = part.type.row_bytes(count)
        self._whole: NDArray[np.uint8] | None = None
        total = len(found.stream.positions)
        if transposed:
            size = part.type.block_bytes
            numbers = source.read(part.offset, self._row * total).reshape(count, total, size)
            self._whole = np.ascontiguousarray(numbers.transpose(1, 0, 2)).reshape(total, self._row)
        elif not found.together:
            self._whole = source.read(part.offset, self._row * total).reshape(total, self._row)

    def read(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Return rows of positions [start, stop), [n, row_bytes], C-contiguous."""
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[self._cells[start:stop]])
        offset = self._part.offset + (int(self._cells[0]) + start) * self._row
        return self._source.read(offset, (stop - start) * self._row).reshape(stop - start, self._row)


def check_types(keys: GgmlType, values: GgmlType, *, transposed: bool) -> None:
    """Refuse what llama.cpp can't have.

    Raises:
        DtypeError: quantised values without flash attention.
    """
    if transposed and values.quantized:
        raise DtypeError(
            f"values of {values.name} need flash attention: they can't be transposed",
            expected="f16",
            actual=values.name,
        )
