"""Caches in files, across handles and processes: create, reopen, follow, lock, commit, resize."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers.support import check_filled, fill, make_file, rows, run_python

import kvmmap


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to empty the page cache here")
def test_opening_reads_only_the_pages_it_needs(path: Path) -> None:
    make_file(path, 10, capacity=2_000_000).close()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    with kvmmap.open(path) as cache:
        assert cache.seq_len == 10
    assert resident_pages(path) * 4096 < 512 * 1024


def resident_pages(path: Path) -> int:
    """Count a file's pages in the page cache (mincore of a map that touches none)."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(path, os.O_RDONLY)
    try:
        address = libc.mmap(None, size, 1, 1, fd, 0)
        found = ctypes.create_string_buffer(-(-size // 4096))
        assert libc.mincore(address, size, found) == 0
        libc.munmap(address, size)
    finally:
        os.close(fd)
    return sum(byte & 1 for byte in found.raw)


def test_append_in_one_process_and_in_a_second_and_read_in_a_third(any_path: Path) -> None:
    code = (
        "import sys, kvmmap; from helpers.support import fill\n"
        "with kvmmap.open(sys.argv[1], 'a') as cache: fill(cache, int(sys.argv[2]))"
    )
    make_file(any_path, 10).close()
    run_python(code, any_path, 300)
    run_python(code, any_path, 517)
    done = run_python(
        "import sys, kvmmap; from helpers.support import check_filled\n"
        "with kvmmap.open(sys.argv[1]) as cache: check_filled(cache, 517); print(cache.seq_len)",
        any_path,
    )
    assert done.stdout == "517\n"


def test_a_reader_follows_a_writer_in_another_process(path: Path) -> None:
    make_file(path, 1).close()
    code = (
        "import sys, time, kvmmap; from helpers.support import fill\n"
        "cache = kvmmap.open(sys.argv[1], 'a')\n"
        "for length in range(2, 400): fill(cache, length)\n"
        "print('done', flush=True); sys.stdin.readline(); cache.close()"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        ) as writer,
        kvmmap.open(path) as reader,
    ):
        assert writer.stdout
        assert writer.stdin
        lengths = [reader.seq_len]
        while lengths[-1] < 399:
            assert writer.poll() is None
            reader.refresh()
            lengths.append(reader.seq_len)
            if lengths[-1] != lengths[-2]:
                check_filled(reader, lengths[-1])
        assert lengths == sorted(lengths)
        assert writer.stdout.readline() == "done\n"
        assert reader.facts()["state"] == "open for writing"
        assert reader.facts()["committed_len"] == 1
        with pytest.raises(kvmmap.CacheLockedError, match=f"process {writer.pid}") as caught:
            kvmmap.open(path, "a")
        assert caught.value.actual == writer.pid
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.wait() == 0
        reader.refresh()
        assert reader.facts()["state"] == "closed"
        assert reader.facts()["committed_len"] == 399


def test_what_is_published_survives_the_process(path: Path) -> None:
    make_file(path, 10).close()
    code = (
        "import os, sys, kvmmap; from helpers.support import fill, rows\n"
        "cache = kvmmap.open(sys.argv[1], 'a'); fill(cache, 270)\n"
        "cache.layers[0].push(rows(2, 8), rows(2, 8)); os._exit(9)"
    )
    assert run_python(code, path, check=False).returncode == 9
    with kvmmap.open(path) as reader:
        check_filled(reader, 270)
        assert reader.facts()["committed_len"] == 10
        assert [len(layer) for layer in reader.layers] == [270, 270]
    with kvmmap.open(path, "a") as cache:
        assert [len(layer) for layer in cache.layers] == [270, 270]
        fill(cache, 280)
    with kvmmap.open(path) as reader:
        check_filled(reader, 280)
        assert reader.verify().sound


def test_what_was_only_published_does_not_survive_the_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_file(path, 10).close()
    code = (
        "import os, sys, kvmmap; from helpers.support import fill\n"
        "cache = kvmmap.open(sys.argv[1], 'a'); fill(cache, 20); cache.flush(); fill(cache, 270); os._exit(0)"
    )
    run_python(code, path)
    monkeypatch.setattr("kvmmap.storage.file.live_record.boot_id", lambda: 12345)
    with kvmmap.open(path) as reader:
        check_filled(reader, 20)
        assert reader.facts()["state"] == "interrupted"
    with kvmmap.open(path, "a") as cache:
        check_filled(cache, 20)
        fill(cache, 300)
    with kvmmap.open(path) as reader:
        check_filled(reader, 300)
        assert reader.verify().sound


def test_commit_at_every_append(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_file(path, durability="commit")
    for length in (1, 2, 255, 256, 257, 300):
        fill(cache, length)
        assert cache.facts()["committed_len"] == length
        with monkeypatch.context() as patch, kvmmap.open(path) as reader:
            patch.setattr("kvmmap.storage.file.live_record.boot_id", lambda: 1)
            reader.refresh()
            check_filled(reader, length)
    cache.layers[0].push(rows(2, 8), rows(2, 8))
    assert cache.facts()["committed_len"] == 300
    cache.layers[1].push(rows(2, 8), rows(2, 8))
    assert cache.facts()["committed_len"] == 301
    cache.close()
    with kvmmap.open(path, "a", durability="commit") as cache:
        cache.push_step(rows(2, 2, 8), rows(2, 2, 8))
        assert cache.facts()["committed_len"] == 302


def test_opening_needs_no_memory_for_positions_that_a_file_declares(path: Path) -> None:
    """A position may take gigabytes, and then a file says so in a few bytes."""
    kvmmap.create(path, num_layers=1, capacity=1, num_kv_heads=4071, head_dim=8, value_head_dim=65535).close()
    tracemalloc.start()
    try:
        kvmmap.open(path, "a").close()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_opening_to_append_changes_nothing(path: Path) -> None:
    make_file(path, 300).close()
    before = path.read_bytes()
    with kvmmap.open(path, "a") as cache:
        assert cache.seq_len == 300
    after = path.read_bytes()
    different = [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    superblock = 3 * 4096  # superblock, slots A and B: the live record follows
    assert all(superblock <= place < superblock + 4096 for place in different)


def test_files_are_private_from_the_start(path: Path) -> None:
    old = os.umask(0)
    try:
        cache = make_file(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        cache.close()
        kvmmap.resize(path, 2000)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(old)


def test_reserving_costs_no_disk(path: Path) -> None:
    with kvmmap.create(path, num_layers=32, capacity=131072, num_kv_heads=8, head_dim=128) as cache:
        assert cache.facts()["file_bytes"] > 8e9
        assert cache.facts()["disk_bytes"] < 1e6


def test_readers_need_no_write_permission(path: Path) -> None:
    make_file(path, 5).close()
    path.chmod(0o400)
    with kvmmap.open(path) as cache:
        check_filled(cache, 5)


def test_a_reader_does_not_write(any_path: Path) -> None:
    make_file(any_path, 5).close()
    with kvmmap.open(any_path) as cache:
        for write in (
            lambda: cache.push_step(rows(2, 2, 8), rows(2, 2, 8)),
            lambda: cache.layers[0].push(rows(2, 8), rows(2, 8)),
            lambda: cache.layers[0].extend(rows(1, 2, 8), rows(1, 2, 8)),
            lambda: cache.push_token_ids([1]),
            lambda: cache.truncate(0),
            lambda: setattr(cache, "metadata", {}),
            cache.flush,
        ):
            with pytest.raises(kvmmap.ReadOnlyError, match='mode="a"'):
                write()
        check_filled(cache, 5)


def test_one_writer(any_path: Path) -> None:
    cache = make_file(any_path, 3)
    with pytest.raises(kvmmap.CacheLockedError, match="this process") as caught:
        kvmmap.open(any_path, "a")
    assert caught.value.path == str(any_path)
    threading.Timer(0.2, cache.close).start()
    with kvmmap.open(any_path, "a", timeout=10) as second:
        check_filled(second, 3)
    with pytest.raises(kvmmap.ClosedError):
        cache.push_step(rows(2, 2, 8), rows(2, 2, 8))


def test_closing_releases_the_lock_while_views_exist(any_path: Path) -> None:
    cache = make_file(any_path, 3)
    view = cache.layers[0].key_codes
    kept = view.copy()
    cache.close()
    with kvmmap.open(any_path, "a") as again:
        again.truncate(0)
        again.close()
    np.testing.assert_array_equal(view.shape, kept.shape)


def test_a_forked_child_does_not_write(any_path: Path) -> None:
    code = (
        "import os, sys, kvmmap; from helpers.support import fill, rows\n"
        "cache = kvmmap.open(sys.argv[1], 'a'); fill(cache, 5)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try: cache.push_step(rows(2, 2, 8), rows(2, 2, 8))\n"
        "    except kvmmap.CacheLockedError as error: assert str(os.getppid()) in str(error)\n"
        "    else: os._exit(1)\n"
        "    assert cache.layers[0].key_codes.shape[0] == 5\n"
        "    cache.close(); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "try: kvmmap.open(sys.argv[1], 'a')\n"
        "except kvmmap.CacheLockedError: pass\n"
        "else: raise SystemExit('the child gave the lock away')\n"
        "fill(cache, 6); cache.close()"
    )
    make_file(any_path).close()
    run_python(code, any_path)
    with kvmmap.open(any_path) as cache:
        check_filled(cache, 6)


def test_a_forked_child_detects_truncation_by_its_parent(path: Path) -> None:
    """It reads through the map alone: it has closed the descriptor, and with it the lock."""
    code = (
        "import os, sys, kvmmap; from helpers.support import *\n"
        "cache = make_file(Path(sys.argv[1]), 300); end, begin = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.read(end, 1)\n"
        "    for read in cache.layers[0].read_keys, lambda: cache.token_ids:\n"
        "        try: read(); os._exit(1)\n"
        "        except kvmmap.CacheChangedError: pass\n"
        "    assert cache.refresh(); check_filled(cache, 110)\n"
        "    try: cache.verify(); os._exit(2)\n"
        "    except kvmmap.ClosedError: os._exit(0)\n"
        "cache.truncate(100); fill(cache, 110); os.write(begin, b'x')\n"
        "assert os.wait()[1] == 0; cache.close()"
    )
    run_python(code, path)


def test_truncation_invalidates_readers(path: Path) -> None:
    with make_file(path, 300) as cache, kvmmap.open(path) as reader:
        layer = reader.layers[0]
        cache.truncate(200)
        for read in (lambda: layer.get_key(0, 0), layer.read_keys, lambda: layer.key_codes, lambda: reader.token_ids):
            with pytest.raises(kvmmap.CacheChangedError, match=r"refresh\(\)"):
                read()
        assert reader.refresh()
        check_filled(reader, 200)
        assert not reader.refresh()


def test_overwritten_metadata_is_not_reported_as_damaged(path: Path) -> None:
    with make_file(path, 3) as cache, kvmmap.open(path) as reader:
        for number in range(2):
            cache.metadata = {"number": number}
            cache.flush()
        with pytest.raises(kvmmap.CacheChangedError, match=r"refresh\(\)"):
            _ = reader.metadata
        assert reader.verify().sound
        assert reader.refresh()
        assert reader.metadata == {"number": 1}


def test_truncate_is_durable_before_anything_is_overwritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_file(path, 600)
    cache.flush()
    cache.truncate(100)
    cache.push_step(rows(2, 2, 8, seed=77), rows(2, 2, 8))
    with monkeypatch.context() as patch:
        patch.setattr("kvmmap.storage.file.live_record.boot_id", lambda: 1)
        with kvmmap.open(path) as reader:
            check_filled(reader, 100)
            assert reader.verify().sound
    cache.close()


def test_metadata_is_committed_with_the_rest(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_file(path, 3, metadata={"a": 1})
    cache.metadata = {"b": 2}
    with kvmmap.open(path) as reader:
        assert reader.metadata == {"a": 1}
        cache.flush()
        assert reader.refresh()
        assert reader.metadata == {"b": 2}
        cache.metadata = {"c": 3}
        cache.close()
        reader.refresh()
        assert reader.metadata == {"c": 3}
    with kvmmap.open(path, "a") as again:
        assert again.metadata == {"c": 3}
        with pytest.raises(kvmmap.MetadataError, match="room for 65,536"):
            again.metadata = {"long": "x" * 70_000}
        assert again.metadata == {"c": 3}


def test_metadata_room(path: Path) -> None:
    with make_file(path, metadata={"long": "x" * 200_000}) as cache:
        assert len(cache.metadata["long"]) == 200_000
    with make_file(path.with_name("b.kvm"), metadata_room=200_000) as cache:
        cache.metadata = {"long": "x" * 190_000}


def test_resize_and_compact(path: Path) -> None:
    make_file(path, 300, metadata={"a": 1}).close()
    with kvmmap.open(path) as reader:
        seen: list[tuple[int, int]] = []
        kvmmap.resize(path, 5000, progress=lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1]
        check_filled(reader, 300)
        with pytest.raises(kvmmap.CacheChangedError, match="open it again"):
            reader.refresh()
    with kvmmap.open(path, "a") as cache:
        assert (cache.capacity, cache.metadata) == (5000, {"a": 1})
        check_filled(cache, 300)
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.resize(path, 10)
        fill(cache, 1001)
    with pytest.raises(kvmmap.CapacityExceededError, match="1001 positions are stored"):
        kvmmap.resize(path, 1000)
    kvmmap.compact(path)
    with kvmmap.open(path) as cache:
        assert cache.capacity == 1001
        check_filled(cache, 1001)
        assert cache.verify().sound
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_resize_does_not_hide_damage(path: Path) -> None:
    make_file(path, 300).close()
    with kvmmap.open(path) as cache:
        offset = cache._storage.superblock.sections[18, 1].offset  # value codes of layer 1
    with path.open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)[0]
        file.seek(offset + 5)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 1, positions \[0, 256\)"):
        kvmmap.resize(path, 5000)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    with kvmmap.open(path) as cache:
        (damage,) = cache.verify().damages
        assert (damage.layer, damage.start, damage.stop) == (1, 0, 256)


def test_a_damaged_tail_is_not_appended_to(path: Path) -> None:
    make_file(path, 300).close()
    with kvmmap.open(path) as cache:
        offset = cache._storage.superblock.sections[16, 0].offset + 290 * 16
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x55")
    with kvmmap.open(path, "a") as cache:
        with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 0 is damaged in positions \[256, 300\)"):
            fill(cache, 301)
        assert cache.seq_len == 300


def test_create_refuses_existing_files(path: Path) -> None:
    make_file(path, 5).close()
    with pytest.raises(kvmmap.CacheExistsError, match="exists already") as caught:
        make_file(path)
    assert isinstance(caught.value, FileExistsError)
    with kvmmap.open(path) as reader:
        check_filled(reader, 5)
        make_file(path, 3, overwrite=True).close()
        check_filled(reader, 5)
        with pytest.raises(kvmmap.CacheChangedError):
            reader.refresh()
    with kvmmap.open(path) as reader:
        check_filled(reader, 3)
    with kvmmap.open(path, "a"), pytest.raises(kvmmap.CacheLockedError):
        make_file(path, overwrite=True)
    other = path.with_name("notes.txt")
    other.write_text("dear diary")
    with pytest.raises(kvmmap.CacheExistsError, match="remove it yourself"):
        make_file(other, overwrite=True)
    assert other.read_text() == "dear diary"
    with pytest.raises(kvmmap.CacheNotFoundError, match="no such directory"):
        make_file(path.parent / "missing" / "a.kvm")
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, other.name]


def test_open_refuses(path: Path) -> None:
    with pytest.raises(kvmmap.CacheNotFoundError, match="no such file") as caught:
        kvmmap.open(path)
    assert isinstance(caught.value, FileNotFoundError)
    for mode in ("r", "a"):
        with pytest.raises(kvmmap.NotACacheError, match="a directory"):
            kvmmap.open(path.parent, mode)  # type: ignore[arg-type]
    path.write_bytes(b"")
    with pytest.raises(kvmmap.NotACacheError, match="0 bytes"):
        kvmmap.open(path)
    path.write_text("x" * 10_000)
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.open(path, "a")
    os.mkfifo(path.with_name("pipe"))
    with pytest.raises(kvmmap.NotACacheError, match="not a regular file"):
        kvmmap.open(path.with_name("pipe"))
    with pytest.raises(kvmmap.KvmmapError, match="mode must be"):
        kvmmap.open(path, "w")  # type: ignore[arg-type]
    with pytest.raises(kvmmap.NotACacheError, match="no such kind of URL"):
        kvmmap.open("gopher://bucket/key.zarr")
    with pytest.raises(kvmmap.KvmmapError, match="durability"):
        make_file(path.with_name("b"), durability="always")


def test_a_removed_file_is_not_committed_silently(path: Path) -> None:
    cache = make_file(path, 3)
    path.unlink()
    fill(cache, 5)
    with pytest.raises(kvmmap.CacheChangedError, match="removed or replaced"):
        cache.flush()
    with pytest.raises(kvmmap.CacheChangedError):
        cache.close()
    assert cache.closed


def test_an_unclosed_writer_is_warned_about(path: Path) -> None:
    cache = make_file(path, 3)
    with pytest.warns(ResourceWarning, match="not closed"):
        del cache
    with kvmmap.open(path, "a") as again:
        check_filled(again, 3)


def test_a_renamed_file_remains_usable(path: Path) -> None:
    with make_file(path, 3) as cache:
        path.rename(path.with_name("moved.kvm"))
        fill(cache, 5)
        cache.flush()
    with kvmmap.open(path.with_name("moved.kvm")) as cache:
        check_filled(cache, 5)
