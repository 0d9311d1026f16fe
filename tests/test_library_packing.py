"""Segments as streams in parts, which arrive in any order."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import kvmmap
from kvmmap.library.packing import PART_BYTES, Packed, digest, unpack
from kvmmap.storage.posix import PosixFile


def make(path: Path) -> bytes:
    """A file of data and holes, some three parts long."""
    data = np.random.default_rng(0).bytes(5 << 19)
    with open(path, "wb") as file:
        for number in range(14):
            file.seek(number * (8 << 20))
            file.write(data[number:])
        file.truncate(14 * (8 << 20))
    return path.read_bytes()


def packed(path: Path) -> list[bytes]:
    file = PosixFile.open(str(path), writable=False)
    parts = [b"".join(part) for part in Packed(file).parts()]
    file.close()
    return parts


def restore(path: Path, parts: list[bytes], digests: list[str], last_first: bool = False) -> None:
    others = threading.Event()

    def fetch(number: int) -> Iterator[memoryview]:
        if last_first and number == 0:
            others.wait(30)
        view = memoryview(parts[number])
        for start in range(0, len(view), 1 << 20):
            if number == len(parts) - 1:
                others.set()
            yield view[start : start + (1 << 20)]

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        unpack([partial(fetch, number) for number in range(len(parts))], fd, str(path), digests)
    finally:
        os.close(fd)


@pytest.mark.parametrize("last_first", [False, True])
def test_parts_in_any_order(tmp_path: Path, last_first: bool) -> None:
    content = make(tmp_path / "a")
    parts = packed(tmp_path / "a")
    assert [len(part) for part in parts[:-1]] == [PART_BYTES] * (len(parts) - 1)
    assert len(parts) == 3
    restore(tmp_path / "b", parts, [digest([memoryview(part)]) for part in parts], last_first)
    assert (tmp_path / "b").read_bytes() == content
    assert (tmp_path / "b").stat().st_blocks * 512 < len(content) // 2  # holes stay holes


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("how", ["flipped", "cut off", "gone", "longer", "header"])
def test_damaged_parts(tmp_path: Path, number: int, how: str) -> None:
    make(tmp_path / "a")
    parts = packed(tmp_path / "a")
    digests = [digest([memoryview(part)]) for part in parts]
    if how == "gone":
        del parts[number]
    elif how == "header":
        parts[0] = b"KVMPACK1\x02\0\0\0{}" + parts[0][14:]
        digests[0] = digest([memoryview(parts[0])])
    else:
        data = bytearray(parts[number])
        if how == "flipped":
            data[len(data) // 2] ^= 1
        elif how == "cut off":
            del data[-5:]
        else:
            data += b"more"
        parts[number] = bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="damaged or cut off"):
        restore(tmp_path / "b", parts, digests)
