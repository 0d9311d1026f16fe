"""What a copy copies: which layers and positions, in which steps, and the stamp by which it is found again."""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache import QuantizedKvCache
from ..codecs.presets import Codecs
from ..errors import NoCheckpointError, ShapeMismatchError
from ..geometry import LayerGeometry
from ..per_layer import codecs_a_layer, in_layer
from ..ranges import check_range, check_room, index
from ..state_spec import StateSpec
from ..storage.receiving import CopyRange, Incoming
from .transcoding import LayerLoss, TranscodedStorage

STEP_TOKENS = 8192
"""Positions of a layer that are copied in one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recode:
    """How a copy is to store rows; None: as the source does."""

    key_codec: Codecs | None = None
    value_codec: Codecs | None = None
    recent_window: int | None = None
    sinks: int | None = None

    def applied(self, layers: Sequence[LayerGeometry]) -> tuple[LayerGeometry, ...]:
        """Return layers with these codecs.

        Raises:
            DtypeError: there is no such codec.
            ShapeMismatchError: not one a layer, or a codec that can't have a layer's rows; names the layer.
        """
        keys, values = (
            [None] * len(layers) if codec is None else codecs_a_layer(codec, len(layers), name)
            for codec, name in ((self.key_codec, "key_codec"), (self.value_codec, "value_codec"))
        )
        made = []
        for number, (layer, key, value) in enumerate(zip(layers, keys, values, strict=True)):
            try:
                made.append(replace(layer, key_codec=key or layer.key_codec, value_codec=value or layer.value_codec))
            except ShapeMismatchError as error:
                raise in_layer(error, number) from None
        return tuple(made)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied."""

    incoming: Incoming
    layers: list[int]
    """Numbers of the layers in the incoming storage, in the order of the target."""
    start: int
    """First position to copy."""
    tokens: int
    """Token ids to copy."""
    source_position_bytes: int
    """Bytes of one position of these layers in the source."""

    @classmethod
    def make(
        cls,
        cache: QuantizedKvCache,
        start: int,
        stop: int | None,
        layers: Sequence[int] | None,
        capacity: int | None,
        recode: Recode = Recode(),
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
        chosen = cache.layers.chosen(layers)
        states, numbers = _states_of(cache, chosen)
        given = tuple(cache.geometry.layers[layer] for layer in chosen)
        geometry = replace(
            cache.geometry,
            layers=recode.applied(given),
            capacity=cache.capacity if capacity is None else index(capacity, "capacity"),
            states=states,
            recent_window=cache.geometry.recent_window if recode.recent_window is None else recode.recent_window,
            sinks=cache.geometry.sinks if recode.sinks is None else recode.sinks,
        )
        check_room(0, stop - start, geometry.capacity)
        identity = source.identity() or secrets.token_hex(8)  # a cache in memory can't be recognised
        facts = [identity, start, chosen, geometry.capacity, source.document.encode().decode()]
        recent = geometry.recent_window, geometry.sinks
        if recent != (cache.geometry.recent_window, cache.geometry.sinks):
            facts.append(recent)
        same_blocks = start == 0 and chosen == list(range(len(source.layers)))
        if geometry.layers != given:
            facts.append([(layer.key_codec.name, layer.value_codec.name) for layer in geometry.layers])
            source = TranscodedStorage(source, chosen, geometry)
            same_blocks, chosen = False, list(range(len(chosen)))
        incoming = Incoming(
            source=source,
            geometry=geometry,
            length=stop - start,
            stamp=hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24],
            same_blocks=same_blocks,
            states=numbers,
        )
        position_bytes = sum(layer.position_bytes for layer in given)
        return cls(incoming, chosen, start, max(0, min(cache.token_len, stop) - start), position_bytes)

    @property
    def length(self) -> int:
        """Positions to copy."""
        return self.incoming.length

    def losses(self) -> tuple[LayerLoss, ...]:
        """Return what each layer of the copy has lost so far; empty if rows are copied bit by bit."""
        source = self.incoming.source
        if not isinstance(source, TranscodedStorage):
            return ()
        return tuple(layer.loss for layer in source.layers)

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
