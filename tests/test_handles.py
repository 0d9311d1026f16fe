"""Several handles of one file in one process, views that outlive them, and forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.support import check_filled, fill, make_file, run_python

import kvmmap
from kvmmap.storage.on_demand import OnDemand

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def maps_of(path: Path) -> int:
    """Count this process's maps of a file, whatever its current name."""
    return Path("/proc/self/maps").read_text().count(str(path))


def descriptors_of(path: Path) -> int:
    """Count this process's descriptors of a file."""
    found = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            found += os.readlink(entry.path).startswith(str(path))
        except FileNotFoundError:  # the one that lists them
            continue
    return found


def test_two_readers_of_one_file(any_path: Path) -> None:
    make_file(any_path, 300).close()
    first, second = kvmmap.open(any_path), kvmmap.open(any_path)
    rows = second.layers[0].read_keys()
    first.close()
    np.testing.assert_array_equal(second.layers[0].read_keys(), rows)
    check_filled(second, 300)
    second.close()


def test_a_reader_follows_a_writer_of_the_same_process(any_path: Path) -> None:
    with make_file(any_path, 10) as writer:
        writer.flush()
        with kvmmap.open(any_path) as reader, kvmmap.open(any_path) as late:
            fill(writer, 300)
            writer.flush()
            assert reader.refresh()
            check_filled(reader, 300)
            writer.truncate(200)
            fill(writer, 210)
            writer.flush()
            assert late.refresh()
            check_filled(late, 210)


def test_layers_are_made_when_they_are_first_asked_for(path: Path) -> None:
    with make_file(path, 40) as writer, kvmmap.open(path) as reader:
        layers = reader.storage.layers
        assert isinstance(layers, OnDemand)
        assert layers.made() == []
        assert reader.seq_len == 40
        first = reader.layers[0]
        assert len(first) == 40
        assert reader.layers[0] is first
        assert layers.made() == [layers[0]]
        fill(writer, 70)
        assert reader.refresh()
        assert len(first) == len(reader.layers[1]) == reader.seq_len == 70  # made before the refresh, and after
        writer.truncate(10)
        assert reader.refresh()
        assert {len(layer) for layer in reader.layers} == {10}
    with kvmmap.open(path, "a") as writer:
        writer.layers[1].push(*(np.ones((writer.num_kv_heads, writer.head_dim), np.float32),) * 2)
        assert (writer.seq_len, len(writer.layers[1]), len(writer.layers[0])) == (10, 11, 10)


def test_closing_a_reader_leaves_the_writer_its_lock(any_path: Path) -> None:
    """POSIX locks would go with any descriptor of the file."""
    code = "import sys, kvmmap\ntry: kvmmap.open(sys.argv[1], 'a')\nexcept kvmmap.CacheLockedError: print('locked')"
    with make_file(any_path, 5) as writer:
        writer.flush()
        kvmmap.open(any_path).close()
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(any_path, "a")
        assert run_python(code, any_path).stdout == "locked\n"
        fill(writer, 6)
    with kvmmap.open(any_path) as cache:
        check_filled(cache, 6)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_views_outlive_their_cache(any_path: Path, mode: str) -> None:
    make_file(any_path, 300).close()
    cache = kvmmap.open(any_path, mode)  # type: ignore[arg-type]
    layer = cache.layers[1]
    views = [layer.key_codes, layer.key_scales, layer.value_codes, layer.value_scales]
    kept = [view.copy() for view in views]
    cache.close()
    for read in (layer.read_keys, lambda: layer.key_codes, lambda: layer.get_key(0, 0), lambda: cache.token_ids):
        with pytest.raises(kvmmap.ClosedError):
            read()
    kvmmap.remove(any_path)
    for view, copy in zip(views, kept, strict=True):
        np.testing.assert_array_equal(view, copy)
        with pytest.raises(ValueError, match="read-only"):
            view[:1] = 0


def test_views_outlive_the_file_that_was_resized(path: Path) -> None:
    make_file(path, 300).close()
    with kvmmap.open(path) as reader:
        view = reader.layers[0].key_codes
        kept = view.copy()
        kvmmap.resize(path, 5000)
        with kvmmap.open(path, "a") as writer:
            writer.truncate(0)
        np.testing.assert_array_equal(view, kept)


@linux
def test_a_map_is_released_with_its_last_view(path: Path) -> None:
    make_file(path, 300).close()
    for mode in ("r", "a"):
        with kvmmap.open(path, mode) as cache:  # type: ignore[arg-type]
            view = cache.layers[0].value_codes[10:20]
        assert descriptors_of(path) == 1  # the map's own
        assert maps_of(path)
        del view, cache
        assert descriptors_of(path) == maps_of(path) == 0


@linux
@pytest.mark.parametrize("cycles", [int(os.environ.get("KVMMAP_OPENS", "300"))])
def test_opening_leaves_nothing_behind(path: Path, cycles: int) -> None:
    make_file(path, 300).close()
    query = np.ones((1, 2, 8), np.float32)
    before = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    for _ in range(cycles):
        with kvmmap.open(path) as reader, kvmmap.open(path, "a") as writer:
            assert reader.verify().sound
            reader.layers[0].attend(query)
            writer.layers[1].attend(query)
            writer.truncate(299)
            fill(writer, 300)
        with pytest.raises(kvmmap.CapacityExceededError), kvmmap.open(path, "a") as writer:
            writer.extend(np.ones((2, 701, 2, 8), np.float32), np.ones((2, 701, 2, 8), np.float32))
    assert descriptors_of(path) == maps_of(path) == 0
    after = len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 20  # the allocator's own
    with kvmmap.open(path) as cache:
        check_filled(cache, 300)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_reader_can_read(any_path: Path) -> None:
    code = (
        "import os, sys, kvmmap; from helpers.support import check_filled, fill\n"
        "reader = kvmmap.open(sys.argv[1]); check_filled(reader, 300)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    check_filled(reader, 300); reader.close(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "check_filled(reader, 300)\n"
        "with kvmmap.open(sys.argv[1], 'a') as writer: fill(writer, 310)\n"
        "reader.refresh(); check_filled(reader, 310); reader.close()"
    )
    make_file(any_path, 300).close()
    run_python(code, any_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_surviving_child_does_not_hold_the_lock(any_path: Path) -> None:
    """The writer is killed, and its forked child lives on with the inherited descriptors."""
    code = (
        "import os, sys, time, kvmmap; from helpers.support import fill\n"
        "cache = kvmmap.open(sys.argv[1], 'a'); fill(cache, 5); cache.flush()\n"
        "if os.fork() == 0: print('forked', flush=True)\n"
        "time.sleep(60)"
    )
    make_file(any_path).close()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(any_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        start_new_session=True,
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "forked\n"
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(any_path, "a")
        writer.kill()
        writer.wait()
        try:
            with kvmmap.open(any_path, "a") as cache:
                check_filled(cache, 5)
        finally:
            os.killpg(writer.pid, signal.SIGKILL)
