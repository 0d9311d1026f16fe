"""Codecs go through everything that int8 does: the package's own, and some that are registered here."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from contract.suite import StorageContract
from helpers import attention_oracle as oracle
from helpers.cli_support import click_run
from numpy.typing import NDArray

import kvmmap
from kvmmap import codecs, report
from kvmmap.codecs import RowArray, RowCodec, registry
from kvmmap.codecs.base import Arrays
from kvmmap.format import Section, Superblock
from kvmmap.row_arrays import widened

F32 = np.dtype("<f4")

_numbers = itertools.count()


class PlainFloats(RowCodec):
    """Rows as they are, f32: one array."""

    id = 201
    name = "test-f32"

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return (RowArray("numbers", F32, (dim,)),)

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        wide = widened(rows)
        finite = np.isfinite(wide).all(axis=-1)
        np.copyto(out[0], wide)
        return -1 if finite.all() else int(np.argmin(finite))

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        import ml_dtypes

        target = out.view(ml_dtypes.bfloat16) if dtype == 2 else out
        with np.errstate(over="ignore"):
            target[...] = arrays[0].astype(target.dtype)

    def check(self, arrays: Arrays, dim: int) -> None:
        if not np.isfinite(arrays[0]).all():
            raise kvmmap.NonFiniteError("numbers hold a NaN or an infinity")


class HalvedBytes(RowCodec):
    """Two arrays of unusual kinds: u8 of half the row's length, and f16 pairs; lossy, and even dims alone."""

    id = 201
    transform = 7
    name = "test-pairs"
    id_name = "test-f32"
    transform_name = "pairs"

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return RowArray("packed", np.dtype(np.uint8), (dim // 2,)), RowArray("range", np.dtype("<f2"), (2,))

    def check_dim(self, dim: int) -> None:
        if dim % 2:
            raise kvmmap.ShapeMismatchError(
                f"test-pairs takes rows of even dim, not {dim}", expected="even", actual=dim
            )

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        wide = widened(rows)
        finite = np.isfinite(wide).all(axis=-1)
        if not finite.all():
            return int(np.argmin(finite))
        low, high = wide.min(axis=-1).astype("<f2"), wide.max(axis=-1).astype("<f2")
        out[1][...] = np.stack([low, high], axis=-1)
        step = np.maximum(high.astype(F32) - low, 1e-6)[..., None] / 15
        codes = np.clip(np.round((wide - low.astype(F32)[..., None]) / step), 0, 15).astype(np.uint8)
        out[0][...] = codes[..., ::2] | codes[..., 1::2] << 4
        return -1

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        packed, limits = arrays[0], arrays[1].astype(F32)
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], dim)
        step = np.maximum(limits[..., 1:] - limits[..., :1], 1e-6) / 15
        PlainFloats().decode([codes * step + limits[..., :1]], dim, out, dtype, threads)


PLAIN, PAIRS = PlainFloats(), HalvedBytes()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register the codecs of this file while its tests run: those of other files sweep over all that are known."""
    with pytest.MonkeyPatch.context() as patch:
        for table in ("_by_name", "_by_id"):
            patch.setattr(registry, table, dict(getattr(registry, table)))
        for codec in (PLAIN, PAIRS):
            codecs.register(codec)
        yield


LAYERS, HEADS, DIM, VALUE_DIM, LENGTH = 2, 2, 8, 16, 600
SHAPE: dict[str, Any] = {
    "num_layers": LAYERS,
    "capacity": 1000,
    "num_kv_heads": HEADS,
    "head_dim": DIM,
    "value_head_dim": VALUE_DIM,
}
CODECS = [("test-f32", "test-f32"), ("test-f32", "int8"), ("int8", "test-pairs"), ("test-pairs", ["test-f32", "int8"]),
          ("int8-rotated", "int4-rotated"), ("int5-rotated", ["bf16", "f16"]), ("fp8-e4m3", "fp8-e5m2-scaled"),
          ("int6-rotated", ["int3-rotated", "fp8-e4m3-scaled"])]  # fmt: skip


def rows(length: int = LENGTH, dim: int = DIM, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, dim]).standard_normal((LAYERS, length, HEADS, dim)).astype(np.float32)


@pytest.fixture(params=CODECS, ids=lambda pair: "-".join(str(part) for part in pair))
def pair(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(zip(("key_codec", "value_codec"), request.param, strict=True))


@pytest.fixture(params=["memory", "file", "zarr", "zstd"])
def cache(request: pytest.FixtureRequest, pair: dict[str, Any], tmp_path: Path) -> Iterator[kvmmap.QuantizedKvCache]:
    """A cache with rows in it; stored ones were closed and opened again for appending."""
    if request.param == "memory":
        made = kvmmap.QuantizedKvCache(**SHAPE, **pair)
    else:
        path = tmp_path / ("a.kvm" if request.param == "file" else "a.zarr")
        made = kvmmap.create(path, **SHAPE, **pair, compressor="zstd" if request.param == "zstd" else None)
    made.extend(rows()[:, :-1], rows(dim=VALUE_DIM)[:, :-1], np.arange(LENGTH - 1))
    made.push_step(rows()[:, -1], rows(dim=VALUE_DIM)[:, -1], LENGTH - 1)
    if request.param != "memory":
        made.close()
        made = kvmmap.open(path, "a")
    with made:
        yield made


def stored(codec: RowCodec, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a codec gives back of rows [n, heads, dim]."""
    dim = numbers.shape[-1]
    arrays = [np.zeros((*numbers.shape[:2], *one.shape), one.dtype) for one in codec.arrays(dim)]
    assert codec.encode(numbers, 0, arrays, 1) == -1
    return codec.decoded(arrays, dim)


def check_rows(cache: kvmmap.QuantizedKvCache, length: int = LENGTH, start: int = 0) -> None:
    keys, values = rows(), rows(dim=VALUE_DIM)
    for number, layer in enumerate(cache.layers):
        shape = layer.geometry
        np.testing.assert_array_equal(layer.read_keys(), stored(shape.key_codec, keys[number])[start : start + length])
        np.testing.assert_array_equal(
            layer.read_values(), stored(shape.value_codec, values[number])[start : start + length]
        )


def test_rows_come_back(cache: kvmmap.QuantizedKvCache) -> None:
    check_rows(cache)
    cache._check()
    assert cache.token_ids.tolist() == list(range(LENGTH))
    layer = cache.layers[1]
    np.testing.assert_array_equal(layer.get_key(300, 1), layer.read_keys(300, 301)[0, 1])
    np.testing.assert_array_equal(layer.get_values_at(5), layer.read_values(5, 6)[0])
    for dtype in ("float16", "bfloat16"):
        assert layer.read_keys(0, 3, dtype=dtype).dtype.name == dtype
    assert cache.verify().sound


def test_going_on_and_truncating(cache: kvmmap.QuantizedKvCache) -> None:
    more, more_values = rows(50, seed=1), rows(50, VALUE_DIM, seed=1)
    cache.extend(more, more_values)
    cache.truncate(LENGTH)
    cache.flush()
    check_rows(cache)
    broken = more.copy()
    broken[0, 2, 1, 3] = np.nan
    with pytest.raises(kvmmap.NonFiniteError, match="position 602, head 1"):
        cache.extend(broken, more_values)
    assert cache.seq_len == LENGTH


def test_attention_is_that_of_the_decoded_rows(cache: kvmmap.QuantizedKvCache) -> None:
    queries = np.random.default_rng(3).standard_normal((5, 2 * HEADS, DIM)).astype(np.float32)
    layer = cache.layers[1]
    for options in (
        {},
        {"causal": False},
        {"window": 40, "sinks": 3},
        {"softcap": 2.0, "scale": 0.3, "query_start": 100},
        {"resident": "stream"},
        {"positions": (10, 580)},
        {"positions": [[0, 2], [1, 2]]},
    ):
        out, lse = layer.attend(queries, return_lse=True, **options)
        keep = np.ones((HEADS, LENGTH), bool)
        if options.get("positions") == (10, 580):
            keep[:, :10] = keep[:, 580:] = False
        elif "positions" in options:
            keep[0, 256:512] = keep[1, :256] = False
        more = {name: value for name, value in options.items() if name not in ("positions", "resident")}
        expected, expected_lse = oracle.attend(layer, queries, keep=keep, **more)
        np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(lse, expected_lse, rtol=2e-4, atol=2e-5)
    with pytest.raises(kvmmap.NonFiniteError):
        layer.attend(np.full_like(queries, np.inf))


def test_blocks_are_selected_by_the_keys(cache: kvmmap.QuantizedKvCache) -> None:
    query = np.random.default_rng(4).standard_normal((HEADS, DIM)).astype(np.float32)
    layer = cache.layers[0]
    chosen = layer.select_blocks(query, 2)
    keys = layer.read_keys()[:512].reshape(2, 256, HEADS, DIM)
    bounds = np.maximum(keys.min(axis=1) * query, keys.max(axis=1) * query).sum(axis=-1) * DIM**-0.5 / 2
    shares = np.exp(bounds - bounds.max(axis=0))
    best = int((shares / shares.sum(axis=0)).sum(axis=1).argmax())
    assert chosen.tolist() == [best, 2]
    cache.flush()
    found = cache.verify()
    assert found.sound, found.damages


def test_encoded_rows_go_from_cache_to_cache(cache: kvmmap.QuantizedKvCache) -> None:
    for layer in cache.layers:
        shape = layer.geometry
        other = kvmmap.QuantizedKvLayer(
            700, HEADS, DIM, VALUE_DIM, key_codec=shape.key_codec.name, value_codec=shape.value_codec.name
        )
        other.extend_quantized(*layer.read_quantized())
        np.testing.assert_array_equal(other.read_keys(), layer.read_keys())
        with pytest.raises(kvmmap.ShapeMismatchError, match="arrays"):
            other.extend_quantized(layer.read_quantized()[0])
        with pytest.raises(kvmmap.DtypeError):
            other.extend_quantized(*(array.astype(np.int64) for array in layer.read_quantized()))


def test_reports(cache: kvmmap.QuantizedKvCache) -> None:
    facts = report.inspect(cache)
    json.dumps(facts.to_dict())
    assert facts.memory_bytes == 1000 * sum(layer.position_bytes for layer in cache.geometry.layers)
    names = {(layer.key_codec, layer.value_codec) for layer in facts.layers}
    assert names == {(g.key_codec.id_name, g.value_codec.id_name) for g in cache.geometry.layers}
    numbers = report.statistics(cache)
    assert numbers.keys.rows == LAYERS * LENGTH * HEADS
    assert len(report.scale_grids(cache, 4)) == LAYERS
    assert report.compare(cache, cache).same


@pytest.mark.parametrize(("first", "second"), [(".kvm", ".zarr"), (".zarr", ".kvm"), (".kvm", ".kvm")])
def test_copies(pair: dict[str, Any], tmp_path: Path, first: str, second: str) -> None:
    source, target, part = tmp_path / f"a{first}", tmp_path / f"b{second}", tmp_path / f"c{second}"
    with kvmmap.create(source, **SHAPE, **pair) as cache:
        cache.extend(rows(), rows(dim=VALUE_DIM), np.arange(LENGTH))
        geometry = cache.geometry
    kvmmap.copy(source, target)
    kvmmap.copy(source, part, start=100, stop=500)
    with kvmmap.open(target) as cache, kvmmap.open(part) as middle:
        assert cache.geometry.layers == geometry.layers
        assert cache.verify().sound
        check_rows(cache)
        check_rows(middle, 400, 100)


def test_files_of_it_are_forked_resized_and_repaired(pair: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    with kvmmap.create(path, **SHAPE, **pair) as cache:
        cache.extend(rows(), rows(dim=VALUE_DIM), np.arange(LENGTH))
        superblock = cache.storage.superblock
    assert Superblock.decode(path.read_bytes()[: superblock.size], "a", path.stat().st_size) == superblock
    with kvmmap.fork(path, tmp_path / "fork.kvm", length=300) as fork:
        check_rows(fork, 300)
        assert fork.verify().sound
    kvmmap.resize(path, 700)
    with kvmmap.open(path) as cache:
        check_rows(cache)
        at = cache.storage.superblock.section(Section.KEY_CODES, 1).offset
        row = cache.geometry.layers[1].slabs[0].row_bytes
    with path.open("r+b") as file:
        file.seek(at + 300 * row)
        file.write(bytes([file.read(1)[0] ^ 0xFF]))
    with path.open("r+b") as file:
        file.seek(at + 300 * row + 1)
        file.write(b"\x99\x77")
    with kvmmap.open(path) as cache:
        assert [damage.layer for damage in cache.verify().damages] == [1]
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[1].read_keys()
    kept = kvmmap.repair(path, tmp_path / "kept.kvm")
    assert kept.seq_len == 256
    with kvmmap.open(tmp_path / "kept.kvm") as cache:
        check_rows(cache, 256)
    zeroed = kvmmap.repair(path, tmp_path / "zeroed.kvm", zero=[(1, 1)])
    assert zeroed.seq_len == LENGTH
    with kvmmap.open(tmp_path / "zeroed.kvm") as cache:
        assert cache.verify().sound
        assert np.abs(cache.layers[1].read_keys(256, 512)).max() < 1e-5


def test_commands(tmp_path: Path) -> None:
    path = str(tmp_path / "a.kvm")
    with kvmmap.create(path, **SHAPE, key_codec="test-f32", value_codec="test-pairs") as cache:
        cache.extend(rows(), rows(dim=VALUE_DIM), np.arange(LENGTH))
    for command in (
        ["inspect", path],
        ["inspect", path, "--stats"],
        ["verify", path],
        ["copy", path, str(tmp_path / "b.zarr")],
        ["verify", str(tmp_path / "b.zarr")],
        ["diff", path, str(tmp_path / "b.zarr")],
        ["report", path, "-o", str(tmp_path / "page.html")],
    ):
        result = click_run(*command)
        assert result.exit_code == 0, (command, result.output, result.exception)
    shown = click_run("inspect", path, "--json")
    assert "test-f32" in shown.output


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("float16", 1e-3), ("int8", 0)])
def test_safetensors(pair: dict[str, Any], tmp_path: Path, dtype: Any, tolerance: float) -> None:
    pytest.importorskip("safetensors")
    with kvmmap.create(tmp_path / "a.kvm", **SHAPE, **pair) as cache:
        cache.extend(rows(), rows(dim=VALUE_DIM), np.arange(LENGTH))
        if dtype == "int8":
            with pytest.raises(kvmmap.DtypeError, match="stores "):
                kvmmap.export_tensors(cache, tmp_path / "a.safetensors", dtype=dtype)
            return
        kvmmap.export_tensors(cache, tmp_path / "a.safetensors", dtype=dtype)
        kvmmap.import_tensors(tmp_path / "a.safetensors", tmp_path / "b.kvm")
        with kvmmap.open(tmp_path / "b.kvm") as other:
            for one, two in zip(cache.layers, other.layers, strict=True):
                np.testing.assert_allclose(two.read_keys(), one.read_keys(), atol=tolerance + 2e-2)


def test_dims_that_a_codec_refuses(tmp_path: Path) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError, match="even"):
        kvmmap.create(tmp_path / "a.kvm", **SHAPE | {"head_dim": 7}, key_codec="test-pairs")
    assert not list(tmp_path.iterdir())


def test_views_of_arrays_that_a_layer_lacks() -> None:
    layer = kvmmap.QuantizedKvLayer(4, HEADS, DIM, VALUE_DIM, key_codec="test-f32")
    with pytest.raises(kvmmap.DtypeError, match=r"no key_codes.*as key_numbers, value_codes, value_scales"):
        _ = layer.key_codes
    assert layer.value_codes.shape == (0, HEADS, VALUE_DIM)


def test_codecs_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(kvmmap.DtypeError, match="no codec 'int9': this kvmmap has int8"):
        kvmmap.create(tmp_path / "a.kvm", **SHAPE, key_codec="int9")
    with pytest.raises(kvmmap.ShapeMismatchError, match="value_codec has 3 entries for 2 layers"):
        kvmmap.create(tmp_path / "a.kvm", **SHAPE, value_codec=["int8"] * 3)
    with pytest.raises(ValueError, match="taken"):
        codecs.register(type("Other", (PlainFloats,), {"name": "test-other"})())


def test_unknown_codecs_of_a_file_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".kvm", ".zarr"):
        kvmmap.create(tmp_path / f"a{suffix}", **SHAPE, key_codec="test-f32").close()
        kvmmap.open(tmp_path / f"a{suffix}").close()  # whatever is remembered of it does not outlive its codec
    monkeypatch.setattr(registry, "_by_id", {(1, 0): codecs.INT8})
    monkeypatch.setattr(registry, "_by_name", {"int8": codecs.INT8})
    with pytest.raises(kvmmap.VersionMismatchError, match="layer 0 has key codec 201, and this kvmmap knows"):
        kvmmap.open(tmp_path / "a.kvm")
    with pytest.raises(kvmmap.VersionMismatchError, match="has key codec 'test-f32', and this kvmmap knows int8"):
        kvmmap.open(tmp_path / "a.zarr")


def test_a_codec_is_itself_wherever_it_goes() -> None:
    shape = kvmmap.LayerGeometry(2, 8, 8, PLAIN, PAIRS)
    assert copy.deepcopy(shape) == pickle.loads(pickle.dumps(shape)) == shape
    assert copy.deepcopy(shape).key_codec is PLAIN
    assert [slab.name for slab in shape.slabs] == ["key_numbers", "value_packed", "value_range"]
    assert shape.position_bytes == 2 * (32 + 4 + 4)
    assert PAIRS.bits_per_number(8) == 8.0
    assert codecs.INT8.bits_per_number(128) == 8.25


class CodecContract(StorageContract):
    """The contract suite of storages, of layers whose keys and values are stored by codecs of this file."""

    shape: ClassVar[dict[str, Any]] = StorageContract.shape | {
        "key_codec": ["test-f32", "test-pairs", "int8"],
        "value_codec": "test-pairs",
    }


class TestMemory(CodecContract):
    persistent = False

    @pytest.fixture
    def place(self) -> Callable[[], Any]:
        return lambda: None


class TestFile(CodecContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[], Any]:
        return lambda: tmp_path / f"{next(_numbers)}.kvm"


class TestGroupInAFolder(CodecContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[], Any]:
        return lambda: tmp_path / f"{next(_numbers)}.zarr"


class TestGroupInMemory(CodecContract):
    @pytest.fixture
    def place(self) -> Callable[[], Any]:
        return lambda: f"memory://codecs-{next(_numbers)}"


@pytest.mark.parametrize(("preset", "bits"), [
    ("int8", 8.5), ("fidelity", 8.5), ("compact", 6.375), ("small", 4.75), ("tiny", 4.25), ("lossless", 16),
])  # fmt: skip
def test_presets(tmp_path: Path, preset: str, bits: float) -> None:
    shape = {"num_layers": 1, "capacity": 10, "num_kv_heads": 1, "head_dim": 64}
    with kvmmap.create(tmp_path / "a.kvm", **shape, preset=preset) as cache:
        layer = cache.geometry.layers[0]
        assert (layer.key_codec.bits_per_number(64) + layer.value_codec.bits_per_number(64)) / 2 == bits
    made = click_run("create", str(tmp_path / "b.kvm"), "--like", str(tmp_path / "a.kvm"))
    assert made.exit_code == 0, made.output
    other = click_run(
        "create", str(tmp_path / "c.kvm"), "--like", str(tmp_path / "a.kvm"), "--preset", "tiny", "--key-codec", "f16"
    )
    assert other.exit_code == 0, other.output
    with kvmmap.open(tmp_path / "b.kvm") as same, kvmmap.open(tmp_path / "c.kvm") as mixed:
        assert same.geometry.layers == (layer,)
        assert [mixed.geometry.layers[0].key_codec.name, mixed.geometry.layers[0].value_codec.name] == [
            "f16",
            "int4-rotated",
        ]


def test_presets_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(kvmmap.DtypeError, match="no preset 'huge': choose one of int8, fidelity"):
        kvmmap.create(tmp_path / "a.kvm", **SHAPE, preset="huge")
    assert not list(tmp_path.iterdir())


def test_inspect_names_codecs_as_create_does(tmp_path: Path) -> None:
    for name in codecs.names():
        path = tmp_path / f"{name}.kvm"
        kvmmap.create(path, num_layers=1, capacity=1, num_kv_heads=1, head_dim=64, key_codec=name).close()
        shown = click_run("inspect", str(path)).output.splitlines()[-1].split()
        assert shown[3].rstrip(",") == ("int8-row" if name == "int8" else name)


@pytest.mark.parametrize(
    "wrong", [["int8"], {"int8": 1}, {"int8"}, np.array("int8"), b"int8", 8, True, "", "int8-rotated"]
)
def test_presets_that_are_no_names_of_one(tmp_path: Path, wrong: Any) -> None:
    shape = {"num_kv_heads": 1, "head_dim": 64}
    for use in (
        lambda: kvmmap.create(tmp_path / "a.kvm", num_layers=1, capacity=1, **shape, preset=wrong),
        lambda: kvmmap.QuantizedKvCache(1, 1, 1, 64, preset=wrong),
        lambda: kvmmap.QuantizedKvLayer(1, 1, 64, preset=wrong),
        lambda: kvmmap.bytes_per_token(num_layers=1, **shape, preset=wrong),
        lambda: kvmmap.copy(kvmmap.QuantizedKvCache(1, 1, 1, 64), tmp_path / "a.kvm", preset=wrong),
    ):
        with pytest.raises(kvmmap.DtypeError, match=r"there is no preset .*: choose one of int8, fidelity"):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [b"int8", {"int8": 1}, np.array(["int8", "f16"]), 8, ["int8", ["f16"]], ["int8", None]]
)
def test_codecs_that_are_no_names(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(kvmmap.DtypeError, match="a codec is named by a string, or codecs by a list of one a layer"):
        kvmmap.create(tmp_path / "a.kvm", num_layers=2, capacity=1, num_kv_heads=1, head_dim=64, value_codec=wrong)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_layer_of_a_codec_where_layers_differ(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"num_layers": 3, "capacity": 1, "num_kv_heads": 1}
    with pytest.raises(kvmmap.DtypeError, match=r"^key_codec of layer 1: there is no codec 'int9'") as wrong:
        kvmmap.create(tmp_path / "a.kvm", **shape, head_dim=64, key_codec=["int8", "int9", "f16"])
    assert wrong.value.layer == 1
    for more in ({"head_dim": [64, 64, 17]}, {"head_dim": 64, "value_head_dim": [64, 64, 17]}):
        with pytest.raises(kvmmap.ShapeMismatchError, match=r"^layer 2: codec int8-rotated takes rows") as odd:
            kvmmap.create(tmp_path / "a.kvm", **shape, **more, preset="fidelity")
        assert odd.value.layer == 2
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"^codec int8-rotated takes rows") as all_alike:
        kvmmap.create(tmp_path / "a.kvm", **shape, head_dim=17, preset="fidelity")
    assert all_alike.value.layer is None
    source = kvmmap.QuantizedKvCache(3, 1, 1, [64, 17, 64])
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"^layer 1: codec int4-rotated takes rows") as copied:
        kvmmap.copy(source, tmp_path / "a.kvm", preset="tiny")
    assert copied.value.layer == 1
    with pytest.raises(kvmmap.DtypeError, match=r"^value_codec of layer 2: there is no codec 'int9'"):
        kvmmap.copy(source, tmp_path / "a.kvm", value_codec=["int8", "int8", "int9"])
    assert not list(tmp_path.iterdir())


def test_names_that_reports_show_are_taken(tmp_path: Path) -> None:
    for name in codecs.names():
        path = tmp_path / f"{name}.kvm"
        kvmmap.create(path, num_layers=1, capacity=1, num_kv_heads=1, head_dim=64, value_codec=name).close()
        (layer,) = json.loads(click_run("inspect", "--json", str(path)).output)["layers"]
        assert (layer["key_codec_name"], layer["value_codec_name"]) == ("int8", name)
        shown = click_run("inspect", str(path)).output.splitlines()[-1].split()
        shown = shown[5 if name != "int8" else 3]
        again = tmp_path / f"{name}-again.kvm"
        kvmmap.create(again, num_layers=1, capacity=1, num_kv_heads=1, head_dim=64, value_codec=shown).close()
        with kvmmap.open(again) as cache:
            assert cache.geometry.layers[0].value_codec.name == name


def test_statistics_say_that_they_are_those_of_int8(tmp_path: Path) -> None:
    note = "Rows of int4-rotated, bf16 are decoded, and scales, codes and errors are those that int8 would give them."
    for path, names in ((tmp_path / "a.kvm", ("int8", "int8")), (tmp_path / "b.kvm", ("int4-rotated", "bf16"))):
        with kvmmap.create(
            path,
            num_layers=2,
            capacity=9,
            num_kv_heads=1,
            head_dim=64,
            key_codec=[names[0], "int8"],
            value_codec=names[1],
        ) as cache:
            cache.extend(*np.random.default_rng(0).standard_normal((2, 2, 9, 1, 64), dtype=np.float32))
        told = names[0] != "int8"
        for arguments in (("--stats",), ("--heatmap",), ("--layer", "0")):
            assert (note in " ".join(click_run("inspect", *arguments, str(path)).output.split())) == told
        second = click_run("inspect", "--layer", "1", str(path)).output
        assert ("Rows of bf16 are decoded" in second) == told
        assert "are decoded" not in click_run("inspect", str(path)).output


@pytest.mark.parametrize("preset", ["int8", "compact"])
def test_the_report_page_names_codecs_and_window(tmp_path: Path, preset: str) -> None:
    path = tmp_path / "a.kvm"
    with kvmmap.create(path, num_layers=2, capacity=9, num_kv_heads=1, head_dim=64, preset=preset, sinks=3) as cache:
        cache.extend(*np.random.default_rng(0).standard_normal((2, 2, 9, 1, 64), dtype=np.float32))
    assert click_run("report", path, "-o", tmp_path / "a.html").exit_code == 0
    page = (tmp_path / "a.html").read_text()
    if preset == "compact":
        assert "int8-rotated, values int4-rotated" in page
        assert "What int8 would cost" in page
        assert "Rows of int8-rotated, int4-rotated are decoded" in page
        assert "the last 256 positions and the first 3, " in page
    else:
        assert "What int8 costs" in page
        assert "are decoded" not in page
        assert "the first 3 positions, " in page


@pytest.mark.parametrize("name", ["f32", "test-f32"])
def test_attention_over_numbers_whose_products_overflow(name: str) -> None:
    """Without warnings, which are errors here: in codecs without a kernel of their own."""
    keys, values = np.zeros((6, 1, 32), np.float32), np.full((6, 1, 32), 3.4e38, np.float32)
    values[:, :, ::2] *= -1
    values[3] = 1.0
    queries = np.full((1, 2, 32), 3.0, np.float32)
    layer = kvmmap.QuantizedKvLayer(6, 1, 32, key_codec=name, value_codec=name)
    keys[2, :, ::2], keys[2, :, 1::2] = 3e38, -3e38  # the product is 0, and no sum of f32 gets there
    layer.extend(keys, values)
    found, lse = layer.attend(queries, return_lse=True)
    mean = values.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found[0], [mean[0]] * 2, rtol=1e-6)
    np.testing.assert_allclose(lse, np.log(6), rtol=1e-6)
    keys[3] = 3e37
    keys[4] = -3e38
    layer.truncate(0)
    layer.extend(keys, values)
    found, lse = layer.attend(queries, return_lse=True)
    np.testing.assert_array_equal(found, np.ones((1, 2, 32)))
    assert np.isfinite(lse).all()
    assert np.isfinite(layer.attend(np.full((1, 2, 32), 3e38, np.float32), scale=1e5)).all()
