"""Verification on first read: the first read of a damaged block raises, and no block is hashed twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.support import check_filled, fill, make_file, rows

import kvmmap
from kvmmap.format import SLAB_SECTIONS, Section
from kvmmap.storage.file.verified_blocks import VerifiedBlocks

LENGTH = 600
"""Two blocks of 256, and a tail of 88."""


def flip(path: Path, section: int, layer: int | None = None, at: int = 0) -> None:
    """Flip a bit of a section of the file, without the handles' knowledge."""
    with kvmmap.open(path, verify="none") as cache:
        superblock = cache.storage.superblock  # type: ignore[attr-defined]
        offset = superblock.section(section, *([] if layer is None else [layer])).offset + at
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


READS: dict[str, Callable[[kvmmap.QuantizedKvLayer], Any]] = {
    "get_key": lambda layer: layer.get_key(300, 1),
    "get_value": lambda layer: layer.get_value(300, 1),
    "get_keys_at": lambda layer: layer.get_keys_at(511),
    "get_values_at": lambda layer: layer.get_values_at(256),
    "read_keys": lambda layer: layer.read_keys(0, 300),
    "read_values": lambda layer: layer.read_values(400),
    "read_quantized": lambda layer: layer.read_quantized(256, 257),
    "attend": lambda layer: layer.attend(rows(1, 2, 8)),
    "attend, a window": lambda layer: layer.attend(rows(1, 2, 8), window=100),
    "attend, a block": lambda layer: layer.attend(rows(1, 2, 8), positions=[1]),
    "attend, a block a head": lambda layer: layer.attend(rows(1, 2, 8), positions=[[0], [1]]),
    "attend, streamed": lambda layer: layer.attend(rows(1, 2, 8), resident="stream"),
    "key_codes": lambda layer: layer.key_codes,
    "key_scales": lambda layer: layer.key_scales,
    "value_codes": lambda layer: layer.value_codes,
    "value_scales": lambda layer: layer.value_scales,
}
OTHERS: dict[str, Callable[[kvmmap.QuantizedKvLayer], Any]] = {
    "get_key": lambda layer: layer.get_key(255, 1),
    "read_keys": lambda layer: layer.read_keys(512),
    "attend, a window": lambda layer: layer.attend(rows(1, 2, 8), window=88),
    "attend, a window and sinks": lambda layer: layer.attend(rows(1, 2, 8), window=88, sinks=3),
    "attend, other blocks": lambda layer: layer.attend(rows(1, 2, 8), positions=[0, 2]),
    "attend, a range": lambda layer: layer.attend(rows(1, 2, 8), positions=(0, 256)),
}
"""What reads nothing of block 1."""


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("kind", SLAB_SECTIONS, ids=lambda kind: Section(kind).name)
def test_every_read_of_a_damaged_block_raises(path: Path, kind: int, mode: Any) -> None:
    make_file(path, LENGTH).close()
    row = {16: 16, 17: 8, 18: 16, 19: 8}[kind]
    flip(path, kind, 1, 400 * row + 5)
    for name, read in READS.items():
        if name == "attend, a window":
            continue  # sees only the last 100
        with kvmmap.open(path, mode) as cache:
            with pytest.raises(kvmmap.CorruptCacheError, match=r"layer 1 .* \[256, 512\), block 1.*kvmmap repair") as e:
                read(cache.layers[1])
            assert (e.value.path, e.value.layer, e.value.position) == (str(path), 1, 256), name
            read(cache.layers[0])
            for harmless in OTHERS.values():
                harmless(cache.layers[1])
            with pytest.raises(kvmmap.CorruptCacheError):
                read(cache.layers[1])  # it is not forgotten


@pytest.mark.parametrize("section", [Section.CHECKSUMS, Section.KEY_CODES])
def test_a_tail_and_stored_checksums_count(path: Path, section: Section) -> None:
    make_file(path, LENGTH).close()
    if section == Section.CHECKSUMS:
        flip(path, section, None, 8 * (1 * 2 + 1))  # of block 1, layer 1
        damaged, sound = 256, 512
    else:
        flip(path, section, 1, 520 * 16)
        damaged, sound = 599, 511
    with kvmmap.open(path) as cache:
        cache.layers[1].get_key(sound, 0)
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[1].get_key(damaged, 0)


@pytest.mark.parametrize(("place", "start"), [(3, 0), (300, 256), (590, 512)])
def test_token_ids_are_verified(path: Path, place: int, start: int) -> None:
    make_file(path, LENGTH).close()
    flip(path, Section.TOKEN_IDS, None, 4 * place)
    with kvmmap.open(path) as cache:
        cache.layers[0].read_keys()
        with pytest.raises(kvmmap.CorruptCacheError, match=rf"token ids .*\[{start}, ") as error:
            _ = cache.token_ids
        assert (error.value.layer, error.value.position) == (None, start)
    with kvmmap.open(path, verify="none") as cache:
        assert cache.token_ids[place] != place


def test_verified_blocks_are_not_hashed_again(path: Path) -> None:
    make_file(path, LENGTH).close()
    with kvmmap.open(path) as cache:
        cache.layers[0].read_keys(256, 300)
        flip(path, Section.KEY_CODES, 0, 300 * 16)
        cache.layers[0].get_key(300, 0)  # its block was verified
        flip(path, Section.KEY_CODES, 0, 100 * 16)
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[0].read_keys()
    with kvmmap.open(path) as cache, pytest.raises(kvmmap.CorruptCacheError):
        cache.layers[0].get_key(300, 0)


def test_a_grown_tail_is_verified_up_to_its_new_length(path: Path) -> None:
    with make_file(path, 300) as writer:
        writer.flush()
        with kvmmap.open(path) as reader:
            reader.layers[0].read_keys()
            fill(writer, 310)
            writer.flush()
            flip(path, Section.VALUE_CODES, 0, 305 * 16)
            reader.layers[0].read_keys()  # 300 positions, all verified
            reader.refresh()
            with pytest.raises(kvmmap.CorruptCacheError):
                reader.layers[0].read_keys()


def test_truncation_discards_verified_blocks_of_readers(path: Path) -> None:
    with make_file(path, LENGTH) as writer:
        writer.flush()
        with kvmmap.open(path) as reader:
            check_filled(reader, LENGTH)
            writer.truncate(100)
            fill(writer, LENGTH)
            writer.flush()
            flip(path, Section.KEY_CODES, 1, 50 * 16)
            with pytest.raises(kvmmap.CacheChangedError):
                reader.layers[1].read_keys()
            reader.refresh()
            with pytest.raises(kvmmap.CorruptCacheError):
                reader.layers[1].get_key(3, 0)


def test_overwritten_blocks_are_reported_as_changed_not_damaged(path: Path) -> None:
    """A reader reads, for the first time, rows that its writer has truncated and overwritten."""
    with make_file(path, LENGTH) as writer:
        writer.flush()
        with kvmmap.open(path) as reader:
            writer.truncate(0)
            writer.extend(rows(2, 50, 2, 8, seed=5), rows(2, 50, 2, 8, seed=6))
            with pytest.raises(kvmmap.CacheChangedError):
                reader.layers[0].read_keys()
            with pytest.raises(kvmmap.CacheChangedError):
                _ = reader.token_ids


def test_a_writer_does_not_verify_its_own_rows(path: Path) -> None:
    with make_file(path, 300) as cache:
        cache.flush()
        flip(path, Section.KEY_CODES, 0, 3)
        cache.layers[0].read_keys()
    with kvmmap.open(path, "a", verify="read") as cache:
        fill(cache, LENGTH)
        cache.flush()
        cache.layers[0].read_keys(256)
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[0].read_keys()
        cache.truncate(256)
        fill(cache, LENGTH)
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[0].read_keys()
        cache.truncate(0)
        fill(cache, LENGTH)
        check_filled(cache, LENGTH)
    with kvmmap.open(path) as cache:
        check_filled(cache, LENGTH)


def test_uncommitted_rows_have_no_checksum(path: Path) -> None:
    with make_file(path, 300) as writer:
        writer.flush()
        fill(writer, LENGTH)
        flip(path, Section.KEY_CODES, 0, 400 * 16)
        with kvmmap.open(path) as reader:
            reader.layers[0].read_keys()  # published alone
            reader.layers[1].read_keys()


def test_a_cut_block_of_token_ids_is_verified_before_its_new_checksum(path: Path) -> None:
    make_file(path, LENGTH).close()
    flip(path, Section.TOKEN_IDS, None, 4 * 300)
    with kvmmap.open(path, "a") as cache:
        with pytest.raises(kvmmap.CorruptCacheError, match="nothing was truncated"):
            cache.truncate(400)
        cache.truncate(256)
        fill(cache, LENGTH)
    with kvmmap.open(path) as cache:
        check_filled(cache, LENGTH)


@pytest.mark.parametrize("verify", ["open", "none"])
def test_damage_is_not_detected_with_verify_none(path: Path, verify: Any) -> None:
    make_file(path, LENGTH).close()
    flip(path, Section.KEY_CODES, 0, 3)
    with kvmmap.open(path, verify=verify) as cache:
        cache.layers[0].read_keys()


@pytest.mark.parametrize("mode", ["r", "a"])
def test_verify_open_checks_all_after_a_machine_crash(path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    with make_file(path, LENGTH) as cache:
        cache.flush()
        monkeypatch.setattr(type(cache.storage), "_close_commit", lambda self: None)
    with kvmmap.open(path, mode, verify="open") as cache:
        check_filled(cache, LENGTH)
    flip(path, Section.KEY_CODES, 1, 300 * 16)
    with kvmmap.open(path, verify="open"):
        pass  # its writer died, and the machine did not
    monkeypatch.setattr("kvmmap.storage.file.live_record.boot_id", lambda: 1)
    with pytest.raises(kvmmap.CorruptCacheError, match=r"was not closed.*layer 1, positions \[256, 512\).*repair"):
        kvmmap.open(path, mode, verify="open")
    with kvmmap.open(path, mode) as cache:
        assert cache.seq_len == LENGTH


def test_verify_accepts_three_values(path: Path) -> None:
    make_file(path, 3).close()
    with pytest.raises(kvmmap.KvmmapError, match='"read", "open" or "none"'):
        kvmmap.open(path, verify="always")  # type: ignore[arg-type]


def test_verified_blocks_match_a_plain_list() -> None:
    random = np.random.default_rng(0)
    size, capacity = 4, 50
    for _ in range(300):
        verified, model, covered = VerifiedBlocks(1, capacity, size), [0] * 13, 0
        for _ in range(12):
            covered = int(random.integers(covered, capacity + 1))
            ranges = np.sort(random.integers(0, capacity + 1, (int(random.integers(0, 4)), 2)), axis=1)
            wanted = [min(size, max(0, covered - size * block)) for block in range(13)]
            touched = [
                any(
                    start < min(stop, covered) and start // size <= block <= (min(stop, covered) - 1) // size
                    for start, stop in ranges
                )
                for block in range(13)
            ]
            expected = [block for block in range(13) if touched[block] and model[block] < wanted[block]]
            assert verified.missing(0, ranges, covered).tolist() == expected
            for block in expected:
                verified.note(0, block, wanted[block])
                model[block] = wanted[block]
            verified.sum_up(0, covered)
            gap = next((block for block in range(13) if model[block] < wanted[block]), None)
            assert verified.below[0] == (covered if gap is None else gap * size)
            if random.random() < 0.3:
                length = int(random.integers(0, covered + 1))
                verified = verified.cut(length)
                model = [min(rows, max(0, length - size * block)) for block, rows in enumerate(model)]
                covered = min(covered, length)
