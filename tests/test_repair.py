"""Repair of a damaged file: all undamaged positions before the damage, and no others."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cli_support import run as run_cli
from helpers.support import check_filled, fill, make_file, run_python

import kvmmap
from kvmmap.format import Section
from kvmmap.storage.file.mapped_file import open_file, read_superblock

LENGTH = 600
"""Two blocks, and a tail of 88 positions."""


def flip(path: Path, section: int, layer: int | None = None, at: int = 0, count: int = 1) -> None:
    """Change bytes of a section of a file that nobody has open."""
    with contextlib.closing(open_file(str(path), writable=False)) as file:
        extent = read_superblock(file).section(Section(section), *([] if layer is None else [layer]))
    with path.open("r+b") as stream:
        stream.seek(extent.offset + at)
        data = stream.read(count)
        stream.seek(extent.offset + at)
        stream.write(bytes(byte ^ 0x41 for byte in data))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "new.kvm"


def save(path: Path, new: Path, **more: Any) -> kvmmap.RepairReport:
    """Repair, and assert that the damaged file is unchanged."""
    before = path.read_bytes()
    try:
        return kvmmap.repair(path, new, **more)
    finally:
        assert path.read_bytes() == before


def make(path: Path, length: int = LENGTH) -> None:
    with make_file(path, length, metadata={"note": 1}, model=kvmmap.ModelInfo(name="m")) as cache:
        cache.flush()


def check_new(new: Path, length: int, tokens: int | None = None) -> None:
    """Assert that the new file holds the first `length` positions unchanged, and can be appended to."""
    with kvmmap.open(new) as cache:
        assert cache.verify().sound
        assert cache.token_len == (length if tokens is None else tokens)
        if tokens is None:
            check_filled(cache, length)
    with kvmmap.open(new, "a") as cache:
        assert cache.capacity == 1000
        fill(cache, length + 3)
        cache.flush()
        if tokens is None:
            check_filled(cache, length + 3)


def test_an_undamaged_file_is_copied_completely(path: Path, new: Path) -> None:
    make(path)
    report = save(path, new)
    assert report.complete
    assert (report.stored, report.seq_len, report.unverified, report.token_len) == (LENGTH, LENGTH, 0, LENGTH)
    assert (report.metadata, report.damages, report.zeroed) == ("kept", [], [])
    check_new(new, LENGTH)
    with kvmmap.open(new) as cache:
        assert cache.metadata == {"note": 1}
        assert cache.model == kvmmap.ModelInfo(name="m")
    assert oct(new.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(("position", "kept"), [(3, None), (256, 256), (511, 256), (512, 512), (599, 512)])
@pytest.mark.parametrize("kind", [Section.KEY_CODES, Section.VALUE_SCALES])
def test_positions_end_before_the_first_damaged_block(
    path: Path, new: Path, kind: Section, position: int, kept: int | None
) -> None:
    make(path)
    flip(path, kind, 1, position * (16 if kind == Section.KEY_CODES else 8))
    if kept is None:
        with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 1, positions \[0, 256\).*nothing was made"):
            save(path, new)
        assert sorted(path.parent.iterdir()) == [path]
        return
    report = save(path, new)
    assert (report.stored, report.seq_len, report.complete) == (LENGTH, kept, False)
    assert [(damage.layer, damage.start) for damage in report.damages] == [(1, kept)]
    check_new(new, kept)


def test_damaged_checksums_cost_their_block(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.CHECKSUMS, None, 8 * 2 * 1)
    assert save(path, new).seq_len == 256
    check_new(new, 256)


@pytest.mark.parametrize(("place", "kept"), [(0, 0), (300, 256), (550, 512)])
def test_damaged_token_ids_end_before_the_rows(path: Path, new: Path, place: int, kept: int) -> None:
    make(path)
    flip(path, Section.TOKEN_IDS, None, 4 * place)
    report = save(path, new)
    assert (report.seq_len, report.token_len, report.stored_token_len) == (LENGTH, kept, LENGTH)
    assert not report.complete
    with kvmmap.open(new) as cache, kvmmap.open(path, verify="none") as old:
        assert cache.token_ids.tolist() == [*range(kept), *[-1] * (LENGTH - kept)]
        np.testing.assert_array_equal(cache.layers[1].read_keys(), old.layers[1].read_keys())


@pytest.mark.parametrize("slot", [Section.SLOT_A, Section.SLOT_B])
def test_a_closed_file_has_two_commit_records(path: Path, new: Path, slot: Section) -> None:
    make(path)
    flip(path, slot, None, 30)
    report = save(path, new)
    assert report.complete
    assert ["commit record" in damage.what for damage in report.damages] == [True]
    check_new(new, LENGTH)


def die_uncommitted(path: Path, committed: int, flushed: int, published: int) -> None:
    """Create a file whose writer has died: committed, committed again, and appended to."""
    run_python(
        "import os, sys\n"
        "from helpers.support import *\n"
        "cache = make_file(Path(sys.argv[1]), int(sys.argv[2]))\n"
        "for argument in sys.argv[2:4]: fill(cache, int(argument)); cache.flush()\n"
        "fill(cache, int(sys.argv[4])); os._exit(0)",
        path,
        committed,
        flushed,
        published,
    )


def test_published_rows_are_saved(path: Path, new: Path) -> None:
    die_uncommitted(path, 100, 300, 700)
    report = save(path, new)
    assert (report.stored, report.seq_len, report.unverified) == (700, 700, 400)
    with kvmmap.open(new) as cache:
        assert cache.seq_len == 700
        assert cache.token_len == 300
        assert cache.verify().sound


def test_published_rows_are_dropped_after_a_machine_crash(
    path: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_uncommitted(path, 100, 300, 700)
    monkeypatch.setattr("kvmmap.storage.file.live_record.boot_id", lambda: 1)
    report = save(path, new)
    assert (report.stored, report.seq_len, report.unverified) == (300, 300, 0)
    check_new(new, 300)


def test_blocks_of_a_lost_commit_are_found_by_their_checksums(path: Path, new: Path) -> None:
    """The last commit record is damaged; the previous one has 100 positions, and two more blocks match."""
    die_uncommitted(path, 100, 600, 600)
    with kvmmap.open(path) as cache:
        which = cache.storage.snapshot.which  # type: ignore[attr-defined]
    flip(path, Section.SLOT_B if which else Section.SLOT_A, None, 30)
    report = save(path, new)
    assert (report.stored, report.seq_len) == (600, 512)
    assert "the last commit record is damaged" in report.damages[0].what
    with kvmmap.open(new) as cache:
        assert cache.verify().sound
        with kvmmap.QuantizedKvCache(2, 512, 2, 8) as model:
            fill(model, 512)
            np.testing.assert_array_equal(cache.layers[1].value_codes, model.layers[1].value_codes)


def test_a_lost_commit_does_not_restore_truncated_rows(path: Path, new: Path) -> None:
    """Rows and checksums of what was truncated are still there, and match."""
    with make_file(path, LENGTH) as cache:
        cache.flush()
        cache.truncate(100)
    for slot in (Section.SLOT_A, Section.SLOT_B):
        flip(path, slot, None, 30)
    with pytest.raises(kvmmap.CorruptCacheError, match="both commit records"):
        save(path, new)  # 100 positions are no complete block, and beyond them lies the past


def test_without_commit_records_complete_blocks_are_found(path: Path, new: Path) -> None:
    make(path)
    for slot in (Section.SLOT_A, Section.SLOT_B):
        flip(path, slot, None, 30)
    with pytest.raises(kvmmap.CorruptCacheError, match="kvmmap repair"):
        kvmmap.open(path)
    report = save(path, new)
    assert (report.stored, report.seq_len, report.token_len, report.metadata) == (LENGTH, 512, 512, "lost")
    check_new(new, 512)
    flip(path, Section.LIVE, None, 64)  # and without lengths
    new.unlink()
    assert save(path, new).seq_len == 512
    check_new(new, 512)


def test_a_damaged_live_record_costs_nothing_that_is_committed(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.LIVE, None, 0, 80)
    report = save(path, new)
    assert report.complete
    check_new(new, LENGTH)


def test_damaged_metadata_is_lost_or_that_of_the_commit_before(path: Path, new: Path) -> None:
    with make_file(path, 5, metadata={"note": 1}) as cache:
        cache.flush()
        cache.metadata = {"note": 2}
        cache.flush()
        half = cache.storage.superblock.section(Section.METADATA).size // 2  # type: ignore[attr-defined]
        data = path.read_bytes()
    path.write_bytes(data)  # as it was before it was closed, which would write both records
    flip(path, Section.METADATA, None, half + 3)
    report = save(path, new)
    assert report.metadata == "earlier"
    with kvmmap.open(new) as cache:
        assert cache.metadata == {"note": 1}
    flip(path, Section.METADATA, None, 3)
    new.unlink()
    report = save(path, new)
    assert (report.metadata, report.seq_len) == ("lost", 5)
    check_new(new, 5)


@pytest.mark.parametrize("cut", [1, 100_000])
def test_a_file_that_was_cut_off(path: Path, new: Path, cut: int) -> None:
    make(path)
    data = path.read_bytes()
    with contextlib.closing(open_file(str(path), writable=False)) as file:
        slab = read_superblock(file).section(Section.VALUE_SCALES, 1)  # the last of all
    path.write_bytes(data[: slab.offset + 8 * 300] if cut > 1 else data[:-cut])
    with pytest.raises(kvmmap.CorruptCacheError, match="cut off"):
        kvmmap.open(path)
    report = save(path, new)
    assert report.seq_len == (256 if cut > 1 else LENGTH)
    assert "cut off" in report.damages[0].what
    check_new(new, report.seq_len)


def test_zeros_by_name(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.KEY_CODES, 1, 300 * 16)
    report = save(path, new, zero=[(1, 1), (0, 0), (1, 2)])
    assert report.seq_len == LENGTH
    assert not report.complete
    assert [(one.layer, one.start, one.stop) for one in report.zeroed] == [(1, 256, 512)]
    with kvmmap.open(new) as cache, kvmmap.open(path, verify="none") as old:
        assert cache.verify().sound
        assert cache.metadata == {"note": 1, "kvmmap.repair": {"zeroed": [{"layer": 1, "start": 256, "stop": 512}]}}
        assert not cache.layers[1].read_keys(256, 512).any()
        assert not cache.layers[1].read_values(256, 512).any()
        np.testing.assert_array_equal(cache.layers[1].read_keys(512), old.layers[1].read_keys(512))
        np.testing.assert_array_equal(cache.layers[1].read_keys(0, 256), old.layers[1].read_keys(0, 256))
        np.testing.assert_array_equal(cache.layers[0].read_keys(), old.layers[0].read_keys())
        assert cache.token_ids.tolist() == [*range(256), *[-1] * 256, *range(512, LENGTH)]
        cache._check()


def test_zeros_for_token_ids(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.TOKEN_IDS, None, 4 * 300)
    report = save(path, new, zero=[(None, 1)])
    assert (report.seq_len, report.token_len) == (LENGTH, LENGTH)
    with kvmmap.open(new) as cache:
        assert cache.token_ids.tolist() == [*range(256), *[-1] * 256, *range(512, LENGTH)]


def test_zeros_for_token_ids_without_commit_records_are_reported(path: Path, new: Path) -> None:
    make(path)
    for slot in (Section.SLOT_A, Section.SLOT_B):
        flip(path, slot, None, 30)
    flip(path, Section.TOKEN_IDS, None, 300 * 4)
    report = save(path, new, zero=[(None, 1)])
    assert [(damage.layer, damage.start, damage.stop) for damage in report.zeroed] == [(None, 256, 512)]


def test_a_damaged_block_that_is_not_named_ends_the_copy(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.KEY_CODES, 1, 300 * 16)
    flip(path, Section.KEY_CODES, 0, 300 * 16)
    report = save(path, new, zero=[(1, 1)])
    assert (report.seq_len, report.zeroed) == (256, [])


def test_without_a_superblock_nothing_can_be_done(path: Path, new: Path) -> None:
    make(path)
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="nothing of this file can be recovered"):
        save(path, new)
    assert not new.exists()


def test_existing_targets_are_refused(path: Path, new: Path) -> None:
    make(path)
    new.write_bytes(b"mine")
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.repair(path, new)
    assert new.read_bytes() == b"mine"
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.repair(path, path)
    new.unlink()
    with kvmmap.open(path, "a"), pytest.raises(kvmmap.CacheLockedError):
        kvmmap.repair(path, new)
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.repair(path.with_name("none.kvm"), new)
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.repair(path.with_name("none.zarr"), new)


def test_the_command(path: Path, new: Path) -> None:
    make(path)
    flip(path, Section.KEY_CODES, 1, 300 * 16)
    done = run_cli("verify", path)
    assert done.returncode == 1
    assert "kvmmap repair PATH NEW_PATH" in done.stdout
    done = run_cli("repair", "--json", path, new)
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert (told["seq_len"], told["stored"], told["complete"]) == (256, LENGTH, False)
    new.unlink()
    done = run_cli("repair", "--zero", "1:1", path, new)
    assert f"{new}: all of 600 positions kept" in done.stdout
    assert "zeros now: layer 1, positions [256, 512)" in done.stdout
    done = run_cli("repair", "--zero", "1-1", path, new)
    assert done.returncode == 2
    assert "LAYER:BLOCK" in done.stderr
