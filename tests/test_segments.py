"""Caches that continue others: chains of files, read, attended over and appended to as one cache."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.support import check_filled, fill, make_file, rows, run_python
from kvmmap_cli.main import kvmmap as group

import kvmmap
from kvmmap.format import Section, name_fault
from kvmmap.storage.file.chain import ChainStorage
from kvmmap.storage.file.child import MAX_FILES, make_record
from kvmmap.storage.file.mapped_file import open_file, read_parent, read_superblock

CUTS = {
    "on a block": (256,),
    "within a block": (100,),
    "one position": (1,),
    "four files": (256, 512, 600),
    "short ones": (300, 301, 302, 303),
}


def make_chain(folder: Path, cuts: tuple[int, ...], length: int, **shape: Any) -> Path:
    """Files 0.kvm, 1.kvm, ...: each continues the one before at a cut, and has more; the last to `length`."""
    path = folder / "0.kvm"
    for number, cut in enumerate([*cuts, None]):
        stop = length if cut is None else min(length, cut + 40)
        with make_file(path, **shape) if not number else kvmmap.open(path, "a") as cache:
            fill(cache, stop)
        if cut is None:
            return path
        child = folder / f"{number + 1}.kvm"
        kvmmap.create(child, parent=path, parent_length=cut).close()
        path = child
    raise AssertionError


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path]:
    """A parent of 640 positions, and a child that departs at 600 and has 800."""
    return tmp_path / "0.kvm", make_chain(tmp_path, (600,), 800)


def overwrite(path: Path, section: Section, layer: int, offset: int) -> None:
    """Flip bits of a byte of a section."""
    with contextlib.closing(open_file(str(path), writable=False)) as file:
        at = read_superblock(file).section(section, layer).offset + offset
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


# Reading


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_chain_is_one_cache(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    path = make_chain(tmp_path, cuts, 650)
    with kvmmap.open(path) as cache:
        check_filled(cache, 650)
        assert (cache.capacity, cache.token_len) == (1000, 650)
        report = kvmmap.report.inspect(cache)
        assert [(parent.start, parent.stop) for parent in report.parents] == list(zip((0, *cuts), cuts, strict=False))
        assert report.commit is not None
        assert report.commit.committed_len == 650
        verified = cache.verify()
        assert verified.sound
        assert (verified.seq_len, verified.verified) == (650, 650)
        assert cache.get_key(1, cuts[0] - 1, 0).tolist() == cache.layers[1].read_keys()[cuts[0] - 1, 0].tolist()
        assert cache.get_value(1, cuts[0], 1).tolist() == cache.layers[1].read_values()[cuts[0], 1].tolist()
    with kvmmap.open(tmp_path / "0.kvm") as first:
        check_filled(first, cuts[0] + 40)


CODECS = [("int8", "int8"), ("int8-rotated", "int4-rotated"), ("f16", "bf16"), ("int5-rotated", "fp8-e4m3-scaled")]


@pytest.mark.parametrize("codecs", CODECS, ids="/".join)
def test_attention_is_that_of_one_file(tmp_path: Path, codecs: tuple[str, str], kernel: str) -> None:
    shape: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64, "key_codec": codecs[0], "value_codec": codecs[1]}
    with kvmmap.QuantizedKvCache(2, 1000, **shape) as whole:
        fill(whole, 900)
        path = make_chain(tmp_path, (300, 310, 600), 900, **shape)
        with kvmmap.open(path) as cache:
            for options in (
                {},
                {"window": 350, "sinks": 4},
                {"causal": False, "query_start": 0},
                {"query_start": 305},
                {"softcap": 3.0, "threads": 2},
                {"positions": (250, 650)},
                {"positions": np.array([[0, 2], [1, 3]])},
                {"positions": np.array([], int)},
                {"resident": "stream"},
            ):
                for count in (1, 5):
                    queries = rows(count, 6, 64, seed=count)
                    found = cache.layers[1].attend(queries, return_lse=True, **options)
                    wanted = whole.layers[1].attend(queries, return_lse=True, **options)
                    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5, atol=3e-6, err_msg=str(options))
                    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)
            with pytest.raises(kvmmap.NonFiniteError):
                cache.layers[0].attend(np.full((1, 6, 64), np.nan, np.float32))


def test_rows_without_a_kernel_are_attended_over(family: tuple[Path, Path]) -> None:
    queries = rows(3, 4, 8, seed=5)
    with kvmmap.open(family[1]) as cache:
        wanted = cache.layers[0].attend(queries, return_lse=True, window=300)
        with mock.patch.dict("kvmmap.attention.kernel.KERNELS", clear=True):
            found = cache.layers[0].attend(queries, return_lse=True, window=300)
    np.testing.assert_allclose(found[0], wanted[0], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(256, 512), (100, 512, 700)])
def test_blocks_are_selected_as_in_one_file(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    with kvmmap.QuantizedKvCache(2, 1000, 2, 8) as whole, kvmmap.open(make_chain(tmp_path, cuts, 1000)) as cache:
        fill(whole, 1000)
        for seed in range(3):
            query = rows(4, 8, seed=seed)
            for k in (1, 2, 3):
                wanted = whole.layers[1].select_blocks(query, k)
                assert cache.layers[1].select_blocks(query, k).tolist() == wanted.tolist()


def test_views_lie_in_one_file_and_copies_across(family: tuple[Path, Path]) -> None:
    with kvmmap.open(family[1]) as cache:
        store = cache.storage.layers[0]
        maps = [extent[1][0] for extent in store.extents()]
        for start, stop, views in ((0, 600, True), (600, 800, True), (599, 601, False)):
            part = cache.layers[0].read_quantized(start, stop)
            assert any(np.shares_memory(part[0], array) for array in maps) == views
            assert not any(array.flags.writeable for array in part)
        assert len(cache.layers[0].key_codes) == 800
        assert [len(part[0]) for part in store.iter_rows(590, 610)] == [10, 10]
        cache.layers[0].prefetch(0, 800)
        cache.layers[0].release(0, 800)
        view = cache.layers[0].read_quantized(0, 10)
    assert view[0].shape == (10, 2, 8)  # valid after close()
    with pytest.raises(kvmmap.ClosedError):
        cache.layers[0].attend(rows(1, 4, 8))


# Rows in 16 bits, and states


@pytest.mark.parametrize("cuts", [(300,), (300, 310, 600), (2, 3)])
def test_the_last_and_first_positions_are_exact(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    shape: dict[str, Any] = {
        "recent_window": 40,
        "sinks": 4,
        "key_codec": "int4-rotated",
        "value_codec": "int4-rotated",
    }
    with kvmmap.QuantizedKvCache(2, 1000, 2, 8, **shape) as whole, make_file(tmp_path / "0.kvm", **shape) as first:
        fill(whole, 650)
        fill(first, cuts[0])
    path = tmp_path / "0.kvm"
    for number, stop in enumerate([*cuts[1:], 620]):  # each ends where the next one departs: the window is whole
        child = tmp_path / f"{number + 1}.kvm"
        with kvmmap.create(child, parent=path) as cache:
            fill(cache, stop)
        path = child
    with kvmmap.open(path, "a") as cache, kvmmap.open(path) as reader:
        for length in (620, 650, 630):
            if length < cache.seq_len:
                cache.truncate(length)
                with kvmmap.QuantizedKvCache(2, 1000, 2, 8, **shape) as whole:
                    fill(whole, 650)
                    whole.truncate(length)
                    check_attention(cache, whole)
            else:
                fill(cache, length)
                cache.flush()
                whole = kvmmap.QuantizedKvCache(2, 1000, 2, 8, **shape)
                fill(whole, length)
                check_attention(cache, whole)
            reader.refresh()
            if length != 630:  # where the parent's file still has rows that this handle's ring has lost
                check_attention(reader, cache)
    kvmmap.fork(path, tmp_path / "fork.kvm").close()
    kvmmap.copy(path, tmp_path / "copy.zarr")
    with kvmmap.open(path) as cache:
        assert cache.verify().sound
        for name in ("fork.kvm", "copy.zarr"):
            with kvmmap.open(tmp_path / name) as other:
                check_attention(other, cache)


def check_attention(found: kvmmap.QuantizedKvCache, expected: kvmmap.QuantizedKvCache) -> None:
    queries = rows(3, 4, 8, seed=9)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for options in ({}, {"resident": "stream"}, {"window": 60, "sinks": 2}):
            wanted = other.attend(queries, **options)
            np.testing.assert_allclose(layer.attend(queries, **options), wanted, rtol=2e-5, atol=2e-6)
        np.testing.assert_array_equal(layer.read_keys(), other.read_keys())


def test_a_child_begins_with_the_states_of_its_parent(tmp_path: Path) -> None:
    states = (kvmmap.StateSpec(1, "conv", "float32", (3,)),)
    shape: dict[str, Any] = {"num_layers": 2, "capacity": 900, "num_kv_heads": [2, 0], "head_dim": 8}

    def grow(cache: kvmmap.QuantizedKvCache, stop: int) -> None:
        step = rows(stop - cache.seq_len, 2, 8, seed=stop)
        cache.extend([step, None], [step, None], np.arange(cache.seq_len, stop))
        cache.write_states([np.full(3, stop, np.float32)])
        cache.checkpoint()

    with kvmmap.create(tmp_path / "0.kvm", states=states, checkpoint_slots=4, **shape) as parent:
        for stop in (100, 300, 500):
            grow(parent, stop)
    with pytest.raises(kvmmap.NoCheckpointError):
        kvmmap.create(tmp_path / "1.kvm", parent=tmp_path / "0.kvm", parent_length=200)
    with kvmmap.create(tmp_path / "1.kvm", parent=tmp_path / "0.kvm", parent_length=300) as child:
        assert child.checkpoints == ((300, True),)
        for stop in (310, 320, 600):
            grow(child, stop)
    with kvmmap.open(tmp_path / "0.kvm", "a") as parent:  # whose own checkpoint may go
        for stop in range(510, 600, 10):
            grow(parent, stop)
        assert 300 not in dict(parent.checkpoints)
    with kvmmap.open(tmp_path / "1.kvm", "a") as child:
        assert child.seq_len == 600
        assert dict(child.checkpoints)[300]
        assert child.read_states(300)[1, "conv"].tolist() == [300, 300, 300]
        assert child.read_states(600)[1, "conv"].tolist() == [600, 600, 600]
        child.truncate(315)
        assert child.seq_len == 310
        child.truncate(305)
        assert (child.seq_len, child.checkpoints) == (300, ((300, True),))
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            child.truncate(299)
        grow(child, 700)
    with kvmmap.create(tmp_path / "2.kvm", parent=tmp_path / "1.kvm") as grandchild:
        assert grandchild.read_states(700)[1, "conv"].tolist() == [700, 700, 700]
        assert grandchild.verify().sound
    kvmmap.fork(tmp_path / "1.kvm", tmp_path / "fork.kvm", length=650).close()
    kvmmap.copy(tmp_path / "1.kvm", tmp_path / "copy.zarr")
    for name, position in (("fork.kvm", 300), ("copy.zarr", 700)):
        with kvmmap.open(tmp_path / name) as cache:
            assert cache.seq_len == position
            assert cache.read_states(position)[1, "conv"].tolist() == [position] * 3


# Appending


def test_appending_and_truncating(family: tuple[Path, Path]) -> None:
    parent, child = family
    before = parent.read_bytes()
    with kvmmap.open(child, "a") as cache:
        fill(cache, 900)
        check_filled(cache, 900)
        cache.truncate(700)
        fill(cache, 750)
        cache.flush()
        with pytest.raises(kvmmap.PositionOutOfRangeError, match="parent_length=599"):
            cache.truncate(599)
        check_filled(cache, 750)
        cache.truncate(600)
        check_filled(cache, 600)
        fill(cache, 1000)
        with pytest.raises(kvmmap.CapacityExceededError, match="1000") as caught:
            cache.extend(rows(2, 1, 2, 8), rows(2, 1, 2, 8))
        assert caught.value.capacity == 1000
        cache.layers[0].check_input(rows(1, 2, 8), rows(1, 2, 8))
        cache.metadata = {"a": 1}
    with kvmmap.open(child) as cache:
        check_filled(cache, 1000)
        assert cache.metadata == {"a": 1}
    assert parent.read_bytes() == before


def test_steps_layer_by_layer_and_token_ids(family: tuple[Path, Path]) -> None:
    with kvmmap.open(family[1], "a") as cache:
        step = rows(2, 1, 2, 8)
        for layer, key in zip(cache.layers, step, strict=True):
            assert cache.seq_len == 800
            layer.push(key[0], key[0])
        assert (cache.seq_len, cache.token_len) == (801, 800)
        cache.push_token_ids([7])
        assert cache.token_ids[-2:].tolist() == [799, 7]
        cache.extend(*[rows(2, 3, 2, 8)] * 2)
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.push_token_ids([1], start=500)
        cache.layers[0].extend_quantized(*cache.layers[0].read_quantized(598, 602))
        cache.truncate(804)
        assert cache.token_ids.tolist() == [*range(800), 7, -1, -1, -1]


def test_token_ids_that_a_parent_lacks_are_unknown(tmp_path: Path) -> None:
    with make_file(tmp_path / "0.kvm", 100) as cache:
        cache.extend(*[rows(2, 50, 2, 8)] * 2)
    with kvmmap.create(tmp_path / "1.kvm", parent=tmp_path / "0.kvm", parent_length=140) as child:
        child.extend(*[rows(2, 2, 2, 8)] * 2, [8, 9])
        assert child.token_ids.tolist() == [*range(100), *[-1] * 40, 8, 9]
    with kvmmap.open(tmp_path / "0.kvm", "a") as cache:
        cache.push_token_ids(range(50))
    with kvmmap.open(tmp_path / "1.kvm") as child:
        assert child.token_ids.tolist() == [*range(100), *[-1] * 40, 8, 9]


def test_readers_follow_a_writer(family: tuple[Path, Path]) -> None:
    with kvmmap.open(family[1], "a") as cache, kvmmap.open(family[1]) as reader:
        fill(cache, 810)
        assert reader.seq_len == 800
        assert reader.refresh()
        check_filled(reader, 810)
        cache.truncate(700)
        with pytest.raises(kvmmap.CacheChangedError):
            reader.layers[0].read_keys()
        reader.refresh()
        check_filled(reader, 700)
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(family[1], "a")
    with pytest.raises(kvmmap.ReadOnlyError), kvmmap.open(family[1]) as reader:
        reader.flush()


def test_commits_survive_a_writer_that_dies(family: tuple[Path, Path]) -> None:
    code = """
import os, sys, kvmmap
from helpers.support import fill
cache = kvmmap.open(sys.argv[1], "a")
fill(cache, 850)
os._exit(0)
"""
    run_python(code, family[1])
    with kvmmap.open(family[1], "a") as cache:
        check_filled(cache, 850)


def test_a_parent_has_a_writer_meanwhile(family: tuple[Path, Path]) -> None:
    parent, child = family
    with kvmmap.open(parent, "a") as writer, kvmmap.open(child) as cache:
        fill(writer, 900)
        check_filled(cache, 800)
        writer.flush()
        writer.truncate(650)  # a block of which the first positions count, and it is first read afterwards
        writer.extend(*[rows(2, 10, 2, 8)] * 2)
        writer.flush()
        check_filled(cache, 800)
        with kvmmap.open(child) as other:
            check_filled(other, 800)
        assert cache.verify().sound


# What is made


def test_shapes_model_and_metadata_are_the_parents(tmp_path: Path) -> None:
    model = kvmmap.ModelInfo(name="m")
    make_file(tmp_path / "0.kvm", 30, model=model, metadata={"a": 1}, preset="compact").close()
    with kvmmap.create(tmp_path / "1.kvm", parent=tmp_path / "0.kvm") as child:
        assert (child.seq_len, child.capacity, child.model, child.metadata) == (30, 1000, model, {"a": 1})
        assert child.geometry.layers[0].value_codec.name == "int4-rotated"
    with kvmmap.create(tmp_path / "2.kvm", parent=tmp_path / "1.kvm", capacity=31, metadata={"b": 2}) as child:
        assert (child.capacity, child.metadata, child.model) == (31, {"b": 2}, None)
        assert len(kvmmap.report.inspect(child).parents) == 1  # 1.kvm has no positions of its own
    with kvmmap.create(tmp_path / "3.kvm", parent=child.path or "", parent_length=10, overwrite=True) as other:
        assert other.seq_len == 10


def test_what_is_not_made(tmp_path: Path) -> None:
    parent, path = tmp_path / "0.kvm", tmp_path / "1.kvm"
    with make_file(parent, 30) as cache:
        cache.flush()
        fill(cache, 40)
        for length in (0, -1, 31, 40):
            with pytest.raises(kvmmap.PositionOutOfRangeError, match="1 to 30"):
                kvmmap.create(path, parent=parent, parent_length=length)
        with kvmmap.create(path, parent=cache, parent_length=35) as child:  # flushed first
            assert child.seq_len == 35
    path.unlink()
    with pytest.raises(kvmmap.CapacityExceededError):
        kvmmap.create(path, parent=parent, capacity=39)
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.create(path, parent=parent, num_layers=2)
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.create(path, capacity=2)
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.create(path, parent_length=2, num_layers=1, capacity=1, num_kv_heads=1, head_dim=1)
    with pytest.raises(kvmmap.CacheExistsError, match="would continue"):
        kvmmap.create(parent, parent=parent, overwrite=True)
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.create(parent, parent=parent)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(kvmmap.ParentError, match="another folder"):
        kvmmap.create(tmp_path / "elsewhere" / "1.kvm", parent=parent)
    with pytest.raises(kvmmap.FormatError, match=r"only a \.kvm"):
        kvmmap.create(tmp_path / "1.zarr", parent=parent)
    with pytest.raises(kvmmap.FormatError, match="memory"):
        kvmmap.create(path, parent=kvmmap.QuantizedKvCache(1, 1, 1, 1))
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.create(path, parent=tmp_path / "none.kvm")
    hidden = tmp_path / ".0.kvm"
    shutil.copy(parent, hidden)
    with pytest.raises(kvmmap.ParentError, match="dot"):
        kvmmap.create(path, parent=hidden)
    overwrite(parent, Section.VALUE_CODES, 1, 7)
    with pytest.raises(kvmmap.CorruptCacheError, match="nothing was made"):
        kvmmap.create(path, parent=parent, parent_length=20)
    assert sorted(os.listdir(tmp_path)) == [".0.kvm", "0.kvm", "elsewhere"]


def test_departing_before_a_parents_own_positions_goes_to_its_parent(tmp_path: Path) -> None:
    path = make_chain(tmp_path, (300, 500), 600)
    for length, parents in ((300, [300]), (301, [300, 301]), (500, [300, 500]), (550, [300, 500, 550])):
        with kvmmap.create(tmp_path / f"at{length}.kvm", parent=path, parent_length=length) as child:
            assert [parent.stop for parent in kvmmap.report.inspect(child).parents] == parents
            check_filled(child, length)


def test_long_chains_become_whole_files(tmp_path: Path) -> None:
    path = make_chain(tmp_path, tuple(range(300, 300 + 10 * (MAX_FILES - 1), 10)), 400)
    with kvmmap.open(path) as cache:
        assert len(kvmmap.report.inspect(cache).parents) == MAX_FILES - 1
    with kvmmap.create(tmp_path / "next.kvm", parent=path, parent_length=395) as cache:
        assert kvmmap.report.inspect(cache).parents == ()
        fill(cache, 520)
    for file in tmp_path.glob("[0-9].kvm"):
        file.unlink()
    with kvmmap.open(tmp_path / "next.kvm") as cache:
        check_filled(cache, 520)
        assert cache.verify().sound


def test_rows_are_shared_with_a_whole_file_where_they_lie_on_pages(tmp_path: Path) -> None:
    path = make_chain(tmp_path, (512, 768), 1000, num_kv_heads=8, head_dim=16)
    with mock.patch("kvmmap.storage.posix.PosixFile.copy_from", autospec=True) as copied:
        copied.side_effect = lambda self, source, start, at, size: self.write((at,), (source.read(start, size),))
        kvmmap.fork(path, tmp_path / "fork.kvm", length=900).close()
    assert copied.call_count == 2 * 4 * 3
    with kvmmap.open(tmp_path / "fork.kvm") as cache:
        check_filled(cache, 900)
        assert cache.verify().sound


# What goes wrong


def test_a_parent_that_is_missing(family: tuple[Path, Path]) -> None:
    parent, child = family
    parent.rename(parent.with_name("moved.kvm"))
    for mode in ("r", "a", "r"):
        with pytest.raises(kvmmap.ParentError, match=r"0\.kvm is missing: it holds the first 600 positions") as caught:
            kvmmap.open(child, mode)  # type: ignore[arg-type]
        assert (caught.value.path, caught.value.actual) == (str(child), str(parent))
    parent.with_name("moved.kvm").rename(parent)
    with kvmmap.open(child, "a") as cache:
        check_filled(cache, 800)


@pytest.mark.parametrize("keep", [0, 100, 599])
def test_a_parent_that_was_truncated(family: tuple[Path, Path], keep: int) -> None:
    with kvmmap.open(family[1]) as cache:
        with kvmmap.open(family[0], "a") as parent:
            parent.truncate(keep)
        with pytest.raises(kvmmap.ParentError, match=r"0\.kvm"):
            cache.layers[0].attend(rows(1, 4, 8))
        with pytest.raises(kvmmap.ParentError, match="truncated"):
            kvmmap.open(family[1])


@pytest.mark.parametrize("keep", [0, 100, 520, 599])
@pytest.mark.parametrize("verify", ["read", "none"])
def test_a_parent_that_was_rewritten(family: tuple[Path, Path], keep: int, verify: Any) -> None:
    with kvmmap.open(family[1]) as cache:
        with kvmmap.open(family[0], "a") as parent:
            parent.truncate(keep)
            count = 700 - keep
            parent.extend(*[rows(2, count, 2, 8, seed=7)] * 2, np.arange(count))
        with pytest.raises(kvmmap.ParentError, match=r"0\.kvm"):
            cache.layers[0].read_keys()
    with pytest.raises(kvmmap.ParentError, match="rewritten"):
        kvmmap.open(family[1], verify=verify)


def test_token_ids_that_were_rewritten(tmp_path: Path) -> None:
    child = make_chain(tmp_path, (520,), 600)
    with kvmmap.open(tmp_path / "0.kvm") as whole:
        keys = whole.layers[0].read_quantized()
        values = [layer.read_quantized() for layer in whole.layers]
    with kvmmap.open(tmp_path / "0.kvm", "a") as parent:
        parent.truncate(515)
        for layer, rest in zip(parent.layers, values, strict=True):
            layer.extend_quantized(*[array[515:] for array in rest])
        parent.push_token_ids(range(len(keys[0]) - 515))
    with pytest.raises(kvmmap.ParentError, match="token ids differ"):
        kvmmap.open(child)


def test_a_parent_rewritten_with_the_same_is_as_good(family: tuple[Path, Path]) -> None:
    """But a read during which it happened, and happened again, is not trusted."""
    with kvmmap.open(family[1]) as cache:
        with kvmmap.open(family[0], "a") as parent:
            parent.truncate(550)
            fill(parent, 700)
        check_filled(cache, 800)
        store = cache.storage.layers[0]
        version = store.version()
        with kvmmap.open(family[0], "a") as parent:
            for keep in (550, 400):
                parent.truncate(keep)
                fill(parent, 700)
        with pytest.raises(kvmmap.CacheChangedError, match="read again"):
            store.validate(version)
        check_filled(cache, 800)
    with kvmmap.open(family[1]) as cache:
        check_filled(cache, 800)


def test_another_file_in_a_parents_place(family: tuple[Path, Path]) -> None:
    parent, child = family
    copy = parent.with_name("copy.kvm")
    kvmmap.copy(parent, copy, capacity=800)
    copy.replace(parent)
    with kvmmap.open(child) as cache:  # the same positions
        check_filled(cache, 800)
    parent.unlink()
    with make_file(parent) as other:
        other.extend(*[rows(2, 700, 2, 8, seed=3)] * 2, np.arange(700))
    with pytest.raises(kvmmap.ParentError, match="another file"):
        kvmmap.open(child)
    make_file(parent, 700, head_dim=16, overwrite=True).close()
    with pytest.raises(kvmmap.ParentError, match="other shapes"):
        kvmmap.open(child)
    parent.write_bytes(b"no cache at all")
    with pytest.raises(kvmmap.ParentError, match="not a kvmmap cache"):
        kvmmap.open(child)


def test_resized_and_repaired_parents_are_as_good(family: tuple[Path, Path]) -> None:
    parent, child = family
    kvmmap.compact(parent)
    kvmmap.resize(child, 1200)
    repaired = parent.with_name("repaired.kvm")
    kvmmap.repair(parent, repaired)
    repaired.replace(parent)
    with kvmmap.open(child) as cache:
        check_filled(cache, 800)
        assert cache.capacity == 1200
    kvmmap.compact(child)
    with pytest.raises(kvmmap.CapacityExceededError, match="800"):
        kvmmap.resize(child, 799)
    with kvmmap.open(child) as cache:
        assert (cache.capacity, cache.seq_len) == (800, 800)


DAMAGES = {
    "a complete block": (Section.KEY_CODES, 100 * 16, 0),
    "the block that is cut": (Section.VALUE_SCALES, 550 * 8, 512),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_in_a_parent_is_named(family: tuple[Path, Path], name: str) -> None:
    section, offset, start = DAMAGES[name]
    overwrite(family[0], section, 1, offset)
    with kvmmap.open(family[1]) as cache:
        cache.layers[0].attend(rows(1, 4, 8))
        for act in (cache.layers[1].read_keys, lambda: cache.layers[1].attend(rows(1, 4, 8))):
            with pytest.raises(kvmmap.CorruptCacheError, match=r"0\.kvm") as caught:
                act()
            assert caught.value.layer == 1
        [damage] = cache.verify().damages
        assert (damage.layer, damage.start) == (1, start)
        assert "0.kvm" in damage.what
        with pytest.raises(kvmmap.CorruptCacheError):
            kvmmap.copy(cache, family[0].with_name("copy.kvm"))
        with pytest.raises(kvmmap.CorruptCacheError):
            kvmmap.fork(family[1], family[0].with_name("fork.kvm"))
    assert sorted(file.name for file in family[0].parent.glob("[a-z]*.kvm")) == []


def test_damage_that_does_not_count(family: tuple[Path, Path]) -> None:
    overwrite(family[0], Section.KEY_CODES, 0, 620 * 16)
    with kvmmap.open(family[1]) as cache:
        check_filled(cache, 800)
        assert cache.verify().sound
    with kvmmap.open(family[0]) as parent:
        assert not parent.verify().sound


def test_damage_of_own_rows_is_counted_over_the_chain(family: tuple[Path, Path]) -> None:
    overwrite(family[1], Section.KEY_CODES, 1, 3)
    with kvmmap.open(family[1]) as cache:
        with pytest.raises(kvmmap.CorruptCacheError, match=r"begins after 600") as caught:
            cache.layers[1].read_keys()
        assert caught.value.position == 600
        [damage] = cache.verify().damages
        assert (damage.start, damage.stop) == (600, 800)
    report = kvmmap.repair(family[1], family[1].with_name("repaired.kvm"), zero=[(1, 0)])
    assert (report.first, report.seq_len) == (600, 200)
    with kvmmap.open(family[1].with_name("repaired.kvm")) as cache:
        assert cache.seq_len == 800
        assert cache.verify().sound
    (family[1].parent / "elsewhere").mkdir()
    with pytest.raises(kvmmap.ParentError, match="same folder"):
        kvmmap.repair(family[1], family[1].parent / "elsewhere" / "repaired.kvm")


def test_each_damaged_byte_of_the_record_is_noticed(family: tuple[Path, Path]) -> None:
    with contextlib.closing(open_file(str(family[1]), writable=False)) as file:
        extent = read_superblock(file).section(Section.PARENT)
    data = family[1].read_bytes()
    for at in range(extent.offset, extent.offset + extent.size):
        family[1].write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(kvmmap.CorruptCacheError, match="parent record"):
            kvmmap.open(family[1])
    with pytest.raises(kvmmap.CorruptCacheError, match="parent record"):
        kvmmap.repair(family[1], family[1].with_name("repaired.kvm"))


# Hostile records


def rewrite(path: Path, **changes: Any) -> None:
    """Change a file's parent record, its checksum included."""
    with contextlib.closing(open_file(str(path), writable=True)) as file:
        superblock = read_superblock(file)
        record = read_parent(file, superblock)
        assert record is not None
        file.write((superblock.section(Section.PARENT).offset,), (dataclasses.replace(record, **changes).encode(),))


HOSTILE = ["../0.kvm", "/etc/passwd", "a/0.kvm", "", ".", "..", ".0.kvm", "a\0b", "./0.kvm", "0.kvm/"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_elsewhere_are_never_looked_up(family: tuple[Path, Path], name: str) -> None:
    (family[0].parent / "a").mkdir()
    shutil.copy(family[0], family[0].parent / "a" / "0.kvm")
    shutil.copy(family[0], family[0].parent / ".0.kvm")
    rewrite(family[1], name=name)
    opened: list[str] = []
    real = os.open

    def watch(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(os.path.realpath(path))
        return real(path, *arguments, **more)

    with mock.patch("os.open", watch), pytest.raises(kvmmap.CorruptCacheError, match="parent record damaged"):
        kvmmap.open(family[1])
    assert str(family[0]) not in opened
    assert not any("passwd" in path or path.endswith("/.0.kvm") or "/a/" in path for path in opened)


def test_names_that_are_allowed(tmp_path: Path) -> None:
    for name in (
        "a.kvm",
        "no suffix",
        "ü.kvm",
        "a" * 251 + ".kvm",
        "new\nline",
        os.fsdecode(b"\xff\xfe.kvm"),
    ):
        assert name_fault(name) is None
        make_file(tmp_path / name, 20).close()
        path = tmp_path / "child.kvm"
        with kvmmap.create(path, parent=tmp_path / name, overwrite=True) as child:
            fill(child, 30)
        with kvmmap.open(path) as child:
            check_filled(child, 30)
    assert name_fault("a" * 256)


def test_circles_are_refused(family: tuple[Path, Path]) -> None:
    rewrite(family[1], name="1.kvm")
    with pytest.raises(kvmmap.ParentError):
        kvmmap.open(family[1])
    kvmmap.create(family[0].with_name("2.kvm"), parent=family[0], parent_length=630).close()
    rewrite(family[1], name="2.kvm")
    rewrite(family[0].with_name("2.kvm"), name="1.kvm")
    for name in ("1.kvm", "2.kvm"):
        with pytest.raises(kvmmap.ParentError):
            kvmmap.open(family[0].with_name(name))


def test_a_record_without_the_feature_and_the_feature_without_a_record(family: tuple[Path, Path]) -> None:
    with contextlib.closing(open_file(str(family[1]), writable=False)) as file:
        superblock = read_superblock(file)
    real = family[1].stat().st_size
    without = dataclasses.replace(superblock, has_parent=False)
    with pytest.raises(kvmmap.CorruptCacheError, match="belongs to feature"):
        type(superblock).decode(without.encode(), "x", real)
    sections = {key: extent for key, extent in superblock.sections.items() if key[0] != Section.PARENT}
    gone = dataclasses.replace(superblock, sections=sections, size=superblock.size - 24)
    with pytest.raises(kvmmap.CorruptCacheError, match=r"PARENT of layer \d+ is missing"):
        type(superblock).decode(gone.encode(), "x", real)
    assert superblock.has_parent


# Everything else


def test_copies_of_a_chain_are_whole(family: tuple[Path, Path]) -> None:
    folder = family[0].parent
    made: list[Callable[[Path], Any]] = [
        lambda path: kvmmap.copy(family[1], path),
        lambda path: kvmmap.fetch(family[1], path).close(),
        lambda path: kvmmap.fork(family[1], path).close(),
    ]
    for number, make in enumerate(made):
        make(folder / f"copy{number}.kvm")
    kvmmap.copy(family[1], folder / "copy.zarr")
    kvmmap.copy(folder / "copy.zarr", folder / "back.kvm")
    kvmmap.copy(family[1], folder / "part.kvm", start=590, stop=610, layers=[1])
    for name in ("1.kvm", "copy0.kvm"):
        kvmmap.export_tensors(folder / name, folder / f"{name}.safetensors")
    assert (folder / "1.kvm.safetensors").read_bytes() == (folder / "copy0.kvm.safetensors").read_bytes()
    with kvmmap.open(family[1]) as chain:
        for name in ("copy0.kvm", "copy1.kvm", "copy2.kvm", "copy.zarr", "back.kvm"):
            with kvmmap.open(folder / name) as cache:
                check_filled(cache, 800)
                assert cache.verify().sound
                assert kvmmap.report.inspect(cache).parents == ()
        with kvmmap.open(folder / "part.kvm") as part:
            np.testing.assert_array_equal(part.layers[0].key_codes, chain.layers[1].key_codes[590:610])
    with kvmmap.fetch(family[1], folder / "copy1.kvm") as again:  # the same already
        assert again.seq_len == 800


def test_reports_of_a_chain(family: tuple[Path, Path], tmp_path: Path) -> None:
    kvmmap.copy(family[1], tmp_path / "whole.kvm")
    with kvmmap.open(family[1]) as chain, kvmmap.open(tmp_path / "whole.kvm") as whole:
        assert kvmmap.report.statistics(chain).to_dict() == kvmmap.report.statistics(whole).to_dict()
        found = kvmmap.report.file_map(chain)
        assert found is not None
        assert "parent" in [section.name for section in found.sections]
        grids = [kvmmap.report.scale_grids(cache, 8) for cache in (chain, whole)]
        assert len(grids[0]) == len(grids[1])


def test_opening_verified(family: tuple[Path, Path]) -> None:
    for verify in ("read", "open", "none"):
        with kvmmap.open(family[1], verify=verify) as cache:  # type: ignore[arg-type]
            check_filled(cache, 800)
    with kvmmap.open(family[1], verify="none") as cache:
        overwrite(family[0], Section.KEY_CODES, 0, 0)
        with pytest.raises(kvmmap.CorruptCacheError):
            kvmmap.copy(cache, family[0].with_name("copy.kvm"))


def test_a_use_of_a_child_is_one_of_its_parents(family: tuple[Path, Path]) -> None:
    for path in family:
        os.utime(path, (1e9, 1e9))
    with kvmmap.open(family[1], record_use=False) as cache:
        cache.layers[0].read_keys()
    assert all(path.stat().st_atime == 1e9 for path in family)
    with kvmmap.open(family[1]) as cache:
        cache.layers[0].read_keys()
    assert all(path.stat().st_atime > 1e9 for path in family)


def test_no_descriptor_is_left_open(family: tuple[Path, Path]) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    kvmmap.open(family[1]).close()
    kvmmap.create(family[0].with_name("2.kvm"), parent=family[1], parent_length=100).close()
    shutil.copy(family[0], family[0].with_name("good"))
    family[0].unlink()
    with pytest.raises(kvmmap.ParentError):
        kvmmap.open(family[1], "a")
    family[0].with_name("good").rename(family[0])
    overwrite(family[0], Section.CHECKSUMS, 0xFFFFFFFF, 0)
    with pytest.raises(kvmmap.ParentError):
        kvmmap.open(family[1])
    assert count() == before


def test_a_damaged_parent_is_not_continued_by_accident(family: tuple[Path, Path]) -> None:
    """The record is made of what was verified, and a truncation meanwhile is noticed."""
    with kvmmap.open(family[0]) as parent, kvmmap.open(family[0], "a") as writer:
        reader = parent.storage
        writer.truncate(300)
        with pytest.raises(kvmmap.CacheChangedError):
            make_record(reader, 600, str(family[0].with_name("2.kvm")))  # type: ignore[arg-type]


def test_a_chain_in_threads(family: tuple[Path, Path]) -> None:
    """Readers beside a refresh and a truncation of the parent get right rows or an error."""
    with kvmmap.open(family[1]) as cache:
        assert isinstance(cache.storage, ChainStorage)
        code = """
import sys, threading, kvmmap
from helpers.support import check_filled, fill
cache = kvmmap.open(sys.argv[1])
keys = cache.layers[1].read_keys()
stop, errors = threading.Event(), []
def read():
    while not stop.is_set():
        try:
            assert (cache.layers[1].read_keys() == keys).all()
        except kvmmap.CacheChangedError:
            pass
        except BaseException as error:
            errors.append(error)
threads = [threading.Thread(target=read) for _ in range(3)]
[thread.start() for thread in threads]
for number in range(20):
    with kvmmap.open(sys.argv[2], "a") as parent:
        parent.truncate(610 + number)
        fill(parent, 700)
    cache.refresh()
stop.set()
[thread.join() for thread in threads]
assert not errors, errors
"""
        run_python(code, family[1], family[0])


# The command line


def test_a_child_is_made_and_shown_in_a_shell(tmp_path: Path) -> None:
    make_file(tmp_path / "0.kvm", 300).close()
    run = CliRunner().invoke
    done = run(
        group, ["create", str(tmp_path / "1.kvm"), "--parent", str(tmp_path / "0.kvm"), "--parent-length", "290"]
    )
    assert done.exit_code == 0, done.output
    with kvmmap.open(tmp_path / "1.kvm", "a") as cache:
        fill(cache, 310)
    shown = run(group, ["inspect", str(tmp_path / "1.kvm")])
    assert "continues" in shown.output
    assert "positions 0 to 289 in 0.kvm" in shown.output
    [parent] = json.loads(run(group, ["inspect", "--json", str(tmp_path / "1.kvm")]).output)["parents"]
    assert (parent["start"], parent["stop"], parent["path"]) == (0, 290, str(tmp_path / "0.kvm"))
    for wrong in (["--layers", "2"], ["--model", "x"]):
        done = run(group, ["create", str(tmp_path / "2.kvm"), "--parent", str(tmp_path / "0.kvm"), *wrong])
        assert (done.exit_code, "the parent's" in done.output) == (2, True)
    assert run(group, ["create", str(tmp_path / "2.kvm"), "--parent-length", "2"]).exit_code == 2
    assert run(group, ["verify", str(tmp_path / "1.kvm")]).exit_code == 0
    overwrite(tmp_path / "0.kvm", Section.KEY_CODES, 0, 0)
    damaged = run(group, ["verify", str(tmp_path / "1.kvm")])
    assert (damaged.exit_code, "0.kvm" in damaged.output) == (1, True)
    (tmp_path / "0.kvm").unlink()
    missing = run(group, ["verify", str(tmp_path / "1.kvm")])
    assert (missing.exit_code, "0.kvm is missing" in missing.output) == (1, True)


def collected(folder: Path, *options: str) -> list[str]:
    done = CliRunner().invoke(group, ["gc", str(folder), *options, "--yes"])
    assert done.exit_code == 0, done.output
    return sorted(path.name for path in folder.glob("*.kvm"))


def test_gc_removes_no_cache_before_those_that_continue_it(tmp_path: Path) -> None:
    make_chain(tmp_path, (300, 310), 400)
    kvmmap.create(tmp_path / "other.kvm", parent=tmp_path / "0.kvm", parent_length=200).close()
    for number, name in enumerate(("0", "1", "2", "other")):  # the first one is the longest unused
        os.utime(tmp_path / f"{name}.kvm", (1e9 + number, 1e9 + number))
    with kvmmap.open(tmp_path / "2.kvm", "a", record_use=False) as cache:
        os.utime(tmp_path / "2.kvm", (1e9 + 2, 1e9 + 2))
        assert collected(tmp_path, "--older-than", "1d") == ["0.kvm", "1.kvm", "2.kvm"]
        assert cache.seq_len == 400
    os.utime(tmp_path / "2.kvm", (1e9 + 2, 1e9 + 2))
    size = sum((tmp_path / name).stat().st_blocks * 512 for name in ("0.kvm", "1.kvm"))
    assert collected(tmp_path, "--max-bytes", str(size)) == ["0.kvm", "1.kvm"]
    assert collected(tmp_path, "--max-bytes", "0") == []
