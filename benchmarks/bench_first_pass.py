"""The first attention over all layers of a file after opening it, relative to a later one.

    python benchmarks/bench_first_pass.py [--rounds 11] [--length 7900] [--json FILE]

The file is in the page cache, as it was written: what the first pass has besides is mapping its pages and hashing its
blocks. Its shape is SmolLM2-135M's: 30 layers of 3 KV heads x 64, three query heads each. Attention by one thread,
processor times.

Then the file is dropped from the page cache before each task (`posix_fadvise`): a first pass beside reading the file
from its start to its end, in elapsed times; and a first pass over what the pass before has read from the disk, in
processor times, since a file system may have put it into larger pages.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import process_time

from harness import Bar, Report, Task, arguments, gaussian, measure, workspace

import kvmmap

LAYERS, HEADS, DIM, GROUP = 30, 3, 64, 3
LIMIT = 1.5
"""The first pass, relative to a later one."""
COLD = 0.9
"""The speed of a first pass, of that of reading the file, with nothing of it in the page cache."""
PIECE = 1 << 20


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.fdatasync(fd)  # pages that are not on the disk stay
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def read(path: Path) -> None:
    """Read a file from its start to its end."""
    room = bytearray(PIECE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(room):
            pass


def main() -> None:
    parser = arguments("Benchmark the first pass after opening.", rounds=11)
    parser.add_argument("--length", type=int, default=7_900, help="positions")
    args = parser.parse_args()
    report = Report("first_pass")
    report.note("shape", f"{args.length:,} positions, {LAYERS} layers of {HEADS} KV heads x {DIM}")
    with workspace(args.dir) as folder:
        path = folder / "cache.kvm"
        rows = gaussian(args.length, HEADS, DIM)
        with kvmmap.create(path, num_layers=LAYERS, capacity=args.length, num_kv_heads=HEADS, head_dim=DIM) as cache:
            for layer in cache.layers:
                layer.extend(rows, rows)
        report.note("megabytes", round(os.stat(path).st_blocks * 512 / 1e6, 1))
        opened: list[kvmmap.QuantizedKvCache] = []
        queries = gaussian(1, HEADS * GROUP, DIM, seed=1)

        def reopen(verify: str) -> None:
            while opened:
                opened.pop().close()
            opened.append(kvmmap.open(path, verify=verify))

        def attend() -> None:
            for layer in opened[0].layers:
                layer.attend(queries, threads=1)

        tasks = [
            Task(name="first pass", before=lambda: reopen("read"), run=attend),
            Task(name="later pass", run=attend),
            Task(name="first pass, no checksums", before=lambda: reopen("none"), run=attend),
        ]
        found = measure(tasks, args.rounds, clock=process_time)

        def forget() -> None:
            while opened:
                opened.pop().close()
            drop(path)

        def first() -> None:
            reopen("read")
            attend()

        tasks = [
            Task(name="reading the file", before=forget, run=lambda: read(path)),
            Task(name="first pass, cold", before=forget, run=first),
        ]
        cold = measure(tasks, args.rounds)
        tasks = [
            Task(name="first pass, as it was read", before=lambda: reopen("read"), run=attend),
            Task(name="later pass", run=attend),
        ]
        again = measure(tasks, args.rounds, clock=process_time)
        opened.pop().close()
    report.show("attention over all layers", found, ["later pass"])
    report.show("with nothing in the page cache", cold, ["reading the file"])
    report.show("with what a cold pass has read in the page cache", again, ["later pass"])
    ratio = 1 / found.ratio("first pass", "later pass").median
    report.bars.append(Bar("the first pass, relative to a later one", LIMIT, ratio, "x at most"))
    speed = cold.ratio("first pass, cold", "reading the file").median
    report.bars.append(Bar("a first pass with nothing in the page cache", COLD, speed, "x", beside="reading the file"))
    report.finish(args.json)


if __name__ == "__main__":
    main()
