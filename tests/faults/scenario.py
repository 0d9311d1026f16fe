"""Run under the shim: every system call of every scenario fails once, and in turn all from there on; then look.

After each failure: the error was an OSError or a KvmmapError, the file opens to a state that was promised, verify is
clean, and the next writer continues. A failed sync leaves the handle poisoned.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers.support import make_file

import kvmmap

shim = ctypes.CDLL(None)
shim.fault_failed.restype = ctypes.c_char_p
FOLDER = Path(os.environ["FAULT_FOLDER"])
PATH = FOLDER / "cache.kvm"
START = 270
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EINTR": errno.EINTR, "short": 0}


def rows(start: int, stop: int) -> np.ndarray:
    """f32 [2 layers, n, 2 heads, 8], whole numbers that the codec keeps."""
    grid = np.arange(start, stop)[:, None] * 31 + np.arange(2 * 2 * 8).reshape(2, 1, 16) * 17
    rows = (grid % 251 - 125).reshape(2, stop - start, 2, 8).astype(np.float32)
    rows[..., 0] = 127
    return rows


def fill(cache: kvmmap.QuantizedKvCache, length: int) -> None:
    start = cache.seq_len
    if start < length:
        cache.extend(rows(start, length), -rows(start, length), np.arange(start, length))


def check_filled(cache: kvmmap.QuantizedKvCache, length: int) -> None:
    assert cache.seq_len == length
    for layer, expected in zip(cache.layers, rows(0, length), strict=True):
        np.testing.assert_array_equal(layer.read_keys(stop=length), expected)
        np.testing.assert_array_equal(layer.read_values(stop=length), -expected)
    np.testing.assert_array_equal(cache.token_ids, np.arange(length))


def create() -> None:
    PATH.unlink()
    with make_file(PATH) as cache:
        fill(cache, 5)


def overwrite() -> None:
    make_file(PATH, 0, overwrite=True).close()


def append_and_flush() -> None:
    with kvmmap.open(PATH, "a") as cache:
        fill(cache, 300)
        cache.flush()
        cache.metadata = {"a": 1}
        fill(cache, 520)
        cache.flush()


def truncate() -> None:
    with kvmmap.open(PATH, "a") as cache:
        cache.truncate(100)
        fill(cache, 130)


def resize() -> None:
    kvmmap.resize(PATH, 2000)


def read() -> None:
    with kvmmap.open(PATH) as cache:
        check_filled(cache, START)
        damages = cache.verify().damages
        assert all("can't be read" in damage.what for damage in damages), damages
        if damages:
            raise OSError(damages[0].what)


def recover() -> None:
    """The file was not closed."""
    with kvmmap.open(PATH, "a") as cache:
        fill(cache, 280)


LENGTHS: dict[Callable[[], None], set[int]] = {
    create: {-1, START, *range(6)},
    overwrite: {START, 0},
    append_and_flush: {START, 300, 520},
    truncate: {START, 100, 130},
    resize: {START},
    read: {START},
    recover: {START, 280},
}


def prepare(kind: Callable[[], None]) -> None:
    for name in os.listdir(FOLDER):
        os.unlink(FOLDER / name)
    shutil.copyfile(FOLDER.with_suffix(".open" if kind is recover else ".closed"), PATH)


def look(kind: Callable[[], None], where: str) -> None:
    if not PATH.exists():
        assert -1 in LENGTHS[kind], where
        return
    with kvmmap.open(PATH) as reader:
        length = reader.seq_len
        assert length in LENGTHS[kind], (where, length)
        check_filled(reader, length)
        report = reader.verify()
        assert report.sound, (where, report.damages)
    with kvmmap.open(PATH, "a") as cache:
        check_filled(cache, length)
        fill(cache, length + 1)
    with kvmmap.open(PATH) as reader:
        check_filled(reader, length + 1)
        assert reader.verify().sound, where


def main() -> None:
    warnings.simplefilter("ignore", ResourceWarning)
    FOLDER.mkdir()
    with make_file(PATH) as cache:
        fill(cache, START)
    shutil.copyfile(PATH, FOLDER.with_suffix(".closed"))
    cache = kvmmap.open(PATH, "a")
    fill(cache, START)
    cache.flush()
    shutil.copyfile(PATH, FOLDER.with_suffix(".open"))
    cache.close()
    total, kinds = 0, set()
    for kind in LENGTHS:
        for name, number in ERRORS.items():
            for stay in (0, 1) if number in (errno.ENOSPC, errno.EIO) else (0,):  # EINTR for ever would be waited for
                after = 0
                while True:
                    prepare(kind)
                    where = f"{kind.__name__}: call {after} fails with {name}{', and all after it' if stay else ''}"
                    shim.fault_arm(after, number, stay)
                    try:
                        kind()
                        error = None
                    except (OSError, kvmmap.KvmmapError) as caught:
                        error = caught
                    failed = shim.fault_failed().decode()
                    shim.fault_disarm()
                    kinds.add(failed)
                    if not failed:
                        assert error is None, (where, error)
                        break
                    if number == 0:
                        assert error is None, (where, failed, error)  # short reads and writes are gone on with
                    try:
                        look(kind, f"{where} ({failed})")
                    except Exception as problem:
                        raise AssertionError(f"{where} ({failed}), error {error!r}") from problem
                    total += 1
                    after += 1
    print(total, *sorted(kinds - {""}))


if __name__ == "__main__":
    sys.exit(main())
