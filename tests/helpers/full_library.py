"""Use a library on a tmpfs that is full: `python -m helpers.full_library FOLDER`, which test_library_full_disk runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvmmap
from helpers.full_disk import fill_up
from helpers.library_support import NAMESPACE, check_consistent, compute, prompt, say, text


def main() -> None:
    folder = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", folder], check=True)
    ballast = folder / "ballast"
    with kvmmap.Library(folder / "library") as library:
        # Without a budget the disk is the limit.
        seed = 0
        while not library.stats().evictions:
            say(library, text(400, seed))
            seed += 1
        assert library.match(NAMESPACE, text(400, seed - 1)).length == 400
        session = library.session(NAMESPACE, text(300, 1000))
        fill_up(ballast)
        compute(session, text(300, 1000))
        session.close()
        assert library.match(NAMESPACE, text(300, 1000)).length == 300
        assert say(library, prompt(text(300, 1000), [1])) == 300
        assert say(library, text(300, 1001)) == 0
        library.check()
        check_consistent(library)
        # Where nothing may go, an error says so, and what was there stays.
        for entry in library.entries():
            library.pin(entry.name)
        pinned = len(library.entries())
        ballast.unlink()
        fill_up(ballast)
        with pytest.raises(kvmmap.LibraryFullError, match="the disk is full"):
            fill_with_pinned(library, folder)
        assert library.match(NAMESPACE, text(300, 1000)).length == 300
    ballast.unlink()
    with kvmmap.Library(folder / "library") as library:
        assert len([entry for entry in library.entries() if entry.pinned]) >= pinned
        assert say(library, text(300, 3000)) == 0
        assert library.check().broken == ()
        check_consistent(library)
    print("sound")


def fill_with_pinned(library: kvmmap.Library, folder: Path) -> None:
    for number in range(1000):
        say(library, text(300, 2000 + number))
        library.pin(*[entry.name for entry in library.entries()])
        fill_up(folder / f"more {number}")


if __name__ == "__main__":
    main()
