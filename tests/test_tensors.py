"""safetensors files: what the library reads of ours, what we read of others', and what is refused."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
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
def test_the_library_reads_exported_files(tmp_path: Path, suffix: str, dtype: Any) -> None:
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
def test_codes_and_scales_round_trip_exactly(tmp_path: Path, suffix: str) -> None:
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


def test_files_of_other_formats_are_refused(tmp_path: Path) -> None:
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


def raw(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], text: str | None = None) -> None:
    """Write a safetensors file whose parts the library would not write."""
    header: dict[str, Any] = {} if text is None else {"__metadata__": {"kvmmap": text}}
    data = b""
    for name, (dtype, shape, part) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


PAIR = {name: ("F32", [3, 2, 4], np.ones(24, "<f4").tobytes()) for name in ("layers.0.keys", "layers.0.values")}
SOUND_DOCUMENT = '{"model":null,"metadata":{}}'


def refused(tmp_path: Path, error: type[Exception], match: str) -> None:
    """Assert that a.safetensors can't be imported into either storage, and that nothing is left of it."""
    for ending in ("kvm", "zarr"):
        with pytest.raises(error, match=match) as caught:
            kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / f"b.{ending}")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"version":1,"capacity":1e400,"document":' + SOUND_DOCUMENT + "}", "its capacity is inf"),
        ('{"version":1,"capacity":-1,"document":' + SOUND_DOCUMENT + "}", "its capacity is -1"),
        ('{"version":1,"capacity":true,"document":' + SOUND_DOCUMENT + "}", "its capacity is True"),
        ('{"version":1,"capacity":"9","document":' + SOUND_DOCUMENT + "}", "its capacity is 9"),
        ('{"version":1,"capacity":' + "9" * 4000 + ',"document":' + SOUND_DOCUMENT + "}", "its capacity is 9999"),
        ('{"version":1,"capacity":' + "9" * 9000 + ',"document":' + SOUND_DOCUMENT + "}", "is invalid"),
        ('{"version":0,"capacity":1,"document":' + SOUND_DOCUMENT + "}", "its version is 0"),
        ('{"version":true,"capacity":1,"document":' + SOUND_DOCUMENT + "}", "its version is True"),
        ('{"capacity":1,"document":' + SOUND_DOCUMENT + "}", "'version'"),
        ('{"version":1,"capacity":1,"document":{"model":[],"metadata":{}}}', "is invalid"),
        ('{"version":1,"capacity":1,"document":' + "[" * 5000 + "]" * 5000 + "}", "is invalid"),
        ("[" * 100_000, "is invalid"),
        (
            '{"version":1,"capacity":1,"document":{"model":null,"metadata":{"a":'
            + '{"b":' * 200
            + "1"
            + "}" * 200
            + "}}}",
            "deep",
        ),
        ("", "is invalid"),
        ("[]", "is invalid"),
        ("null", "is invalid"),
    ],
)
def test_the_metadata_of_an_export_is_checked(tmp_path: Path, text: str, match: str) -> None:
    raw(tmp_path / "a.safetensors", PAIR, text)
    refused(tmp_path, kvmmap.FormatError, match)


def test_an_export_of_a_later_version_is_refused(tmp_path: Path) -> None:
    raw(tmp_path / "a.safetensors", PAIR, '{"version":99,"capacity":9,"document":' + SOUND_DOCUMENT + "}")
    refused(tmp_path, kvmmap.VersionMismatchError, "version 99")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F64", "I64", "BOOL", "C64", "U8"])
def test_rows_of_other_dtypes_are_refused_by_name(tmp_path: Path, dtype: str) -> None:
    bits = {"F4": 4, "F6_E2M3": 6, "F64": 64, "I64": 64, "C64": 64}.get(dtype, 8)
    data = bytes(24 * bits // 8)
    raw(tmp_path / "a.safetensors", {name: (dtype, [3, 2, 4], data) for name in PAIR})
    refused(tmp_path, kvmmap.DtypeError, f"'layers.0.keys' is {dtype}, and must be F32 or F16 or BF16")


def test_bfloat16_without_its_library_loaded(tmp_path: Path) -> None:
    """The program's own import of ml_dtypes must not be what makes it work."""
    make_file(tmp_path / "a.kvm", 300).close()
    kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / "a.safetensors", dtype="bfloat16")
    code = (
        "import sys, kvmmap; assert 'ml_dtypes' not in sys.modules;"
        f"kvmmap.import_tensors({str(tmp_path / 'a.safetensors')!r}, {str(tmp_path / 'b.kvm')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.kvm") as other:
        np.testing.assert_allclose(
            one.layers[1].read_keys(), other.layers[1].read_keys(), atol=float(one.layers[1].key_scales.max()) * 2
        )


def ids(dtype: str, shape: list[int], *numbers: int) -> tuple[str, list[int], bytes]:
    return (
        dtype,
        shape,
        np.array(numbers, {"I32": "<i4", "I64": "<i8", "F32": "<f4", "U8": "u1", "U64": "<u8"}[dtype]).tobytes(),
    )


@pytest.mark.parametrize(
    ("tensor", "error", "match"),
    [
        (ids("I32", [], 7), kvmmap.NotACacheError, r"token_ids is \[\]"),
        (ids("I32", [1, 3], 1, 2, 3), kvmmap.NotACacheError, r"\[1, 3\], and must be \[n\]"),
        (ids("I32", [4], 1, 2, 3, 4), kvmmap.NotACacheError, "at most the 3 positions"),
        (ids("F32", [3], 1, 2, 3), kvmmap.DtypeError, "'token_ids' is F32"),
        (ids("I64", [3], 1, 2**31, 3), kvmmap.NotACacheError, "2147483648"),
        (ids("U64", [3], 1, 2**63 + 5, 3), kvmmap.NotACacheError, "9223372036854775813"),
        (ids("I64", [3], 1, -2, 3), kvmmap.NotACacheError, "from -2"),
    ],
)
def test_token_ids_that_are_none(tmp_path: Path, tensor: Any, error: type[Exception], match: str) -> None:
    raw(tmp_path / "a.safetensors", PAIR | {"token_ids": tensor})
    refused(tmp_path, error, match)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (ids("I64", [3], 5, -1, 7), [5, -1, 7]),
        (ids("I32", [3], -1, -1, 7), [-1, -1, 7]),
        (ids("I32", [3], 5, -1, -1), [5, -1, -1]),
        (ids("I32", [2], 5, 6), [5, 6, -1]),
        (ids("U8", [3], 5, 200, 7), [5, 200, 7]),
        (ids("I32", [0]), [-1, -1, -1]),
    ],
)
def test_token_ids_with_gaps(tmp_path: Path, tensor: Any, found: list[int]) -> None:
    raw(tmp_path / "a.safetensors", PAIR | {"token_ids": tensor})
    kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        assert cache.token_ids.tolist() == found
        assert cache.verify().sound


@pytest.mark.parametrize(
    "name",
    [
        "layers." + "9" * 5000 + ".keys",
        "layers.65535.keys",
        "layers.-1.keys",
        "layers.٣.keys",
        "0." + "_" * 5000 + "!",
        "0." + "._" * 3000 + "keyss",
        "keys",
        "keys.",
        "",
        "x" * 9000,
    ],
)
def test_names_that_say_nothing_are_refused_at_once(tmp_path: Path, name: str) -> None:
    raw(tmp_path / "a.safetensors", {name: PAIR["layers.0.keys"]})
    refused(tmp_path, kvmmap.NotACacheError, "says no layer, or neither keys nor values")


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"key_codes": [3, 2, 4, 1]}, "key_codes of layer 0"),
        ({"key_scales": [2, 3]}, "key_scales of layer 0"),
        ({"value_scales": [3, 2, 1]}, "value_scales of layer 0"),
        ({"value_codes": [2, 2, 6]}, "value_codes of layer 0"),
    ],
)
def test_codes_and_scales_that_do_not_fit_together(tmp_path: Path, shapes: dict[str, list[int]], match: str) -> None:
    sound = {"key_codes": [3, 2, 4], "key_scales": [3, 2], "value_codes": [3, 2, 4], "value_scales": [3, 2]} | shapes
    tensors = {
        f"layers.0.{name}": (
            "I8" if "codes" in name else "F32",
            shape,
            bytes(int(np.prod(shape)) * (1 if "codes" in name else 4)),
        )
        for name, shape in sound.items()
    }
    raw(tmp_path / "a.safetensors", tensors)
    refused(tmp_path, kvmmap.NotACacheError, match)


def test_no_heads_and_no_dimensions(tmp_path: Path) -> None:
    for shape in ([3, 0, 4], [3, 2, 0], [1, 2, 0, 4], [1, 0, 3, 4]):
        raw(tmp_path / "a.safetensors", dict.fromkeys(PAIR, ("F32", shape, b"")))
        if shape == [1, 2, 0, 4]:
            kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
            (tmp_path / "b.kvm").unlink()
        else:
            why = "must be from 1 to" if shape[-1] == 0 else "at least one must"
            refused(tmp_path, kvmmap.ShapeMismatchError, why)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name, error, match in (
        ("folder", kvmmap.NotACacheError, "it is a folder"),
        ("pipe", kvmmap.NotACacheError, "not a regular file"),
        ("empty", kvmmap.NotACacheError, "not a safetensors file"),
        ("loop", OSError, "symbolic links"),
        ("none", kvmmap.CacheNotFoundError, "no such file"),
    ):
        with pytest.raises(error, match=match):
            kvmmap.import_tensors(tmp_path / f"{name}.safetensors", tmp_path / "b.kvm")
    with pytest.raises(kvmmap.NotACacheError, match="not a regular file"):
        kvmmap.import_tensors("/dev/null", tmp_path / "b.kvm")
    assert not (tmp_path / "b.kvm").exists()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    make_file(tmp_path / "a.kvm", 3).close()
    odd = os.fsencode(tmp_path) + b"/\xff\xfe.safetensors"
    kvmmap.export_tensors(tmp_path / "a.kvm", odd)  # type: ignore[arg-type]
    kvmmap.import_tensors(odd, tmp_path / "b.kvm")  # type: ignore[arg-type]
    assert os.path.exists(odd)


def test_pipes_and_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    make_file(tmp_path / "a.kvm", 300).close()
    kvmmap.export_tensors(tmp_path / "a.kvm", tmp_path / "whole.safetensors")
    pipe, link = tmp_path / "pipe.safetensors", tmp_path / "link.safetensors"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for target in (pipe, link):
        code = f"import sys; sys.stdout.buffer.write(open({str(pipe)!r}, 'rb').read())"
        reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        kvmmap.export_tensors(tmp_path / "a.kvm", target)
        assert reader.communicate(timeout=60)[0] == (tmp_path / "whole.safetensors").read_bytes()
        assert pipe.is_fifo()
        assert link.is_symlink()
    null = tmp_path / "null.safetensors"
    null.symlink_to("/dev/null")
    kvmmap.export_tensors(tmp_path / "a.kvm", null, overwrite=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert null.is_symlink()
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    for overwrite in (False, True):
        with pytest.raises(kvmmap.CacheExistsError):
            kvmmap.export_tensors(tmp_path / "a.kvm", folder, overwrite=overwrite)
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "new.safetensors")
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.export_tensors(tmp_path / "a.kvm", dangling)
    kvmmap.export_tensors(tmp_path / "a.kvm", dangling, overwrite=True)
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
