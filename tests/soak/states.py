"""Kill writers of a cache with states at random moments: `python -m soak.states --kills 1000`.

After each death the cache opens at the last checkpoint that the writer had been told of, or at the one that it was
making; its rows are those of that checkpoint, and the states of every checkpoint are those that belong to its rows. A
restarted machine would find the checkpoint of the last commit, or a later one: making checkpoints commits, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
from numpy.typing import NDArray

import kvmmap

from .content import DIM, HEADS, LAYERS, rows_of, verify_rows
from .kills import SoakError
from .model import Epochs, Log, Operation

SPECS = (
    kvmmap.StateSpec(0, "recurrent", "float32", (96, 128)),
    kvmmap.StateSpec(2, "conv", "int64", (40, 4)),
)
CAPACITY = 4000


def states_of(epochs: Epochs) -> list[NDArray[np.generic]]:
    """Return the states that belong to a sequence of rows."""
    seed = int((np.arange(1, len(epochs) + 1) * (epochs + 7)).sum()) * 31 + len(epochs)
    random = np.random.default_rng(seed)
    return [random.standard_normal(SPECS[0].shape, np.float32), random.integers(-9, 9, SPECS[1].shape)]


def check_states(cache: kvmmap.QuantizedKvCache, epochs: Epochs) -> None:
    """Compare the states of every checkpoint with those that its rows must have."""
    for checkpoint in cache.checkpoints:
        found = list(cache.read_states(checkpoint.position).values())
        for spec, array, expected in zip(SPECS, found, states_of(epochs[: checkpoint.position]), strict=True):
            if not np.array_equal(array, expected):
                raise SoakError(f"{spec} at position {checkpoint.position} is not that of its rows")


class Writer:
    """One life: it makes checkpoints, goes back to some, and commits now and then."""

    def __init__(self, path: Path, log: Log, epochs: Epochs, epoch: int, seed: int, *, early: bool) -> None:
        self.path, self.log, self.epochs, self.epoch = path, log, epochs, epoch
        self.random, self.early = Random(seed), early

    def run(self) -> None:
        """Do things until the process is killed."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*were not saved, so it continues", RuntimeWarning)
            self.cache = kvmmap.open(self.path, "a")
        if self.cache.seq_len != len(self.epochs):
            raise SoakError(f"continues at {self.cache.seq_len}, and {len(self.epochs)} positions were there")
        while True:
            (name,) = self.random.choices(("checkpoint", "truncate", "flush", "reopen"), (60, 15, 15, 5))
            getattr(self, name)()

    def checkpoint(self) -> None:
        count = self.random.choice((1, 2, 7, 64, 300))
        if len(self.epochs) + count > CAPACITY:
            self.truncate()
            return
        self.log.begin(Operation("checkpoint", count, self.epoch))
        positions, epochs = np.arange(len(self.epochs), len(self.epochs) + count), np.full(count, self.epoch)
        grown = np.append(self.epochs, epochs)
        if self.early:  # a fault that the soak must notice: states before their rows
            self.cache.write_states(states_of(grown))
            self.cache.checkpoint()
        self.cache.extend(rows_of(False, positions, epochs), rows_of(True, positions, epochs), epochs)
        self.cache.write_states(states_of(grown))
        self.cache.checkpoint()
        self.log.end()
        self.epochs = grown

    def truncate(self) -> None:
        position = self.random.choice([0, *(one.position for one in self.cache.checkpoints)])
        self.log.begin(Operation("truncate", position))
        kept = self.cache.truncate(position)
        self.log.end()
        if kept != position:
            raise SoakError(f"went back to {kept}, and there is a checkpoint at {position}")
        self.epochs, self.epoch = self.epochs[:position], self.epoch + 1

    def flush(self) -> None:
        self.log.begin(Operation("flush"))
        self.cache.flush()
        self.log.end()

    def reopen(self) -> None:
        self.log.begin(Operation("close"))
        self.cache.close()
        self.log.end()
        self.cache = kvmmap.open(self.path, "a")


class Soak:
    """A cache with states, and one writer at a time."""

    def __init__(self, folder: Path, seed: int, *, early: bool) -> None:
        self.folder, self.path, self.early = folder, folder / "cache.kvm", early
        self.log, self.random, self.counts = Log(folder / "log"), Random(seed), Counter[str]()
        self.epochs = np.zeros(0, np.int64)
        self.committed = [self.epochs]  # what may be committed
        self.epoch = 1
        shapes = {"num_layers": LAYERS, "capacity": CAPACITY, "num_kv_heads": HEADS, "head_dim": DIM}
        kvmmap.create(self.path, **shapes, states=SPECS, key_codec="int8", value_codec="int8").close()  # type: ignore[arg-type]

    def kill_one(self) -> None:
        """One writer's life and death."""
        self.log.start()
        seed = self.random.getrandbits(32)
        pid = os.fork()
        if not pid:
            try:
                Writer(self.path, self.log, self.epochs, self.epoch, seed, early=self.early).run()
            except BaseException:
                (self.folder / "failed").write_text(traceback.format_exc())
            os._exit(1)
        wanted, end = self.random.choice((0, 1, *[self.random.randint(1, 400)] * 4)), time.monotonic() + 20
        while self.log.size() < wanted and time.monotonic() < end and not (self.folder / "failed").exists():
            time.sleep(0.0002)
        while self.random.random() < 0.995 and self.log.idle() and time.monotonic() < end:
            time.sleep(0.00005)  # until an operation is under way, mostly
        time.sleep(self.random.random() * self.random.choice((0.0, 0.0005, 0.005)))
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            raise SoakError(f"the writer ended by itself\n{(self.folder / 'failed').read_text()}")
        self.counts["kills"] += 1
        self.look_after_death()

    def look_after_death(self) -> None:
        done, current = self.log.read()
        state = self.epochs, self.committed
        for operation in done:
            state = after(*state, operation)
            self.epoch += operation.name == "truncate"
        self.counts["operations"] += len(done)
        self.counts[f"killed in {current.name if current else 'between two'}"] += 1
        later = state if current is None else after(*state, current)
        with kvmmap.open(self.path) as cache:
            if not (report := cache.verify()).sound:
                raise SoakError(f"verify after {current}: {report.damages}")
            epochs = self.find("published", cache, (state[0], later[0]))
            self.counts["rows beyond the last checkpoint"] += cache.rows_beyond_checkpoint > 0
        with mock.patch("kvmmap.storage.file.live_record.boot_id", return_value=1), kvmmap.open(self.path) as cache:
            committed = self.find("committed", cache, [*state[1], *later[1]])
        self.epochs, self.committed, self.epoch = epochs, [committed, epochs], self.epoch + 2

    def find(self, what: str, cache: kvmmap.QuantizedKvCache, candidates: Sequence[Epochs]) -> Epochs:
        """Return the candidate that a cache holds, with its states compared."""
        found = verify_rows(cache, 0, cache.seq_len)
        check_states(cache, found)
        for epochs in candidates:
            if np.array_equal(found, epochs):
                if len(found) and cache.restorable() != len(found):
                    raise SoakError(f"{what}: {len(found)} positions, and the last checkpoint is {cache.restorable()}")
                return epochs
        raise SoakError(f"what was {what} is lost: {len(found)} positions for {sorted(map(len, candidates))}")


def after(epochs: Epochs, committed: Sequence[Epochs], done: Operation) -> tuple[Epochs, list[Epochs]]:
    """Return what is published, and what may be committed, once an operation has returned."""
    if done.name == "checkpoint":
        grown = np.append(epochs, np.full(done.number, done.epoch))
        return grown, [*committed, grown]
    if done.name == "truncate":
        cut = epochs[: done.number]
        return cut, [*(found[: done.number] for found in committed), cut]
    return epochs, [epochs]  # flush, close


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.states", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="of the operations; moments stay random")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary one by default")
    parser.add_argument("--early", action="store_true", help="write states before their rows, to see it noticed")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="kvmmap-soak-"))
    print(f"seed {seed}, in {folder.parent}", flush=True)
    soak = Soak(folder, seed, early=arguments.early)
    try:
        while soak.counts["kills"] < arguments.kills:
            soak.kill_one()
    except BaseException:
        print(f"after {soak.counts['kills']} kills; the files are in {folder}", file=sys.stderr)
        raise
    for name, count in soak.counts.most_common():
        print(f"{count:>12,} {name}")
    print("nothing lost, nothing wrong")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
