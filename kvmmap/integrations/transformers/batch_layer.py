"""One layer of a batch: the layers of its sequences, in the place of the tensors that a model would get of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, Self

import torch
from transformers.cache_utils import CacheLayerMixin

from ...errors import UnsupportedModelError
from .cache import KvmmapCache


@dataclass(slots=True)
class Members:
    """The sequences of a batch, and what the forward pass that runs feeds to each."""

    caches: list[KvmmapCache]
    fed: list[int] = field(default_factory=list)
    """New positions of each sequence; they are the last ones of its line."""

    columns: int = 0
    """Columns of the padded prompts, those of the pass that runs included."""


class BatchLayer(CacheLayerMixin):
    """A layer of a `KvmmapBatch`, on transformers' own interface of cache layers."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, members: Members, number: int) -> None:
        self._members = members
        self._number = number
        own: Any = members.caches[0].layers[number]
        self.is_sliding = own.is_sliding
        """True if the model sees a window of it."""
        self.is_initialized = True
        """Always."""

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """Refused: the sequences' tensors have lengths of their own."""
        self._refuse("keys")

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """As `keys`."""
        self._refuse("values")

    def sequences(self) -> Iterator[tuple[int, Any, int]]:
        """Yield (index, layer, new positions) of each sequence that is fed some in the pass that runs."""
        for number, (cache, fed) in enumerate(zip(self._members.caches, self._members.fed, strict=True)):
            if fed:
                yield number, cache.layers[self._number], fed

    def get_seq_length(self) -> NoReturn:
        """Refused, as `keys`."""
        self._refuse("a length")

    def get_mask_sizes(self, query_length: int) -> NoReturn:
        """Refused: the batch knows."""
        self._refuse("masks")

    def get_max_length(self) -> int:
        """Positions there is room for in the smallest cache."""
        return min(cache.capacity for cache in self._members.caches)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the batch does it."""
        self._refuse("updates")

    def to(self, device: torch.device) -> Self:
        """Return the layer itself: some models move keys and values that layers share to the queries' device."""
        if not isinstance(device, torch.device):
            self._refuse("dtype")
        return self

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"layers of a KvmmapBatch have no {what} of their own (see batch.caches): a model that asks for that can't "
            "run with a batch; generate each sequence with its own KvmmapCache"
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UnsupportedModelError(
            f"{getattr(function, '__name__', function)} was called on a BatchLayer: this model uses its keys and "
            'values before it attends, so it can\'t attend in place: model.set_attn_implementation("sdpa")'
        )
