"""Checkpoints of states: writing one of 50 MB durably, reading it back, and opening a file with many of them.

    python benchmarks/bench_states.py [--mb 50] [--rounds 9] [--json FILE]

The states are those of 24 layers, f32. A plain write puts as many bytes into a file that is there already, and syncs
it; a checkpoint is written, named and flushed. memcpy copies as many bytes into memory that is already in use. Opening
is compared for files that hold few and many checkpoints. Reading and opening are timed in processor time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
from harness import Bar, Report, Task, arguments, measure, workspace

import kvmmap

LAYERS, HEADS, DIM = 24, 8, 128
MEMCPY, PLAIN = "memcpy", "plain synced write"
FEW, MANY = 4, 64


def main() -> None:
    parser = arguments("Benchmark checkpoints of states.", rounds=9)
    parser.add_argument("--mb", type=int, default=50)
    args = parser.parse_args()
    report = Report("states")
    with workspace(args.dir) as folder:
        checkpoint = Checkpoint(folder, args.mb)
        report.note("bytes of a checkpoint", checkpoint.bytes)
        written = measure(checkpoint.writes(), args.rounds)
        report.show("write a checkpoint, durable on return", written, [PLAIN])
        read = measure(checkpoint.reads(), args.rounds, time.process_time)
        report.show("read a checkpoint back, checksums compared", read, [MEMCPY])
        checkpoint.close()
        opened = measure([opening(folder, count) for count in (FEW, MANY)], args.rounds, time.process_time)
        report.show("open a file", opened, [name_of(FEW)])
    report.bars = [
        Bar(f"writing, to a {PLAIN}", 0.5, written.ratio("kvmmap", PLAIN).median, "x"),
        Bar(f"reading, to {MEMCPY}", 0.5, read.ratio("kvmmap", MEMCPY).median, "x"),
        Bar(f"opening with {MANY} checkpoints", 1.0, opened.time(name_of(MANY)).median * 1e3, "ms"),
    ]
    report.finish(args.json)


class Checkpoint:
    """A cache with states, and a plain file beside it."""

    def __init__(self, folder: Path, mb: int) -> None:
        numbers = mb * 1_000_000 // 4 // LAYERS // DIM
        specs = [kvmmap.StateSpec(layer, "recurrent", "float32", (numbers, DIM)) for layer in range(LAYERS)]
        self.states = [
            np.random.default_rng(layer).standard_normal((numbers, DIM), np.float32) for layer in range(LAYERS)
        ]
        self.bytes = sum(state.nbytes for state in self.states)
        self.copies = [np.zeros_like(state) for state in self.states]
        self.cache = kvmmap.create(
            folder / "states.kvm",
            num_layers=LAYERS,
            capacity=4096,
            num_kv_heads=[HEADS] * (LAYERS // 4) + [0] * (LAYERS - LAYERS // 4),
            head_dim=DIM,
            states=specs,
        )
        self.row = [np.ones((HEADS, DIM), np.float32)] * (LAYERS // 4) + [None] * (LAYERS - LAYERS // 4)
        self.file = os.open(folder / "plain", os.O_RDWR | os.O_CREAT)

    def writes(self) -> list[Task]:
        """Return the tasks that write."""
        return [Task(name=PLAIN, run=self.write_plainly), Task(name="kvmmap", run=self.write, before=self.step)]

    def reads(self) -> list[Task]:
        """Return the tasks that read."""
        return [Task(name=MEMCPY, run=self.copy), Task(name="kvmmap", run=self.cache.read_states)]

    def step(self) -> None:
        self.cache.push_step(self.row, self.row)

    def write(self) -> None:
        self.cache.write_states(self.states)
        self.cache.checkpoint()
        self.cache.flush()

    def write_plainly(self) -> None:
        offset = 0
        for state in self.states:
            offset += os.pwrite(self.file, state.reshape(-1).view(np.uint8).data, offset)
        os.fdatasync(self.file)

    def copy(self) -> None:
        for out, state in zip(self.copies, self.states, strict=True):
            np.copyto(out, state)

    def close(self) -> None:
        self.cache.close()
        os.close(self.file)


def name_of(count: int) -> str:
    return f"{count} checkpoints"


def opening(folder: Path, count: int) -> Task:
    """Make a file with so many checkpoints, and return the task that opens it."""
    path = folder / f"{count}.kvm"
    spec = kvmmap.StateSpec(0, "recurrent", "float32", (DIM, DIM))
    with kvmmap.create(
        path, num_layers=1, capacity=1024, num_kv_heads=HEADS, head_dim=DIM, states=[spec], checkpoint_slots=count
    ) as cache:
        row = np.ones((1, HEADS, DIM), np.float32)
        for number in range(count):
            cache.push_step(row, row)
            cache.write_states([np.full((DIM, DIM), number, np.float32)])
            cache.checkpoint()
        assert len(cache.checkpoints) == count
    return Task(name=name_of(count), run=lambda: kvmmap.open(path).close(), calls=1)


if __name__ == "__main__":
    main()
