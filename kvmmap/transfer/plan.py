"""What a copy copies: which layers and positions, in which steps, and the stamp by which it is found again."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache import QuantizedKvCache
from ..geometry import check_range, check_room, index
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
        chosen = [cache.layers.check(layer) for layer in (range(cache.num_layers) if layers is None else layers)]
        geometry = replace(
            cache.geometry,
            layers=tuple(cache.geometry.layers[layer] for layer in chosen),
            capacity=cache.capacity if capacity is None else index(capacity, "capacity"),
        )
        check_room(0, stop - start, geometry.capacity)
        identity = source.identity() or secrets.token_hex(8)  # a cache in memory can't be recognised
        facts = [identity, start, chosen, geometry.capacity, source.document.encode().decode()]
        incoming = Incoming(
            source=source,
            geometry=geometry,
            length=stop - start,
            stamp=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24],
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
            ]
            for start, stop in itertools.pairwise(edges)
        ]
