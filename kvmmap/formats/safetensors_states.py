"""States and their checkpoints in a safetensors file: names of tensors, and what the header says of them.

A file with states, or with layers without rows, is of version 2. Below "states" its facts have

    layers          how many there are
    row_layers      the numbers of those with rows
    tensors         [layer, name, dtype, shape] of each state, in the cache's order
    slots           checkpoints that the cache keeps
    checkpoints     [position, pinned], by ascending position

and the state tensors at a position are `checkpoints.POSITION.LAYER.NAME`, in their own dtype and shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..errors import NotACacheError
from ..ranges import index
from ..state_spec import MAX_CHECKPOINT_SLOTS, StateSpec, check_states
from ..storage.checkpoints import Checkpoint
from .safetensors_file import TensorFile, shown

VERSION = 2
"""Of files that have states, or layers without rows."""

PREFIX = "checkpoints."
"""What names of state tensors begin with."""

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
}
"""What safetensors calls the dtypes of states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedStates:
    """The states of an export, under the numbers that its layers have there."""

    layers: int
    """How many layers there are."""

    row_layers: tuple[int, ...]
    """The numbers of those with rows."""

    specs: tuple[StateSpec, ...]
    """The states, in order."""

    slots: int
    """Checkpoints that the cache keeps; 0 without states."""

    checkpoints: tuple[Checkpoint, ...]
    """By ascending position."""

    @classmethod
    def of(cls, cache: QuantizedKvCache, chosen: Sequence[int], stop: int) -> Self | None:
        """Return those of a cache's layers up to a position; None if it has none, and all layers have rows."""
        row_layers = [number for number, layer in enumerate(chosen) if cache.geometry.layers[layer].has_rows]
        specs = [
            StateSpec(number, spec.name, spec.dtype, spec.shape)
            for spec in cache.states
            for number, layer in enumerate(chosen)
            if spec.layer == layer
        ]
        if not specs and len(row_layers) == len(chosen):
            return None
        return cls(
            layers=len(chosen),
            row_layers=tuple(row_layers),
            specs=tuple(specs),
            slots=cache.checkpoint_slots if specs else 0,
            checkpoints=tuple([one for one in cache.checkpoints if one.position <= stop]) if specs else (),
        )

    def facts(self) -> dict[str, Any]:
        """Return what a header says of them."""
        return {
            "layers": self.layers,
            "row_layers": list(self.row_layers),
            "tensors": [[spec.layer, spec.name, spec.dtype, list(spec.shape)] for spec in self.specs],
            "slots": self.slots,
            "checkpoints": [[one.position, one.pinned] for one in self.checkpoints],
        }

    @classmethod
    def decode(cls, facts: Any) -> Self:
        """Return what `facts` has made.

        Raises:
            ValueError, KeyError, TypeError: it is damaged.
        """
        layers, slots = index(facts["layers"], "layers"), index(facts["slots"], "slots")
        row_layers = tuple([index(number, "row_layers") for number in facts["row_layers"]])
        if list(row_layers) != sorted({number for number in row_layers if 0 <= number < layers}):
            raise ValueError(f"row_layers are {list(row_layers)[:8]}")
        specs = check_states(
            [StateSpec(at, name, dtype, tuple(shape)) for at, name, dtype, shape in facts["tensors"]], layers
        )
        if not (1 <= slots <= MAX_CHECKPOINT_SLOTS if specs else slots == 0):
            raise ValueError(f"slots is {slots}")
        checkpoints = [
            Checkpoint(index(position, "a position"), pinned is True) for position, pinned in facts["checkpoints"]
        ]
        positions = [one.position for one in checkpoints]
        if positions != sorted(set(positions)) or len(positions) > slots or any(position < 1 for position in positions):
            raise ValueError(f"checkpoints are at {positions[:8]}")
        return cls(layers=layers, row_layers=row_layers, specs=specs, slots=slots, checkpoints=tuple(checkpoints))

    def places(self) -> Iterator[tuple[int, StateSpec, str]]:
        """Yield the position, the state and the name of each tensor."""
        for one in self.checkpoints:
            for spec in self.specs:
                yield one.position, spec, f"{PREFIX}{one.position}.{spec.layer}.{spec.name}"

    def arrays(self, cache: QuantizedKvCache, chosen: Sequence[int]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """Yield the name and the bytes of each tensor of a cache, checkpoint by checkpoint.

        Args:
            cache: whose states they are.
            chosen: the numbers that the layers have there.
        """
        held: tuple[int, Any] = (0, {})
        for position, spec, name in self.places():
            if held[0] != position:
                held = position, cache.read_states(position)
            array: NDArray[Any] = held[1][chosen[spec.layer], spec.name]
            yield name, np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def restore(self, cache: QuantizedKvCache, file: TensorFile) -> None:
        """Write all checkpoints of a file to a cache that has its rows.

        Raises:
            NotACacheError: a tensor is missing, or not of the dtype and shape that the header says.
        """
        names, checkpoints = set(file.names()), cache.storage.checkpoints
        arrays: list[NDArray[Any]] = []
        pinned = {one.position: one.pinned for one in self.checkpoints}
        for position, spec, name in self.places():
            if name not in names:
                raise NotACacheError(
                    f"{file.path}: has no tensor {shown(name)}, which its header names", path=file.path
                )
            file.check_dtype(name, (DTYPES[spec.dtype],))
            if file.shape(name) != spec.shape:
                raise NotACacheError(
                    f"{file.path}: {shown(name)} is {list(file.shape(name))}, and its header says {list(spec.shape)}",
                    path=file.path,
                    layer=spec.layer,
                )
            arrays.append(np.ascontiguousarray(file.read(name)).astype(spec.numpy_dtype, copy=False))
            if len(arrays) == len(self.specs):
                checkpoints.write(position, arrays)
                checkpoints.name_staged(pin=pinned[position])
                arrays = []
