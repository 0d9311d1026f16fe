"""Prompt caches of mlx-lm: safetensors files whose arrays are named by numbers, L being the layer's.

    "L.0" "L.1"      keys and values, [1, heads, room, dim]; of a quantised cache each three: codes, scales, biases
    "L.2" ...        numbers, in mlx-lm 0.32 and later:
                     KVCache           positions
                     RotatingKVCache   positions, keep, max_size, place of the newest
                     QuantizedKVCache  positions, group_size, bits
    metadata         "0.KEY" the user's, "1.L" the class, "2.i.0" and "2.i.1" names and kinds of the numbers
    metadata before  "0.L" or "0.L.i" the numbers (of a ring: keep, max_size, positions, newest), "1.KEY" the user's,
                     "2.L" the class; arrays have no room beyond the positions

Rows are in the portable form: mlx-lm has its models' keys in the order of transformers' checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import NotACacheError, UnsupportedModelError
from .safetensors_file import ROW_DTYPES, TensorFile, shown

Layout = Literal["scalars", "meta_state"]
"""Of mlx-lm 0.32 and later, and of those before."""

PLAIN, ROTATING, QUANTIZED = "KVCache", "RotatingKVCache", "QuantizedKVCache"
OTHERS = {
    "ArraysCache": "recurrent states",
    "MambaCache": "recurrent states",
    "CacheList": "several caches a layer",
    "ChunkedKVCache": "chunks of positions",
    "BatchKVCache": "a batch",
    "BatchRotatingKVCache": "a batch",
    "ConcatenateKVCache": "",
}
"""Classes of caches that are not read, and what they hold."""

NAMES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
"""Codecs that keep rows of a dtype bit by bit."""

_CLASS = re.compile(r"([12])\.(\d{1,5})")


def is_prompt_cache(file: TensorFile) -> bool:
    """Whether a safetensors file is a prompt cache of mlx-lm."""
    return _classes(file.metadata()) is not None


@dataclass(frozen=True, slots=True)
class MlxLayer:
    """The rows of one layer."""

    file: TensorFile
    number: int
    kind: str
    positions: int
    turned: int
    """Where the oldest position after those always kept lies, in a ring; 0 where they lie in order."""
    keep: int
    group: int
    bits: int
    """0: not quantised."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Heads, and the dimensions of keys and of values."""
        dims = []
        for part in ("0", "1"):
            shape = self.file.shape(self._name(part))
            dims.append(shape[3] * 32 // self.bits if self.bits else shape[3])
        return self.file.shape(self._name("0"))[1], dims[0], dims[1]

    @property
    def codec(self) -> str:
        """The codec that keeps its numbers, or of quantised ones what they are decoded to."""
        return NAMES[self.file.dtype(f"{self.number}.0.1" if self.bits else f"{self.number}.0")]

    def _name(self, part: str) -> str:
        return f"{self.number}.{part}.0" if self.bits else f"{self.number}.{part}"

    def read(self, part: Literal["keys", "values"], start: int, stop: int) -> NDArray[Any]:
        """Return positions [start, stop), [n, heads, dim], in order of position."""
        index = "0" if part == "keys" else "1"
        if self.turned:
            order = np.r_[0 : self.keep, self.turned : self.positions, self.keep : self.turned][start:stop]
            ordered: NDArray[Any] = self._rows(index, 0, self.positions)[order]
            return ordered
        return self._rows(index, start, stop)

    def _rows(self, index: str, start: int, stop: int) -> NDArray[Any]:
        where = (slice(None), slice(None), slice(start, stop))
        found: NDArray[Any] = self.file.read(self._name(index), where)[0].transpose(1, 0, 2)
        if not self.bits:
            return found
        scales, biases = (
            self.file.read(f"{self.number}.{index}.{part}", where)[0].transpose(1, 0, 2).astype(np.float32)
            for part in (1, 2)
        )
        # Codes lie side by side as a stream of bits, the lowest first.
        bits = np.unpackbits(np.ascontiguousarray(found, "<u4").view(np.uint8), axis=-1, bitorder="little")
        codes = (bits.reshape(*found.shape[:2], -1, self.bits) << np.arange(self.bits, dtype=np.uint8)).sum(-1)
        grouped = codes.reshape(*found.shape[:2], -1, self.group).astype(np.float32)
        with np.errstate(all="ignore"):  # infinities and NaN are refused where rows are encoded
            numbers: NDArray[Any] = grouped * scales[..., None] + biases[..., None]
        return numbers.reshape(*found.shape[:2], -1)


def read_layers(file: TensorFile) -> list[MlxLayer]:
    """Sort out the layers of a prompt cache.

    Raises:
        NotACacheError: it is none, or its arrays don't fit together.
        UnsupportedModelError: caches of a kind that is not read, or a ring that has dropped positions.
        DtypeError: rows of a dtype that is not read.
    """
    metadata = file.metadata()
    found = _classes(metadata)
    if found is None:
        raise NotACacheError(f"{file.path}: not a prompt cache of mlx-lm: its metadata names no caches", path=file.path)
    layout, classes = found
    layers = [_layer(file, metadata, layout, number, kind) for number, kind in enumerate(classes)]
    lengths = {layer.positions for layer in layers}
    if len(lengths) > 1:
        raise NotACacheError(
            f"{file.path}: its layers hold from {min(lengths)} to {max(lengths)} positions", path=file.path
        )
    return layers


def user_notes(file: TensorFile) -> dict[str, Any]:
    """Return what an export of ours has put into the user's metadata; nothing of other files."""
    metadata = file.metadata()
    found = _classes(metadata)
    text = metadata.get(f"{0 if found and found[0] == 'scalars' else 1}.kvmmap")
    try:
        notes = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        notes = {}
    return notes if isinstance(notes, dict) else {}


def _classes(metadata: Mapping[str, str]) -> tuple[Layout, list[str]] | None:
    """Return the layout, and the classes of the layers' caches."""
    by_group: dict[str, dict[int, str]] = {"1": {}, "2": {}}
    for name, value in metadata.items():
        match = _CLASS.fullmatch(name)
        if match:
            by_group[match[1]][int(match[2])] = value
    for layout, group in (("scalars", "1"), ("meta_state", "2")):
        named = by_group[group]
        if named and sorted(named) == list(range(len(named))) and all(map(_is_class, named.values())):
            return layout, [named[number] for number in range(len(named))]  # type: ignore[return-value]
    return None


def _is_class(name: str) -> bool:
    return name in (PLAIN, ROTATING, QUANTIZED, *OTHERS) or bool(re.fullmatch(r"[A-Z]\w*Cache\w*", name))


def _layer(file: TensorFile, metadata: Mapping[str, str], layout: Layout, number: int, kind: str) -> MlxLayer:
    if kind not in (PLAIN, ROTATING, QUANTIZED):
        what = OTHERS.get(kind, "something else than keys and values")
        raise UnsupportedModelError(
            f"{file.path}: layer {number} is a {kind[:60]}{f', which holds {what}' if what else ''}: not read"
        )
    names = set(file.names())
    first = [f"{number}.{part}.{index}" for part in (0, 1) for index in range(3)]
    needed = first if kind == QUANTIZED else [f"{number}.0", f"{number}.1"]
    for name in needed:
        if name not in names:
            raise NotACacheError(
                f"{file.path}: has no tensor {shown(name)}: the cache of layer {number} is empty", path=file.path
            )
    scalars = _scalars(file, metadata, layout, number, kind, names)
    keys = file.shape(needed[0])
    values = file.shape(needed[3 if kind == QUANTIZED else 1])
    if len(keys) != 4 or len(values) != 4 or keys[0] != 1 or keys[:3] != values[:3] or 0 in (*keys[1:], *values[1:]):
        raise NotACacheError(
            f"{file.path}: keys and values of layer {number} are {list(keys)} and {list(values)}, and not "
            "[1, num_kv_heads, positions, head_dim]",
            path=file.path,
        )
    rows = keys[2]
    if kind == QUANTIZED:
        return _quantized(file, number, rows, scalars, needed)
    for name in needed:
        file.check_dtype(name, ROW_DTYPES)
    if kind == PLAIN:
        return MlxLayer(file, number, kind, _within(file, scalars, rows, number), 0, 0, 0, 0)
    offset, keep, size, newest = scalars if len(scalars) == 4 else (rows, 0, rows, rows)
    if offset > rows:
        raise UnsupportedModelError(
            f"{file.path}: layer {number} has dropped positions: it holds {rows} of {offset} (max_size {size}). Only "
            "whole "
            "prompts can be continued by other programs"
        )
    if not (0 <= keep <= newest <= rows and offset > 0):
        raise NotACacheError(f"{file.path}: the ring of layer {number} is invalid: {scalars}", path=file.path)
    turned = newest if keep < newest < offset else 0
    return MlxLayer(file, number, kind, offset, turned, keep, 0, 0)


def _quantized(file: TensorFile, number: int, rows: int, scalars: list[int], needed: list[str]) -> MlxLayer:
    if len(scalars) != 3:
        raise NotACacheError(f"{file.path}: layer {number} does not say its group size and bits", path=file.path)
    positions, group, bits = _within(file, scalars[:1], rows, number), scalars[1], scalars[2]
    if not (1 <= bits <= 8 and 1 <= group <= 4096):
        raise NotACacheError(f"{file.path}: layer {number} has {bits} bits in groups of {group}", path=file.path)
    for part in (0, 3):
        codes, scales, biases = (file.shape(name) for name in needed[part : part + 3])
        file.check_dtype(needed[part], ("U32",))
        for name in needed[part + 1 : part + 3]:
            file.check_dtype(name, ROW_DTYPES)
        dim = codes[-1] * 32 // bits
        if codes[-1] * 32 % bits or dim % group or scales != biases or scales != (*codes[:3], dim // group):
            raise NotACacheError(
                f"{file.path}: codes, scales and biases of layer {number} are {list(codes)}, {list(scales)} and "
                f"{list(biases)}, which {bits} bits in groups of {group} don't have",
                path=file.path,
            )
    return MlxLayer(file, number, QUANTIZED, positions, 0, 0, group, bits)


def _scalars(
    file: TensorFile, metadata: Mapping[str, str], layout: Layout, number: int, kind: str, names: set[str]
) -> list[int]:
    """Return what a cache says of itself besides its arrays; nothing if it says nothing."""
    found: list[int] = []
    if layout == "scalars":
        while (name := f"{number}.{len(found) + 2}") in names:
            file.check_dtype(name, ("I32", "I64", "U32", "BOOL"))
            if file.shape(name) not in ((), (1,)):
                raise NotACacheError(f"{file.path}: tensor {shown(name)} is not a single number", path=file.path)
            found.append(int(file.read(name).reshape(-1)[0]))
            if len(found) > 8:
                break
        return found
    texts = [metadata[f"0.{number}"]] if metadata.get(f"0.{number}") else []
    while (name := f"0.{number}.{len(texts)}") in metadata:
        texts.append(metadata[name])
    if not all(re.fullmatch(r"-?\d{1,12}", text) for text in texts):
        raise NotACacheError(
            f"{file.path}: the meta_state of layer {number} does not consist of numbers", path=file.path
        )
    found = [int(text) for text in texts]
    # (keep, max_size, offset, newest) of a ring before; (offset, keep, max_size, newest) now.
    return [found[2], found[0], found[1], found[3]] if kind == ROTATING and len(found) == 4 else found


def _within(file: TensorFile, scalars: list[int], rows: int, number: int) -> int:
    positions = scalars[0] if scalars else rows
    if not 0 < positions <= rows:
        raise NotACacheError(
            f"{file.path}: layer {number} has {positions} positions in arrays of {rows}", path=file.path
        )
    return positions
