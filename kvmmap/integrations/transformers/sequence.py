"""What of transformers' interface is about batches, for a cache that holds one sequence."""

from __future__ import annotations

from typing import NoReturn

import torch
from transformers.cache_utils import Cache

from ...errors import UnsupportedModelError


class OneSequence(Cache):
    """A cache whose batch is one sequence, and can't become another: beam search and the like are refused."""

    def begin_pass(self, token_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> None:
        """Take note of what a forward pass is about to feed."""
        raise NotImplementedError

    def end_pass(self) -> None:
        """Take note of the end of a forward pass."""
        raise NotImplementedError

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
        raise UnsupportedModelError(f"a KvmmapCache holds one sequence; {what} would need several")
