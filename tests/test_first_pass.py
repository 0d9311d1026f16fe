"""The first attention over blocks computes their checksums as it reads them: damage is found, named, and not served."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.support import rows

import kvmmap
from kvmmap import _core
from kvmmap.format import slab_sections
from kvmmap.storage.checksums import row_digests
from kvmmap.storage.file.mapped_file import open_file, read_superblock

HEADS, DIM, LENGTH = 2, 64, 1900
"""Seven blocks of 256, and a tail of 108: enough for two threads."""

CODECS = {
    "int8": ("int8", "int8"),
    "int4": ("int4-rotated", "int4-rotated"),
    "int3": ("int3-rotated", "int3-rotated"),
    "K8V4": ("int8", "int4-rotated"),
    "16 bits": ("f16", "f16"),
    "bf16 and int8": ("bf16", "int8"),
    "scaled floats": ("fp8-e4m3-scaled", "fp8-e4m3-scaled"),
    "no kernel": ("f32", "f32"),
}
READS: dict[str, tuple[dict[str, Any], set[int]]] = {
    "all": ({}, set(range(8))),
    "a window": ({"window": 300}, {6, 7}),
    "a window and sinks": ({"window": 100, "sinks": 4}, {0, 7}),
    "earlier queries": ({"query_start": 1000}, set(range(4))),
    "blocks": ({"positions": [1, 2, 5]}, {1, 2, 5}),
    "blocks a head": ({"positions": [[0, 3], [3, 6]]}, {0, 3, 6}),
    "a range": ({"positions": (500, 600)}, {1, 2}),
}
"""Arguments of attention, and the blocks that one query reads."""


def make(path: Path, codecs: tuple[str, str] = ("int8", "int8"), length: int = LENGTH, **more: Any) -> None:
    keys, values = codecs
    shape: dict[str, Any] = {"num_layers": 2, "capacity": LENGTH + 300, "num_kv_heads": HEADS, "head_dim": DIM}
    with kvmmap.create(path, **shape, key_codec=keys, value_codec=values, **more) as cache:
        cache.extend(rows(2, length, HEADS, DIM), rows(2, length, HEADS, DIM, seed=1))


def damage(path: Path, block: int, array: int, layer: int = 1) -> None:
    """Flip a bit of a block's part of an array, the last of its first row."""
    with contextlib.closing(open_file(str(path), writable=False)) as file:
        superblock = read_superblock(file)
    geometry = superblock.geometry.layers[layer]
    size = geometry.slab_bytes(1)[array]
    at = superblock.sections[slab_sections(geometry)[array], layer].offset + block * 256 * size + size - 1
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 2]))


def queries(count: int = 1, group: int = 3) -> np.ndarray:
    return rows(count, HEADS * group, DIM, seed=2)


@pytest.mark.parametrize("codecs", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_first_pass_finds_damage_in_the_blocks_that_it_reads(
    tmp_path: Path, codecs: tuple[str, str], threads: int
) -> None:
    path = tmp_path / "cache.kvm"
    make(path, codecs)
    with kvmmap.open(path) as sound:
        arrays = len(sound.geometry.layers[0].slabs)
        expected = {name: sound.layers[1].attend(queries(), threads=1, **read) for name, (read, _) in READS.items()}
    for number, block in enumerate((0, 2, 3, 6, 7)):
        damage(path, block, number % arrays)
        for name, (read, blocks) in READS.items():
            with kvmmap.open(path) as cache:
                layer, out = cache.layers[1], np.full((1, 3 * HEADS, DIM), 7, np.float32)
                if block not in blocks:
                    np.testing.assert_allclose(
                        layer.attend(queries(), threads=threads, **read), expected[name], atol=1e-5
                    )
                    continue
                for _ in range(2):  # it is not forgotten
                    with pytest.raises(kvmmap.CorruptCacheError, match=rf"layer 1 .*, block {block}:") as error:
                        layer.attend(queries(), threads=threads, out=out, **read)
                    assert (error.value.layer, error.value.position) == (1, block * 256), name
                    assert (out == 7).all(), "what came of damaged rows was handed out"
                cache.layers[0].attend(queries(), threads=threads, **read)
        damage(path, block, number % arrays)  # undone


@pytest.mark.parametrize("kernel", _core.available_kernels())
@pytest.mark.parametrize(("count", "group"), [(1, 1), (1, 3), (1, 8), (5, 2), (40, 3)])
def test_a_first_pass_gives_what_a_later_one_does(tmp_path: Path, kernel: str, count: int, group: int) -> None:
    path = tmp_path / "cache.kvm"
    make(path)
    before = _core.current_kernel()
    _core.use_kernel(kernel)
    try:
        with kvmmap.open(path) as cache:
            for layer in cache.layers:
                first, first_lse = layer.attend(queries(count, group), threads=1, return_lse=True)
                later, later_lse = layer.attend(queries(count, group), threads=1, return_lse=True)
                np.testing.assert_array_equal(first, later)
                np.testing.assert_array_equal(first_lse, later_lse)
    finally:
        _core.use_kernel(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_are_hashed_once(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "cache.kvm"
    make(path)
    with kvmmap.open(path) as cache:
        layer = cache.layers[1]
        layer.attend(queries(), window=300, threads=threads)
        damage(path, 6, 0)
        layer.attend(queries(), window=300, threads=threads)  # the window's blocks were verified
        layer.attend(queries(), threads=threads)
        damage(path, 2, 2)
        layer.attend(queries(), threads=threads)
        assert cache.storage.holder.current.verified.below == [0, LENGTH, 0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2])
def test_sound_blocks_of_a_damaged_layer_are_remembered(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "cache.kvm"
    make(path)
    damage(path, 4, 1)
    with kvmmap.open(path) as cache:
        layer = cache.layers[1]
        with pytest.raises(kvmmap.CorruptCacheError):
            layer.attend(queries(), threads=threads)
        damage(path, 5, 0)  # later than its verification
        layer.attend(queries(), positions=(5 * 256, LENGTH), threads=threads)
        damage(path, 4, 1)  # undone
        layer.attend(queries(), threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [0, 3, 6, 7])
def test_rows_in_16_bits_do_not_hide_damage(tmp_path: Path, block: int, threads: int) -> None:
    """The window and the sinks stand for coded rows of blocks that are read all the same."""
    path = tmp_path / "cache.kvm"
    make(path, recent_window=300, sinks=4)
    with kvmmap.open(path) as cache:
        expected = cache.layers[1].attend(queries())
        np.testing.assert_allclose(cache.layers[1].attend(queries(), threads=threads), expected, atol=1e-5)
    damage(path, block, 2)
    with kvmmap.open(path) as cache, pytest.raises(kvmmap.CorruptCacheError, match=f"block {block}:"):
        cache.layers[1].attend(queries(), threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("cut", [512, 900])
def test_each_file_of_a_chain_is_verified(tmp_path: Path, cut: int, threads: int) -> None:
    parent, child = tmp_path / "parent.kvm", tmp_path / "child.kvm"
    make(parent, length=1200)
    kvmmap.create(child, parent=parent, parent_length=cut).close()
    with kvmmap.open(child, "a") as cache:
        cache.extend(rows(2, 700, HEADS, DIM, seed=3), rows(2, 700, HEADS, DIM, seed=4))
    with kvmmap.open(child) as cache:
        first = cache.layers[1].attend(queries(), threads=1)
        np.testing.assert_array_equal(cache.layers[1].attend(queries(), threads=1), first)
        np.testing.assert_allclose(cache.layers[1].attend(queries(), threads=threads), first, atol=1e-5)
    for path, block, position in ((parent, 0, 0), (parent, 1, 256), (child, 1, cut + 256), (child, 2, cut + 512)):
        damage(path, block, 3)
        with kvmmap.open(child) as cache:
            with pytest.raises(kvmmap.CorruptCacheError, match=rf"{path.name}: layer 1 .*, block {block}:") as error:
                cache.layers[1].attend(queries(), threads=threads)
            assert error.value.position == position
        damage(path, block, 3)  # undone
    damage(parent, 4, 0)  # beyond what counts
    with kvmmap.open(child) as cache:
        np.testing.assert_array_equal(cache.layers[1].attend(queries(), threads=1), first)


def test_rows_that_were_truncated_meanwhile_are_reported_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    make(path)
    with kvmmap.open(path, "a") as writer, kvmmap.open(path) as reader:
        writer.truncate(0)
        writer.extend(rows(2, 300, HEADS, DIM, seed=5), rows(2, 300, HEADS, DIM, seed=6))
        with pytest.raises(kvmmap.CacheChangedError):
            reader.layers[0].attend(queries())
        reader.refresh()
        reader.layers[0].attend(queries())


def test_what_is_prepared_for_other_layers_is_not_used_for_other_rows(tmp_path: Path) -> None:
    """Reading one layer prepares the next ones. Rows that change meanwhile count as they are."""
    path = tmp_path / "cache.kvm"
    make(path)
    with kvmmap.open(path, "a") as writer:
        writer.layers[0].attend(queries())
        writer.truncate(200)  # within a block
        writer.extend(rows(2, LENGTH - 200, HEADS, DIM, seed=5), rows(2, LENGTH - 200, HEADS, DIM, seed=6))
        first = writer.layers[1].attend(queries())
        writer.flush()
        np.testing.assert_array_equal(writer.layers[1].attend(queries()), first)
    with kvmmap.open(path) as cache:
        cache.layers[0].attend(queries())
        cache.layers[1].read_keys(300, 301)  # block 1 is compared
        damage(path, 1, 0)
        damage(path, 5, 0)
        with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 1 .* block 5:"):
            cache.layers[1].attend(queries())
        damage(path, 5, 0)  # undone
        cache.layers[1].attend(queries())
    damage(path, 1, 0)  # undone
    with kvmmap.open(path) as cache:
        cache.layers[0].attend(queries())
        damage(path, 2, 1)
        with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 1 .* block 2:"):
            cache.layers[1].attend(queries())


@pytest.mark.parametrize(("count", "group"), [(1, 3), (40, 3)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("reads", READS)
def test_a_first_pass_that_compares_nothing_gives_the_same(
    tmp_path: Path, reads: str, threads: int, count: int, group: int
) -> None:
    """Its pages are mapped ahead, in one file and in a chain; damage is not noticed."""
    path, child = tmp_path / "cache.kvm", tmp_path / "child.kvm"
    make(path)
    kvmmap.create(child, parent=path, parent_length=LENGTH).close()
    how = READS[reads][0] | {"threads": threads}
    with kvmmap.open(path) as cache:
        cache.layers[1].attend(queries(), threads=1)
        expected = cache.layers[1].attend(queries(count, group), **how)
    for each in (path, child):
        with kvmmap.open(each, verify="none") as cache:
            layer = cache.layers[1]
            for _ in range(3):
                np.testing.assert_allclose(layer.attend(queries(count, group), **how), expected, atol=1e-5)
                assert layer._store.is_verified(LENGTH)
    damage(path, 6, 0)
    with kvmmap.open(path, verify="none") as cache:
        cache.layers[1].attend(queries(count, group), **how)


def test_uncommitted_rows_and_a_grown_tail(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    make(path)
    with kvmmap.open(path, "a") as writer, kvmmap.open(path) as reader:
        reader.layers[1].attend(queries())
        writer.extend(rows(2, 50, HEADS, DIM), rows(2, 50, HEADS, DIM))
        reader.refresh()
        reader.layers[1].attend(queries())  # the last 50 have no checksum yet
        writer.flush()
        reader.refresh()
        damage(path, 7, 0)
        with pytest.raises(kvmmap.CorruptCacheError, match="block 7:"):
            reader.layers[1].attend(queries())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("count", [1, 30])
def test_attention_computes_the_checksums_of_any_blocks(threads: int, count: int) -> None:
    """Of those in its ranges and of others, each as `row_digests` does."""
    rng = np.random.default_rng(0)
    length, size = 3000, 100
    keys, values = (rng.integers(-127, 128, (length, HEADS, DIM), np.int8) for _ in range(2))
    scales = rng.random((length, HEADS), np.float32)
    slabs = keys, scales, values, scales
    for _ in range(10):
        blocks = np.flatnonzero(rng.random(30) < 0.6)
        ranges = np.sort(rng.integers(0, length, (3, 2)))
        ranges = np.concatenate([[[0, HEADS]] * 3, ranges], axis=1).astype(np.int64)
        found, stop = np.zeros(len(blocks), np.uint64), length - int(rng.integers(0, 60))
        out, lse = np.empty((count, 2 * HEADS, DIM), np.float32), np.empty((count, 2 * HEADS), np.float32)
        _core.attend(
            *(queries(count, 2), 0, slabs, HEADS, DIM, 0, ranges, 0.1, 0.0, length, True, 0, 0, out, lse, threads),
            unread=((5, blocks, size, stop, found),),
        )
        assert found.tolist() == row_digests(slabs, 5, blocks, size, stop).tolist()


@pytest.mark.parametrize("threads", [1, 2])
def test_attention_compares_checksums_with_a_table(threads: int) -> None:
    """Of several layers one after the other, or of some blocks alone; a difference is told, in whatever block."""
    rng = np.random.default_rng(1)
    slabs = (rng.integers(-127, 128, (1000, 1, 8), np.int8), rng.random((1000, 1), np.float32)) * 2
    ranges, out, lse = np.array([[0, 1, 0, 1000]]), np.empty((1, 1, 8), np.float32), np.empty((1, 1), np.float32)
    blocks = np.array([1, 2, 5, 9])
    sums = np.zeros(10, np.uint64)
    sums[blocks] = row_digests(slabs, 3, blocks, 100, 950)
    query = rows(1, 1, 8)

    def attend(table: np.ndarray, first: int) -> int:
        arguments = (query, 0, slabs, 1, 8, 0, ranges, 1.0, 0.0, 1000, True, 0, 0, out, lse, threads)
        return _core.attend(*arguments, unread=((3, blocks, 100, 950, table, first),))

    assert attend(np.concatenate([np.ones(7, np.uint64), sums]), 7) == -1
    assert attend(sums[1:].copy(), -1) == -1
    for block in blocks:
        wrong = sums.copy()
        wrong[block] ^= np.uint64(1 << 63)
        assert attend(wrong, 0) == -2
    sums[0] = 1  # of no block that is read
    assert attend(sums, 0) == -1


@pytest.mark.parametrize("count", [1, 30])
def test_attention_notes_that_blocks_match(count: int) -> None:
    """In a list, unless they differ, or the caller is to do it; and it need not hash them at all."""
    slabs = (np.ones((1000, 1, 8), np.int8), np.ones((1000, 1), np.float32)) * 2
    ranges, out, lse = np.array([[0, 1, 0, 900]]), np.empty((count, 1, 8), np.float32), np.empty((count, 1), np.float32)
    blocks = np.arange(10)
    sums = row_digests(slabs, 1, blocks, 100, 950)

    def attend(table: np.ndarray | None, reach: int) -> tuple[int, list[int]]:
        below = [0, 300, 0]
        arguments = (rows(count, 1, 8), 0, slabs, 1, 8, 0, ranges, 1.0, 0.0, 1000, True, 0, 0, out, lse, 1)
        return _core.attend(*arguments, unread=((1, blocks, 100, 950, table, 0, below, reach),)), below

    assert attend(sums, 950) == (-1, [0, 950, 0])
    assert attend(sums, 200) == (-1, [0, 300, 0])  # more was noted meanwhile
    assert attend(sums, 0) == (-3, [0, 300, 0])
    assert attend(sums[::-1].copy(), 950) == (-2, [0, 300, 0])
    assert attend(None, 950) == (-1, [0, 950, 0])


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"unread": ()}, "an entry an extent"),
        ({"unread": (None, None)}, "an entry an extent"),
        ({"unread": ((0, np.array([0]), 100, 300),)}, "track"),
        ({"unread": ((0, np.array([1, 0]), 100, 300, np.empty(2, np.uint64)),)}, "ascend"),
        ({"unread": ((0, np.array([3]), 100, 300, np.empty(1, np.uint64)),)}, "beyond"),
        ({"unread": ((0, np.array([0]), 100, 301, np.empty(1, np.uint64)),)}, "positions"),
        ({"unread": ((0, np.array([0]), 100, 300, np.empty(0, np.uint64)),)}, "too small"),
        ({"unread": ((0, np.array([0]), 100, -1, np.empty(1, np.uint64)),)}, "negative"),
        ({"unread": ((0, np.array([0]), 100, 300, np.empty(1, np.uint64), 0, 0),)}, "track"),
        ({"unread": ((0, np.array([0, 2]), 100, 300, np.empty(2, np.uint64), 0),)}, "not all blocks"),
        ({"unread": ((0, np.array([0, 1]), 100, 300, np.empty(2, np.uint64), -1),)}, "not all blocks"),
        ({"unread": ((1, np.array([0]), 100, 300, np.empty(1, np.uint64), 0, [0], 9),)}, "not all tracks"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(change: dict[str, Any], what: str) -> None:
    slabs = (np.zeros((300, 1, 8), np.int8), np.zeros((300, 1), np.float32)) * 2
    ranges, out, lse = np.array([[0, 1, 0, 300]]), np.empty((1, 1, 8), np.float32), np.empty((1, 1), np.float32)
    with pytest.raises(ValueError, match=what):
        _core.attend(rows(1, 1, 8), 0, slabs, 1, 8, 0, ranges, 1.0, 0.0, 300, True, 0, 0, out, lse, 1, **change)
