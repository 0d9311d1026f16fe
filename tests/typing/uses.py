"""A user's program over the public API, as type checkers see it: `assert_type` says what each call must be.

Checked by mypy --strict and pyright against an installed kvmmap (`make check-wheels`); never run.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import kvmmap
from kvmmap import CapacityExceededError, ModelInfo, QuantizedKvCache, QuantizedKvLayer, VerifyReport, report

Floats = NDArray[np.float32]


def make(path: Path, keys: Floats, values: Floats) -> int:
    model = ModelInfo(name="some/model", revision="main")
    with kvmmap.create(
        path, num_layers=2, capacity=16, num_kv_heads=[4, 2], head_dim=64, metadata={"a": [1, None]}, model=model
    ) as cache:
        assert_type(cache, QuantizedKvCache)
        cache.extend(keys, values, token_ids=[1, 2, 3])
        cache.push_step(keys[:, 0], values[:, 0], token_id=4)
        cache.metadata = {"title": "a"}
        cache.flush()
        cache.truncate(2)
        return len(cache)


def read(path: str) -> None:
    cache = kvmmap.open(path, "a", timeout=1.5, durability="commit")
    assert_type(cache, QuantizedKvCache)
    assert_type(cache.seq_len, int)
    assert_type(cache.compression_ratio, float)
    assert_type(cache.path, str | None)
    assert_type(cache.model, ModelInfo | None)
    assert_type(cache.metadata, dict[str, Any])
    assert_type(cache.token_ids, NDArray[np.int32])
    assert_type(cache.get_key(0, 1, 2), Floats)
    assert_type(cache.verify(), VerifyReport)
    assert_type(cache.refresh(), bool)
    assert_type(cache.layers[0], QuantizedKvLayer)
    assert_type(cache.layers[1:], list[QuantizedKvLayer])
    for layer in cache.layers:
        assert_type(layer.key_codes, NDArray[np.int8])
        assert_type(layer.value_scales, Floats)
        assert_type(layer.read_keys(0, 2, dtype="bfloat16"), NDArray[Any])
        other = QuantizedKvLayer(8, 4, 64, value_head_dim=32)
        other.extend_quantized(*layer.read_quantized(0, 2))


def attend(layer: QuantizedKvLayer, queries: Floats) -> Floats:
    assert_type(layer.attend(queries), Floats)
    assert_type(layer.attend(queries, return_lse=True, window=8, threads=2), tuple[Floats, Floats])
    near, far = (layer.attend(queries, return_lse=True, positions=part) for part in ((4, 8), (0, 4)))
    assert_type(kvmmap.merge_attention([near[0], far[0]], [near[1], far[1]]), tuple[Floats, Floats])
    return layer.attend(queries, scale=0.5, causal=False, resident="stream")


def rows(x: Floats) -> float:
    codes, scales = kvmmap.quantize_rows(x)
    assert_type(codes, NDArray[np.int8])
    assert_type(scales, Floats)
    assert_type(kvmmap.dequantize_rows(codes, scales, "float16"), NDArray[Any])
    return kvmmap.quantization_error(x, codes, scales)


def whole_files(path: Path, url: str) -> None:
    def progress(done: int, total: int) -> None:
        print(done / total)

    assert_type(kvmmap.copy(path, url, compressor="zstd", progress=progress), kvmmap.CopyReport)
    assert_type(kvmmap.fetch(url, path, overwrite=True, storage_options={"region": "eu-north-1"}), QuantizedKvCache)
    assert_type(kvmmap.fork(path, path.with_name("fork.kvm"), length=10), QuantizedKvCache)
    kvmmap.export_tensors(path, "a.safetensors", dtype="int8", layers=[0])
    kvmmap.export_tensors(path, "a.safetensors", dtype="stored", overwrite=True)
    kvmmap.import_tensors("a.safetensors", "b.kvm", preset="fidelity", sinks=2)
    kvmmap.resize(path, 32)
    kvmmap.compact(path)
    kvmmap.remove(path)


def look(cache: QuantizedKvCache) -> None:
    facts = report.inspect(cache)
    assert_type(facts, report.CacheReport)
    assert_type(facts.layers[0].head_dim, int)
    assert_type(facts.to_dict(), dict[str, Any])
    assert_type(report.statistics(cache).layers, tuple[report.LayerStatistics, ...])
    assert_type(kvmmap.kernel(), str)
    assert_type(kvmmap.__version__, str)


def recover(path: Path) -> int:
    try:
        kvmmap.open(path)
    except CapacityExceededError as error:
        assert isinstance(error, kvmmap.KvmmapError)
        return error.capacity or 0
    except kvmmap.CacheLockedError as error:
        return len(str(error.path))
    return 0
