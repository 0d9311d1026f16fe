"""safetensors files: what the library reads of ours, what we read of others', and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.support import fill, make_file, rows
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import kvmmap

ARRAYS = ("key_codes", "key_scales", "value_codes", "value_scales")


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_library_reads_what_we_write(tmp_path: Path, suffix: str, dtype: Any) -> None:
    make_file(tmp_path / f"a.{suffix}", 601).close()
    kvmmap.export_tensors(tmp_path / f"a.{suffix}", tmp_path / "b.safetensors", dtype=dtype)
    assert stat.S_IMODE((tmp_path / "b.safetensors").stat().st_mode) == 0o600
    tensors = load_file(tmp_path / "b.safetensors")
    assert sorted(tensors) == [*(f"layers.{n}.{kind}" for n in (0, 1) for kind in ("keys", "values")), "token_ids"]
    with kvmmap.open(tmp_path / f"a.{suffix}") as cache:
        for number, layer in enumerate(cache.layers):
            for kind, expected in (("keys", layer.read_keys(dtype=dtype)), ("values", layer.read_values(dtype=dtype))):
                found = tensors[f"layers.{number}.{kind}"]
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(tensors["token_ids"], cache.token_ids)


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
def test_codes_and_scales_go_and_come_bit_by_bit(tmp_path: Path, suffix: str) -> None:
    model = kvmmap.ModelInfo(name="m", rope={"theta": 5.0})
    with kvmmap.create(
        tmp_path / "a.kvm",
        num_layers=2,
        capacity=6000,
        num_kv_heads=[1, 2],
        head_dim=[8, 4],
        value_head_dim=[4, 4],
        metadata={"a": "é"},
        model=model,
    ) as cache:
        keys = [rows(5000, 1, 8), rows(5000, 2, 4)]
        values = [rows(5000, 1, 4, seed=1), rows(5000, 2, 4, seed=1)]
        cache.extend(keys, values)
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="int8")
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / f"c.{suffix}")
        with kvmmap.open(tmp_path / f"c.{suffix}") as other:
            assert (other.seq_len, other.capacity) == (5000, 6000)
            assert (other.metadata, other.model) == ({"a": "é"}, model)
            assert other.token_len == 0
            for one, two in zip(cache.layers, other.layers, strict=True):
                for name in ARRAYS:
                    np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
            assert other.verify().sound


def test_a_part_with_token_ids(tmp_path: Path) -> None:
    make_file(tmp_path / "a.kvm", 600).close()
    kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / "b.safetensors", dtype="int8", start=100, stop=400, layers=[1])
    kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm", capacity=300, metadata={"mine": 1})
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "c.kvm") as two:
        np.testing.assert_array_equal(two.token_ids, np.arange(100, 400))
        np.testing.assert_array_equal(two.layers[0].value_codes, one.layers[1].value_codes[100:400])
        assert two.metadata == {"mine": 1}


def test_an_empty_cache(tmp_path: Path) -> None:
    make_file(tmp_path / "a.kvm").close()
    for dtype in ("int8", "float16"):
        kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / f"{dtype}.safetensors", dtype=dtype)
        kvmmap.import_tensors(tmp_path / f"{dtype}.safetensors", tmp_path / f"{dtype}.zarr")
        with kvmmap.open(tmp_path / f"{dtype}.zarr") as cache:
            assert (cache.seq_len, cache.capacity) == (0, 1000)


@pytest.mark.parametrize(
    "names",
    [
        "key_cache.{}/value_cache.{}",
        "key_cache_{}/value_cache_{}",
        "layers.{}.keys/layers.{}.values",
        "past_key_values.{}.key/past_key_values.{}.value",
        "{}.k/{}.v",
        "model.layers.{}.self_attn.key_states/model.layers.{}.self_attn.value_states",
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_a_dynamic_cache_of_transformers(tmp_path: Path, names: str, dtype: Any) -> None:
    """[1, num_kv_heads, n, head_dim] a layer, more than ten of them, under the names that people give them."""
    key, value = names.split("/")
    keys = rows(12, 1, 2, 300, 8).astype(dtype)
    tensors = {key.format(n): keys[n] for n in range(12)} | {value.format(n): -keys[n] for n in range(12)}
    save_file(tensors, tmp_path / "a.safetensors")
    kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        assert (cache.seq_len, cache.capacity) == (300, 300)
        for n, layer in enumerate(cache.layers):
            codes, scales = kvmmap.quantize_rows(np.ascontiguousarray(keys[n, 0].transpose(1, 0, 2)))
            np.testing.assert_array_equal(layer.key_codes, codes)
            np.testing.assert_array_equal(layer.value_codes, -codes)
            np.testing.assert_array_equal(layer.value_scales, scales)


FLAT = rows(1, 2, 10, 8)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({}, "layers"),
        ({"weights": FLAT}, "'weights'"),
        ({"layers.0.keys": FLAT}, "layer 0"),
        ({"layers.1.keys": FLAT, "layers.1.values": FLAT}, "all from 0"),
        ({"layers.0.keys": FLAT, "layers.0.values": FLAT, "key_cache.0": FLAT}, "second one"),
        ({"layers.0.keys": FLAT, "layers.0.values": FLAT[0]}, "layer 0"),
        ({"layers.0.keys": FLAT, "layers.0.values": FLAT[:, :1]}, "layer 0"),
        ({"layers.0.keys": np.concatenate([FLAT, FLAT]), "layers.0.values": np.concatenate([FLAT, FLAT])}, "layer 0"),
        ({"0.k": FLAT, "0.v": FLAT, "1.k": FLAT[:, :, :5], "1.v": FLAT[:, :, :5]}, "from 5 to 10"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path: Path, tensors: dict[str, Any], what: str) -> None:
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(kvmmap.NotACacheError, match=what):
        kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
    assert not (tmp_path / "b.kvm").exists()


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
def test_numbers_that_cannot_be_stored_leave_nothing(tmp_path: Path, suffix: str) -> None:
    bad = rows(1, 2, 9000, 8)
    bad[0, 1, 8999, 3] = np.nan
    save_file({"0.k": bad, "0.v": bad}, tmp_path / "a.safetensors")
    with pytest.raises(kvmmap.NonFiniteError, match="position 8999, head 1"):
        kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / f"b.{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(kvmmap.NotACacheError, match="not a safetensors file"):
        kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.import_tensors(tmp_path / "none.safetensors", tmp_path / "b.kvm")
    make_file(tmp_path / "c.kvm", 300).close()
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.export_tensors(tmp_path / "c.kvm", tmp_path / "a.safetensors")
    with pytest.raises(kvmmap.DtypeError):
        kvmmap.export_tensors(tmp_path / "c.kvm", tmp_path / "d.safetensors", dtype="int4")  # type: ignore[arg-type]
    kvmmap.export_tensors(tmp_path / "c.kvm", tmp_path / "a.safetensors", overwrite=True)
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert "kvmmap" in file.metadata()
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "c.kvm")
    kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "c.kvm", overwrite=True)
    with kvmmap.open(tmp_path / "c.kvm", "a") as cache:
        fill(cache, 301)


def test_a_damaged_cache_is_not_exported(tmp_path: Path) -> None:
    make_file(tmp_path / "a.kvm", 600).close()
    data = bytearray((tmp_path / "a.kvm").read_bytes())
    with kvmmap.open(tmp_path / "a.kvm") as cache:
        place = data.find(cache.layers[1].key_codes[300].tobytes())
    data[place] ^= 1
    (tmp_path / "a.kvm").write_bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 1"):
        kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.kvm"]
