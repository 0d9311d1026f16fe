"""Flipped bits and truncated files: each is reported or harmless; no wrong value is ever returned.

Three files are looked at: one that was closed; one whose writer has died, with positions that were published and not
committed; and the same after the machine crashed. Every byte of superblock, commit records, live record and
checksums is changed, 500 single bits over each whole file (2,000 in a sweep), and its end is cut off at every
section's edge. After each, everything that can be read is, and compared. The permitted outcomes are listed below, by
section; `python tests/test_damage.py` prints how often each did.

The mutation checks leave out what this rests upon, one at a time, and must see a wrong value served.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers.support import MEMORY

import kvmmap
from kvmmap import _core
from kvmmap.format import LIVE, SLAB_SECTIONS, WHOLE_CACHE, Section
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.metadata import Document
from kvmmap.storage.file.mapped_file import MappedFile
from kvmmap.storage.file.snapshot import SnapshotHolder
from kvmmap.storage.file.writer import MappedWriter

GEOMETRY = CacheGeometry(100, (LayerGeometry(2, 8, 4), LayerGeometry(1, 16, 16)), block_tokens=16)
COMMITTED, PUBLISHED = 40, 72
"""Two blocks and a half; two more published."""
SAMPLES = 2000
EVERY_BIT = bool(os.environ.get("KVMMAP_EVERY_BIT"))
"""Change every bit of the records, as `make soak` does, and not one of each byte."""

REFUSED, TOLD, VERIFY, HARMLESS, SHORTER, WRONG = "refused", "told", "verify", "harmless", "shorter", "WRONG"
OUTCOMES = {
    REFUSED: "opening raises",
    TOLD: "what would be wrong raises when it is read, and verify tells",
    VERIFY: "all that is read is right, and verify tells",
    HARMLESS: "all that is read is right",
    SHORTER: "what is read is right, and ends where the last commit does",
    WRONG: "a wrong value: rows that no commit covers have no checksum yet",
}

EXPECTED = {
    "superblock": {REFUSED},
    "commit record that counts": {
        "closed": {VERIFY},  # the other one says the same
        "died": {REFUSED},  # the one before has other metadata, and covers less
        "down": {REFUSED},  # the one before has less
    },
    "other commit record": {
        "closed": {VERIFY},
        "died": {HARMLESS},  # the next to be written anyway
        "down": {HARMLESS},
    },
    "boot id": {
        "closed": {HARMLESS},  # only 0 and the present one mean something
        "died": {SHORTER},  # looks as if the machine had crashed
        "down": {HARMLESS},
    },
    "generation": {"closed": {HARMLESS}, "died": {VERIFY}, "down": {HARMLESS}},  # compared as it lies there
    "acknowledged": {"closed": {HARMLESS}, "died": {VERIFY}, "down": {HARMLESS}},  # the record itself holds
    "writer_pid": {"closed": {HARMLESS}, "died": {VERIFY}, "down": {HARMLESS}},  # for messages
    "named": {HARMLESS},  # the name is synced once more
    "superseded": {"closed": {HARMLESS}, "died": {VERIFY}, "down": {HARMLESS}},  # the file's name tells as well
    "published lengths": {"closed": {HARMLESS}, "died": {REFUSED}, "down": {HARMLESS}},  # read in one of them alone
    "home": {"closed": {HARMLESS}, "died": {REFUSED}, "down": {HARMLESS}},  # goes with the published lengths
    "metadata that counts": {TOLD},
    "token ids": {TOLD},
    "checksums": {TOLD},
    "committed rows": {TOLD},
    "sketches": {VERIFY},  # computed anew from the rows where they are needed
    "uncommitted rows and ids": {"closed": {HARMLESS}, "died": {WRONG}, "down": {HARMLESS}},
    "nothing": {HARMLESS},  # between sections, beyond lengths, and where fields are reserved
}
"""By what lies there, and by file where that matters: what may come of a change."""


@dataclass
class Specimen:
    """A file to damage, and what it holds."""

    name: str
    path: Path
    data: bytes
    boot: int | None
    """What this machine's boot id is to be; None for the real one."""
    which: int
    committed: int
    length: int
    truth: dict[str, Any]
    places: list[tuple[int, int, str]]
    """(start, stop, what lies there), rising; "nothing" between."""

    @contextlib.contextmanager
    def machine(self) -> Iterator[None]:
        """The machine on which the file is opened."""
        if self.boot is None:
            yield
        else:
            with mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=self.boot):
                yield

    def what(self, offset: int) -> str:
        """Return the name of the section at an offset."""
        return next((what for start, stop, what in self.places if start <= offset < stop), "nothing")

    def allowed(self, what: str) -> set[str]:
        found = EXPECTED[what]
        return found if isinstance(found, set) else found[self.name]  # type: ignore[index]


def make(folder: Path, name: str) -> Specimen:
    """Create a file, and record its section map."""
    path = folder / f"{name}.kvm"
    writer = MappedWriter.create(str(path), GEOMETRY, Document(None, {"note": "x" * 20}), metadata_room=100)
    cache = kvmmap.QuantizedKvCache.of_storage(writer)
    fill(cache, COMMITTED // 2)
    cache.flush()
    fill(cache, COMMITTED)
    cache.metadata = {"note": "y" * 30}
    cache.flush()
    if name == "closed":
        fill(cache, PUBLISHED)
        cache.close()
    else:
        fill(cache, PUBLISHED)
        writer.file.close()  # as the end of its process would
    boot = 12345 if name == "down" else None
    specimen = Specimen(name, path, path.read_bytes(), boot, 0, 0, 0, {}, [])
    with specimen.machine(), kvmmap.open(path) as reader:
        specimen.truth = look(reader)
        snapshot = reader.storage.snapshot  # type: ignore[attr-defined]
        specimen.which, specimen.committed, specimen.length = snapshot.which, snapshot.slot.seq_len, reader.seq_len
        specimen.places = list(layout(reader, specimen))
    return specimen


def fill(cache: kvmmap.QuantizedKvCache, length: int) -> None:
    start, count = cache.seq_len, length - cache.seq_len
    random = np.random.default_rng(length)
    keys = [random.standard_normal((count, g.num_kv_heads, g.head_dim)) for g in GEOMETRY.layers]
    values = [random.standard_normal((count, g.num_kv_heads, g.value_head_dim)) for g in GEOMETRY.layers]
    cache.extend(
        [part.astype(np.float32) for part in keys],
        [part.astype(np.float32) for part in values],
        np.arange(start, length),
    )


def layout(reader: kvmmap.QuantizedKvCache, specimen: Specimen) -> Iterator[tuple[int, int, str]]:
    """Return the section map."""
    storage: Any = reader.storage
    superblock, slot = storage.superblock, storage.snapshot.slot

    def at(kind: int, layer: int = WHOLE_CACHE) -> int:
        return int(superblock.sections[kind, layer].offset)

    yield 0, superblock.size, "superblock"
    for number, kind in enumerate((Section.SLOT_A, Section.SLOT_B)):
        counts = number == specimen.which
        name = "commit record that counts" if counts else "other commit record"
        yield at(kind), at(kind) + superblock.section(kind).size, name
    for offset, size, field in LIVE.rows():
        name = "boot id" if field.name.startswith("boot_id") else field.name
        name = {"token_len": "published lengths"}.get(name, name)
        yield at(Section.LIVE) + offset, at(Section.LIVE) + offset + size, name
    yield at(Section.LIVE) + LIVE.size, at(Section.LIVE) + LIVE.size + 16, "published lengths"
    yield at(Section.LIVE) + LIVE.size + 16, at(Section.LIVE) + LIVE.size + 24, "home"
    half = at(Section.METADATA) + slot.metadata_half * superblock.section(Section.METADATA).size // 2
    yield half, half + slot.metadata_bytes, "metadata that counts"
    rows = [(at(Section.TOKEN_IDS), 4, "token ids")]
    for number, shape in enumerate(GEOMETRY.layers):
        offsets = [at(kind, number) for kind in SLAB_SECTIONS]
        rows += [(offset, row, "committed rows") for offset, row in zip(offsets, shape.slab_bytes(1), strict=True)]
    for offset, row, name in rows:
        yield offset, offset + row * specimen.committed, name
        yield offset + row * specimen.committed, offset + row * PUBLISHED, "uncommitted rows and ids"
    blocks = specimen.committed // GEOMETRY.block_tokens
    yield at(Section.CHECKSUMS), at(Section.CHECKSUMS) + 8 * 2 * blocks, "checksums"
    yield at(Section.TOKEN_CHECKSUMS), at(Section.TOKEN_CHECKSUMS) + 8 * blocks, "checksums"
    yield at(Section.SKETCH_CHECKSUMS), at(Section.SKETCH_CHECKSUMS) + 8 * 2 * blocks, "sketches"
    for number, shape in enumerate(GEOMETRY.layers):
        offset = at(Section.KEY_SKETCHES, number)
        yield offset, offset + shape.sketch_bytes(blocks), "sketches"


def look(cache: kvmmap.QuantizedKvCache, length: int | None = None) -> dict[str, Any]:
    """Read everything: name -> value, or None where reading reports damage."""
    found: dict[str, Any] = {}

    def note(name: str, read: Callable[[], Any]) -> None:
        try:
            found[name] = read()
        except kvmmap.CorruptCacheError:
            found[name] = None

    found["length"] = cache.seq_len
    stop = cache.seq_len if length is None else length
    found["created"] = cache.facts()["created_ns"]
    note("metadata", lambda: cache.metadata)
    note("token ids", lambda: cache.token_ids[:stop].tolist())
    for number, layer in enumerate(cache.layers):
        for start in range(0, stop, GEOMETRY.block_tokens):
            end = min(start + GEOMETRY.block_tokens, stop)
            note(
                f"rows {number} {start}",
                lambda layer=layer, start=start, end=end: [part.tobytes() for part in layer.read_quantized(start, end)],
            )
        queries = np.ones((1, layer.num_kv_heads, layer.head_dim), np.float32)
        note(
            f"attention {number}",
            lambda layer=layer, queries=queries: layer.attend(queries, positions=(0, stop), threads=1).tobytes(),
        )
        note(f"blocks {number}", lambda layer=layer, queries=queries: layer.select_blocks(queries[0], 2).tolist())
    return found


def examine(specimen: Specimen) -> str:
    """Open a changed file, read everything, and return the outcome."""
    try:
        cache = kvmmap.open(specimen.path)
    except kvmmap.FormatError:
        return REFUSED
    with cache:
        truth, outcome = specimen.truth, HARMLESS
        if cache.seq_len == specimen.committed != specimen.length:
            outcome, truth = SHORTER, shorter(specimen)
        found = look(cache)
        if found.keys() != truth.keys():
            return WRONG
        silent = [name for name, value in found.items() if value is not None and value != truth[name]]
        if silent:
            return WRONG
        sound = cache.verify().sound
        if None in found.values():
            return WRONG if sound else TOLD
        return outcome if sound else VERIFY


def shorter(specimen: Specimen) -> dict[str, Any]:
    """What the last commit holds."""
    with specimen.path.with_suffix(".copy").open("wb") as file:
        file.write(specimen.data)
    with mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=777), kvmmap.open(file.name) as cache:
        return look(cache)


Change = tuple[int, int]
"""Offset, and what its byte is XORed with."""


def sweep(specimen: Specimen, changes: Iterable[Change], *, strict: bool = True) -> Counter[tuple[str, str]]:
    """Make changes one at a time, and count the outcomes by section.

    Raises:
        AssertionError: something came of one that may not (if `strict`).
    """
    counts: Counter[tuple[str, str]] = Counter()
    no_waiting = mock.patch("time.sleep")  # for a writer to finish with a record: there is none
    with specimen.machine(), no_waiting, open(specimen.path, "r+b", buffering=0) as file:
        for offset, bits in changes:
            file.seek(offset)
            file.write(bytes([specimen.data[offset] ^ bits]))
            what, outcome = specimen.what(offset), examine(specimen)
            file.seek(offset)
            file.write(specimen.data[offset : offset + 1])
            counts[what, outcome] += 1
            assert not strict or outcome in specimen.allowed(what), (
                f"{specimen.name} file, byte {offset} ({what}) changed by {bits:#04x}: {outcome}"
            )
    return counts


def every_byte(specimen: Specimen, *names: str, every_bit: bool = EVERY_BIT) -> Iterator[Change]:
    """Every byte of the sections with these names, whole and by a bit of its own; or by every bit, if asked for."""
    for start, stop, what in specimen.places:
        if what in names:
            for offset in range(start, stop):
                some = range(8) if every_bit else (offset * 5 % 8,)
                yield from ((offset, bits) for bits in (*(1 << bit for bit in some), 0xFF))


def sampled(specimen: Specimen, samples: int = SAMPLES) -> Iterator[Change]:
    """Single bits: half of them anywhere in the file, half where something lies."""
    random = Random(specimen.name)
    for number in range(samples):
        offset = random.randrange(len(specimen.data))
        if number % 2:
            start, stop, _ = random.choice(specimen.places)
            offset = random.randrange(start, max(stop, start + 1))
        yield offset, 1 << random.randrange(8)


NAMES = ("closed", "died", "down")
SAMPLED = {"committed rows", "token ids", "uncommitted rows and ids", "sketches", "nothing"}
RECORDS = [what for what in EXPECTED if what not in SAMPLED]


@pytest.fixture(scope="module")
def specimens() -> Iterator[dict[str, Specimen]]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield {name: make(Path(folder), name) for name in NAMES}


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_the_records(specimens: dict[str, Specimen], name: str) -> None:
    counts = sweep(specimens[name], every_byte(specimens[name], *RECORDS))
    assert {what for what, _ in counts} == set(RECORDS)


@pytest.mark.parametrize("samples", [SAMPLES // 4, pytest.param(SAMPLES, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", NAMES)
def test_bits_anywhere(specimens: dict[str, Specimen], name: str, samples: int) -> None:
    counts = sweep(specimens[name], sampled(specimens[name], samples))
    assert counts.total() == samples


@pytest.mark.parametrize("name", NAMES)
def test_files_that_end_early(specimens: dict[str, Specimen], name: str) -> None:
    """At the edges of every section, and a byte before and behind."""
    specimen = specimens[name]
    with specimen.machine(), kvmmap.open(specimen.path) as cache:
        extents = cache.storage.superblock.sections.values()  # type: ignore[attr-defined]
        edges = {0, *[extent.offset for extent in extents], *[extent.offset + extent.size for extent in extents]}
    whole = len(specimen.data)
    for edge in sorted(edges | {whole}):
        for size in (edge - 1, edge, edge + 1):
            if 0 <= size < whole:
                specimen.path.write_bytes(specimen.data[:size])
                with specimen.machine():
                    assert examine(specimen) == REFUSED, size
    for more in (1, 4096):
        specimen.path.write_bytes(specimen.data + bytes(more))
        with specimen.machine():
            assert examine(specimen) == HARMLESS
    specimen.path.write_bytes(specimen.data)


# The mutation check: each check is left out, one at a time, and a wrong value must show.


def believed(body: memoryview) -> int:
    """Return the stored checksum instead of computing one."""
    return int.from_bytes(bytes(memoryview(body.obj)[len(body) : len(body) + 8]), "little")


def unchecked(memory: Any, offset: int, count: int, index: int, salt: int) -> list[int]:
    return [_core.load_word(memory, offset + 8 * number) & (2**40 - 1) for number in range(count)]


MUTATIONS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "rows not compared with their checksums": (
        lambda: mock.patch("kvmmap.storage.file.reader_layer.verify_rows"),
        "closed",
        "committed rows",
    ),
    "token ids not compared with theirs": (
        lambda: mock.patch("kvmmap.storage.file.reader.verify_tokens"),
        "closed",
        "token ids",
    ),
    "checks of words left out": (
        lambda: mock.patch(
            "kvmmap.storage.file.live_record._core",
            SimpleNamespace(load_word=_core.load_word, load_checked=unchecked),
        ),
        "died",
        "published lengths",
    ),
    "superblock's checksum not checked": (
        lambda: mock.patch("kvmmap.format.superblock.checksum", believed),
        "closed",
        "superblock",
    ),
    "commit record's checksum not checked": (
        lambda: mock.patch("kvmmap.format.slot.checksum", believed),
        "closed",
        "commit record that counts",
    ),
    "metadata's checksum not checked": (
        lambda: mock.patch.object(
            MappedFile,
            "document",
            lambda self, slot: Document.decode(metadata(self, slot), self.path),
        ),
        "closed",
        "metadata that counts",
    ),
    "acknowledged commits not missed": (
        lambda: mock.patch.object(SnapshotHolder, "_contradiction", return_value=None),
        "down",
        "commit record that counts",
    ),
}
"""What is left out, and the file and the place in it that show it."""


def metadata(reader: Any, slot: Any) -> bytes:
    section = reader.superblock.section(Section.METADATA)
    start = section.offset + slot.metadata_half * section.size // 2
    return bytes(reader.memory[start : start + slot.metadata_bytes])


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_check_is_necessary(specimens: dict[str, Specimen], name: str) -> None:
    mutation, file, what = MUTATIONS[name]
    with mutation():
        changes = list(every_byte(specimens[file], what, every_bit=True))
        counts = sweep(specimens[file], Random(0).sample(changes, min(len(changes), 600)), strict=False)
    assert counts[what, WRONG]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            specimen = make(Path(folder), name)
            counts = sweep(specimen, [*every_byte(specimen, *RECORDS), *sampled(specimen)])
            print(f"{name}: {counts.total():,} changes")
            for (what, outcome), count in sorted(counts.items()):
                print(f"  {what:28} {outcome:9} {count:6,}   {OUTCOMES[outcome]}")


if __name__ == "__main__":
    main()
