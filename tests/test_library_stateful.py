"""The library against a dictionary from segments' names to token ids: matches are the longest, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers.library_support import NAMESPACE, check_consistent, check_rows, compute, prompt, say, text
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import kvmmap
from kvmmap.library.hashing import common_length

EXAMPLES = int(os.environ.get("KVMMAP_LIBRARY_EXAMPLES", "6"))
LENGTHS = st.sampled_from([1, 3, 40, 63, 64, 65, 150, 256, 300])
SEEDS = st.integers(0, 2)


class LibraryMachine(RuleBasedStateMachine):
    """Sessions, branches, evictions, crashes and lost indexes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.known: dict[str, np.ndarray] = {}
        """Token ids of each segment's chain, by its name."""
        self.pinned: set[str] = set()
        self.library = kvmmap.Library(self.folder / "library")

    @initialize(length=LENGTHS)
    def first(self, length: int) -> None:
        self._say(text(length, 0))

    def teardown(self) -> None:
        self.library.close()
        shutil.rmtree(self.folder)

    def longest(self, ids: np.ndarray) -> int:
        return max((common_length(known, ids) for known in self.known.values()), default=0)

    def draw(self, data: st.DataObject, seed: int, length: int) -> np.ndarray:
        """A prompt that begins as something known does, or anew."""
        if not self.known or data.draw(st.integers(0, 4)) == 0:
            return text(length, seed)
        base = self.known[data.draw(st.sampled_from(sorted(self.known)))]
        kept = data.draw(st.one_of(st.just(len(base)), st.integers(0, len(base))))
        return prompt(base[:kept], text(length, seed))

    def _say(self, ids: np.ndarray, limit: int | None = None) -> None:
        wanted = ids if limit is None else ids[:limit]
        expected = self.longest(wanted)
        assert self.library.match(NAMESPACE, ids, limit=limit).length == expected
        with self.library.session(NAMESPACE, ids, limit=limit) as session:
            assert session.reused == expected
            check_rows(session, ids[:expected])
            compute(session, ids)
            check_rows(session, ids)
            new = self.longest(ids) < len(ids)  # of a prompt that is there already, nothing is kept
        if new:
            self.known[session.name] = np.asarray(ids)

    @rule(data=st.data(), seed=SEEDS, length=LENGTHS)
    def session(self, data: st.DataObject, seed: int, length: int) -> None:
        self._say(self.draw(data, seed, length))

    @rule(data=st.data(), seed=SEEDS, length=LENGTHS)
    def all_but_the_last(self, data: st.DataObject, seed: int, length: int) -> None:
        ids = self.draw(data, seed, length)
        self._say(ids, len(ids) - 1)

    @rule(data=st.data(), seed=SEEDS, length=LENGTHS)
    def match(self, data: st.DataObject, seed: int, length: int) -> None:
        ids = self.draw(data, seed, length)
        found = self.library.match(NAMESPACE, ids)
        assert found.length == self.longest(ids)
        if found.length:
            with self.library.open(found) as cache:
                check_rows(cache, ids[: found.length])

    @rule(data=st.data(), seed=SEEDS, length=LENGTHS)
    def put(self, data: st.DataObject, seed: int, length: int) -> None:
        ids = self.draw(data, seed, length)
        path = self.folder / "other"
        with kvmmap.Library(path) as other:
            say(other, ids)
            with other.open(other.match(NAMESPACE, ids)) as cache:
                segment = self.library.put(cache, NAMESPACE)
        shutil.rmtree(path)
        if segment.name not in self.known or len(ids) > len(self.known[segment.name]):
            self.known[segment.name] = np.asarray(ids)
        assert self.longest(ids) == len(ids)

    @rule(data=st.data(), seed=SEEDS, length=LENGTHS, flushed=st.booleans(), killed=st.booleans())
    def another_process(self, data: st.DataObject, seed: int, length: int, flushed: bool, killed: bool) -> None:
        ids = self.draw(data, seed, length)

        def work() -> None:
            session = self.library.session(NAMESPACE, ids)
            compute(session, ids)
            if flushed:
                session.flush()
            if killed:
                os._exit(0)
            session.close()

        in_child(work)
        expected = max(self.longest(ids), len(ids) if flushed or not killed else 0)
        assert self.library.match(NAMESPACE, ids).length == expected
        if killed:
            self.library.check()
        found = self.library.match(NAMESPACE, ids)
        assert found.length == len(ids)  # what it published counts, as soon as somebody looks
        self._learn()

    def _learn(self) -> None:
        """Take the segments over that another process has made or continued."""
        for entry in self.library.entries():
            chain = self.library._index.chain(entry)
            parts = []
            for one, following in zip(chain, [*chain[1:], None], strict=True):
                with kvmmap.open(one.path) as cache:
                    ids = cache.token_ids
                parts.append(ids[one.start : following.start if following else one.stop])
            self.known[entry.name] = np.concatenate(parts)

    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        before = self.library.stats().bytes
        planned = self.library.evict(int(before * share) or 1, dry_run=True)
        gone = self.library.evict(int(before * share) or 1)
        assert {choice.segment.name for choice in planned} == {choice.segment.name for choice in gone}
        for choice in gone:
            assert choice.segment.name not in self.pinned
            del self.known[choice.segment.name]
        left = self.library.entries()
        assert {entry.name for entry in left} == set(self.known)
        if not all(self._keeps_a_pin(entry.name) for entry in left):
            assert self.library.stats().bytes <= max(before * share, 1)

    def _keeps_a_pin(self, name: str) -> bool:
        entries = {entry.name: entry for entry in self.library.entries()}
        return entries[name].pinned or any(
            entry.parent == name and self._keeps_a_pin(entry.name) for entry in entries.values()
        )

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if self.known:
            name = data.draw(st.sampled_from(sorted(self.known)))
            self.library.pin(name)
            self.pinned |= {entry.name for entry in self.library.entries() if entry.pinned}

    @rule()
    def unpin(self) -> None:
        self.library.unpin(*sorted(self.pinned & set(self.known)))
        self.pinned.clear()

    @rule(how=st.sampled_from(["rebuild", "check", "delete", "overwrite", "reopen"]))
    def maintain(self, how: str) -> None:
        if how in ("rebuild", "check"):
            report = self.library.rebuild() if how == "rebuild" else self.library.check()
            assert (report.broken, report.removed, report.busy) == ((), (), ())
        elif how == "delete":
            for path in (self.folder / "library").glob("index.sqlite3*"):
                path.unlink()
        elif how == "overwrite":
            (self.folder / "library" / "index.sqlite3").write_bytes(b"no database" * 999)
        else:
            self.library.close()
            self.library = kvmmap.Library(self.folder / "library")

    @invariant()
    def consistent(self) -> None:
        check_consistent(self.library)
        entries = self.library.entries()
        assert {entry.name for entry in entries} == set(self.known)
        disk = sum(path.stat().st_blocks * 512 for path in (self.folder / "library").rglob("*.kvm"))
        assert self.library.stats().bytes == disk
        assert {entry.name for entry in entries if entry.pinned} == self.pinned & set(self.known)


def in_child(work: Callable[[], None]) -> None:
    """Do something in a forked process, and wait for it."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


TestLibrary = LibraryMachine.TestCase
TestLibrary.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=12 if EXAMPLES < 50 else 40,
    deadline=None,
    derandomize=EXAMPLES < 50,
    suppress_health_check=list(HealthCheck),
)
