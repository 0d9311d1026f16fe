"""The shorter way that decoding takes: layers' compiled steps on tensors.

What lives here: which caches can take it. What else a pass must be is checked by `stored` and `attention`, and what a
step does is `DecodeStep`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...decode_step import DecodeStep
from .layer import KvmmapLayer
from .rows import StoredRows
from .team import model_threads

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Steps:
    """The steps of a cache's layers, which are made when it first decodes a token in place."""

    def __init__(self) -> None:
        self.checked = False
        """True once an earlier layer's keys and values of this pass were checked: what holds for all is known."""
        self._steps: dict[int, DecodeStep] | None = None
        self._last: DecodeStep | None = None
        self._dtype: torch.dtype | None = None

    @property
    def newest(self) -> int:
        """Positions that the last layer has."""
        return 0 if self._last is None else self._last.length

    def check(self, layers: Sequence[object], rows: Sequence[StoredRows], keys: torch.Tensor) -> None:
        """Have the other layers of a pass take the shorter way, if all of the cache can.

        Args:
            layers: those of the model.
            rows: all stores of rows.
            keys: the first ones of the pass.
        """
        if self._steps is None:
            self._steps = _made(layers, len(rows))
            self._last = next(reversed(self._steps.values()), None)
        threads = model_threads()
        for step in self._steps.values():
            step.prepare(keys, threads)
        self.checked, self._dtype = self._last is not None, keys.dtype

    def push(self, number: int, length: int, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Append a position to a layer that has `length`; False if nothing was done.

        Raises:
            As `KvmmapCache.update`.
        """
        assert self._steps is not None
        step = self._steps.get(number)
        return step is not None and step.length == length and keys.dtype is self._dtype and step.push(keys, values)


def _made(layers: Sequence[object], stores: int) -> dict[int, DecodeStep]:
    """Make the steps of a model's layers, by their numbers; none unless as many have some as there are stores."""
    found: dict[int, tuple[KvmmapLayer, DecodeStep]] = {}
    for number, layer in enumerate(layers):
        # No other class: theirs do more. A saved cache that is only read takes a second look, and chunks several.
        if type(layer) is KvmmapLayer and layer.saved is None and not (layer.kind.chunk or layer.kind.valueless):
            step = layer.own.decode_step(torch.Tensor, _DTYPES)
            if step is not None:
                found[number] = layer, step
    if len(found) != stores:
        return {}
    for layer, step in found.values():
        layer.step = step
    return {number: step for number, (_, step) in found.items()}
