"""Rotary frequencies of a model: those that are not what its config says.

They are buffers that are not saved with the weights: a model computes them from its config, and they can be edited. Two
machines may compute them differently in the last bit, so they are compared with newly computed ones, and only what
differs is part of a model's identity. Knows modules; nothing of caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

_CLOSE = 1e-5  # relative


def watched_buffers(module: torch.nn.Module) -> Iterator[str]:
    """The names of a module's buffers that forward passes leave alone."""
    kinds = getattr(module, "rope_type", "")
    moving = [kind for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]) if _follows_length(kind)]
    for name, buffer in module._buffers.items():
        # RoPE that depends on the length writes the frequencies of each pass; the original ones stay.
        if buffer is not None and not (moving and name.endswith("inv_freq") and "original_inv_freq" not in name):
            yield name


def scalings(module: torch.nn.Module) -> tuple[float, ...]:
    """The factors that a rotary module applies to sines and cosines."""
    return tuple(value for name, value in vars(module).items() if name.endswith("attention_scaling"))


def deviating(body: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Frequencies and factors that differ from those that a model's config gives, by name."""
    for name, module in body.named_modules():
        found = [one for one in watched_buffers(module) if one.endswith("inv_freq")]
        config = getattr(module, "config", None)
        if not found or config is None:
            continue
        new = _computed(module, config)
        for one in found:
            old, right = module._buffers[one], None if new is None else new._buffers.get(one)
            if old is not None and (right is None or not _same(old, right)):
                yield f"{name}.{one}", old
        if new is not None and not _all_close(scalings(module), scalings(new)):
            yield f"{name}.attention_scaling", [str(value) for value in scalings(module)]


def _computed(module: torch.nn.Module, config: Any) -> torch.nn.Module | None:
    """A new rotary module, None if the class wants more than a config."""
    kind: Any = type(module)
    try:
        with torch.device("cpu"):
            made = kind(config)
    except Exception:  # a class of another package may raise anything
        return None
    return made if isinstance(made, torch.nn.Module) else None


def _follows_length(kind: Any) -> bool:
    return "dynamic" in str(kind) or kind == "longrope"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype is not other.dtype:
        return False
    return one.is_meta or torch.allclose(one.cpu(), other.cpu(), rtol=_CLOSE, atol=0)


def _all_close(ours: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(ours) == len(others) and all(
        math.isclose(one, other, rel_tol=_CLOSE) for one, other in zip(ours, others, strict=True)
    )
