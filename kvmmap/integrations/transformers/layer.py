"""One layer of a model's cache, on transformers' interface: appends, and gives back tensors or itself to attend over.

Its positions lie in two stores: those kept of a saved cache that is only read (none, where there is no such cache), and
after them those that were appended. Where these are files, and what holds for all layers, is the cache's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import CacheLayerMixin

from ...attention.merge import merge_attention
from ...attention.run import AttendOptions
from ...errors import KvmmapError, UnsupportedModelError
from ...layer import QuantizedKvLayer
from .models import LayerKind
from .tensors import as_array, to_host


@dataclass(slots=True)
class Pattern:
    """What the layers of one kind have in common during a forward pass."""

    window: int | None
    """Positions that a query sees, its own among them; None: all."""

    latent: bool
    """True if what is cached becomes keys and values only later."""

    in_place: bool = False
    """True once this pass is known to ask for nothing but causal attention, from the function that attends in place."""


class _NotATensorError(UnsupportedModelError, AttributeError):
    """A layer was used as the tensor that it stands for. An AttributeError, because `hasattr` needs one."""


class KvmmapLayer(CacheLayerMixin):
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
        self.kind = kind
        """What the model's config says of the layer."""
        self.pattern = pattern
        """What it has in common with others of its kind during a forward pass."""
        self.saved = saved
        """The layer of a file that is only read, if there is one."""
        self.own = own
        """What is appended to."""
        self.kept = kept
        """Positions that count of `saved`; `own` has those from there on."""
        self.is_sliding = kind.window is not None
        """True if the model sees a window of it."""
        self.is_initialized = True
        """Always."""
        self._dtype = torch.float32  # of the last keys that came in

    # transformers' layers have tensors of these names, and some models read them.

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        """All keys, dequantised anew at each access, [1, num_kv_heads, n, head_dim]: see `read`."""
        return self.read(self._dtype)[0]

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """All values, dequantised anew at each access, [1, num_kv_heads, n, value_head_dim]: see `read`."""
        return self.read(self._dtype)[1]

    def __len__(self) -> int:
        """Positions that the layer has, also those of a pass that has not reached all layers yet."""
        return self.kept + len(self.own)

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
        self.append(key_states, value_states)
        if self.pattern.in_place:
            return self, self
        return self.read(key_states.dtype, key_states.device)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Quantise and append, all positions or none."""
        self._check_batch(key_states)
        keys, values = to_host(key_states, value_states)
        self._dtype = key_states.dtype
        if keys.shape[2] == 1:
            self.own.push(keys[0, :, 0], values[0, :, 0])
        else:
            self.own.extend(keys[0].swapaxes(0, 1), values[0].swapaxes(0, 1))

    def _check_batch(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != 1:
            raise UnsupportedModelError(
                f"a KvmmapCache holds one sequence, and this is a batch of {key_states.shape[0]} (several prompts, "
                "beam search, or num_return_sequences): generate them one by one, each with its own cache; those that "
                'start alike may each open the same file with mode="r"',
                expected=1,
                actual=key_states.shape[0],
            )

    def read(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantise all positions: two tensors [1, num_kv_heads, n, dim], views of [n, heads, dim]."""
        shape = self.own.geometry
        keys = torch.empty(len(self), shape.num_kv_heads, shape.head_dim, dtype=dtype)
        values = torch.empty(len(self), shape.num_kv_heads, shape.value_head_dim, dtype=dtype)
        key_rows, value_rows = as_array(keys), as_array(values)
        done = 0
        for part, first, stop in self.parts(0, len(self)):
            place = slice(done, done + stop - first)
            part.read_keys(first, stop, dtype=key_rows.dtype, out=key_rows[place])
            part.read_values(first, stop, dtype=value_rows.dtype, out=value_rows[place])
            done = place.stop
        return keys.to(device).transpose(0, 1)[None], values.to(device).transpose(0, 1)[None]

    def parts(self, start: int, stop: int) -> list[tuple[QuantizedKvLayer, int, int]]:
        """Return the layers that hold positions [start, stop), each with its own range of positions."""
        kept = self.kept
        found = [] if self.saved is None else [(self.saved, start, min(stop, kept))]
        found.append((self.own, max(start, kept) - kept, stop - kept))
        return [(part, first, last) for part, first, last in found if first < last]

    def attend(
        self, queries: NDArray[Any], *, scale: float, softcap: float | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Attend over what is stored, causally and within the layer's window.

        Args:
            queries: [n, num_q_heads, head_dim], of the last n positions there are, all of which were appended.
            scale: factor of the scores.
            softcap: bound of the scores, if they have one.

        Returns:
            f32 [n, num_q_heads, value_head_dim], and the logarithm of the softmax's denominator, [n, num_q_heads].
        """
        length, kept, window = len(self), self.kept, self.kind.window
        first = length - len(queries)
        oldest = 0 if window is None else max(0, first - window + 1)
        options: AttendOptions = {"scale": scale, "softcap": softcap, "window": window}
        own = self.own.attend(queries, return_lse=True, **options)
        if self.saved is None or oldest >= kept:
            return own
        options |= {"query_start": first, "positions": (oldest, kept)}
        before = self.saved.attend(queries, return_lse=True, **options)
        return merge_attention([before[0], own[0]], [before[1], own[1]])

    def cut(self, length: int, kept: int) -> None:
        """Note that the first `length` positions are kept, the first `kept` of these in the saved cache."""
        self.kept = kept

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

    # A layer that is handed on in the place of tensors must not be taken for one.

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
