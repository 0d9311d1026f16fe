"""Prompt caches of mlx-lm in and out, and mlx-lm itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvmmap

HEADS, DIM, COUNT, LAYERS = 2, 64, 10, 2
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def rows(layer: int, part: int, count: int = COUNT, dtype: Any = np.float16) -> np.ndarray[Any, Any]:
    """[1, heads, n, dim]."""
    return np.random.default_rng([layer, part]).standard_normal((1, HEADS, count, DIM)).astype(dtype)


def expected(layer: int, part: int, dtype: Any = np.float16) -> np.ndarray[Any, Any]:
    return rows(layer, part, dtype=dtype)[0].transpose(1, 0, 2).astype(np.float32)


def write(
    path: Path, caches: list[tuple[str, list[Any], list[int]]], layout: str, user: dict[str, str] | None = None
) -> Path:
    """Write a file as mlx-lm does: of each layer the class, arrays (or lists of three), and scalars."""
    tensors: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    scalars = [("", "")]
    for number, (kind, arrays, numbers) in enumerate(caches):
        for part, found in enumerate(arrays):
            for name, array in (
                [(f"{number}.{part}", found)]
                if not isinstance(found, list)
                else [(f"{number}.{part}.{index}", array) for index, array in enumerate(found)]
            ):
                tensors[name] = np.ascontiguousarray(array)
        if layout == "scalars":
            metadata[f"1.{number}"] = kind
            for index, value in enumerate(numbers, 2):
                tensors[f"{number}.{index}"] = np.array(value, np.int32)
                scalars.append((f"{number}.{index}", "scalar"))
        else:
            metadata[f"2.{number}"] = kind
            if numbers:
                metadata |= {f"0.{number}.{index}": str(value) for index, value in enumerate(numbers)}
            else:
                metadata[f"0.{number}"] = ""
    if layout == "scalars":
        metadata["2.0"] = ""
        for index, (name, kind) in enumerate(scalars[1:], 1):
            metadata |= {f"2.{index}.0": name, f"2.{index}.1": kind}
    for name, value in (user or {}).items():
        metadata[f"{0 if layout == 'scalars' else 1}.{name}"] = value
    save_file(tensors, path, metadata)
    return path


def padded(array: np.ndarray[Any, Any], room: int = 256) -> np.ndarray[Any, Any]:
    out = np.full((*array.shape[:2], room, array.shape[3]), 7, array.dtype)
    out[:, :, : array.shape[2]] = array
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["scalars", "meta_state"])
def test_plain_caches_come_back(layout: str, dtype: str, tmp_path: Path) -> None:
    kind = DTYPES[dtype]
    pad = padded if layout == "scalars" else lambda array: array
    caches = [
        ("KVCache", [pad(rows(n, 0, dtype=kind)), pad(rows(n, 1, dtype=kind))], [COUNT] if layout == "scalars" else [])
        for n in range(LAYERS)
    ]
    path = write(tmp_path / "p.safetensors", caches, layout, {"model": "some"})
    kvmmap.import_mlx(path, tmp_path / "p.kvm", token_ids=range(COUNT), portable_id="me", weights="bfloat16")
    with kvmmap.open(tmp_path / "p.kvm") as cache:
        assert cache.seq_len == COUNT
        assert cache.metadata["portable"]["id"] == "me"
        for number, layer in enumerate(cache.layers):
            np.testing.assert_array_equal(layer.read_keys(0, COUNT), expected(number, 0, kind))
            np.testing.assert_array_equal(layer.read_values(0, COUNT), expected(number, 1, kind))
    kvmmap.export_mlx(tmp_path / "p.kvm", tmp_path / "q.safetensors", dtype=dtype, layout=layout)  # type: ignore[arg-type]
    again = load_file(tmp_path / "q.safetensors")
    for number in range(LAYERS):
        for part in (0, 1):
            np.testing.assert_array_equal(again[f"{number}.{part}"], rows(number, part, dtype=kind))
    kvmmap.import_mlx(tmp_path / "q.safetensors", tmp_path / "q.kvm")
    with kvmmap.open(tmp_path / "q.kvm") as second, kvmmap.open(tmp_path / "p.kvm") as first:
        np.testing.assert_array_equal(second.token_ids, first.token_ids)
        np.testing.assert_array_equal(second.layers[1].read_values(0, COUNT), first.layers[1].read_values(0, COUNT))


def quantize(array: np.ndarray[Any, Any], group: int, bits: int) -> list[np.ndarray[Any, Any]]:
    """mlx's affine quantisation, as its documentation says."""
    grouped = array.astype(np.float32).reshape(*array.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    scales = (high - low) / (2**bits - 1)
    codes = np.round((grouped - low[..., None]) / scales[..., None]).astype(np.uint8).reshape(array.shape)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(*array.shape[:-1], -1)
    packed = np.packbits(stream, axis=-1, bitorder="little").view("<u4")
    return [packed, scales.astype(np.float16), low.astype(np.float16)]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("layout", ["scalars", "meta_state"])
@pytest.mark.parametrize("group", [32, 64])
def test_quantised_caches_are_decoded(group: int, layout: str, bits: int, tmp_path: Path) -> None:
    caches = [
        ("QuantizedKVCache", [quantize(rows(n, part), group, bits) for part in (0, 1)], [COUNT - 1, group, bits])
        for n in range(LAYERS)
    ]
    kvmmap.import_mlx(write(tmp_path / "p.safetensors", caches, layout), tmp_path / "p.kvm")
    with kvmmap.open(tmp_path / "p.kvm") as cache:
        assert cache.seq_len == COUNT - 1
        found = cache.layers[1].read_keys(0, COUNT - 1)
        bound = np.ptp(expected(1, 0)) / (2**bits - 1) * 0.52 + 0.01
        assert np.abs(found - expected(1, 0)[:-1]).max() < bound


@pytest.mark.filterwarnings("error")
def test_infinite_scales_are_refused_without_a_warning(tmp_path: Path) -> None:
    parts = [quantize(rows(0, part), 32, 8) for part in (0, 1)]
    parts[1][1][:] = np.inf
    path = write(tmp_path / "p.safetensors", [("QuantizedKVCache", parts, [COUNT, 32, 8])], "scalars")
    with pytest.raises(kvmmap.NonFiniteError):
        kvmmap.import_mlx(path, tmp_path / "p.kvm")
    assert not (tmp_path / "p.kvm").exists()


def test_rings_are_put_in_order(tmp_path: Path) -> None:
    """Two always kept, and eight of which the newest two lie before the oldest."""
    order = np.r_[0:2, 8:10, 2:8]
    for layout, numbers in (("scalars", [10, 2, 10, 4]), ("meta_state", [2, 10, 10, 4])):
        caches = [("RotatingKVCache", [rows(n, part)[:, :, order] for part in (0, 1)], numbers) for n in range(LAYERS)]
        # The file's oldest one stands where the newest would go next.
        kvmmap.import_mlx(write(tmp_path / "p.safetensors", caches, layout), tmp_path / f"{layout}.kvm")
        with kvmmap.open(tmp_path / f"{layout}.kvm") as cache:
            kept = np.r_[0:2, 4:10, 2:4]
            np.testing.assert_array_equal(cache.layers[0].read_keys(0, 10), expected(0, 0)[order][kept])
    scalars = [COUNT, 4, 512, COUNT]
    unturned = [("RotatingKVCache", [padded(rows(n, part)) for part in (0, 1)], scalars) for n in range(LAYERS)]
    kvmmap.import_mlx(write(tmp_path / "p.safetensors", unturned, "scalars"), tmp_path / "u.kvm")
    with kvmmap.open(tmp_path / "u.kvm") as cache:
        np.testing.assert_array_equal(cache.layers[1].read_values(0, COUNT), expected(1, 1))


PAIR = [rows(0, 0), rows(0, 1)]
BAD: dict[str, tuple[list[tuple[str, list[Any], list[int]]], type[Exception], str]] = {
    "dropped positions": ([("RotatingKVCache", PAIR, [90, 4, 10, 5])], kvmmap.UnsupportedModelError, "10 of 90"),
    "states": ([("ArraysCache", PAIR, [])], kvmmap.UnsupportedModelError, "recurrent states"),
    "lists": ([("CacheList", [PAIR, PAIR], [])], kvmmap.UnsupportedModelError, "several caches"),
    "an unknown class": ([("WildCache", PAIR, [])], kvmmap.UnsupportedModelError, "WildCache"),
    "no values": ([("KVCache", [rows(0, 0)], [4])], kvmmap.NotACacheError, "is empty"),
    "too many positions": ([("KVCache", PAIR, [11])], kvmmap.NotACacheError, "11 positions"),
    "a batch": ([("KVCache", [np.concatenate([array] * 2) for array in PAIR], [4])], kvmmap.NotACacheError, "\\[2, 2"),
    "layers of two lengths": ([("KVCache", PAIR, [4]), ("KVCache", PAIR, [5])], kvmmap.NotACacheError, "from 4 to 5"),
    "other bits": (
        [("QuantizedKVCache", [quantize(array, 64, 8) for array in PAIR], [4, 64, 5])],
        kvmmap.NotACacheError,
        "5 bits",
    ),
    "whole numbers": ([("KVCache", [array.astype(np.int32) for array in PAIR], [4])], kvmmap.DtypeError, "I32"),
    "a wild ring": ([("RotatingKVCache", PAIR, [10, 9, 10, 4])], kvmmap.NotACacheError, "is invalid"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_read_is_refused(name: str, tmp_path: Path) -> None:
    caches, kind, message = BAD[name]
    path = write(tmp_path / "p.safetensors", caches, "scalars")
    with pytest.raises(kind, match=message):
        kvmmap.import_mlx(path, tmp_path / "p.kvm")
    assert not (tmp_path / "p.kvm").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"0.k": rows(0, 0)}, tmp_path / "p.safetensors")
    with pytest.raises(kvmmap.NotACacheError, match="names no caches"):
        kvmmap.import_mlx(tmp_path / "p.safetensors", tmp_path / "p.kvm")
    with kvmmap.create(tmp_path / "e.kvm", num_layers=1, capacity=4, num_kv_heads=1, head_dim=4) as cache:
        with pytest.raises(kvmmap.EmptyCacheError):
            kvmmap.export_mlx(cache, tmp_path / "e.safetensors")
        with pytest.raises(kvmmap.KvmmapError, match="layout must be"):
            kvmmap.export_mlx(cache, tmp_path / "e.safetensors", layout="new")  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="needs mlx-lm")
class TestWithMlxLm:
    """Its own classes write and read the files."""

    def test_its_files_are_imported(self, tmp_path: Path) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache, RotatingKVCache, save_prompt_cache

        keys, values = (mx.array(rows(0, part)) for part in (0, 1))
        for kind in ("plain", "rotating", "quantized"):
            cache = RotatingKVCache(max_size=512, keep=4) if kind == "rotating" else KVCache()
            cache.update_and_fetch(keys[:, :, :7], values[:, :, :7])
            for position in range(7, COUNT):
                step = slice(position, position + 1)
                cache.update_and_fetch(keys[:, :, step], values[:, :, step])
            if kind == "quantized":
                cache = cache.to_quantized(group_size=32, bits=8)
            path = tmp_path / f"{kind}.safetensors"
            save_prompt_cache(str(path), [cache], {"model": "m"})
            kvmmap.import_mlx(path, tmp_path / f"{kind}.kvm")
            with kvmmap.open(tmp_path / f"{kind}.kvm") as found:
                atol = 0.03 if kind == "quantized" else 0
                np.testing.assert_allclose(found.layers[0].read_keys(0, COUNT), expected(0, 0), atol=atol)
                np.testing.assert_allclose(found.layers[0].read_values(0, COUNT), expected(0, 1), atol=atol)

    def test_it_loads_exports(self, tmp_path: Path) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import load_prompt_cache

        with kvmmap.create(
            tmp_path / "a.kvm", num_layers=2, capacity=64, num_kv_heads=HEADS, head_dim=DIM, preset="lossless"
        ) as cache:
            made = np.stack([expected(n, 0, ml_dtypes.bfloat16) for n in range(2)])
            cache.extend(made, made, range(COUNT))
        kvmmap.export_mlx(tmp_path / "a.kvm", tmp_path / "a.safetensors")
        loaded, metadata = load_prompt_cache(str(tmp_path / "a.safetensors"), return_metadata=True)
        assert json.loads(metadata["kvmmap"])["token_ids"] == list(range(COUNT))
        assert [layer.offset for layer in loaded] == [COUNT] * 2
        more = mx.zeros((1, HEADS, 1, DIM), mx.bfloat16)
        keys, _ = loaded[1].update_and_fetch(more, more)
        np.testing.assert_array_equal(np.array(keys[0, :, :COUNT].astype(mx.float32)), made[1].transpose(1, 0, 2))
        assert keys.shape[2] == COUNT + 1
