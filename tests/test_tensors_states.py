"""States and checkpoints in safetensors files: written, read back bit by bit, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # numpy's bfloat16
import numpy as np
import pytest
from helpers.support import rows
from safetensors.numpy import load_file, save_file

import kvmmap
from kvmmap.state_spec import STATE_DTYPES

GOLDEN = Path(__file__).parent / "golden" / "v1-states.kvm"
SPECS = tuple(
    kvmmap.StateSpec(number % 2 * 2, f"{dtype}.{number}", dtype, (1, 3, 5 + number))
    for number, dtype in enumerate(STATE_DTYPES)
)


def filled(path: Path) -> kvmmap.QuantizedKvCache:
    """Layers 0 and 1 have rows, layer 2 states alone, and there is a checkpoint at 20 (pinned), 33 and 50."""
    cache = kvmmap.create(
        path, num_layers=3, capacity=64, num_kv_heads=[2, 1, 0], head_dim=[8, 4, 0], states=SPECS, checkpoint_slots=5
    )
    for start, stop in ((0, 20), (20, 33), (33, 50)):
        count = stop - start
        keys = [rows(count, 2, 8, seed=start), rows(count, 1, 4, seed=start), None]
        cache.extend(keys, keys)
        cache.push_token_ids(np.arange(start, stop))
        generator = np.random.default_rng(stop)
        cache.write_states([generator.integers(0, 2, spec.shape).astype(spec.numpy_dtype) for spec in SPECS])
        cache.checkpoint(pin=stop == 20)
    return cache


def assert_same(one: kvmmap.QuantizedKvCache, other: kvmmap.QuantizedKvCache, codes: bool) -> None:
    assert (one.states, one.checkpoint_slots) == (other.states, other.checkpoint_slots)
    assert (one.seq_len, one.checkpoints) == (other.seq_len, other.checkpoints)
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    for checkpoint in one.checkpoints:
        found = zip(
            one.read_states(checkpoint.position).items(), other.read_states(checkpoint.position).items(), strict=True
        )
        for (place, mine), (name, theirs) in found:
            assert (place, mine.dtype, mine.tobytes()) == (name, theirs.dtype, theirs.tobytes())
    for first, second in zip(one.layers, other.layers, strict=True):
        assert first.geometry.dims == second.geometry.dims
        if codes and first.geometry.has_rows:
            np.testing.assert_array_equal(first.key_codes, second.key_codes)
            np.testing.assert_array_equal(first.value_scales, second.value_scales)


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
@pytest.mark.parametrize("dtype", ["int8", "float32", "bfloat16"])
def test_states_and_checkpoints_round_trip_exactly(tmp_path: Path, suffix: str, dtype: Any) -> None:
    with filled(tmp_path / f"a.{suffix}") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype=dtype)
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / f"c.{suffix}")
        with kvmmap.open(tmp_path / f"c.{suffix}", "a") as other:
            assert other.capacity == 64
            assert other.verify().sound
            assert_same(cache, other, codes=dtype == "int8")
            assert other.truncate(40) == 33  # and so it can be continued


def test_each_state_is_a_tensor_of_its_own(tmp_path: Path) -> None:
    with filled(tmp_path / "a.kvm") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", stop=49)
        tensors = load_file(tmp_path / "b.safetensors")
        assert tensors["layers.0.keys"].shape == (33, 2, 8)
        assert "layers.2.keys" not in tensors
        names = {f"checkpoints.{at}.{spec.layer}.{spec.name}" for at in (20, 33) for spec in SPECS}
        assert {name for name in tensors if name.startswith("checkpoints.")} == names
        for spec in SPECS:
            found = tensors[f"checkpoints.33.{spec.layer}.{spec.name}"]
            expected = cache.read_states(33)[spec.layer, spec.name]
            assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, spec.shape, expected.tobytes())


def test_a_part_of_the_layers_keeps_their_states(tmp_path: Path) -> None:
    with filled(tmp_path / "a.kvm") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", layers=[2, 1])
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert [layer.geometry.has_rows for layer in other.layers] == [False, True]
            assert {spec.layer for spec in other.states} == {0}
            for spec in other.states:
                mine = cache.read_states(33)[2, spec.name]
                assert other.read_states(33)[0, spec.name].tobytes() == mine.tobytes()
        with pytest.raises(kvmmap.ShapeMismatchError, match="has rows"):
            kvmmap.export_tensors(cache, tmp_path / "d.safetensors", layers=[2])
        with pytest.raises(kvmmap.NoCheckpointError, match="position 0"):
            kvmmap.export_tensors(cache, tmp_path / "d.safetensors", start=20)
        assert not (tmp_path / "d.safetensors").exists()


def test_a_file_of_the_first_version_with_states_is_exported_as_ever(tmp_path: Path) -> None:
    """What the header says, and where tensors lie, is fixed: other programs read it."""
    with kvmmap.open(GOLDEN) as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", dtype="int8")
        data = (tmp_path / "b.safetensors").read_bytes()
        (size,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + size])
        facts = json.loads(header.pop("__metadata__")["kvmmap"])
        assert facts["version"] == 2
        assert facts["states"] == {
            "layers": 3,
            "row_layers": [number for number, layer in enumerate(cache.layers) if layer.geometry.has_rows],
            "tensors": [[spec.layer, spec.name, spec.dtype, list(spec.shape)] for spec in cache.states],
            "slots": cache.checkpoint_slots,
            "checkpoints": [[20, True], [50, False]],
        }
        for position in (20, 50):
            for (layer, name), array in cache.read_states(position).items():
                place = header[f"checkpoints.{position}.{layer}.{name}"]
                first, stop = place["data_offsets"]
                assert place["shape"] == list(array.shape)
                assert data[8 + size + first : 8 + size + stop] == array.tobytes()
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
        with kvmmap.open(tmp_path / "c.kvm") as other:
            assert_same(cache, other, codes=True)


def test_layers_without_rows_and_without_states(tmp_path: Path) -> None:
    with kvmmap.create(tmp_path / "a.kvm", num_layers=2, capacity=9, num_kv_heads=[0, 1], head_dim=4) as cache:
        cache.extend([None, rows(5, 1, 4)], [None, rows(5, 1, 4)])
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors", start=1, dtype="int8")
    kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
    with kvmmap.open(tmp_path / "c.kvm") as other:
        assert (other.num_layers, other.seq_len, other.states) == (2, 4, ())


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    spec = kvmmap.StateSpec(0, "s", "float32", (2,))
    with kvmmap.create(
        tmp_path / "a.kvm", num_layers=1, capacity=9, num_kv_heads=1, head_dim=4, states=[spec]
    ) as cache:
        cache.extend([rows(5, 1, 4)], [rows(5, 1, 4)])
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors")
    kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
    with kvmmap.open(tmp_path / "c.kvm") as other:
        assert (other.seq_len, other.states, other.checkpoints) == (0, (spec,), ())


NAME = "checkpoints.20.0.float32.0"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors, facts: tensors.pop(NAME), "has no tensor"),
        (lambda tensors, facts: tensors.update({NAME: tensors[NAME][:, :, :2].copy()}), "its header says"),
        (lambda tensors, facts: tensors.update({NAME: tensors[NAME].astype(np.float64)}), "must be F32"),
        (lambda tensors, facts: facts.update(states=None), "is invalid"),
        (lambda tensors, facts: facts["states"].update(layers=2), "is invalid"),
        (lambda tensors, facts: facts["states"].update(slots=0), "is invalid"),
        (lambda tensors, facts: facts["states"].update(slots=2), "is invalid"),
        (lambda tensors, facts: facts["states"].update(row_layers=[0, 0]), "is invalid"),
        (lambda tensors, facts: facts["states"].update(row_layers=[0]), "rows of 2 layers"),
        (lambda tensors, facts: facts["states"].update(row_layers=[0, 1, 2]), "2 is missing"),
        (lambda tensors, facts: facts["states"]["checkpoints"].pop(), "last checkpoint"),
        (lambda tensors, facts: facts["states"]["checkpoints"].reverse(), "is invalid"),
        (lambda tensors, facts: facts["states"]["checkpoints"].insert(0, [-1, False]), "is invalid"),
        (lambda tensors, facts: facts["states"]["tensors"].append(facts["states"]["tensors"][0]), "is invalid"),
        (lambda tensors, facts: facts["states"]["tensors"][0].__setitem__(2, "complex64"), "is invalid"),
        (lambda tensors, facts: facts.update(version=4), "a later kvmmap"),
    ],
)
def test_damaged_states_are_refused_and_nothing_is_left(tmp_path: Path, change: Any, match: str) -> None:
    with filled(tmp_path / "a.kvm") as cache:
        kvmmap.export_tensors(cache, tmp_path / "b.safetensors")
    data = (tmp_path / "b.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
    tensors, facts = load_file(tmp_path / "b.safetensors"), json.loads(header["__metadata__"]["kvmmap"])
    change(tensors, facts)
    save_file(tensors, tmp_path / "b.safetensors", {"kvmmap": json.dumps(facts)})
    with pytest.raises(kvmmap.KvmmapError, match=match):
        kvmmap.import_tensors(tmp_path / "b.safetensors", tmp_path / "c.kvm")
    assert not (tmp_path / "c.kvm").exists()
