"""The part of a layer's store that concerns compiled calls which append a position: none, unless a storage says so."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from .._core import Step


class StepStore:
    """The part of `LayerStore` by which a position is appended by one compiled call: of arrays, and of tensors as they
    lie (see `DecodeStep`)."""

    @property
    def appends_positions(self) -> bool:
        """True if there is `append_position`."""
        return False

    def append_position(
        self, position: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int
    ) -> int:
        """Encode, `write` and `keep` one position.

        Args:
            position: what `begin` has returned.
            keys, key_dtype, values, value_dtype: rows of one position, as `encoding.PairEncode` takes them.

        Returns:
            -1, or what that returns for a row that the codec can't hold: then nothing was written.
        """
        raise NotImplementedError

    def make_step(self, tensor: type, dtypes: tuple[Any, Any, Any]) -> Step | None:
        """Make what `write_step` takes, for tensors of a class and of three dtypes; None where there is no such way."""
        return None

    def write_step(self, step: Step, position: int, keys: Any, values: Any) -> bool:
        """As `write` and `keep`, for tensors [1, num_kv_heads, 1, dim]; False if nothing was written."""
        return False
