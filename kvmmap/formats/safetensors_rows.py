"""Rows in a safetensors file as a cache stores them, of any codec, with what it keeps in 16 bits besides.

Unless all rows are plain int8 with nothing in 16 bits, such a file is of version 3, and its facts have below "rows"

    layers          [num_kv_heads, head_dim, value_head_dim, codec of keys, codec of values] of each layer
    recent_window   last positions that are kept in 16 bits besides
    sinks           first positions that are

Its tensors are the arrays that these codecs make, `layers.I.key_codes` and the like, bit by bit, and of the m positions
that a layer keeps in 16 bits

    recent.I.positions  I64 [m], ascending
    recent.I.dtypes     U8 [m, 2], of keys and of values: 1 for f16, 2 for bf16
    recent.I.keys       U16 [m, num_kv_heads, head_dim], their bits
    recent.I.values     U16 [m, num_kv_heads, value_head_dim]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..codecs import INT8, by_name
from ..codecs.presets import Codecs, chosen_codecs, chosen_recent
from ..errors import NonFiniteError, NotACacheError
from ..geometry import MAX_CAPACITY, MAX_LAYERS, MAX_RECENT, LayerGeometry
from ..ranges import index
from ..recent import RecentRing, RecentRows
from ..row_arrays import widened
from ..transfer.plan import Recode
from .safetensors_file import LONGEST_NAME, TensorFile

VERSION = 3
"""Of files whose tensors are arrays of codecs other than int8, or that have rows in 16 bits besides."""

PREFIX = "recent."
"""What names of tensors in 16 bits begin with."""

DTYPES = {
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
}
"""What safetensors calls the dtypes of arrays."""

_FORM_BITS = (40, 48)
"""Where a tag has the dtype's number of keys, and of values."""


@dataclass(frozen=True, slots=True)
class ExportedRows:
    """How the rows of an export are stored, layer by layer."""

    layers: tuple[LayerGeometry, ...]
    recent_window: int = 0
    sinks: int = 0

    @classmethod
    def of(cls, cache: QuantizedKvCache, chosen: Sequence[int]) -> Self:
        """Return that of a cache's layers."""
        geometry = cache.geometry
        return cls(tuple([geometry.layers[layer] for layer in chosen]), geometry.recent_window, geometry.sinks)

    @property
    def plain(self) -> bool:
        """True if all rows are int8, and nothing is kept in 16 bits."""
        codecs = {codec for layer in self.layers for codec in (layer.key_codec, layer.value_codec)}
        return codecs == {INT8} and not self.keeps_recent

    @property
    def keeps_recent(self) -> bool:
        """True if some positions are kept in 16 bits besides."""
        return bool(self.recent_window or self.sinks)

    def facts(self) -> dict[str, Any]:
        """Return what a header says of it."""
        layers = [[*layer.dims, layer.key_codec.name, layer.value_codec.name] for layer in self.layers]
        return {"layers": layers, "recent_window": self.recent_window, "sinks": self.sinks}

    @classmethod
    def decode(cls, facts: Any) -> Self:
        """Return what `facts` has made.

        Raises:
            ValueError, KeyError, TypeError: it is damaged, or (a DtypeError) names a codec that is not known here.
        """
        window, sinks = (index(facts[name], name) for name in ("recent_window", "sinks"))
        if not (0 <= window <= MAX_RECENT and 0 <= sinks <= MAX_RECENT):
            raise ValueError(f"recent_window is {window} and sinks is {sinks}")
        if not 1 <= len(facts["layers"]) <= MAX_LAYERS:
            raise ValueError(f"it has {len(facts['layers'])} layers")
        layers: dict[tuple[Any, ...], LayerGeometry] = {}
        found = []
        for heads, dim, value_dim, keys, values in facts["layers"]:
            shape = heads, dim, value_dim, keys, values
            if not all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in (keys, values)):
                raise ValueError(f"names of codecs are {str([keys, values])[:80]}")
            if shape not in layers:
                layers[shape] = LayerGeometry(heads, dim, value_dim, by_name(keys), by_name(values))
            found.append(layers[shape])
        return cls(tuple(found), window, sinks)

    def recoded(
        self,
        preset: str | None,
        key_codec: Codecs | None,
        value_codec: Codecs | None,
        recent_window: int | None,
        sinks: int | None,
    ) -> ExportedRows:
        """Return it with what a caller asks for in place of what is there; as `kvmmap.copy` does.

        Raises:
            DtypeError: there is no such preset or codec.
            ShapeMismatchError: not one a layer, or a codec that can't have rows of a layer's dims.
        """
        if preset is not None:
            key_codec, value_codec = chosen_codecs(preset, key_codec, value_codec)
            recent_window, sinks = chosen_recent(preset, recent_window, sinks, key_codec, value_codec)
        return ExportedRows(
            Recode(key_codec=key_codec, value_codec=value_codec).applied(self.layers),
            self.recent_window if recent_window is None else recent_window,
            self.sinks if sinks is None else sinks,
        )

    def recent_of(self, number: int) -> RecentRows:
        """Make room for what a layer keeps in 16 bits."""
        layer = self.layers[number]
        return RecentRows(self.recent_window, RecentRing(layer, self.recent_window), RecentRing(layer, self.sinks))


class KeptRows(NamedTuple):
    """What a layer keeps in 16 bits of m positions."""

    positions: NDArray[np.int64]
    """[m], ascending."""

    dtypes: NDArray[np.uint8]
    """[m, 2], of keys and of values: 1 for f16, 2 for bf16."""

    keys: NDArray[np.uint16]
    """[m, num_kv_heads, head_dim], their bits."""

    values: NDArray[np.uint16]
    """[m, num_kv_heads, value_head_dim], their bits."""

    @classmethod
    def of(cls, rows: ExportedRows, number: int, source: RecentRows, start: int, stop: int) -> Self:
        """Return what layer `number` of an export of positions [start, stop) keeps, of what its source does."""
        kept = rows.recent_of(number)
        kept.copy_from(source, start, stop)
        count = stop - start
        found = {position: (kept.ring, position % kept.ring.slots) for position in kept.ring.held(0, count)}
        found |= {position: (kept.first, position) for position in kept.first.held(0, min(count, kept.sinks))}
        layer, places = rows.layers[number], [found[position] for position in sorted(found)]
        keys = np.empty((len(places), layer.num_kv_heads, layer.head_dim), np.uint16)
        values = np.empty((len(places), layer.num_kv_heads, layer.value_head_dim), np.uint16)
        dtypes = np.empty((len(places), 2), np.uint8)
        for at, (ring, slot) in enumerate(places):
            keys[at], values[at] = ring.keys[slot], ring.values[slot]
            dtypes[at] = [int(ring.tags[slot]) >> bit & 0xFF for bit in _FORM_BITS]
        return cls(np.array(sorted(found), np.int64), dtypes, keys, values)

    @classmethod
    def read(cls, file: TensorFile, rows: ExportedRows, number: int, count: int) -> RecentRows:
        """Return what a file of `count` positions keeps of a layer.

        Raises:
            NotACacheError: a tensor is missing, or not what the module's text says.
            NonFiniteError: a number in 16 bits is a NaN or an infinity.
        """
        layer, found, held = rows.layers[number], {}, None
        for part, dtype, shape in (
            ("positions", "I64", ()),
            ("dtypes", "U8", (2,)),
            ("keys", "U16", (layer.num_kv_heads, layer.head_dim)),
            ("values", "U16", (layer.num_kv_heads, layer.value_head_dim)),
        ):
            name = f"{PREFIX}{number}.{part}"
            check_tensor(file, name, dtype, shape, held, number)
            held = file.shape(name)[0]
            if held > rows.recent_window + rows.sinks:
                raise NotACacheError(
                    f"{file.path}: layer {number} has {held:,} positions in 16 bits, and its header says "
                    f"{rows.recent_window:,} and {rows.sinks:,}",
                    path=file.path,
                    layer=number,
                )
            found[part] = file.read(name)
        kept = cls(**found)
        kept._check(file.path, rows, number, count)
        made = rows.recent_of(number)
        tags = kept.positions.astype(np.uint64) + np.uint64(1)
        for column, bit in enumerate(_FORM_BITS):
            tags |= kept.dtypes[:, column].astype(np.uint64) << np.uint64(bit)
        for ring, chosen in (
            (made.first, kept.positions < made.sinks),
            (made.ring, kept.positions >= count - made.window),
        ):
            if chosen.any():
                slots = kept.positions[chosen] % ring.slots
                ring.keys[slots], ring.values[slots], ring.tags[slots] = (
                    kept.keys[chosen],
                    kept.values[chosen],
                    tags[chosen],
                )
        return made

    def named(self, number: int) -> list[tuple[str, NDArray[Any]]]:
        """Return each array with the name of its tensor."""
        return [(f"{PREFIX}{number}.{part}", array) for part, array in self._asdict().items()]

    def _check(self, path: str, rows: ExportedRows, number: int, count: int) -> None:
        positions = self.positions
        if len(positions) and (
            positions[0] < 0
            or positions[-1] >= count
            or (np.diff(positions) < 1).any()
            or ((positions >= rows.sinks) & (positions < count - rows.recent_window)).any()
        ):
            raise NotACacheError(
                f"{path}: the positions of layer {number} in 16 bits are not ascending ones among the first "
                f"{rows.sinks:,} and the last {rows.recent_window:,} of {count:,}",
                path=path,
                layer=number,
            )
        if not np.isin(self.dtypes, (1, 2)).all():
            raise NotACacheError(
                f"{path}: {PREFIX}{number}.dtypes must be 1 for f16 or 2 for bf16", path=path, layer=number
            )
        for part, column in (("keys", 0), ("values", 1)):
            bits = getattr(self, part)
            for form, dtype in ((1, np.float16), (2, np.uint16)):
                chosen = np.ascontiguousarray(bits[self.dtypes[:, column] == form])
                if not np.isfinite(widened(chosen.view(dtype))).all():
                    raise NonFiniteError(f"{path}: {PREFIX}{number}.{part} has a NaN or an infinity", layer=number)


def check_tensor(
    file: TensorFile, name: str, dtype: str, shape: tuple[int, ...], count: int | None, number: int
) -> None:
    """Refuse a tensor that is not [count, *shape] of a dtype; of any count if that is None.

    Raises:
        NotACacheError: it is missing, or has another dtype or shape.
    """
    if not file.has(name):
        raise NotACacheError(f"{file.path}: has no tensor {name}, which its header names", path=file.path, layer=number)
    found, actual = file.shape(name), file.dtype(name)
    length = found[0] if found and count is None else count
    if actual != dtype or found != (length, *shape) or found[0] > MAX_CAPACITY:
        wanted = ", ".join(map(str, ("n" if count is None else count, *shape)))
        raise NotACacheError(
            f"{file.path}: {name} is {actual} {list(found)}, and must be {dtype} [{wanted}]",
            path=file.path,
            layer=number,
        )
