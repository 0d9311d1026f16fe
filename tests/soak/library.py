"""Kill processes that use a library at random moments, and check it: `python -m soak.library --kills 1000`.

Several processes have session after session on shared prefixes, under a budget that is too small, until each is killed
with SIGKILL and another takes its place. Meanwhile, and after every 20 kills:

- what a lookup returns are the keys, values and token ids of the asked prefix, and nothing else;
- the budget is exceeded by at most the appends that are under way;
- no committed segment is lost but by eviction, and the index's sum is that of the files once all is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

import numpy as np
from helpers.library_support import NAMESPACE, check_consistent, check_rows, compute, prompt, text

import kvmmap
from kvmmap.library.index import GOING

BUDGET = 1_500_000
"""Bytes: some ten segments."""

SLACK = 600_000
"""Bytes that the appends under way, and the rounding of files to pages, may add."""

PROCESSES = 4

SESSIONS_A_KILL = 3
"""Sessions that end before the next process is killed, some moments later."""


class SoakError(AssertionError):
    """A guarantee was broken."""


def draw(random: Random) -> np.ndarray:
    """A prompt of a tree of prompts: a system prompt, a document, turns."""
    turns = [
        text(random.choice((5, 60, 200, 256)), 100 + 10 * turn + random.randrange(3))
        for turn in range(random.randrange(1, 4))
    ]
    return prompt(text(300, random.randrange(3)), *turns)


def worker(folder: Path, seed: int) -> None:
    """Have sessions until killed. Exits with 1 and a traceback if anything is wrong."""
    random = Random(seed)
    with kvmmap.Library(folder) as library, open(folder.parent / f"log-{os.getpid()}", "ab", buffering=0) as log:
        while True:
            ids = draw(random)
            found = library.match(NAMESPACE, ids)
            if found.length:
                with contextlib.suppress(kvmmap.CacheNotFoundError), library.open(found) as cache:
                    check_rows(cache, ids[: found.length])
            if random.random() < 0.05:
                library.check()
            with library.session(NAMESPACE, ids) as session:
                check_rows(session, ids[: session.reused])
                compute(session, ids, step=random.choice((None, 64, 17)))
                if random.random() < 0.2:
                    session.flush()
            log.write(b".")


class LibrarySoak:
    """A library and the processes that use it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = Random(seed)
        self.workers: dict[int, float] = {}
        self.most = 0
        self.kills = 0
        kvmmap.Library(folder / "library", BUDGET).close()

    def start(self) -> None:
        """Start a process."""
        seed = self.random.getrandbits(32)
        pid = os.fork()
        if pid:
            self.workers[pid] = time.monotonic()
            return
        code = 1
        try:
            worker(self.folder / "library", seed)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def run(self, kills: int) -> None:
        """Kill so many processes, and check."""
        while self.kills < kills:
            while len(self.workers) < PROCESSES:
                self.start()
            before, deadline = self.sessions(), time.monotonic() + 5
            while self.sessions() < before + SESSIONS_A_KILL and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(self.random.uniform(0, 0.1))
            self.look()
            pid = self.random.choice(sorted(self.workers))
            os.kill(pid, signal.SIGKILL)
            self.reap(pid)
            self.kills += 1
            if self.kills % 20 == 0:
                self.check()
        for pid in sorted(self.workers):
            os.kill(pid, signal.SIGKILL)
            self.reap(pid)
        self.check()

    def reap(self, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        del self.workers[pid]
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SoakError(f"process {pid} ended by itself: {status}")

    def look(self) -> None:
        """The budget holds on the disk at any moment."""
        size = 0
        for path in (self.folder / "library").rglob("*.kvm"):
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_blocks * 512
        self.most = max(self.most, size)
        if size > BUDGET + SLACK * PROCESSES:
            raise SoakError(f"{size:,} bytes on the disk, with a budget of {BUDGET:,}")

    def check(self) -> None:
        """With all processes stopped: everything is in order, and what was committed is found."""
        for pid in list(self.workers):
            os.kill(pid, signal.SIGKILL)
            self.reap(pid)
        committed = self.committed()
        for name in self.going():
            committed.pop(name, None)
        with kvmmap.Library(self.folder / "library") as library:
            report = library.check()
            if report.broken or report.busy:
                raise SoakError(f"broken {report.broken}, busy {report.busy}")
            check_consistent(library)
            entries = {entry.name: entry for entry in library.entries()}
            for name, ids in committed.items():
                if name not in entries or entries[name].stop < len(ids):
                    raise SoakError(f"{name} was committed with {len(ids)} positions, and is lost")
                if library.match(NAMESPACE, ids).length < len(ids):
                    raise SoakError(f"{name} is there, and is not matched")
            disk = sum(path.stat().st_blocks * 512 for path in (self.folder / "library").rglob("*.kvm"))
            if library.stats().bytes != disk:
                raise SoakError(f"the index says {library.stats().bytes:,} bytes, and there are {disk:,}")
            library.evict()
            if library.stats().bytes > BUDGET:
                raise SoakError(f"{library.stats().bytes:,} bytes after evicting to {BUDGET:,}")

    def going(self) -> list[str]:
        """Return the segments that were about to be evicted when a process died."""
        with contextlib.closing(sqlite3.connect(self.folder / "library" / "index.sqlite3")) as connection:
            return [row[0] for row in connection.execute("SELECT name FROM segments WHERE broken = ?", (GOING,))]

    def committed(self) -> dict[str, np.ndarray]:
        """Return what the files have committed, past the library: what must not be lost."""
        found = {}
        for path in (self.folder / "library").rglob("*.kvm"):
            with contextlib.suppress(kvmmap.FormatError), kvmmap.open(path, recover=True, record_use=False) as cache:
                length = min(cache.seq_len, cache.token_len)
                if length > getattr(cache.storage, "base", 0):  # it has positions of its own
                    found[path.stem] = cache.token_ids[:length]
        return found

    def sessions(self) -> int:
        """Return how many sessions came to their end."""
        return sum(path.stat().st_size for path in self.folder.glob("log-*"))


def main() -> int:
    """Run the soak as a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        soak = LibrarySoak(folder, options.seed)
        soak.run(options.kills)
        with kvmmap.Library(folder / "library") as library:
            stats = library.stats()
        print(
            f"{soak.kills} kills, {soak.sessions():,} sessions, {stats.hits:,} with a prefix, {stats.evictions:,} "
            f"evictions; at most {soak.most:,} bytes of {BUDGET:,}"
        )
        print("nothing lost, nothing wrong")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
