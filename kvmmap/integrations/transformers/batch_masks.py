"""Attention masks of batches: how many tokens each line has, and that padding is on the left. Knows no caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import ShapeMismatchError, UnsupportedModelError


def line_lengths(mask: Any, shape: Sequence[int], count: int) -> list[int]:
    """Return the tokens of each line of a mask.

    Args:
        mask: 1 where there is a token and 0 where there is padding, [batch, n]; None: tokens everywhere.
        shape: what it must have.
        count: sequences of the batch.

    Raises:
        ShapeMismatchError: another shape, or another number of sequences.
        UnsupportedModelError: no such mask, or padding that is not on the left.
    """
    if shape[0] != count:
        raise ShapeMismatchError(
            f"a batch of {count} caches takes as many sequences, not {shape[0]} (for "
            "num_return_sequences and beam search: KvmmapBatch.branches(cache, count))",
            expected=count,
            actual=shape[0],
        )
    if mask is None:
        return [shape[1]] * shape[0]
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise UnsupportedModelError("a batch of caches takes an attention mask [batch, n] of zeros and ones")
    if tuple(mask.shape) != tuple(shape):
        raise ShapeMismatchError(
            f"the attention mask must be [{shape[0]}, {shape[1]}], with the columns that are stored, not "
            f"{list(mask.shape)}",
            expected=tuple(shape),
            actual=tuple(mask.shape),
        )
    seen = mask.bool()
    lengths: list[int] = seen.sum(1).tolist()
    expected = torch.arange(shape[1], device=mask.device) >= shape[1] - seen.sum(1, keepdim=True)
    if not torch.equal(seen, expected):
        raise UnsupportedModelError(
            'sequences of a batch are padded on the left, and on no other side: tokenizer(..., padding_side="left")'
        )
    return lengths


def own_part(mask: Any, number: int, fed: int, total: int) -> Any:
    """Return the part of a mask that one sequence's queries and positions have.

    Args:
        mask: as modules get it: [batch, n], [batch, queries, n], [batch, heads, queries, n], such masks by name, or
            anything else, which is returned as it is.
        number: the sequence.
        fed: its queries, the last ones.
        total: its positions, the last ones.
    """
    if isinstance(mask, Mapping):
        return {name: own_part(one, number, fed, total) for name, one in mask.items()}
    if not isinstance(mask, torch.Tensor) or not 2 <= mask.ndim <= 4:
        return mask
    own = mask[number : number + 1, ..., -total:]
    return own if mask.ndim == 2 else own[..., -fed:, :]


def aligned(tensors: Sequence[torch.Tensor], columns: int) -> torch.Tensor:
    """Put rows of sequences, [1, heads, n, dim] each, into the last columns of one tensor, zeros before them."""
    first = tensors[0]
    if all(tensor.shape[2] == columns for tensor in tensors):
        return torch.cat(list(tensors))
    whole = first.new_zeros(len(tensors), first.shape[1], columns, first.shape[3])
    for line, tensor in zip(whole, tensors, strict=True):
        if tensor.shape[2]:
            line[:, columns - tensor.shape[2] :] = tensor[0]
    return whole
