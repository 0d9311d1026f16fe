"""Rows to store, files that hold them, and other processes that open them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmmap

MakeCache = Callable[..., kvmmap.QuantizedKvCache]
TESTS = Path(__file__).parents[1]
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""The parent of temporary folders whose many syncs would take long on a disk; None for the usual one."""


def sweep(*values: Any) -> list[Any]:
    """Mark parameters as cases of a sweep, which `make test-sweeps` runs."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.sweep) for value in values
    ]


def some(values: Iterable[Any], every: int) -> list[Any]:
    """Every n-th value as it is, and the others as cases of a sweep."""
    return [value if number % every == 0 else sweep(value)[0] for number, value in enumerate(values)]


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Gaussian f32 rows of any shape, always the same for a seed."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def make_file(path: Path, length: int = 0, *, token_ids: bool = True, **more: Any) -> kvmmap.QuantizedKvCache:
    """A file of 2 layers, 2 heads x 8, capacity 1000, holding `length` positions; open for appending."""
    settings: dict[str, Any] = {"num_layers": 2, "capacity": 1000, "num_kv_heads": 2, "head_dim": 8} | more
    cache = kvmmap.create(path, **settings)
    fill(cache, length, token_ids=token_ids)
    return cache


def fill(cache: kvmmap.QuantizedKvCache, length: int, *, token_ids: bool = True) -> None:
    """Append positions up to `length`; a position's rows depend on the position alone."""
    start = cache.seq_len
    if length > start:
        geometry = cache.geometry.layers[0]
        shape = (cache.num_layers, 1, geometry.num_kv_heads, geometry.head_dim)
        steps = [rows(*shape, seed=position) for position in range(start, length)]
        keys = np.concatenate(steps, axis=1)
        cache.extend(keys, -keys, np.arange(start, length) if token_ids else None)


def check_filled(cache: kvmmap.QuantizedKvCache, length: int, *, token_ids: bool = True) -> None:
    """Assert that a cache holds exactly what `fill` appends."""
    assert cache.seq_len == length
    with kvmmap.QuantizedKvCache(
        cache.num_layers, length, cache.geometry.layers[0].num_kv_heads, cache.geometry.layers[0].head_dim
    ) as model:
        fill(model, length, token_ids=token_ids)
        for layer, expected in zip(cache.layers, model.layers, strict=True):
            for name in ("key_codes", "key_scales", "value_codes", "value_scales"):
                np.testing.assert_array_equal(getattr(layer, name)[:length], getattr(expected, name))
        np.testing.assert_array_equal(cache.token_ids, model.token_ids)
    cache._check()


def run_python(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code in another process, with `arguments` in sys.argv[1:]."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=TESTS,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done
