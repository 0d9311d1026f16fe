"""The part of a layer's store that concerns compiled decoding steps: where there are none, unless a storage says so."""

from __future__ import annotations

from typing import Any

from .._core import Step


class StepStore:
    """The part of `LayerStore` by which a position is appended from tensors as they lie: see `DecodeStep`."""

    def make_step(self, tensor: type, dtypes: tuple[Any, Any, Any]) -> Step | None:
        """Make what `write_step` takes, for tensors of a class and of three dtypes; None where there is no such way."""
        return None

    def write_step(self, step: Step, position: int, keys: Any, values: Any) -> bool:
        """As `write` and `keep`, for tensors [1, num_kv_heads, 1, dim]; False if nothing was written."""
        return False
