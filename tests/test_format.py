"""The file as bytes: every record round-trips, and invalid ones are refused before they are used."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvmmap import (
    CacheGeometry,
    CorruptCacheError,
    NotACacheError,
    ShapeMismatchError,
    VersionMismatchError,
    _core,
    state_spec,
)
from kvmmap import geometry as geometries
from kvmmap.format import HEADER, PAGE, Extent, Section, Slot, Superblock, checksum, tables
from kvmmap.format.records import MAX_SUPERBLOCK_BYTES

GEOMETRY = CacheGeometry.build(num_layers=3, capacity=1000, num_kv_heads=[2, 4, 2], head_dim=8, value_head_dim=6)


def plan(geometry: CacheGeometry = GEOMETRY) -> Superblock:
    return Superblock.plan(geometry, file_id=bytes(range(16)), created_ns=123, metadata_bytes=5000)


def read(data: bytes, file_bytes: int) -> Superblock:
    """Read a superblock like a reader does."""
    return Superblock.decode(data[: Superblock.peek(data[: HEADER.size], "f")], "f", file_bytes)


def resigned(data: bytearray) -> bytes:
    """Return the superblock with its checksum recomputed."""
    return bytes(data[:-8]) + checksum(bytes(data[:-8])).to_bytes(8, "little")


def test_superblock_round_trip() -> None:
    superblock = plan()
    data = superblock.encode()
    assert len(data) == superblock.size == Superblock.peek(data[: HEADER.size], "f")
    assert Superblock.decode(data, "f", superblock.file_bytes) == superblock


def test_sections_are_pages_of_their_own() -> None:
    for layers in (1, 30, 1000):
        superblock = plan(CacheGeometry.build(num_layers=layers, capacity=513, num_kv_heads=1, head_dim=3))
        end = superblock.size
        for offset, size in sorted(superblock.sections.values()):
            assert offset % PAGE == 0
            assert offset >= end
            end = offset + size
        assert end <= superblock.file_bytes


def test_a_section_table_of_layers_of_many_shapes() -> None:
    heads, dims = [1 + number % 3 for number in range(60)], [8 * (1 + number % 2) for number in range(60)]
    superblock = plan(CacheGeometry.build(num_layers=60, capacity=700, num_kv_heads=heads, head_dim=dims))
    table = Superblock.decode(superblock.encode(), "f", superblock.file_bytes).sections
    assert dict(table) == superblock.sections
    assert len(table) == len(superblock.sections)
    assert (Section.KEY_CODES, 60) not in table
    assert table.get((Section.LIVE, 0)) is None
    for number in range(60):  # a section of another layer's shape
        sections = dict(superblock.sections)
        offset, size = sections[Section.VALUE_CODES, number]
        sections[Section.VALUE_CODES, number] = Extent(offset, size - 1)
        wrong = replace(superblock, sections=sections).encode()
        with pytest.raises(CorruptCacheError, match=rf"VALUE_CODES has {size - 1} bytes for {size}"):
            Superblock.decode(wrong, "f", superblock.file_bytes)


def test_files_of_the_same_shapes_share_a_layout_that_was_checked_once() -> None:
    one, other = plan(), replace(plan(), file_id=bytes(16), created_ns=9)
    first, second = (Superblock.decode(each.encode(), "f", each.file_bytes) for each in (one, other))
    assert (first, second) == (one, other)
    assert first.sections is second.sections
    assert first.geometry is second.geometry
    table_at = one.size - 8 - 24 * len(one.sections)
    for entry in range(table_at, one.size - 8, 24):  # one that differs in a single bit is checked, too
        for field in (0, 4, 8, 16):  # kind, layer, offset and size
            data = bytearray(one.encode())
            data[entry + field] ^= 1
            with pytest.raises((CorruptCacheError, VersionMismatchError)):
                Superblock.decode(resigned(data), "f", one.file_bytes)


def test_a_capacity_beyond_four_gigabytes() -> None:
    superblock = plan(CacheGeometry.build(num_layers=2, capacity=2**30, num_kv_heads=8, head_dim=128))
    assert superblock.section(Section.VALUE_CODES, 1).offset > 2**40
    assert Superblock.decode(superblock.encode(), "f", superblock.file_bytes) == superblock


@pytest.mark.parametrize(
    ("start", "error"),
    [
        (b"", NotACacheError),
        (b"GGUF" + bytes(200), NotACacheError),
        (b"KVMMAP\x00\x01", NotACacheError),
        (b"KVMMAP\x00\x02" + bytes(200), NotACacheError),
        (b"KVMMAP\x00\x01" + (2).to_bytes(4, "little") + bytes(200), VersionMismatchError),
        (b"KVMMAP\x00\x01" + (1).to_bytes(4, "little") + bytes(200), CorruptCacheError),
        (b"KVMMAP\x00\x01" + (1).to_bytes(4, "little") + b"\xff" * 200, CorruptCacheError),
    ],
)
def test_peek_refuses(start: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        Superblock.peek(start[: HEADER.size], "f")


def test_every_flipped_bit_of_the_superblock_is_detected() -> None:
    superblock = plan()
    data = superblock.encode()
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            with pytest.raises((NotACacheError, VersionMismatchError, CorruptCacheError)):
                read(bytes(damaged), superblock.file_bytes)


def test_unknown_codec_is_named() -> None:
    data = bytearray(plan().encode())
    data[HEADER.size + 16 + 12] = 99  # the key codec of layer 1
    with pytest.raises(VersionMismatchError, match=r"layer 1 has key codec 99.*int8-row") as caught:
        Superblock.decode(resigned(data), "f", 2**40)
    assert caught.value.layer == 1


def test_unknown_section_is_refused_unless_optional() -> None:
    superblock = plan()
    data = bytearray(superblock.encode())
    extra = bytes(data[-8 - 24 : -8])
    offset = superblock.file_bytes
    for flags in (0, 1):
        entry = (99).to_bytes(2, "little") + flags.to_bytes(2, "little") + extra[4:8] + offset.to_bytes(8, "little")
        longer = bytearray(data[:-8] + entry + (10).to_bytes(8, "little") + bytes(8))
        longer[12:16] = len(longer).to_bytes(4, "little")
        sections = HEADER.unpack(data)["num_sections"] + 1
        at = next(at for at, _, field in HEADER.rows() if field.name == "num_sections")
        longer[at : at + 4] = sections.to_bytes(4, "little")
        at = next(at for at, _, field in HEADER.rows() if field.name == "file_bytes")
        longer[at : at + 8] = (offset + PAGE).to_bytes(8, "little")
        if flags:
            found = Superblock.decode(resigned(longer), "f", 2**40)
            assert found.geometry == superblock.geometry
        else:
            with pytest.raises(VersionMismatchError, match="kind 99"):
                Superblock.decode(resigned(longer), "f", 2**40)


def test_slot_round_trip_and_flips() -> None:
    superblock = plan()
    slot = Slot(
        sequence=7,
        seq_len=300,
        token_len=290,
        generation=2,
        commit_ns=99,
        closed=True,
        metadata_half=1,
        metadata_bytes=17,
        metadata_checksum=2**64 - 1,
        tail_checksums=(1, 2, 3, 4),
    )
    data = slot.encode(superblock.file_id)
    assert len(data) == superblock.section(Section.SLOT_A).size
    assert Slot.decode(data, superblock) == slot
    assert Slot.decode(slot.encode(bytes(16)), superblock) is None
    assert Slot.decode(data[:-1], superblock) is None
    for place in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            assert Slot.decode(bytes(damaged), superblock) is None


def test_checked_words_are_as_specified() -> None:
    text = (Path(__file__).parent.parent / "docs/format.md").read_text()
    code = re.search(r"```python\n(def mix.*?)\n\nword = (.*?)\n```", text, re.DOTALL)
    assert code

    class Wrapping(int):
        def __add__(self, other: int) -> Wrapping:
            return Wrapping(int(self) + int(other) & 2**64 - 1)

        def __mul__(self, other: int) -> Wrapping:
            return Wrapping(int(self) * int(other) & 2**64 - 1)

        def __xor__(self, other: int) -> Wrapping:
            return Wrapping(int(self) ^ int(other))

        def __rshift__(self, other: int) -> Wrapping:
            return Wrapping(int(self) >> other)

    scope: dict[str, object] = {}
    exec(code[1], scope)
    for value, index, salt in ((0, 0, 0), (1, 8, 2**63 + 5), (2**40 - 1, 1000, 12345), (256, 9, 2**64 - 1)):
        scope |= {"v": Wrapping(value), "i": index, "salt": Wrapping(salt)}
        assert int(eval(code[2], scope)) == _core.checked_word(value, index, salt)  # type: ignore[call-overload]


def test_every_flipped_bit_of_a_checked_word_is_detected() -> None:
    for value in (0, 1, 255, 256, 65535, 131072, 2**39):
        word = _core.checked_word(value, 12, 987654321)
        for bit in range(64):
            flipped = (word ^ 1 << bit).to_bytes(8, "little")
            assert _core.load_checked(flipped, 0, 1, 12, 987654321) == [-1]
        assert _core.load_checked(word.to_bytes(8, "little"), 0, 1, 12, 987654321) == [value]
        assert _core.load_checked(word.to_bytes(8, "little"), 0, 1, 13, 987654321) == [-1]


def test_the_specification_has_the_tables_of_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs/format.md").read_text()
    found = re.search(r"<!-- tables -->\n(.*)<!-- end of tables -->", text, re.DOTALL)
    assert found
    assert found[1].strip() == tables().strip(), "run: python -m kvmmap.format, and put it between the markers"


def test_the_specification_has_the_limits_of_the_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text()

    def number(cell: str) -> int:
        power, _, less = cell.replace(",", "").partition(" - ")
        base, _, exponent = power.partition("^")
        return int(base) ** int(exponent or 1) - int(less or 0)

    lines = text.partition("## Limits")[2].partition("## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    most = {row[0]: number(row[2]) for row in cells[2:]}
    assert most == {
        "layers, at least one of them with rows": geometries.MAX_LAYERS,
        "`num_kv_heads`, `head_dim`, `value_head_dim` of a layer with rows": geometries.MAX_HEADS,
        "`capacity`": geometries.MAX_CAPACITY,
        "`capacity` with states": geometries.MAX_STATE_CAPACITY,
        "`block_tokens`": 2**20,
        "bytes of an array of a layer": geometries.MAX_SLAB_BYTES,
        "recent window, sinks": geometries.MAX_RECENT,
        "states": state_spec.MAX_STATES,
        "bytes of a checkpoint's tensors": state_spec.MAX_CHECKPOINT_BYTES,
        "checkpoints that are kept": state_spec.MAX_CHECKPOINT_SLOTS,
        "bytes of the superblock": MAX_SUPERBLOCK_BYTES,
    }
    assert geometries.MAX_HEADS == geometries.MAX_HEAD_DIM
    build = CacheGeometry.build
    shape: dict[str, Any] = {"num_layers": 1, "capacity": 1, "num_kv_heads": 1, "head_dim": 1}
    for name, what in (
        ("num_layers", "layers, at least one of them with rows"),
        ("capacity", "`capacity`"),
        ("recent_window", "recent window, sinks"),
        ("sinks", "recent window, sinks"),
        ("head_dim", "`num_kv_heads`, `head_dim`, `value_head_dim` of a layer with rows"),
    ):
        build(**shape | {name: most[what]})
        with pytest.raises(ShapeMismatchError, match=name):
            build(**shape | {name: most[what] + 1})
