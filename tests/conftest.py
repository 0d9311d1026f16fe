"""Fixtures: caches of every storage, and where their files go."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import MakeCache

import kvmmap


@pytest.fixture(params=["memory", "file"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeCache]:
    """Make caches of one storage; the whole behaviour suite runs over each."""
    made: list[kvmmap.QuantizedKvCache] = []

    def make(num_layers: int = 3, capacity: int = 600, num_kv_heads: Any = 2, head_dim: Any = 16, **more: Any) -> Any:
        if request.param == "memory":
            cache = kvmmap.QuantizedKvCache(num_layers, capacity, num_kv_heads, head_dim, **more)
        else:
            cache = kvmmap.create(
                tmp_path / f"cache{len(made)}.kvm",
                num_layers=num_layers,
                capacity=capacity,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                **more,
            )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's cache file goes."""
    return tmp_path / "cache.kvm"
