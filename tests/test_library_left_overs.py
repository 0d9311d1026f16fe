"""What a machine that crashed, or a process that died, leaves in a library's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from helpers.library_support import NAMESPACE, compute, say, text

import kvmmap
from kvmmap.format import Section
from kvmmap.storage.file.mapped_file import read_superblock
from kvmmap.storage.posix import PosixFile


def blank(path: Path, what: str) -> None:
    """Leave of a file what a power loss may leave that was never synced."""
    if what == "empty":
        os.truncate(path, 0)
        return
    file = PosixFile.open(str(path), writable=True)
    superblock = read_superblock(file)
    if what == "zeros":
        file.write((0,), (bytes(superblock.size),))
    else:
        for section in (Section.SLOT_A, Section.SLOT_B):
            extent = superblock.section(section)
            file.write((extent.offset,), (bytes(extent.size),))
    file.close()


@pytest.mark.parametrize("what", ["empty", "zeros", "no commits"])
@pytest.mark.parametrize("indexed", [True, False])
def test_files_that_were_never_synced_are_removed(tmp_path: Path, what: str, indexed: bool) -> None:
    kept = text(300, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, kept)
        pid = os.fork()
        if not pid:  # a process that is killed after it appended to a new segment, and committed nothing
            session = library.session(NAMESPACE, text(50, 1))
            compute(session, text(50, 1))
            (tmp_path / "name").write_text(str(session.path))
            os._exit(0)
        os.waitpid(pid, 0)
        path = Path((tmp_path / "name").read_text())
        blank(path, what)
        if not indexed:
            library._index.remove(path.stem)
        report = library.check()
        assert (report.broken, report.busy) == ((), ())
        assert not path.exists()
        assert [entry.stop for entry in library.entries()] == [300]
        assert library.match(NAMESPACE, kept).length == 300


@pytest.mark.parametrize("what", ["empty", "zeros", "no commits"])
def test_a_damaged_segment_that_was_committed_is_kept(tmp_path: Path, what: str) -> None:
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, text(300, 0))
        (entry,) = library.entries()
        blank(Path(entry.path), what)
        library.check()
        library.verify()
        assert Path(entry.path).exists()
        assert library.match(NAMESPACE, text(300, 0)).length == 0
        assert say(library, text(300, 0)) == 0


def test_temporary_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, text(300, 0))
        folder = Path(library.entries()[0].path).parent
        old, young = (folder / f".{name * 12}.kvm.{name * 12}.tmp" for name in "ab")
        for path in (old, young):
            path.write_bytes(b"half of a segment")
        os.utime(old, (time.time() - 9999,) * 2)
        library.check()
        assert not old.exists()
        assert young.exists()
