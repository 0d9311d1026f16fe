"""A family's trial with keys and values as tensors on the device: what a cache must give then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from families.patches import PREFIXED
from families.sources import decoder_ids, pass_arguments
from kvmmap.errors import UnsupportedModelError
from kvmmap.integrations.transformers import KvmmapCache
from kvmmap.integrations.transformers.cross import CrossLayer
from kvmmap.integrations.transformers.models import counting, layer_kinds, text_config
from kvmmap.integrations.transformers.own_caches import become_own
from kvmmap.integrations.transformers.versions import argument_of


def check_resident(net: Any, ids: torch.Tensor, folder: Path, bound: float) -> str | None:
    """Prefill and decode through a device-resident cache, in one go and after reopening; return what is wrong.

    Args:
        net: the model, with its own attention.
        ids: a prompt, [1, n].
        folder: where a file may be made.
        bound: how far logits may be off, in standard deviations: masks of another length are added up otherwise.
    """
    if any(kind.index is not None or kind.valueless for kind in layer_kinds(net.config)):
        try:
            KvmmapCache.create(folder / "refused.kvm", net, resident="device")
        except UnsupportedModelError:
            return "a file is left" if (folder / "refused.kvm").exists() else None
        return "index keys can't be resident, and it is not said"
    path = folder / "resident.kvm"
    own, last = DynamicCache(config=net.config), ids.shape[1] - 4
    become_own(own, text_config(net.config))
    own = EncoderDecoderCache(own, DynamicCache()) if net.config.is_encoder_decoder else own
    with KvmmapCache.create(path, net, resident="device") as cache:
        for start, stop in ((0, last), *((at, at + 1) for at in range(last, ids.shape[1] - 1))):
            try:
                expected = _logits(net, ids, start, stop, own)
            except Exception:  # a model that takes no text alone
                return None
            found = _logits(net, ids, start, stop, cache)
            if not (off := float((found - expected).abs().max() / expected.std())) <= bound:
                return f"logits from {start} on are off by {off:g} standard deviations"
    with KvmmapCache.open(path, net) as saved, KvmmapCache.open(path, net, resident="device") as cache:
        known = net.config.model_type not in PREFIXED and counting(net.config).alike
        if known and cache.token_ids.tolist() != decoder_ids(net.config, ids)[0, :-1].tolist():
            return "token ids are lost"
        _logits(net, ids, ids.shape[1] - 1, ids.shape[1], cache, reopened=True)
        for number, layer in enumerate(cache.layers):
            if getattr(layer, "keys", None) is None or isinstance(layer, CrossLayer):  # it has none of its own
                continue
            stored = saved.layers[number].read(layer.keys.dtype)
            for tensor, rows in zip((layer.keys, layer.values), stored, strict=True):
                if not torch.equal(tensor[:, :, : rows.shape[2]], rows):
                    return f"layer {number} does not have what is stored after reopening"
    return None


def _logits(net: Any, ids: torch.Tensor, start: int, stop: int, cache: Any, reopened: bool = False) -> torch.Tensor:
    given = pass_arguments(net.config, ids, start, stop, reopened)
    with torch.no_grad():
        return net(**given, use_cache=True, **{argument_of(net): cache}).logits  # type: ignore[no-any-return]
