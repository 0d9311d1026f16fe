"""Kill writers with SIGKILL at random moments, and check the cache: `python -m soak.kills --kills 1000`.

One process forks the readers, and then one writer after the other. After each death: the lock is free at once, what the
writer had been told was published is there, what it had been told was committed is what a restarted machine would
find, and nothing else; `verify` finds nothing. The readers meanwhile never see a wrong byte.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np

import kvmmap

from .board import COUNTS, Board
from .content import DIM, HEADS, LAYERS, SINKS, WINDOW, check_recent, rows_of, verify_rows
from .model import Epochs, Log, Model, Operation
from .reader import Reader
from .writer import CAPACITIES, MUTATIONS, Writer


class SoakError(AssertionError):
    """A guarantee was broken."""


class Soak:
    """A cache, its readers, and one writer at a time."""

    def __init__(self, folder: Path, *, readers: int, seed: int, mutation: str, inherited: int = 0) -> None:
        self.folder, self.path = folder, folder / "cache.kvm"
        self.log, self.board = Log(folder / "log"), Board(readers)
        self.random, self.mutation = Random(seed), mutation
        self.epoch = 1
        self.counts: Counter[str] = Counter()
        self.inherited = np.ones(inherited, np.int64)
        self.model = Model(self.inherited, self.inherited, 0, 0, CAPACITIES[0])
        shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM}
        shape |= {"recent_window": WINDOW, "sinks": SINKS}
        if inherited:
            positions = np.arange(inherited)
            with kvmmap.create(folder / "parent.kvm", capacity=inherited, **shape) as parent:
                rows = (rows_of(value, positions, self.inherited) for value in (False, True))
                parent.extend(*rows, self.inherited)
            shape = {"parent": folder / "parent.kvm", "parent_length": inherited}
        kvmmap.create(self.path, capacity=CAPACITIES[0], metadata={"note": 0}, **shape).close()
        self.log.start()
        self.readers = [
            self.fork(f"reader {number}", Reader(self.path, self.board, number, self.random.getrandbits(32)).run)
            for number in range(readers)
        ]

    def fork(self, name: str, run: Callable[[], None]) -> int:
        """Run something in a process of its own; what it raises is kept in a file."""
        pid = os.fork()
        if pid:
            return pid
        try:
            run()
        except BaseException:
            (self.folder / "failed").write_text(f"{name}\n{traceback.format_exc()}")
            os._exit(1)
        os._exit(0)

    def kill_one(self) -> None:
        """One writer's life and death."""
        self.log.start()
        writer = Writer(self.path, self.log, self.board, self.model, self.epoch, self.random.getrandbits(32))
        writer.least = len(self.inherited)

        def live() -> None:
            with MUTATIONS[self.mutation]():
                writer.run()

        pid = self.fork("writer", live)
        self.wait_for_progress()
        if self.random.random() < 0.3:
            self.intrude()
        self.choose_moment(pid)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            raise SoakError(f"the writer ended by itself\n{self.failure()}")
        for number, reader in enumerate(self.readers):
            if os.waitpid(reader, os.WNOHANG)[0]:
                del self.readers[number]
                raise SoakError(f"a reader ended\n{self.failure()}")
        self.counts["kills"] += 1
        self.look_after_death()

    def wait_for_progress(self) -> None:
        """Until the writer has logged a random number of bytes: nothing yet, its opening, or some operations."""
        wanted = self.random.choice((0, 1, *[self.random.randint(1, 1500)] * 4))
        end = time.monotonic() + 20
        while self.log.size() < wanted and time.monotonic() < end and not (self.folder / "failed").exists():
            time.sleep(0.0002)

    def choose_moment(self, pid: int) -> None:
        """Kill the writer: at any moment, or soon after it has begun an operation."""
        if self.random.random() < 0.7:
            end = time.monotonic() + 0.5
            while self.log.idle() and time.monotonic() < end:
                pass
        pause = time.perf_counter() + self.random.random() * self.random.choice((0.0, 0.0001, 0.0005, 0.005))
        while time.perf_counter() < pause:
            pass
        os.kill(pid, signal.SIGKILL)

    def intrude(self) -> None:
        """A second writer is refused as long as the first one holds the cache."""
        before = self.board.get("holding")
        if before % 2 == 0:
            return  # not yet, and it is to find the lock free
        try:
            kvmmap.open(self.path, "a").close()
        except kvmmap.CacheLockedError:
            self.counts["second writers refused"] += 1
            return
        if self.board.get("holding") == before:
            raise SoakError("a second writer got in beside the first")
        self.counts["second writers between two"] += 1

    def look_after_death(self) -> None:
        done, current = self.log.read()
        model = self.model
        for operation in done:
            model = model.after(operation)
        self.counts["operations"] += len(done)
        self.counts[f"killed in {current.name if current else 'between two'}"] += 1
        after = model if current is None else model.after(current)
        with kvmmap.open(self.path) as cache:
            epochs = self.find("what was published", cache, (model.epochs, after.epochs))
            self.counts["rows in 16 bits after a death"] += check_recent(cache, epochs)
            capacity = cache.capacity
            if capacity not in (model.capacity, after.capacity):
                raise SoakError(f"capacity is {capacity}")
            report = cache.verify()
            if not report.sound:
                raise SoakError(f"verify after {current}: {report.damages}")
        with mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=1), kvmmap.open(self.path) as cache:
            committed = self.find("what was committed", cache, (model.committed, after.committed))
            self.counts["rows in 16 bits after a power loss"] += check_recent(cache, committed)
            note = cache.metadata["note"]
            if note not in (model.committed_note, after.committed_note):
                raise SoakError(f"the note is {note}, of {current}")
        self.model = Model(epochs, committed, note, note, capacity)
        self.settle_board([*done, current] if current else done)
        for left in self.folder.glob(".cache.kvm.*.tmp"):  # of a resize that was killed
            left.unlink()
            self.counts["temporary files left"] += 1

    def find(self, what: str, cache: kvmmap.QuantizedKvCache, candidates: Sequence[Epochs]) -> Epochs:
        """Return the candidate that a cache holds."""
        found = verify_rows(cache, 0, cache.seq_len)
        for epochs in candidates:
            if np.array_equal(found, epochs):
                return epochs
        done, current = self.log.read()
        lengths = sorted({len(epochs) for epochs in candidates})
        raise SoakError(f"{what} is lost: {len(found)} positions for {lengths}, after {done[-3:]} and in {current}")

    def settle_board(self, begun: Sequence[Operation]) -> None:
        """Say what readers may rely upon after this death."""
        cuts = [operation for operation in begun if operation.name == "truncate"]
        length = len(self.model.epochs)
        if self.board.get("truncations") % 2:  # killed within a truncation: it has happened or not
            if cuts and length == cuts[-1].number:
                self.board.put("cut_length", length)
                self.board.put("cut_epoch", self.epoch + len(cuts) - 1)
            self.board.put("acknowledged", length)
            self.board.put("truncations", self.board.get("truncations") + 1)
        self.board.put("holding", (self.board.get("holding") | 1) + 1)
        self.epoch += len(cuts) + 1

    def failure(self) -> str:
        """What a process that ended by itself has left."""
        file = self.folder / "failed"
        return file.read_text() if file.exists() else "and said nothing"

    def stop(self) -> None:
        """Let the readers end."""
        self.board.put("stop", 1)
        for reader in self.readers:
            if os.waitpid(reader, 0)[1]:
                raise SoakError(f"a reader ended\n{self.failure()}")

    def report(self) -> str:
        """What was done, a line each."""
        for name in COUNTS:
            total = sum(self.board.counted(number, name) for number in range(len(self.readers)))
            self.counts[f"reader: {name}"] = total
        kills = {name: count for name, count in self.counts.items() if name.startswith("killed in")}
        rest = {name: count for name, count in self.counts.items() if name not in kills}
        ordered = [*rest.items(), *sorted(kills.items(), key=lambda item: -item[1])]
        return "\n".join(f"{count:>12,} {name}" for name, count in ordered)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--readers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None, help="of the operations; moments stay random")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary one by default")
    parser.add_argument("--inherited", type=int, default=0, help="positions of another file that the cache continues")
    parser.add_argument("--mutation", choices=MUTATIONS, default="none", help="break something, to see it noticed")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="kvmmap-soak-"))
    print(f"seed {seed}, {arguments.readers} readers, in {folder.parent}", flush=True)
    soak = Soak(
        folder, readers=arguments.readers, seed=seed, mutation=arguments.mutation, inherited=arguments.inherited
    )
    try:
        while soak.counts["kills"] < arguments.kills:
            soak.kill_one()
            if soak.counts["kills"] % 100 == 0:
                print(f"{soak.counts['kills']} kills", flush=True)
    except BaseException:
        with contextlib.suppress(SoakError):
            soak.stop()
        print(f"after {soak.counts['kills']} kills; the files are in {folder}", file=sys.stderr)
        raise
    soak.stop()
    print(soak.report())
    print("nothing lost, nothing wrong")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
