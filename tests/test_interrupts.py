"""Ctrl-C at every line of an append: the step is in every layer or in none, and the handle stays usable."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from helpers.support import MEMORY, MakeCache, check_filled, fill, rows

import kvmmap

PACKAGE = str(Path(kvmmap.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at the `after`th line of the package that the block runs."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.done = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not self.done:
            self.left -= 1
            if self.left < 0:
                self.done = True
                raise KeyboardInterrupt
        return self._trace


def step(cache: kvmmap.QuantizedKvCache, length: int) -> None:
    """Append the position at `length`, just as `fill` does."""
    geometry = cache.geometry.layers[0]
    keys = rows(cache.num_layers, geometry.num_kv_heads, geometry.head_dim, seed=length)
    cache.push_step(keys, -keys, length)


def test_at_every_line_of_a_step(make_cache: MakeCache) -> None:
    cache = make_cache(3, 600, 2, 8)
    fill(cache, 3)
    cache.flush()
    after = 0
    while True:
        before = cache.seq_len
        with Interrupt(after) as interrupt, contextlib.suppress(KeyboardInterrupt):
            step(cache, before)
        lengths = {len(layer) for layer in cache.layers}
        assert lengths <= {before, before + 1}, after
        assert len(lengths) == 1, f"layers are not level after line {after}: {lengths}"
        if not interrupt.done:
            break
        after += 1
    assert after > 20
    check_filled(cache, cache.seq_len)
    if cache.path is not None:
        cache.close()
        with kvmmap.open(cache.path) as found:
            check_filled(found, cache.seq_len)
            assert found.verify().sound


def test_readers_of_a_file_see_whole_steps(path: Path) -> None:
    with kvmmap.create(path, num_layers=3, capacity=600, num_kv_heads=2, head_dim=8) as cache:
        fill(cache, 2)
        with kvmmap.open(path) as reader:
            for after in range(0, 200, 3):
                before = cache.seq_len
                with Interrupt(after) as interrupt, contextlib.suppress(KeyboardInterrupt):
                    step(cache, before)
                reader.refresh()
                assert reader.seq_len in (before, before + 1)
                step(cache, cache.seq_len)
                reader.refresh()
                check_filled(reader, cache.seq_len)
                if not interrupt.done:
                    break


@pytest.mark.parametrize("what", ["flush", "truncate"])
def test_at_every_line_of_a_commit(what: str) -> None:
    """The handle stays usable, and the file has the right content."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        commit_interrupted(Path(folder) / "cache.kvm", what)


def commit_interrupted(path: Path, what: str) -> None:
    with kvmmap.create(path, num_layers=2, capacity=600, num_kv_heads=2, head_dim=8) as cache:
        after = 0
        while True:
            fill(cache, 300)
            if what == "truncate":
                cache.flush()
            with Interrupt(after) as interrupt, contextlib.suppress(KeyboardInterrupt):
                cache.flush() if what == "flush" else cache.truncate(270)
            if not interrupt.done:
                break
            fill(cache, 310)
            cache.flush()
            with kvmmap.open(path) as reader:
                assert reader.seq_len == 310
                assert reader.verify().sound, after
                np.testing.assert_array_equal(reader.token_ids, np.arange(310))
            cache.truncate(260)
            after += 1
        assert after > 20
        fill(cache, 310)
        check_filled(cache, 310)
