"""What the layers of a model keep for each position, and which positions they see: their kinds.

Rows lie in *stores*, and these are what a file calls layers: first one for each layer of the model that has keys and
values of its own, then one for each that has index keys. A layer that shares another one's has none; but where some
layer has states, each has a store, which may be one without rows, so that states belong to the layer of their number.
Where no layer has rows at all, a last store has a row of zeros for every position: positions are counted in rows.
Pure: knows no models, tensors or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...codecs.float16 import F16
from ...geometry import LayerGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """One layer of a model, as its cache sees it."""

    geometry: LayerGeometry | None
    """The shape of its rows; None: it keeps none of its own, as it uses another layer's, or has states alone."""

    window: int | None
    """Positions that a query sees, its own among them; None: all."""

    latent: bool
    """True if what is cached is expanded into keys and values afterwards (MLA), so it can't be attended over as is."""

    chunk: int | None = None
    """Positions in a chunk: a query sees those of its own chunk up to its own. None: no chunks."""

    index: LayerGeometry | None = None
    """The shape of its index keys, which select the positions that are attended to; None: it has none."""

    states: int = 0
    """States of fixed size that it keeps, as transformers counts them: a convolution's and a recurrent one are one."""

    crosses: bool = False
    """True if it attends to a source alone, of whose rows nothing is stored."""

    valueless: bool = False
    """True if rows of values have no numbers (latents without a rotated part): a store keeps a zero in their place."""

    @property
    def reach(self) -> int | None:
        """What transformers calls the local size of the layer's mask: its window, or its chunk."""
        return self.window if self.chunk is None else self.chunk


def index_geometry(dim: int, codec: Any) -> LayerGeometry:
    """Return the shape of index keys: one half of each number row lies with keys, the other with values."""
    return LayerGeometry(1, dim - dim // 2, dim // 2, codec, codec)


_NO_ROWS = LayerGeometry(0, 0, 0)

POSITIONS = LayerGeometry(1, 1, 1, F16, F16)
"""The shape of the rows by which the positions of a model are counted that keeps states alone: 4 bytes each."""


def has_states(kinds: Iterable[LayerKind]) -> bool:
    """True if a layer keeps states."""
    return any(kind.states for kind in kinds)


def states_alone(kinds: Iterable[LayerKind]) -> bool:
    """True if layers keep states, and none of them rows."""
    kinds = list(kinds)
    return has_states(kinds) and all(kind.geometry is None and kind.index is None for kind in kinds)


def store_numbers(kinds: Sequence[LayerKind]) -> list[int | None]:
    """Return the number of the store of each layer's keys and values; None for a layer that has none."""
    every = has_states(kinds)  # then layers without rows have a store, too
    found: list[int | None] = []
    count = 0
    for kind in kinds:
        found.append(None if kind.geometry is None else count)
        count += every or kind.geometry is not None
    return found


def store_geometries(kinds: Iterable[LayerKind]) -> list[LayerGeometry]:
    """Return the shapes of all stores of rows, in the order in which a file has them."""
    kinds = list(kinds)
    own = [kind.geometry for kind in kinds if kind.geometry is not None]
    if has_states(kinds):
        own = [kind.geometry or _NO_ROWS for kind in kinds]
    if states_alone(kinds):
        own.append(POSITIONS)
    return own + [kind.index for kind in kinds if kind.index is not None]


def as_notes(kinds: Sequence[LayerKind]) -> dict[str, list[Any]]:
    """Return, as JSON, what a cache's shapes don't tell about its layers."""
    notes: dict[str, list[Any]] = {
        "windows": [kind.window for kind in kinds],
        "latent": [kind.latent for kind in kinds],
    }
    if any(kind.chunk is not None for kind in kinds):
        notes["chunks"] = [kind.chunk for kind in kinds]
    if any(kind.geometry is None for kind in kinds):
        notes["shared"] = [kind.geometry is None for kind in kinds]
    if any(kind.index is not None for kind in kinds):
        notes["indexed"] = [kind.index is not None for kind in kinds]
    if has_states(kinds):
        notes["states"] = [kind.states for kind in kinds]
    if any(kind.crosses for kind in kinds):
        notes["crosses"] = [kind.crosses for kind in kinds]
    if any(kind.valueless for kind in kinds):
        notes["valueless"] = [kind.valueless for kind in kinds]
    return notes


def from_notes(notes: Mapping[str, Any], stores: Sequence[LayerGeometry]) -> list[LayerKind]:
    """Return the layers that `as_notes` has written down.

    Args:
        notes: what it returned.
        stores: the shapes of the cache's stores of rows.
    """
    count = len(notes["windows"])
    names = ("shared", "indexed", "crosses", "valueless")
    shared, indexed, crosses, valueless = (notes.get(name, [False] * count) for name in names)
    chunks = notes.get("chunks", [None] * count)
    left = iter(stores)
    states = notes.get("states", [0] * count)
    if any(states):
        own = [store if store.has_rows else None for store, _ in zip(left, range(count), strict=False)]
    else:
        own = [None if share else next(left) for share in shared]
    return [
        LayerKind(
            geometry=own[number],
            window=notes["windows"][number],
            latent=notes["latent"][number],
            chunk=chunks[number],
            index=next(left) if indexed[number] else None,
            states=states[number],
            crosses=crosses[number],
            valueless=valueless[number],
        )
        for number in range(count)
    ]
