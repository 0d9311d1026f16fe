"""What hooks on a model expect of a cache, and what of transformers' interface is about batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from transformers.cache_utils import Cache

from ...errors import UnsupportedModelError


class WatchedCache(Cache):
    """A cache that hooks on a model report forward passes to."""

    leaves_padding_out = False
    """True if hidden columns of a 2-D attention mask are padding that the cache neither stores nor attends over."""

    def begin_pass(self, model: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Take note of what a forward pass is about to feed."""
        raise NotImplementedError

    def own_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pass that has begun, by name, as the model must get them: the same, or others."""
        return given

    def check_mask(self, module: torch.nn.Module, mask: Any) -> None:
        """Take note of the mask that an attention module gets."""
        raise NotImplementedError

    def end_pass(self, model: torch.nn.Module, failed: bool = False) -> None:
        """Take note of the end of a forward pass."""
        raise NotImplementedError

    def check_config(self, config: Any) -> None:
        """Refuse to go on if another config made the cache."""
        raise NotImplementedError

    def attend_in_place(self, reach: int | None, plain: bool) -> bool:
        """Take note of a mask, and return whether the layers that it is for can be attended over in place."""
        raise NotImplementedError


class OneSequence(WatchedCache):
    """A cache whose batch is one sequence, and can't become another: beam search and the like are refused."""

    @property
    def batch_size(self) -> int:
        """One."""
        return 1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refuse beam search."""
        if beam_idx.tolist() != [0]:
            self._refuse("beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to become several sequences."""
        if repeats != 1:
            self._refuse(f"{repeats} copies of it")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to become several sequences, or none."""
        if indices.tolist() != [0]:
            self._refuse("a selection of it")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"a KvmmapCache holds one sequence; {what} would need several: KvmmapBatch.branches(cache, count)"
        )


class MaskLength(int):
    """How many positions a mask is for, and which cache it was asked of.

    transformers asks the cache for the length, and hands it to the function that makes the mask unchanged, which so
    learns what the mask is for. Where it is lost on the way, attention is computed from tensors.
    """

    cache: WatchedCache

    @classmethod
    def of(cls, length: int, cache: WatchedCache) -> MaskLength:
        """Make one."""
        made = cls(length)
        made.cache = cache
        return made
