"""What a copy copies: which layers and positions, in which steps, and the stamp by which it is found again."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache import QuantizedKvCache
from ..errors import NoCheckpointError
from ..geometry import check_range, check_room, index
from ..state_spec import StateSpec
from ..storage.receiving import CopyRange, Incoming

STEP_TOKENS = 8192
"""Positions of a layer that are copied in one step."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied."""

    incoming: Incoming
    layers: list[int]
    """Of the source, in the order of the target."""
    start: int
    """First position to copy."""
    tokens: int
    """Token ids to copy."""

    @classmethod
    def make(
        cls,
        cache: QuantizedKvCache,
        start: int,
        stop: int | None,
        layers: Sequence[int] | None,
        capacity: int | None,
    ) -> Plan:
        """Check what the caller of a copy asks for. Raises as `kvmmap.copy`."""
        source = cache.storage
        start, stop = check_range(start, cache.seq_len if stop is None else stop, cache.seq_len)
        if cache.states:
            if start:
                raise NoCheckpointError(
                    f"a cache with states can be copied from position 0 only, and not from {start}: its states depend "
                    "on all positions before",
                    position=start,
                    path=source.path,
                )
            stop = source.checkpoints.last(stop)
        chosen = [cache.layers.check(layer) for layer in (range(cache.num_layers) if layers is None else layers)]
        states, numbers = _states_of(cache, chosen)
        geometry = replace(
            cache.geometry,
            layers=tuple(cache.geometry.layers[layer] for layer in chosen),
            capacity=cache.capacity if capacity is None else index(capacity, "capacity"),
            states=states,
        )
        check_room(0, stop - start, geometry.capacity)
        identity = source.identity() or secrets.token_hex(8)  # a cache in memory can't be recognised
        facts = [identity, start, chosen, geometry.capacity, source.document.encode().decode()]
        incoming = Incoming(
            source=source,
            geometry=geometry,
            length=stop - start,
            stamp=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24],
            states=numbers,
            same_blocks=start == 0 and chosen == list(range(len(source.layers))),
        )
        return cls(incoming, chosen, start, max(0, min(cache.token_len, stop) - start))

    @property
    def length(self) -> int:
        """Positions to copy."""
        return self.incoming.length

    def steps(self, begun: int) -> list[list[CopyRange]]:
        """Return what is copied in each step, layer by layer, from a length that the target has already."""
        first = begun // STEP_TOKENS * STEP_TOKENS + STEP_TOKENS
        edges = [begun, *range(first, self.length, STEP_TOKENS), self.length]
        source = self.incoming.source
        return [
            [
                CopyRange(source.layers[layer], self.start + start, self.start + stop, number, start)
                for number, layer in enumerate(self.layers)
                if source.layers[layer].geometry.has_rows
            ]
            for start, stop in itertools.pairwise(edges)
        ]


def _states_of(cache: QuantizedKvCache, chosen: Sequence[int]) -> tuple[tuple[StateSpec, ...], list[int]]:
    """Return the states that the chosen layers have, under the layers' new numbers, and their indices in the cache."""
    found = [
        (replace(spec, layer=number), index)
        for number, layer in enumerate(chosen)
        for index, spec in enumerate(cache.states)
        if spec.layer == layer
    ]
    return tuple([spec for spec, _ in found]), [index for _, index in found]
