"""One layer of a model's cache, on transformers' interface: appends, and gives back tensors or itself to attend over.

Its rows are a store of their own (`rows`); what holds for all layers is the cache's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, Self

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from ...attention.merge import merge_attention
from ...attention.run import AttendOptions
from ...decode_step import DecodeStep
from ...errors import KvmmapError, UnsupportedModelError
from ...layer import QuantizedKvLayer
from .kinds import LayerKind
from .rows import StoredRows
from .team import model_threads


@dataclass(slots=True)
class Pattern:
    """What the layers of one kind have in common during a forward pass."""

    reach: int | None
    """Positions in a window or chunk; None: a query sees all."""

    latent: bool
    """True if what is cached becomes keys and values only later."""

    in_place: bool = False
    """True once this pass is known to ask for nothing but causal attention, from the function that attends in place."""


class _NotATensorError(UnsupportedModelError, AttributeError):
    """A layer was used as the tensor that it stands for. An AttributeError, because `hasattr` needs one."""


class KvmmapLayer(StoredRows, CacheLayerMixin):
    """A layer of a `KvmmapCache`, on transformers' own interface of cache layers."""

    is_compileable = False
    """No: it is no part of a compiled graph."""

    is_croppable = True
    """Yes, by its cache."""

    supports_early_init = False
    """No: there is nothing to initialise."""

    def __init__(
        self, kind: LayerKind, pattern: Pattern, saved: QuantizedKvLayer | None, own: QuantizedKvLayer, kept: int
    ) -> None:
        StoredRows.__init__(self, saved, own, kept)
        self.kind = kind
        """What the model's config says of the layer."""
        self.pattern = pattern
        """What it has in common with others of its kind during a forward pass."""
        self.is_sliding = kind.reach is not None
        """True if the model sees a window or a chunk of it."""
        self.is_initialized = True
        """Always."""
        self._dtype = torch.float32  # of the last keys that came in
        self.step: DecodeStep | None = None
        """How single positions are attended over, if there is a shorter way than `attend`."""

    # transformers' layers have tensors of these names, and some models read them.

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """All keys, dequantised anew at each access, [1, num_kv_heads, n, head_dim]: see `read`."""
        return self.read(self._dtype)[0]

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """All values, dequantised anew at each access, [1, num_kv_heads, n, value_head_dim]: see `read`."""
        return self.read(self._dtype)[1]

    def __repr__(self) -> str:
        return f"<KvmmapLayer {len(self)} positions, {self.kept} of them read from a saved cache>"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: everything was reserved when the cache was made."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append, and return all keys and values there are now.

        Args:
            key_states: [1, num_kv_heads, n, head_dim]; f32, f16 or bf16.
            value_states: [1, num_kv_heads, n, value_head_dim].

        Returns:
            Both dequantised, in the dtype and on the device they came in; or, for attention in place, the layer itself
            in place of both.
        """
        stored = value_states.new_zeros(*value_states.shape[:-1], 1) if self.kind.valueless else value_states
        self.append(key_states, stored)
        self._dtype = key_states.dtype
        if self.pattern.in_place:
            return self, self
        return self.read(key_states.dtype, key_states.device)

    def read(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantise all positions: two tensors [1, num_kv_heads, n, dim], views of [n, heads, dim]."""
        keys, values = super().read(dtype, device)
        return keys, values[..., :0] if self.kind.valueless else values

    def attend(
        self, queries: NDArray[Any], *, scale: float, softcap: float | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Attend over what is stored, causally and within the layer's window or chunks.

        Args:
            queries: [n, num_q_heads, head_dim], of the last n positions there are, all of which were appended.
            scale: factor of the scores.
            softcap: bound of the scores, if they have one.

        Returns:
            f32 [n, num_q_heads, value_head_dim], and the logarithm of the softmax's denominator, [n, num_q_heads].
        """
        try:
            return self._attend_all(queries, scale, softcap)
        finally:
            self.chunk = None  # it has as many rows as the pass

    def _attend_all(
        self, queries: NDArray[Any], scale: float, softcap: float | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        length, window, chunk = len(self), self.kind.window, self.kind.chunk
        first = length - len(queries)
        if chunk is None:
            oldest = 0 if window is None else max(0, first - window + 1)
            return self._attend(queries, first, oldest, {"scale": scale, "softcap": softcap, "window": window})
        done = []
        for begin in range(first - first % chunk, length, chunk):
            start, stop = max(begin, first), min(begin + chunk, length)
            some = queries[start - first : stop - first]
            done.append(self._attend(some, start, begin, {"scale": scale, "softcap": softcap}))
        if len(done) == 1:
            return done[0]
        return np.concatenate([out for out, _ in done]), np.concatenate([lse for _, lse in done])

    def _attend(
        self, queries: NDArray[Any], first: int, oldest: int, options: AttendOptions
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Attend with queries from position `first` on to positions from `oldest` on."""
        kept, stop = self.kept, first + len(queries)
        options |= {"query_start": first - kept, "positions": (max(oldest - kept, 0), stop - kept)}
        options |= {"chunk": self.chunk, "threads": model_threads()}
        own = self.own.attend(queries, return_lse=True, **options)
        if self.saved is None or oldest >= kept:
            return own
        options |= {"query_start": first, "positions": (oldest, kept), "chunk": None}
        before = self.saved.attend(queries, return_lse=True, **options)
        return merge_attention([before[0], own[0]], [before[1], own[1]])

    # What masks are made for

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Every position is kept, also behind a window."""
        return len(self) + query_length, 0

    def get_seq_length(self) -> int:
        """Positions stored."""
        return len(self)

    def get_max_length(self) -> int:
        """Positions there is room for."""
        return self.kept + self.own.capacity

    # What layers do together or not at all

    def offload(self) -> None:
        """Nothing to do: it is not on an accelerator."""

    def prefetch(self) -> None:
        """Nothing to do."""

    def reset(self) -> NoReturn:
        """Layers are emptied with their cache."""
        self._refuse("reset")

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Layers are cropped with their cache."""
        self._refuse("crop")

    def reorder_cache(self, beam_idx: torch.Tensor) -> NoReturn:
        """There is one sequence, and nothing to reorder."""
        self._refuse("reorder_cache")

    def _refuse(self, what: str) -> NoReturn:
        raise KvmmapError(f"layers of a KvmmapCache don't {what} on their own: call it on the cache")

    def to(self, device: torch.device) -> Self:
        """Return the layer itself: some models move keys and values that layers share to the queries' device."""
        if not isinstance(device, torch.device):
            return self.__getattr__("to")
        return self

    # A layer that is passed where tensors are expected must not be mistaken for one.

    def __getattr__(self, name: str) -> NoReturn:
        raise _NotATensorError(
            f"'KvmmapLayer' has no {name!r}; if it was to be a tensor of keys or values: this model uses these before "
            'it attends, so it can\'t attend in place: model.set_attn_implementation("sdpa")',
            actual=name,
        )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise UnsupportedModelError(
            f"{getattr(function, '__name__', function)} was called on a KvmmapLayer: this model uses its keys and "
            'values before it attends, so it can\'t attend in place: model.set_attn_implementation("sdpa")'
        )
