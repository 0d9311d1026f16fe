"""safetensors files with rows as they are stored: every codec, rows in 16 bits, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_support import click_run
from helpers.support import rows
from safetensors.numpy import load_file, save_file

import kvmmap
from kvmmap import codecs

DIM = 64
LENGTH = 300


def made(path: Path, length: int = LENGTH, **options: Any) -> kvmmap.QuantizedKvCache:
    """Make a cache of two layers, filled in two parts."""
    shape = {"num_layers": 2, "capacity": 400, "num_kv_heads": [2, 1], "head_dim": DIM, "value_head_dim": [DIM, 128]}
    cache = kvmmap.create(path, **shape | options)
    for start, stop in ((0, length // 3), (length // 3, length)):
        keys = [rows(length, heads, DIM, seed=heads)[start:stop] for heads in (2, 1)]
        values = [rows(length, 2, DIM, seed=3)[start:stop], rows(length, 1, 128, seed=4)[start:stop]]
        cache.extend(keys, values, np.arange(start, stop))
    return cache


def assert_same(one: kvmmap.QuantizedKvCache, two: kvmmap.QuantizedKvCache) -> None:
    """Compare all that is stored, bit by bit."""
    assert one.geometry == two.geometry
    np.testing.assert_array_equal(one.token_ids, two.token_ids)
    for mine, other in zip(one.layers, two.layers, strict=True):
        for here, there in zip(mine.read_quantized(), other.read_quantized(), strict=True):
            np.testing.assert_array_equal(here, there)
        np.testing.assert_array_equal(mine.read_keys(), other.read_keys())
        np.testing.assert_array_equal(mine.read_values(), other.read_values())
        kept = [layer.recent_rows() for layer in (mine, other)]
        assert [None if part is None else part.num_held(len(mine)) for part in kept].count(None) in (0, 2)
        if kept[0] is not None and kept[1] is not None:
            assert kept[0].num_held(len(mine)) == kept[1].num_held(len(mine)) > 0


@pytest.mark.parametrize("recent", [{}, {"recent_window": 17, "sinks": 4}])
@pytest.mark.parametrize("name", codecs.names())
def test_every_codec_round_trips_bit_by_bit(tmp_path: Path, name: str, recent: dict[str, int]) -> None:
    with made(tmp_path / "a.kvm", key_codec=name, value_codec=["int4-rotated", name], **recent) as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored")
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert_same(cache, other)
            assert other.verify().sound


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
@pytest.mark.parametrize("preset", ["int8", "fidelity", "compact", "small", "tiny", "lossless"])
def test_every_preset_continues_as_the_exported_cache_does(tmp_path: Path, preset: str, suffix: str) -> None:
    query = rows(1, 4, DIM, seed=9)
    with made(tmp_path / f"a.{suffix}", preset=preset) as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored")
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / f"c.{suffix}")
        with kvmmap.open(tmp_path / f"c.{suffix}", mode="a") as other:
            for one in (cache, other):
                one.push_step(
                    [rows(1, 2, DIM, seed=5)[0], rows(1, 1, DIM)[0]], [rows(1, 2, DIM)[0], rows(1, 1, 128)[0]]
                )
            assert_same(cache, other)
            np.testing.assert_array_equal(cache.layers[0].attend(query), other.layers[0].attend(query))


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (0, 200), (290, 300), (2, 3), (150, 290), (40, 40)])
def test_parts_keep_what_the_same_copy_would(tmp_path: Path, start: int, stop: int) -> None:
    with made(tmp_path / "a.kvm", preset="fidelity") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored", start=start, stop=stop, layers=[1])
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        kvmmap.copy(cache, tmp_path / "d.kvm", start=start, stop=stop, layers=[1])
    with kvmmap.open(tmp_path / "c.kvm") as one, kvmmap.open(tmp_path / "d.kvm") as two:
        np.testing.assert_array_equal(one.layers[0].read_keys(), two.layers[0].read_keys())
        np.testing.assert_array_equal(one.layers[0].read_values(), two.layers[0].read_values())
        assert one.geometry == two.geometry


def test_plain_int8_is_the_first_version(tmp_path: Path) -> None:
    """Which older versions read: "stored" and "int8" are then the same."""
    made(tmp_path / "a.kvm").close()
    for dtype in ("int8", "stored"):
        kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / f"{dtype}.safetensors", dtype=dtype)
    assert (tmp_path / "int8.safetensors").read_bytes() == (tmp_path / "stored.safetensors").read_bytes()


def test_states_and_codecs_in_one_file(tmp_path: Path) -> None:
    spec = kvmmap.StateSpec(0, "s", "float32", (3,))
    shape = {"num_layers": 2, "capacity": 20, "num_kv_heads": [0, 1], "head_dim": DIM, "states": [spec]}
    with kvmmap.create(tmp_path / "a.kvm", preset="fidelity", **shape) as cache:
        cache.extend([None, rows(9, 1, DIM)], [None, rows(9, 1, DIM)])
        cache.write_states({(0, "s"): np.arange(3, dtype=np.float32)})
        cache.checkpoint()
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored")
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert other.geometry == cache.geometry
            np.testing.assert_array_equal(other.layers[1].read_keys(), cache.layers[1].read_keys())
            np.testing.assert_array_equal(other.read_states(9)[0, "s"], np.arange(3))


def test_numbers_are_imported_with_any_preset(tmp_path: Path) -> None:
    with made(tmp_path / "a.kvm", preset="fidelity") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="float32")
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm", preset="small", sinks=2)
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "d.kvm", value_codec=["bf16", "f16"])
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert (other.geometry.recent_window, other.geometry.sinks) == (512, 2)
            assert {layer.geometry.key_codec.name for layer in other.layers} == {"int5-rotated"}
            np.testing.assert_allclose(other.layers[0].read_keys(), cache.layers[0].read_keys(), atol=1e-2)
        with kvmmap.open(tmp_path / "d.kvm") as other:
            names = [(layer.geometry.key_codec.name, layer.geometry.value_codec.name) for layer in other.layers]
            assert names == [("int8", "bf16"), ("int8", "f16")]
    with pytest.raises(kvmmap.DtypeError, match="preset"):
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "e.kvm", preset="nonesuch")
    assert not (tmp_path / "e.kvm").exists()


def test_other_codecs_for_stored_rows_are_refused(tmp_path: Path) -> None:
    for dtype, preset in (("stored", "fidelity"), ("int8", None)):
        made(tmp_path / f"{dtype}.kvm", preset=preset).close()
        kvmmap.export_tensors(tmp_path / f"{dtype}.kvm", tmp_path / "b.safetensors", dtype=dtype, overwrite=True)
        with pytest.raises(kvmmap.DtypeError, match="give the codecs to"):
            kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm", preset="tiny")
    assert not (tmp_path / "c.kvm").exists()


def test_the_command_line(tmp_path: Path) -> None:
    made(tmp_path / "a.kvm", preset="compact").close()
    exported, imported = str(tmp_path / "b.safetensors"), str(tmp_path / "c.kvm")
    assert click_run("export", str(tmp_path / "a.kvm"), exported, "--dtype", "stored").exit_code == 0
    assert click_run("import", exported, imported).exit_code == 0
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(imported) as two:
        assert_same(one, two)
    refused = click_run("import", exported, imported, "--overwrite", "--preset", "tiny")
    assert refused.exit_code == 2
    assert "int8-rotated" in refused.output
    assert click_run("export", imported, exported, "--overwrite").exit_code == 0
    assert click_run("import", exported, imported, "--overwrite", "--key-codec", "bf16", "--sinks", "3").exit_code == 0
    with kvmmap.open(imported) as two:
        assert two.layers[0].geometry.key_codec.name == "bf16"
        assert two.geometry.sinks == 3


def damaged(tmp_path: Path, change: Any) -> Path:
    """Write a sound file with a change."""
    with made(tmp_path / "a.kvm", preset="fidelity") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored")
    data = (tmp_path / "b.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
    tensors, facts = load_file(tmp_path / "b.safetensors"), json.loads(header["__metadata__"]["kvmmap"])
    change(tensors, facts)
    save_file(tensors, tmp_path / "b.safetensors", {"kvmmap": json.dumps(facts)})
    return tmp_path / "b.safetensors"


def put(name: str, value: Any) -> Any:
    """Return a change of the first number of a tensor."""
    return lambda tensors, facts: tensors[name].reshape(-1).__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(3, "int7-woven"), "no codec 'int7-woven'"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(3, 7), "is invalid"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(3, ["int8"]), "is invalid"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(3, "x" * 9999), "is invalid"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(3, "int4-rotated"), "key_codes is I8"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(1, 32), r"must be I8 \[n, 2, 32\]"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(1, 1 << 40), "is invalid"),
        (lambda tensors, facts: facts["rows"]["layers"][0].__setitem__(0, 0), "contradicts itself"),
        (lambda tensors, facts: facts["rows"]["layers"].append([1, DIM, DIM, "int8", "int8"]), "layers.2.key_codes"),
        (lambda tensors, facts: facts["rows"]["layers"].pop(), "does not name"),
        (lambda tensors, facts: facts["rows"].update(layers=[]), "is invalid"),
        (lambda tensors, facts: facts["rows"].update(layers=5), "is invalid"),
        (lambda tensors, facts: facts.pop("rows"), "is invalid"),
        (lambda tensors, facts: facts["rows"].update(recent_window=1 << 30), "is invalid"),
        (lambda tensors, facts: facts["rows"].update(sinks=-1), "is invalid"),
        (lambda tensors, facts: facts["rows"].update(sinks="4"), "is invalid"),
        (lambda tensors, facts: facts["rows"].update(recent_window=3), "has 132 positions in 16 bits"),
        (lambda tensors, facts: facts["rows"].update(recent_window=100, sinks=100), "not ascending ones"),
        (lambda tensors, facts: facts.update(states={}), "is invalid"),
        (lambda tensors, facts: tensors.pop("recent.0.keys"), "has no tensor recent.0.keys"),
        (lambda tensors, facts: tensors.pop("layers.1.value_scales"), "has no tensor layers.1.value_scales"),
        (lambda tensors, facts: tensors.update(more=np.zeros(3)), "does not name tensor 'more'"),
        (lambda tensors, facts: tensors.update({"recent.0.dtypes": np.zeros((132, 2), np.uint8)}), "1 for f16"),
        (lambda tensors, facts: tensors.update({"recent.0.keys": np.zeros((131, 2, DIM), np.uint16)}), "must be U16"),
        (put("recent.0.positions", -1), "not ascending"),
        (put("recent.0.positions", 1), "not ascending"),
        (put("recent.0.positions", 1 << 62), "not ascending"),
        (put("recent.0.keys", 0x7C00), "NaN or an infinity"),
        (put("recent.1.values", 0xFE01), "NaN or an infinity"),
        (put("layers.0.key_codes", -128), "-128"),
        (put("layers.0.key_scales", np.nan), "scales"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_left(tmp_path: Path, change: Any, match: str) -> None:
    path = damaged(tmp_path, change)
    with pytest.raises(kvmmap.KvmmapError, match=match):
        kvmmap.import_tensors(path, tmp_path / "c.kvm")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.kvm", "b.safetensors"]


def test_bfloat16_rows_stay_what_they_are(tmp_path: Path) -> None:
    """In 16 bits beside the codes, some positions as bf16 and some as f16."""
    numbers = rows(8, 1, DIM) * np.where(np.arange(8) % 2, 1e6, 1)[:, None, None].astype(np.float32)
    with kvmmap.create(
        tmp_path / "a.kvm", num_layers=1, capacity=8, num_kv_heads=1, head_dim=DIM, recent_window=8
    ) as cache:
        cache.extend([numbers], [rows(8, 1, DIM)])
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="stored")
        assert load_file(tmp_path / "b.safetensors")["recent.0.dtypes"].tolist() == [[1, 1], [2, 1]] * 4
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert_same(cache, other)


@pytest.mark.parametrize("wrong", [None, "f32", "STORED", "", 3, ["float32"], float, np.int8, np.float64])
def test_dtypes_that_there_are_not(tmp_path: Path, wrong: Any) -> None:
    cache = kvmmap.QuantizedKvCache(1, 4, 1, 8, preset="tiny")
    cache.extend(np.ones((1, 3, 1, 8), np.float32), np.ones((1, 3, 1, 8), np.float32))
    with pytest.raises(
        kvmmap.DtypeError, match='dtype must be "float32", "float16" or "bfloat16", "stored" or "int8", not'
    ):
        kvmmap.export_tensors(cache, tmp_path / "a.safetensors", dtype=wrong)
    assert not list(tmp_path.iterdir())
