"""A committed file of each format version still opens, and this version still writes the very same bytes."""

from __future__ import annotations

import contextlib
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from helpers import codec_oracle

import kvmmap
from kvmmap.format import LIVE, Section
from kvmmap.storage.file.reader import MappedReader

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make import (  # noqa: E402
    LENGTH,
    codec_rows,
    golden_rows,
    golden_states,
    make,
    make_child,
    make_codecs,
    make_recent,
    make_states,
    recent_rows,
)


@pytest.mark.parametrize("name", ["v1.kvm", "v1-sketches.kvm"])
def test_version_1_opens(name: str) -> None:
    with kvmmap.open(GOLDEN / name) as cache:
        assert (cache.num_layers, cache.seq_len, cache.capacity) == (2, LENGTH, 300)
        assert cache.metadata == {"purpose": "golden", "version": 1}
        assert cache.model == kvmmap.ModelInfo(name="golden", source_dtype="float32", rope={"theta": 10000.0})
        np.testing.assert_array_equal(cache.token_ids, np.arange(LENGTH))
        for number, layer in enumerate(cache.layers):
            for codes, scales, rows in (
                (layer.key_codes, layer.key_scales, golden_rows(0)[number]),
                (layer.value_codes, layer.value_scales, golden_rows(12345)[number]),
            ):
                expected_codes, expected_scales = kvmmap.quantize_rows(rows)
                np.testing.assert_array_equal(codes, expected_codes)
                np.testing.assert_array_equal(scales, expected_scales)
        assert cache.verify().sound


@pytest.mark.parametrize("name", ["v1.kvm", "v1-sketches.kvm"])
def test_version_1_is_appended_to(name: str, path: Path) -> None:
    shutil.copy(GOLDEN / name, path)
    with kvmmap.open(path, "a") as cache:
        cache.extend(golden_rows(7)[:, :30], golden_rows(7)[:, :30])
    with kvmmap.open(path) as cache:
        assert cache.seq_len == LENGTH + 30
        assert cache.verify().sound


def test_every_codec_of_version_1_opens() -> None:
    """With rows that are those of plain numpy."""
    with kvmmap.open(GOLDEN / "v1-codecs.kvm") as cache:
        assert cache.seq_len == 10
        assert cache.verify().sound
        for number, layer in enumerate(cache.layers):
            stored = layer.read_quantized()
            keys, values = codec_rows(0)[number, :, 0], codec_rows(1)[number, :, 0]
            expected = [
                array
                for codec, rows in ((layer.geometry.key_codec, keys), (layer.geometry.value_codec, values))
                for array in codec_oracle.encode(codec.name, rows)
                if array is not None
            ]
            for found, array in zip(stored, expected, strict=True):
                np.testing.assert_array_equal(
                    np.ascontiguousarray(found).view(np.uint8).reshape(-1), array.view(np.uint8).reshape(-1)
                )


def test_states_of_version_1_open() -> None:
    """As docs/format.md says, byte by byte, without the package's code for states."""
    data = (GOLDEN / "v1-states.kvm").read_bytes()
    layers, sections, features = struct.unpack_from("<III", data, 60)
    assert (layers, features) == (3, 1)
    at = 72 + 16 * layers
    table = [struct.unpack_from("<HHIQQ", data, at + 24 * number) for number in range(sections)]
    slots = {layer: offset for kind, _, layer, offset, _ in table if kind == 32}
    assert sorted(slots) == [0, 1, 2, 3]
    (slot_a,) = [offset for kind, _, _, offset, _ in table if kind == 1]
    named = [struct.unpack_from("<QQ", data, slot_a + 80 + 8 * 4 + 16 * number) for number in range(4)]
    assert sorted(word for word, _ in named) == [0, 0, 2 + 2 * 20, 1 + 2 * 50]
    for number, (word, expected) in enumerate(named):
        if word:
            position, at = (word - 1) // 2, slots[number]
            assert data[at : at + 4] == b"CKPT"
            assert struct.unpack_from("<QQ", data, at + 24)[0] == position
            head = data[at : at + 48 + 8 * 3]
            assert struct.unpack_from("<Q", data, at + len(head))[0] == expected == xxhash.xxh3_64_intdigest(head)
            at += 4096
            for state, digest in zip(golden_states(position), struct.unpack_from("<3Q", head, 48), strict=True):
                assert data[at : at + state.nbytes] == state.tobytes()
                assert xxhash.xxh3_64_intdigest(state.tobytes()) == digest
                at += -(-state.nbytes // 64) * 64
    with kvmmap.open(GOLDEN / "v1-states.kvm") as cache:
        assert (cache.seq_len, cache.rows_beyond_checkpoint, cache.checkpoints) == (50, 5, ((20, True), (50, False)))
        for found, expected in zip(cache.read_states(20).values(), golden_states(20), strict=True):
            assert found.tobytes() == expected.tobytes()
        assert cache.verify().sound


def test_a_file_that_continues_another_opens() -> None:
    with kvmmap.open(GOLDEN / "v1-parent.kvm") as cache:
        assert (cache.num_layers, cache.seq_len, cache.capacity) == (2, 259 + LENGTH, 600)
        np.testing.assert_array_equal(cache.token_ids, [*range(259), *range(LENGTH)])
        for number, layer in enumerate(cache.layers):
            for codes, first, second in ((layer.key_codes, 0, 777), (layer.value_codes, 12345, 999)):
                expected = np.concatenate([golden_rows(first)[number, :259], golden_rows(second)[number]])
                np.testing.assert_array_equal(codes, kvmmap.quantize_rows(expected)[0])
        assert cache.verify().sound


def test_rows_in_16_bits_of_version_1_open() -> None:
    """Whole numbers, which f16 and bfloat16 hold: those that are kept come back as they were."""
    rows = recent_rows()
    with kvmmap.open(GOLDEN / "v1-recent.kvm") as cache:
        assert (cache.seq_len, cache.geometry.recent_window, cache.geometry.sinks) == (21, 8, 3)
        for layer, keys in zip(cache.layers, rows, strict=True):
            found = layer.read_keys()
            np.testing.assert_array_equal(found[:3], keys[:3])
            np.testing.assert_array_equal(found[13:20], keys[13:20])
            np.testing.assert_array_equal(found[20], keys[20].astype(ml_dtypes.bfloat16).astype(np.float32))
            kept = layer.recent_rows()
            assert kept is not None
            assert kept.num_held(21) == 11
        report = cache.verify()
        assert report.sound
        assert not report.inexact


WRITERS = [
    ("v1-sketches.kvm", make),
    ("v1-codecs.kvm", make_codecs),
    ("v1-states.kvm", make_states),
    ("v1-recent.kvm", make_recent),
]
WRITERS.append(("v1-parent.kvm", make_child))


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_version_1_is_written_byte_for_byte(path: Path, name: str, write: Callable[[Path], None]) -> None:
    """All but one word, which stands for the place that the file has its name in."""
    shutil.copy(GOLDEN / "v1-sketches.kvm", path.parent)
    write(path)
    with contextlib.closing(MappedReader.open(str(path))) as reader:
        live = reader.superblock.section(Section.LIVE).offset
    named = live + next(offset for offset, _, field in LIVE.rows() if field.name == "named")
    written, golden = path.read_bytes(), (GOLDEN / name).read_bytes()
    assert written[:named] == golden[:named]
    assert written[named + 8 :] == golden[named + 8 :]
