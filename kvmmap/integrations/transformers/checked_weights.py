"""Whether the model that runs a pass is the one that a cache belongs to, looked at before each pass."""

from __future__ import annotations

from typing import Any

import torch

from ...cache import QuantizedKvCache
from ...errors import ModelMismatchError, UnsupportedModelError
from ...metadata import ModelInfo
from .opening import check_stored
from .weights import Weights, weights_of


def checked_weights(model: torch.nn.Module, known: Weights | None, source: QuantizedKvCache) -> Weights | None:
    """Refuse a pass of another model than a cache's, or after a change of its weights or adapters.

    Args:
        model: the model that runs, or a part of it.
        known: weights that are known to be the cache's.
        source: the cache that says whose it is.

    Returns:
        The weights that are known to be the cache's now.

    Raises:
        ModelMismatchError: says what differs.
        UnsupportedModelError: something in the model makes keys and values random.
    """
    weights = weights_of(model)
    random = weights.random.active()
    if random is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode, and {random} would make keys and values random: model.eval()",
            actual=random,
        )
    expected = (source.model or ModelInfo()).fingerprint
    if expected is None or weights is known:
        return known
    if known is not None and known.digest is None:
        raise ModelMismatchError(
            f"{source.path or 'the cache'} was opened with fingerprint={expected!r}, and the model, its weights or "
            "its adapters have changed since: open it again, with the fingerprint of what they are now",
            expected={"weights": expected},
            path=source.path,
        )
    check_stored(source, model, None)
    if known is not None and weights.tables != known.tables:
        raise ModelMismatchError(
            f"tables that the model computes from its config (positions, scales) have changed since {source!r} was "
            "opened, and keys and values depend on them",
            expected={"tables": known.tables},
            actual={"tables": weights.tables},
            path=source.path,
        )
    return weights


def whole_of(part: torch.nn.Module, opened: Any) -> torch.nn.Module:
    """Return the model that a cache was opened with, if a part that runs is its own: Kosmos-2 generates with one part.

    Args:
        part: the outermost part of a model that runs.
        opened: what the cache was opened with: a model, a config or None.
    """
    inside = isinstance(opened, torch.nn.Module) and any(one is part for one in opened.modules())
    return opened if inside else part
