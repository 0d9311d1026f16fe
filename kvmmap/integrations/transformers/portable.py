"""Going on from other programs' caches, and letting other programs go on from ours: the portable form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ...cache import QuantizedKvCache
from ...errors import ModelMismatchError, UnsupportedModelError
from ...formats.portable import KEY, MemberFacts, portable_notes
from ...opening import open_cache
from ...paths import PathLike
from .identity import config_of, describe
from .models import layer_kinds, text_config
from .opening import check_stored
from .weights import body_of


def portable_id_of(model: torch.nn.Module) -> str:
    """Return the identity of a model across programs: the same as of each GGUF file made of its checkpoint.

    Raises:
        UnsupportedModelError: its layers have no norms that GGUF files keep as they are; give an id of your own.
    """
    config = text_config(config_of(model))
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    layers = getattr(body_of(model), "layers", ())
    norms = [getattr(getattr(layer, "input_layernorm", None), "weight", None) for layer in layers]
    shapes = [kind.geometry for kind in layer_kinds(config) if kind.geometry is not None]
    if theta is None or len(norms) != len(shapes) or not all(isinstance(norm, torch.Tensor) for norm in norms):
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no portable id that can be computed: give portable_id= one of your own, "
            "the same "
            "in all programs"
        )
    found = MemberFacts(
        layers=tuple(shapes),
        rope_theta=float(theta),
        norms=tuple(np.asarray(norm.detach().float().cpu()) for norm in norms if norm is not None),
    ).portable_id()
    assert found is not None
    return found


def mark_portable(
    cache: PathLike | QuantizedKvCache, model: torch.nn.Module, *, portable_id: str | None = None
) -> None:
    """Record in a saved cache which member of a model family made it, so that other programs may go on from it.

    Args:
        cache: the path of a cache that no writer has open, or one that is open for appending.
        model: the model that made it.
        portable_id: an id of your own, where none can be computed or several models would have the same.

    Raises:
        ModelMismatchError: another model made it.
        UnsupportedModelError: no id can be computed, and none is given.
        MetadataError, CacheLockedError, FormatError, OSError: as in `kvmmap.open`.
    """
    if not isinstance(cache, QuantizedKvCache):
        with open_cache(cache, "a") as opened:
            mark_portable(opened, model, portable_id=portable_id)
        return
    check_stored(cache, model, None)
    identity = portable_id or portable_id_of(model)
    cache.metadata = cache.metadata | {KEY: portable_notes("transformers", identity, _weights(model))}
    cache.flush()


def adopt(
    cache: PathLike | QuantizedKvCache,
    model: torch.nn.Module,
    *,
    accept_weights: str | None = None,
    portable_id: str | None = None,
) -> None:
    """Let a model go on from a cache in the portable form that another program made.

    From then on the cache counts as the model's own: `KvmmapCache.open` takes it.

    Args:
        cache: the path of a cache that no writer has open, or one that is open for appending.
        model: the model that is to go on from it.
        accept_weights: the type of the weights that made it, such as "Q4_1", if they are not of the model's type: such
            weights have given somewhat other keys and values.
        portable_id: the model's, where it can't be computed.

    Raises:
        ModelMismatchError: another model made it, or weights of another type, which are not accepted.
        ShapeMismatchError: its layers are not those of the model.
        UnsupportedModelError, CacheLockedError, FormatError, OSError: as in `mark_portable`.
    """
    if not isinstance(cache, QuantizedKvCache):
        with open_cache(cache, "a") as opened:
            adopt(opened, model, accept_weights=accept_weights, portable_id=portable_id)
        return
    info, _ = describe(model, None)
    if cache.model is not None and cache.model.fingerprint == info.fingerprint is not None:
        return
    notes = cache.metadata.get(KEY)
    notes = dict(notes) if isinstance(notes, Mapping) else {}
    here = portable_id or portable_id_of(model)
    where = cache.path or "the cache"
    if notes.get("id") is None or notes["id"] != here:
        raise ModelMismatchError(
            f"{where} was made by another model, or does not say by which: its portable id is {notes.get('id')}, and "
            "the "
            f"model's {here}",
            expected={"portable_id": notes.get("id")},
            actual={"portable_id": here},
            path=cache.path,
        )
    if notes.get("weights") not in (_weights(model), accept_weights):
        raise ModelMismatchError(
            f"{where} was made with weights of {notes.get('weights')}, and the model's are {_weights(model)}, which "
            "give "
            f"somewhat other keys and values: accept_weights={notes.get('weights')!r} goes on all the same",
            expected={"weights": notes.get("weights")},
            actual={"weights": _weights(model)},
            path=cache.path,
        )
    kept = cache.model
    cache.model = info
    try:
        check_stored(cache, model, info.fingerprint)
    except BaseException:
        cache.model = kept
        raise
    cache.flush()


def _weights(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")
