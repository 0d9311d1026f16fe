"""Arguments of all kinds of types and sizes: each call returns, or raises an error of kvmmap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.support import rows

import kvmmap

ODD: list[Any] = [
    *(None, 0, -1, 1, True, 1.5, float("nan"), float("inf"), "2", "x", b"1", [], [1], (1,), (), {}, {1}, object()),
    *(2**31, 2**31 - 1, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 1 + 2j, np.True_, len),
    *(np.int64(3), np.uint8(4), np.float32(2), np.array(3)),
    *(slice(None), slice(0, 3, 2), slice("a", 2), range(3), range(5, 1), (0, 5), (0, "a"), (None, 3), (0, 2**70)),
]
ATTEND = "scale causal query_start window sinks softcap positions out return_lse resident threads chunk precision"
READ = "start stop dtype out threads length"
CREATE = (
    "num_layers num_kv_heads head_dim value_head_dim key_codec value_codec preset recent_window sinks checkpoint_slots "
    "parent parent_length metadata model durability metadata_room compressor"
)
COPY = "start stop layers capacity key_codec value_codec preset recent_window sinks compressor"


def check(call: Callable[[Any], object]) -> None:
    for odd in ODD:
        with contextlib.suppress(kvmmap.KvmmapError):
            call(odd)


@pytest.fixture(scope="module")
def layer() -> kvmmap.QuantizedKvLayer:
    layer = kvmmap.QuantizedKvLayer(300, 2, 16, recent_window=20, sinks=3)
    layer.extend(rows(300, 2, 16), rows(300, 2, 16, seed=1))
    return layer


@pytest.mark.parametrize("option", ATTEND.split())
def test_attend(layer: kvmmap.QuantizedKvLayer, option: str) -> None:
    queries: Any = rows(1, 4, 16, seed=2)
    check(lambda odd: layer.attend(queries, **{option: odd}))


@pytest.mark.parametrize("option", READ.split())
def test_read_keys(layer: kvmmap.QuantizedKvLayer, option: str) -> None:
    check(lambda odd: layer.read_keys(**{option: odd}))


def test_other_calls_of_layers(layer: kvmmap.QuantizedKvLayer) -> None:
    query = rows(1, 4, 16, seed=2)
    for call in (layer.attend, layer.get_keys_at, layer.get_values_at, layer.prefetch, layer.release):
        check(call)
    check(lambda odd: layer.get_key(odd, 0))
    check(lambda odd: layer.get_value(0, odd))
    check(lambda odd: layer.read_quantized(0, odd))
    check(lambda odd: layer.select_blocks(query, odd))
    check(lambda odd: layer.select_blocks(query, 1, scale=odd))
    check(lambda odd: kvmmap.merge_attention(odd, odd))
    for option in ("codes", "scales", "threads"):
        check(lambda odd, option=option: kvmmap.quantize_rows(query, **{option: odd}))
    codes = kvmmap.quantize_rows(query)
    for option in ("dtype", "out", "threads"):
        check(lambda odd, option=option: kvmmap.dequantize_rows(*codes, **{option: odd}))


@pytest.mark.parametrize("option", CREATE.split())
def test_create(tmp_path: Path, option: str) -> None:
    given: Any = {"num_layers": 2, "capacity": 20, "num_kv_heads": 1, "head_dim": 8, "overwrite": True}
    for odd in ODD:
        if not (isinstance(odd, int) and odd > 2**20):  # may be possible, and make a large file
            with contextlib.suppress(kvmmap.KvmmapError):
                kvmmap.create(tmp_path / "cache.kvm", **given | {option: odd}).close()


@pytest.mark.parametrize("option", COPY.split())
def test_copy(tmp_path: Path, option: str) -> None:
    source = tmp_path / "cache.kvm"
    with kvmmap.create(source, num_layers=2, capacity=20, num_kv_heads=1, head_dim=8) as cache:
        cache.extend(rows(2, 5, 1, 8), rows(2, 5, 1, 8), np.arange(5))
    for odd in ODD:
        if not (isinstance(odd, int) and odd > 2**20):
            with contextlib.suppress(kvmmap.KvmmapError):
                kvmmap.copy(source, tmp_path / "copy.kvm", overwrite=True, durable=False, **{option: odd})
    with kvmmap.open(source) as cache:
        assert cache.seq_len == 5
        assert cache.verify().sound


def test_parts_of_attention_may_be_stacked(layer: kvmmap.QuantizedKvLayer) -> None:
    parts = [layer.attend(rows(1, 4, 16, seed=2), positions=place, return_lse=True) for place in ((0, 100), (100, 300))]
    outs, lses = zip(*parts, strict=True)
    stacked = kvmmap.merge_attention(np.stack(outs), np.stack(lses))  # type: ignore[arg-type]
    np.testing.assert_array_equal(stacked[0], kvmmap.merge_attention(outs, lses)[0])
