"""States and their checkpoints in every storage, layers without rows, and everything that carries or shows them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from helpers.seaweed import BUCKET, Server

import kvmmap
from kvmmap import Checkpoint, StateSpec, report
from kvmmap.format import Section, Superblock
from kvmmap.geometry import CacheGeometry
from kvmmap.storage.checkpoints import surplus

SPECS = (
    StateSpec(0, "conv", "float32", (1, 6, 3)),
    StateSpec(0, "recurrent", "float32", (1, 2, 4, 4)),
    StateSpec(2, "ids", "int64", (7,)),
    StateSpec(3, "x", "bfloat16", (5, 2)),
)
SHAPE: dict[str, Any] = {"num_layers": 4, "num_kv_heads": [0, 2, 0, 2], "head_dim": 8, "states": SPECS}
_numbers = itertools.count()


@pytest.fixture(params=["memory", "kvm", "zarr", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Return new places for caches."""
    if request.param == "s3":
        server: Server = request.getfixturevalue("s3")
        assert server
        return lambda: f"s3://{BUCKET}/states/{next(_numbers)}.zarr"
    return lambda: None if request.param == "memory" else tmp_path / f"{next(_numbers)}.{request.param}"


def create(path: Any, **more: Any) -> kvmmap.QuantizedKvCache:
    options = SHAPE | {"capacity": 700} | more
    return kvmmap.QuantizedKvCache(**options) if path is None else kvmmap.create(path, **options)


def append(cache: kvmmap.QuantizedKvCache, count: int) -> None:
    start = cache.seq_len
    rows = np.random.default_rng(start).standard_normal((count, 2, 8), np.float32)
    parts = [rows if layer.geometry.has_rows else None for layer in cache.layers]
    cache.extend(parts, parts, np.arange(start, start + count))


def states(seed: int, specs: tuple[StateSpec, ...] = SPECS) -> dict[tuple[int, str], np.ndarray]:
    bits = np.random.default_rng(seed)
    return {
        (spec.layer, spec.name): bits.integers(0, 256, spec.nbytes, np.uint8).view(spec.numpy_dtype).reshape(spec.shape)
        for spec in specs
    }


def same(found: dict[tuple[int, str], np.ndarray], expected: dict[tuple[int, str], np.ndarray]) -> bool:
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
    return all(found[key].tobytes() == array.tobytes() for key, array in expected.items())


def filled(path: Any, positions: tuple[int, ...] = (100, 200, 300), beyond: int = 0, **more: Any) -> Any:
    """A cache with checkpoints at some positions, the first of them pinned."""
    cache = create(path, **more)
    for number, position in enumerate(positions):
        append(cache, position - cache.seq_len)
        cache.write_states(states(position))
        cache.checkpoint(pin=number == 0)
    append(cache, beyond)
    return cache


# The core


def test_checkpoints_are_written_named_and_read(place: Callable[[], Any]) -> None:
    with create(place()) as cache:
        assert (cache.checkpoints, cache.restorable()) == ((), 0)
        append(cache, 10)
        with pytest.raises(kvmmap.NoCheckpointError, match="no states were written"):
            cache.checkpoint()
        cache.write_states(states(10))
        assert cache.checkpoints == ()
        with pytest.raises(kvmmap.NoCheckpointError):
            cache.read_states()
        cache.checkpoint()
        assert cache.checkpoints == (Checkpoint(10, False),)
        assert same(cache.read_states(), states(10))
        append(cache, 5)
        cache.write_states([*states(1).values()])
        cache.write_states(states(15))
        cache.flush()
        assert [found.position for found in cache.checkpoints] == [10, 15]
        assert same(cache.read_states(15), states(15))
        assert same(cache.read_states(10), states(10))
        with pytest.raises(kvmmap.NoCheckpointError) as error:
            cache.read_states(12)
        assert (error.value.position, error.value.expected) == (12, (10, 15))
        cache._check()


def test_states_of_an_earlier_position_are_not_named(place: Callable[[], Any]) -> None:
    with create(place()) as cache:
        append(cache, 10)
        cache.write_states(states(10))
        append(cache, 1)
        with pytest.raises(kvmmap.NoCheckpointError, match="those of position 10"):
            cache.checkpoint()
        cache.flush()
        assert cache.checkpoints == ()


def test_as_many_are_kept_as_there_are_slots(place: Callable[[], Any]) -> None:
    with filled(place(), (5,), checkpoint_slots=3) as cache:
        for position in range(6, 60):
            append(cache, 1)
            cache.write_states(states(position))
            cache.checkpoint()
            if position % 7 == 0:
                cache.flush()
            assert len(cache.checkpoints) <= 3
        assert cache.checkpoints[0] == (5, True)
        assert cache.checkpoints[-1] == (59, False)
        for found in cache.checkpoints:
            assert same(cache.read_states(found.position), states(found.position))


def test_truncation_goes_to_a_checkpoint(place: Callable[[], Any]) -> None:
    with filled(place(), beyond=30) as cache:
        assert [cache.restorable(length) for length in (99, 100, 299, 300, 330)] == [0, 100, 200, 300, 300]
        assert cache.truncate(330) == 330
        assert cache.truncate(329) == cache.seq_len == 300
        assert cache.truncate(250) == cache.seq_len == 200
        assert [found.position for found in cache.checkpoints] == [100, 200]
        cache.flush()
        append(cache, 300)
        assert same(cache.read_states(), states(200))
        assert cache.truncate(0) == cache.seq_len == 0
        assert cache.checkpoints == ()
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.restorable(1)


def test_any_number_of_states(place: Callable[[], Any]) -> None:
    specs = tuple(StateSpec(number % 4, f"s{number}", "float32", (number + 1,)) for number in range(21))
    with create(place(), states=specs) as cache:
        append(cache, 3)
        cache.write_states(states(3, specs))
        cache.flush()
        assert same(cache.read_states(), states(3, specs))


def test_pinned_checkpoints_stay_until_they_are_unpinned(place: Callable[[], Any]) -> None:
    with filled(place(), (10, 20), checkpoint_slots=2) as cache:
        cache.write_states(states(20))
        with pytest.raises(kvmmap.CapacityExceededError, match="one must be free"):
            cache.checkpoint(pin=True)
        append(cache, 10)
        cache.write_states(states(30))
        cache.checkpoint()
        assert cache.checkpoints == ((10, True), (30, False))
        cache.unpin(10)
        with pytest.raises(kvmmap.NoCheckpointError):
            cache.unpin(11)
        cache.checkpoint(pin=True)
        assert cache.checkpoints == ((10, False), (30, True))


def test_wrong_states_are_refused(place: Callable[[], Any]) -> None:
    with filled(place(), (10,)) as cache:
        good = states(1)
        for bad, error in (
            ({key: good[key] for key in list(good)[1:]}, kvmmap.ShapeMismatchError),
            (good | {(1, "conv"): good[0, "conv"]}, kvmmap.ShapeMismatchError),
            (good | {(0, "conv"): good[0, "conv"][0]}, kvmmap.ShapeMismatchError),
            (good | {(0, "conv"): good[0, "conv"].astype(np.float64)}, kvmmap.DtypeError),
            (good | {(3, "x"): np.zeros((5, 2), np.float16)}, kvmmap.DtypeError),
            ([*good.values()][:2], kvmmap.ShapeMismatchError),
            ([*good.values(), good[0, "conv"]], kvmmap.ShapeMismatchError),
        ):
            with pytest.raises(error):
                cache.write_states(bad)
        assert same(cache.read_states(), states(10))


def test_states_keep_strides_and_bits(place: Callable[[], Any]) -> None:
    given = states(4)
    given[0, "recurrent"] = np.asfortranarray(given[0, "recurrent"])
    with create(place()) as cache:
        append(cache, 1)
        cache.write_states(given)
        cache.flush()
        assert same(cache.read_states(), states(4))


# Geometry


@pytest.mark.parametrize(
    "bad",
    [
        {"states": [StateSpec(4, "a", "float32", (1,))]},
        {"states": [StateSpec(0, "a", "float32", (1,)), StateSpec(0, "a", "float32", (2,))]},
        {"checkpoint_slots": 0},
        {"num_kv_heads": 0},
        {"capacity": 2**40 - 1},
    ],
)
def test_geometries_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError):
        CacheGeometry.build(**(SHAPE | {"capacity": 10} | bad))


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ((0, "a/b", "float32", (1,)), kvmmap.ShapeMismatchError),
        ((0, ".", "float32", (1,)), kvmmap.ShapeMismatchError),
        ((0, "a" * 49, "float32", (1,)), kvmmap.ShapeMismatchError),
        ((0, "a", "float8", (1,)), kvmmap.DtypeError),
        ((0, "a", "float32", ()), kvmmap.ShapeMismatchError),
        ((0, "a", "float32", (0,)), kvmmap.ShapeMismatchError),
        ((0, "a", "float32", (1,) * 9), kvmmap.ShapeMismatchError),
        ((True, "a", "float32", (1,)), kvmmap.ShapeMismatchError),
    ],
)
def test_specs_that_cannot_be(spec: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        StateSpec(*spec)


def test_dtypes_are_taken_as_numpy_has_them() -> None:
    assert StateSpec(0, "a", np.float32, (1,)).dtype == "float32"  # type: ignore[arg-type]
    assert StateSpec(0, "a", np.dtype(ml_dtypes.bfloat16), (1,)).dtype == "bfloat16"  # type: ignore[arg-type]


def test_layers_without_rows_cost_nothing_and_say_so(tmp_path: Path) -> None:
    shape = {"num_layers": 3, "capacity": 100, "num_kv_heads": [2, 0, 0], "head_dim": 8}
    with kvmmap.create(tmp_path / "a.kvm", **shape) as cache:
        rows = np.ones((3, 2, 8), np.float32)
        cache.extend([rows, None, None], [rows, None, None])
        cache.push_step([rows[0], None, None], [rows[0], None, None])
        assert [len(layer) for layer in cache.layers] == [4, 4, 4]
        assert cache.layers[1].memory_bytes == 0
        assert (cache.num_kv_heads, cache.head_dim) == (2, 8)
        for use in (
            lambda: cache.layers[1].push(rows[0], rows[0]),
            lambda: cache.layers[1].extend(rows, rows),
            lambda: cache.layers[1].extend_quantized(),
            lambda: cache.layers[1].attend(rows[:1]),
            lambda: cache.layers[1].select_blocks(rows[0], 1),
            lambda: cache.layers[1].read_keys(),
            lambda: cache.layers[1].get_values_at(0),
            lambda: cache.extend([rows] * 3, [rows] * 3),
        ):
            with pytest.raises(kvmmap.NoRowsError) as error:
                use()
            assert error.value.layer == 1
        assert cache.truncate(2) == 2
    for path in (tmp_path / "b.zarr", tmp_path / "c.kvm"):
        kvmmap.copy(tmp_path / "a.kvm", path)
        with kvmmap.open(path, "a") as cache:
            assert [len(layer) for layer in cache.layers] == [2, 2, 2]
            cache.extend([rows, None, None], [rows, None, None])
        with kvmmap.open(path) as cache:
            assert cache.seq_len == 5
            assert cache.verify().sound


def test_checkpoints_thin_out_geometrically() -> None:
    found: list[Checkpoint] = []
    for position in range(0, 10_000, 10):
        found.append(Checkpoint(position, False))
        found = [one for one in found if one.position not in surplus(found, 8)]
    distances = [found[-1].position - one.position for one in found][-2::-1]
    assert distances[0] == 10
    assert all(1.3 <= far / near <= 10 for near, far in itertools.pairwise(distances))
    assert distances[-1] > 1000


# Reopening


@pytest.mark.parametrize("kind", ["kvm", "zarr"])
def test_a_cache_opens_at_its_last_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    filled(path, beyond=7).close()
    with kvmmap.open(path) as cache:
        assert (cache.seq_len, cache.rows_beyond_checkpoint) == (300, 7)
        assert same(cache.read_states(), states(300))
        assert cache.token_len == 300
        cache._check()
        with pytest.raises(kvmmap.ReadOnlyError):
            cache.write_states(states(1))
        with pytest.raises(kvmmap.ReadOnlyError):
            cache.unpin(100)
    with pytest.warns(RuntimeWarning, match="last 7 positions were not saved.* position 300"):
        cache = kvmmap.open(path, "a")
    with cache:
        assert (cache.seq_len, cache.rows_beyond_checkpoint) == (300, 7)
        append(cache, 1)
        cache.write_states(states(301))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with kvmmap.open(path, "a") as cache:
            assert (cache.seq_len, cache.rows_beyond_checkpoint) == (301, 0)
            assert same(cache.read_states(), states(301))


def test_a_reader_beside_a_writer_follows_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    with filled(path, (10,), beyond=5) as writer, kvmmap.open(path) as reader:
        assert (reader.seq_len, reader.rows_beyond_checkpoint) == (10, 5)
        writer.write_states(states(15))
        assert not reader.refresh() or reader.seq_len == 10
        writer.checkpoint()
        assert reader.refresh()
        assert (reader.seq_len, reader.rows_beyond_checkpoint) == (15, 0)
        assert same(reader.read_states(), states(15))
        for position in range(16, 40):
            append(writer, 1)
            writer.write_states(states(position))
            writer.checkpoint()
        with pytest.raises(kvmmap.CacheChangedError, match="was replaced"):
            reader.read_states(15)
        reader.refresh()
        assert same(reader.read_states(), states(39))


def test_a_checkpoint_survives_the_death_of_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    writer = filled(path, (10, 20), beyond=5)
    writer.storage.file.close()  # as the system does when a process ends
    with kvmmap.open(path) as reader:
        assert (reader.seq_len, reader.rows_beyond_checkpoint) == (20, 5)
        assert same(reader.read_states(20), states(20))
    with (
        mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=1),
        kvmmap.open(path) as reader,
    ):
        assert (reader.seq_len, reader.checkpoints) == (0, ())  # after a restart of the machine, commits alone count


def test_open_takes_no_time_for_many_states(tmp_path: Path) -> None:
    """Nothing of a checkpoint is read on opening."""
    path = tmp_path / "a.kvm"
    filled(path).close()
    read: list[int] = []
    from kvmmap.storage.file.mapped_file import MappedFile

    with mock.patch.object(MappedFile, "read_into", lambda self, offset, target: read.append(len(target))):
        kvmmap.open(path).close()
    assert not read


# Damage


def damage(path: Path, state: int, slot_of: int) -> None:
    """Flip a bit of a state in the slot of the checkpoint at a position."""
    with kvmmap.open(path) as cache:
        storage: Any = cache.storage
        superblock: Superblock = storage.superblock
        slot = storage.checkpoints._find(slot_of)
        at = superblock.section(Section.CHECKPOINT, slot).offset + superblock.checkpoint_layout.offsets[state]
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_damaged_states_are_found_and_left_out_by_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    filled(path, beyond=3).close()
    damage(path, 1, 300)
    with kvmmap.open(path) as cache:
        with pytest.raises(kvmmap.CorruptCacheError, match="state 'recurrent' of layer 0") as error:
            cache.read_states()
        assert error.value.position == 300
        assert same(cache.read_states(200), states(200))
        (found,) = cache.verify().damages
        assert (found.layer, found.start) == (0, 300)
        assert "checkpoint at position 300" in found.what
    repaired = kvmmap.repair(path, tmp_path / "b.kvm")
    assert (repaired.seq_len, repaired.restorable) == (303, 200)
    assert any("checkpoint at position 300" in one.what for one in repaired.damages)
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        assert (cache.seq_len, cache.checkpoints) == (200, ((100, True), (200, False)))
        assert same(cache.read_states(), states(200))


def test_damaged_states_of_a_group_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    filled(path).close()
    slots = sorted((path / "states" / "2" / "ids" / "c").iterdir())
    for slot in slots[:3]:
        (slot / "0").write_bytes(bytes(56)) if slot.is_dir() else slot.write_bytes(bytes(56))
    with kvmmap.open(path) as cache:
        with pytest.raises(kvmmap.CorruptCacheError, match="state 'ids' of layer 2"):
            cache.read_states()
        assert len(cache.verify().damages) == 3


def test_other_programs_read_the_states_of_a_group(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "a.zarr"
    with filled(path) as cache:
        slot = cache.storage.checkpoints._find(300)
    found = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(found["states/0/conv"][slot], states(300)[0, "conv"])
    bits = found["states/3/x"]
    assert bits.attrs["dtype"] == "bfloat16"
    np.testing.assert_array_equal(bits[slot], states(300)[3, "x"].view(np.uint16))


# What carries them


@pytest.mark.parametrize("source", ["kvm", "zarr", "memory"])
@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_copies_carry_checkpoints(tmp_path: Path, source: str, target: str) -> None:
    path: Any = None if source == "memory" else tmp_path / f"a.{source}"
    with filled(path, beyond=9) as cache:
        cache.flush()
        copied = kvmmap.copy(cache, tmp_path / f"b.{target}")
        assert copied.seq_len == 300
        with kvmmap.open(tmp_path / f"b.{target}") as found:
            assert found.seq_len == 300
            assert found.checkpoints == cache.checkpoints
            for position in (100, 200, 300):
                assert same(found.read_states(position), states(position))
            assert found.verify().sound
        assert kvmmap.copy(cache, tmp_path / f"c.{target}", stop=299, layers=[1, 3]).seq_len == 200
        with kvmmap.open(tmp_path / f"c.{target}") as found:
            assert found.states == (StateSpec(1, "x", "bfloat16", (5, 2)),)
            assert same(found.read_states(), {(1, "x"): states(200)[3, "x"]})
        with pytest.raises(kvmmap.NoCheckpointError, match="from position 0 only"):
            kvmmap.copy(cache, tmp_path / f"d.{target}", start=100)


def test_fetch_knows_states_apart(tmp_path: Path) -> None:
    filled(tmp_path / "a.zarr").close()
    kvmmap.fetch(tmp_path / "a.zarr", tmp_path / "b.kvm").close()
    kvmmap.fetch(tmp_path / "a.zarr", tmp_path / "b.kvm").close()  # as it is
    with kvmmap.open(tmp_path / "a.zarr", "a") as cache:
        cache.write_states(states(1))
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.fetch(tmp_path / "a.zarr", tmp_path / "b.kvm")


def test_fork_resize_and_compact_carry_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    filled(path, beyond=4).close()
    with kvmmap.fork(path, tmp_path / "b.kvm", length=299, capacity=400) as fork:
        assert (fork.seq_len, fork.checkpoints) == (200, ((100, True), (200, False)))
        append(fork, 100)
        fork.write_states(states(7))
    with kvmmap.open(tmp_path / "b.kvm") as fork:
        assert fork.seq_len == 300
        assert same(fork.read_states(), states(7))
        assert same(fork.read_states(100), states(100))
    kvmmap.resize(path, 900)
    kvmmap.compact(path)
    with kvmmap.open(path) as cache:
        assert (cache.seq_len, cache.rows_beyond_checkpoint, len(cache.checkpoints)) == (300, 4, 3)
        assert same(cache.read_states(), states(300))
        assert cache.verify().sound


def test_reports_and_differences_tell_of_states(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    filled(path, beyond=4).close()
    kvmmap.copy(path, tmp_path / "b.kvm")
    with kvmmap.open(path) as cache, kvmmap.open(tmp_path / "b.kvm", "a") as other:
        told = report.inspect(cache).states
        assert told is not None
        assert [(one.position, one.pinned) for one in told.checkpoints] == [(100, True), (200, False), (300, False)]
        assert (len(told.tensors), told.checkpoint_slots, told.rows_beyond_checkpoint) == (4, 4, 4)
        assert report.inspect(cache).to_dict()["states"]["tensors"][0]["name"] == "conv"
        assert report.compare(cache, other).same
        other.write_states(states(1))
        other.checkpoint()
        found = report.compare(cache, other)
        assert (found.same, found.first_checkpoint) == (False, 300)
        names = [section.name for section in report.file_map(cache).sections]  # type: ignore[union-attr]
        assert "checkpoint-5" in names
        assert [layer.index for layer in report.statistics(cache).layers] == [1, 3]
        assert [grid.layer for grid in report.scale_grids(cache, 5)] == [1, 3]


@pytest.mark.parametrize("kind", ["kvm", "zarr"])
def test_every_append_can_commit_checkpoints(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    with create(path, durability="commit") as cache:
        append(cache, 10)
        cache.write_states(states(10))
        cache.checkpoint()
        with mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=1), kvmmap.open(path) as other:
            assert other.seq_len == 10
            assert same(other.read_states(), states(10))
