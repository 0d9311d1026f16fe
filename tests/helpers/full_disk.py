"""Fill a tmpfs to the last page: `python -m helpers.full_disk FOLDER SCENARIO`, which test_full_disk runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvmmap
from helpers.support import check_filled, fill, rows

LAYERS, HEADS, DIM = 2, 2, 8
"""As `support.make_file` has them."""


def main() -> None:
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], check=True)
    ballast = folder / "ballast"
    path = folder / "cache.kvm"
    if scenario == "create":
        fill_up(ballast)
        with pytest.raises(OSError, match="No space left"):
            make(path)
        assert os.listdir(folder) == ["ballast"], os.listdir(folder)
        ballast.unlink()
        make(path).close()
    elif scenario == "flush again":
        flush_again(path, ballast)
    else:
        append_on_a_full_disk(path, ballast, SCENARIOS[scenario])
    with kvmmap.open(path) as cache:
        assert cache.verify().sound
    print("sound")


def make(path: Path) -> kvmmap.QuantizedKvCache:
    return kvmmap.create(path, num_layers=LAYERS, capacity=20_000, num_kv_heads=HEADS, head_dim=DIM)


def append_on_a_full_disk(path: Path, ballast: Path, append: Callable[[kvmmap.QuantizedKvCache], None]) -> None:
    """Append until the disk is full: earlier rows remain, and once there is space again, appending works."""
    with make(path) as cache, kvmmap.open(path) as reader:
        fill(cache, 300)
        cache.flush()
        fill_up(ballast)
        with pytest.raises(OSError, match="No space left"):
            append_for_ever(cache, append)
        length = cache.seq_len
        assert length >= 300
        reader.refresh()
        for handle in (cache, reader):
            assert handle.seq_len == length
            check_filled_until(handle, 300)
            handle.layers[LAYERS - 1].read_keys()
        ballast.unlink()
        cache.truncate(300)
        fill(cache, 700)
        cache.flush()
        check_filled(cache, 700)
    with kvmmap.open(path) as cache:
        check_filled(cache, 700)


def flush_again(path: Path, ballast: Path) -> None:
    """Append until the rows fit and their commit does not; after room is made, it does, and nothing is lost."""
    with make(path) as cache, kvmmap.open(path) as reader:
        fill(cache, 300)
        cache.flush()
        fill(cache, 5000)  # rows have their pages; checksums and sketches of their blocks have not
        cache.metadata = {"some": "x" * 10_000}
        fill_up(ballast)
        for _ in range(3):
            with pytest.raises(OSError, match="No space left") as caught:
                cache.flush()
            assert caught.value.filename == str(path)
            assert cache.seq_len == 5000
            assert cache.facts()["committed_len"] == 300
            reader.refresh()
            check_filled(reader, 5000)
        ballast.unlink()
        cache.flush()
        check_filled(cache, 5000)
        assert cache.facts()["committed_len"] == 5000
        assert cache.verify().sound
        assert cache.metadata == {"some": "x" * 10_000}
        fill(cache, 5600)
        cache.flush()
    with kvmmap.open(path) as cache:
        check_filled(cache, 5600)
        assert cache.metadata == {"some": "x" * 10_000}


def append_for_ever(cache: kvmmap.QuantizedKvCache, append: Callable[[kvmmap.QuantizedKvCache], None]) -> None:
    while True:
        append(cache)


def push(cache: kvmmap.QuantizedKvCache) -> None:
    for layer in cache.layers:
        layer.push(rows(HEADS, DIM), rows(HEADS, DIM))


def extend(cache: kvmmap.QuantizedKvCache) -> None:
    for layer in cache.layers:
        before = len(layer)
        try:
            layer.extend(rows(3000, HEADS, DIM), rows(3000, HEADS, DIM))
        except OSError:
            assert len(layer) == before
            raise


def step(cache: kvmmap.QuantizedKvCache) -> None:
    before = [len(layer) for layer in cache.layers]
    try:
        cache.push_step(rows(LAYERS, HEADS, DIM), rows(LAYERS, HEADS, DIM), 1)
    except OSError:
        assert [len(layer) for layer in cache.layers] == before
        raise


def flush(cache: kvmmap.QuantizedKvCache) -> None:
    step(cache)
    cache.flush()


SCENARIOS = {"push": push, "extend": extend, "step": step, "flush": flush}


def check_filled_until(cache: kvmmap.QuantizedKvCache, length: int) -> None:
    """Assert that the first positions are those that `fill` put there."""
    with kvmmap.QuantizedKvCache(LAYERS, length, HEADS, DIM) as model:
        fill(model, length)
        for layer, expected in zip(cache.layers, model.layers, strict=True):
            np.testing.assert_array_equal(layer.key_codes[:length], expected.key_codes)
            np.testing.assert_array_equal(layer.value_scales[:length], expected.value_scales)


def fill_up(path: Path) -> None:
    """Use every free page."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert os.statvfs(path).f_bavail == 0


if __name__ == "__main__":
    main()
