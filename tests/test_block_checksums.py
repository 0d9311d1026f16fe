"""The compiled checksums of blocks: those of `digest`, which is the plain Python one, with every kernel."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvmmap import _core
from kvmmap.storage.checksums import BlockHasher, digest, row_digests

SIZE = 64


@pytest.fixture(params=_core.available_kernels())
def kernel(request):
    before = _core.current_kernel()
    _core.use_kernel(request.param)
    yield request.param
    _core.use_kernel(before)


def arrays_of(positions: int) -> list[np.ndarray]:
    """Arrays of rows of 1 to 768 bytes: every branch of the hash, by length."""
    rng = np.random.default_rng(positions)
    shapes = [(3, 64), (3,), (), (5, 17), (1,)]
    dtypes = [np.int8, np.float32, np.int64, np.uint8, np.uint16]
    return [
        rng.integers(0, 127, (positions, *shape)).astype(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


@pytest.mark.parametrize("stop", [1, 63, 64, 65, 127, 128, 130])
@pytest.mark.parametrize("threads", [1, 2])
def test_compiled_checksums_are_those_of_python(kernel, stop, threads):
    arrays = arrays_of(130)
    blocks = np.arange(-(-stop // SIZE))
    found = row_digests(arrays, 7, blocks, SIZE, stop, threads)
    assert found.tolist() == [digest(arrays, 7, b, b * SIZE, min(stop, (b + 1) * SIZE)) for b in blocks.tolist()]


def test_every_length_of_a_row_is_hashed_as_xxhash_does(kernel):
    for width in [*range(1, 40), 120, 121, 240, 241, 511, 512, 513, 544, 545, 1024, 1025, 4096, 50_001]:
        data = np.random.default_rng(width).integers(0, 255, (2, width), np.uint8)
        inner = xxhash.xxh3_64_intdigest(data.tobytes())
        expected = xxhash.xxh3_64_intdigest(struct.pack("<IIQQ", 3, 2, 0, inner))
        assert row_digests([data], 3, np.array([0]), SIZE, 2).tolist() == [expected]


def test_many_blocks_in_any_order_by_threads():
    arrays = arrays_of(300 * SIZE)
    blocks = np.random.default_rng(0).permutation(300)[:250]
    found = row_digests(arrays, 0, blocks, SIZE, 300 * SIZE, threads=2)
    assert found.tolist() == [digest(arrays, 0, b, b * SIZE, (b + 1) * SIZE) for b in blocks.tolist()]


def test_a_track_without_arrays_has_zeros():
    assert row_digests([], 0, np.arange(3), SIZE, 150).tolist() == [0, 0, 0]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=8))
def test_checksums_that_grow_in_any_steps_are_those_of_the_whole(lengths):
    tracks = [arrays_of(400)[:2], [], arrays_of(400)[2:]]
    hasher, sums = BlockHasher(tracks, 5, SIZE, 0), {}
    for length in sorted(lengths):
        advance = hasher.advance(length)
        for number, row in enumerate(advance.complete.tolist()):
            sums[advance.first_block + number] = row
        whole, rest = divmod(length, SIZE)
        expected = [digest(t, 5 + i, whole, whole * SIZE, length) if rest else 0 for i, t in enumerate(tracks)]
        assert list(advance.tails) == expected
    for block, row in sums.items():
        assert row == [digest(t, 5 + i, block, block * SIZE, (block + 1) * SIZE) for i, t in enumerate(tracks)]
    assert sorted(sums) == list(range(max(lengths) // SIZE))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blocks": np.array([2])}, "beyond"),
        ({"blocks": np.array([-1])}, "beyond"),
        ({"stop": 129}, "positions"),
        ({"size": 0}, "size"),
        ({"out": np.empty(0, np.uint64)}, "out"),
        ({"arrays": (np.zeros(128, np.uint8),)}, "bytes"),
        ({"arrays": (np.zeros((128, 1), np.uint8),) * 17}, "many"),
    ],
)
def test_what_does_not_fit_is_refused(change, what):
    arguments = {
        "arrays": (np.zeros((128, 4), np.uint8),),
        "track": 0,
        "blocks": np.array([0]),
        "size": SIZE,
        "stop": 128,
        "out": np.empty(1, np.uint64),
        "threads": 1,
    }
    with pytest.raises(ValueError, match=what):
        _core.block_checksums(**arguments | change)
