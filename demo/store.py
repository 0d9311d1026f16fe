"""Save a model's cache to a file with kvmmap, and load it. Copy this part into your own program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from model import NAME, Model, Pair

import kvmmap


def save(path: Path, pairs: Sequence[Pair], token_ids: Sequence[int], model: Model, text: str) -> None:
    """Write a prompt's keys and values to a new `.kvm` file, with the model's identity; durable on return."""
    config = model.config
    info = kvmmap.ModelInfo(
        name=NAME,
        fingerprint=model.fingerprint,
        source_dtype="float32",
        rope=dict(config.rope_parameters),
    )
    with kvmmap.create(
        path,
        num_layers=config.num_hidden_layers,
        capacity=config.max_position_embeddings,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        model=info,
        metadata={"text": text},
        overwrite=True,
    ) as cache:
        cache.extend([keys for keys, _ in pairs], [values for _, values in pairs], token_ids)


def load(cache: kvmmap.QuantizedKvCache, fingerprint: str, length: int) -> list[Pair]:
    """Read the first `length` positions of every layer as f32, if the same weights computed them."""
    if cache.model is None or cache.model.fingerprint != fingerprint:
        raise SystemExit(f"{cache.path} was made by another model")
    return [
        (
            torch.from_numpy(layer.read_keys(0, length)),
            torch.from_numpy(layer.read_values(0, length)),
        )
        for layer in cache.layers
    ]
