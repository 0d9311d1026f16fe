"""Layers and caches of 8-bit floats in memory, for exchanging rows with engines that hold their caches so.

`key_codec=` and `value_codec=` choose the same codecs for files, and other ones for keys than for values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .cache import QuantizedKvCache
from .errors import DtypeError
from .layer import QuantizedKvLayer

Form = Literal["e4m3", "e5m2"]
"""Exponent and mantissa bits: e4m3 reaches to 448, e5m2 to 57,344 with a bit less of precision."""

_FORMS = ("e4m3", "e5m2")


def fp8_codec(form: Form, *, scaled: bool) -> str:
    """Return the name of the codec of 8-bit floats of a form.

    Raises:
        DtypeError: there is no such form.
    """
    if form not in _FORMS:
        raise DtypeError(
            f"there is no form {form!r} of 8-bit floats: choose one of {', '.join(_FORMS)}",
            expected=_FORMS,
            actual=str(form),
        )
    return f"fp8-{form}-scaled" if scaled else f"fp8-{form}"


class Fp8KvLayer(QuantizedKvLayer):
    """Keys and values of one transformer layer as 8-bit floats, in memory and standing alone.

    Args:
        capacity: positions to reserve.
        num_kv_heads: key and value heads.
        head_dim: numbers in a key row.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        form: "e4m3" or "e5m2".
        scaled: store one f32 scale a row besides, so that any finite row fits. Without it, a number that is beyond the
            form's largest is refused.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
        DtypeError: there is no such form.
    """

    __slots__ = ()

    def __init__(
        self,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        form: Form = "e4m3",
        scaled: bool = True,
    ) -> None:
        codec = fp8_codec(form, scaled=scaled)
        super().__init__(capacity, num_kv_heads, head_dim, value_head_dim, key_codec=codec, value_codec=codec)


class Fp8KvCache(QuantizedKvCache):
    """Keys and values of all layers as 8-bit floats, in memory; `kvmmap.copy` writes it to a file.

    Args:
        num_layers: transformer layers.
        capacity: positions to reserve.
        num_kv_heads: key and value heads; one number, or one a layer.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        form, scaled: as in `Fp8KvLayer`.

    Raises:
        ShapeMismatchError, DtypeError: as in `Fp8KvLayer`.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        value_head_dim: int | Sequence[int] | None = None,
        *,
        form: Form = "e4m3",
        scaled: bool = True,
    ) -> None:
        codec = fp8_codec(form, scaled=scaled)
        super().__init__(
            num_layers, capacity, num_kv_heads, head_dim, value_head_dim, key_codec=codec, value_codec=codec
        )
