"""A cache's layers as a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from .errors import LayerOutOfRangeError, ShapeMismatchError
from .layer import QuantizedKvLayer
from .ranges import index
from .storage.on_demand import OnDemand
from .storage.protocols import Storage


class Layers(Sequence[QuantizedKvLayer]):
    """A cache's layers, by index from 0; negative ones don't wrap."""

    def __init__(self, storage: Storage) -> None:
        stores = storage.layers
        self._layers = OnDemand(
            len(stores), lambda number: QuantizedKvLayer.of_store(storage, stores[number]), storage.lock
        )

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[QuantizedKvLayer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, layer: int) -> QuantizedKvLayer: ...
    @overload
    def __getitem__(self, layer: slice) -> list[QuantizedKvLayer]: ...
    def __getitem__(self, layer: int | slice) -> QuantizedKvLayer | list[QuantizedKvLayer]:
        if isinstance(layer, slice):
            return self._layers[layer]
        return self._layers[self.check(layer)]

    def chosen(self, layers: Iterable[int] | None) -> list[int]:
        """Return the numbers of some layers, or of all, if there are such ones."""
        if layers is None:
            return list(range(len(self)))
        try:
            numbers = list(layers)
        except TypeError:
            raise ShapeMismatchError(
                f"layers must be numbers of layers, such as [0, 1], not {layers!r:.40}", expected="ints", actual=layers
            ) from None
        return [self.check(number) for number in numbers]

    def check(self, layer: int) -> int:
        """Return `layer` if there is such a one."""
        layer = index(layer, "layer")
        if not 0 <= layer < len(self._layers):
            raise LayerOutOfRangeError(
                f"layer {layer} does not exist: there are {len(self._layers)}, counted from 0, and "
                "negative ones do not wrap",
                layer=layer,
                expected=len(self._layers),
            )
        return layer
