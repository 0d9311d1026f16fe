"""A library shared through an S3 server: fetching a match beside obstore's own gets, and following the log.

    python benchmarks/bench_library_remote.py [--mib 128] [--manifests 10000] [--rounds 5] [--json FILE]

The server is SeaweedFS on loopback (`tests/helpers/seaweed.py`), on the same processors. A fetch verifies what comes
with its digests, writes it to a file, syncs that, and takes it into the index. Beside it, obstore gets the same objects
with as many threads: what comes is thrown away, or written to a file that is synced, which is the least that a fetch
can do.
"""

from __future__ import annotations

import base64
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bar, Report, Task, arguments, measure, nothing, workspace

import kvmmap
from kvmmap.library.manifests import Log, Manifest, RemoteSegment, key_of
from kvmmap.library.packing import AT_ONCE
from kvmmap.library.sharing import compact_every

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from helpers import seaweed

SHAPE = {"num_layers": 8, "num_kv_heads": 8, "head_dim": 128}
NAMESPACE = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name="benchmark"))
URL = f"s3://{seaweed.BUCKET}/library"


def main() -> None:
    parser = arguments("Benchmark a shared library.", rounds=5)
    parser.add_argument("--mib", type=int, default=128, help="of the segment that is fetched")
    parser.add_argument("--manifests", type=int, default=10_000)
    args = parser.parse_args()
    report = Report("library_remote")
    with workspace(args.dir) as folder:
        (folder / "server").mkdir()
        with seaweed.Server(folder / "server") as server:
            fetching(report, server, folder, args.mib, args.rounds)
            following(report, server, folder, args.manifests, args.rounds)
    report.finish(args.json)


def open_library(folder: Path, server: seaweed.Server, url: str) -> kvmmap.Library:
    options = server.options() | {"client_options": {"allow_http": True}}
    return kvmmap.Library(folder, remote=url, storage_options=options, write_through=False, follow_every=None)


def fetching(report: Report, server: seaweed.Server, folder: Path, mib: int, rounds: int) -> None:
    import obstore

    length = mib * 2**20 // NAMESPACE.position_bytes
    ids = np.random.default_rng(0).integers(0, 50_000, length)
    with open_library(folder / "one", server, URL) as one:
        rows = np.random.default_rng(1).standard_normal((8, 256, 8, 128), np.float32)
        with one.session(NAMESPACE, ids) as session:
            for start in range(0, length, 256):
                count = min(256, length - start)
                session.extend(rows[:, :count], rows[:, :count], ids[start : start + count])
        before = time.perf_counter()
        one.push()
        report.note("push", f"{mib / (time.perf_counter() - before):.0f} MiB/s")
        (entry,) = one._index.remotes()
    two = open_library(folder / "two", server, URL)
    two.pull()
    assert two._sharing is not None
    sharing, objects = two._sharing, two._sharing._objects
    store, base = objects._store, objects._base  # type: ignore[attr-defined]

    def forget() -> None:
        for found in two.entries():
            two.remove(found.name)

    def fetch() -> None:
        assert sharing.fetch(entry) == entry.size

    def get(key: str) -> int:
        return sum(len(piece) for piece in obstore.get(store, base + key).stream(min_chunk_size=1 << 20))

    def gets() -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            assert sum(pool.map(get, entry.parts)) == entry.size

    def gets_to_file() -> None:
        fd = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_TRUNC)

        def keep(number: int) -> None:
            at = number * (16 << 20)
            for piece in obstore.get(store, base + entry.parts[number]).stream(min_chunk_size=1 << 20):
                at += os.pwrite(fd, piece, at)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(keep, range(len(entry.parts))))
        os.fdatasync(fd)
        os.close(fd)

    tasks = [
        Task(name="gets", run=gets, before=nothing),
        Task(name="gets to a synced file", run=gets_to_file, before=lambda: (folder / "plain").unlink(missing_ok=True)),
        Task(name="fetch", run=fetch, before=forget),
    ]
    found = measure(tasks, rounds)
    report.show(f"a segment of {entry.size >> 20} MiB in {len(entry.parts)} objects", found, ["gets"])
    report.note("fetch, of gets to a synced file", f"{found.ratio('fetch', 'gets to a synced file').median:.2f}")
    report.bars.append(Bar("fetch, of obstore's gets", 0.8, found.ratio("fetch", "gets").median, "x"))
    two.close()


def following(report: Report, server: seaweed.Server, folder: Path, count: int, rounds: int) -> None:
    """Follow a log of so many manifests, as pushes leave it: a snapshot of most, and the last ones."""
    url = f"{URL}-log"
    with open_library(folder / "log", server, url) as library:
        assert library._sharing is not None
        objects = library._sharing._objects
    entries = [synthetic(number) for number in range(count)]
    covered = count - compact_every(count) + 1  # the worst case
    if covered > 0:
        objects.put_if(key_of(covered), Manifest(added=entries[covered - 1 : covered]).encode(), None)
        Log(objects).compact(covered, entries[:covered])

    def put(number: int) -> None:
        objects.put_if(key_of(number + 1), Manifest(added=[entries[number]]).encode(), None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(covered, count)))
    cold, warm, spent = [], [], []
    requests: list[Any] = []
    listed = objects.list_after
    for number in range(rounds):
        with open_library(folder / f"follower {number}", server, url) as library:
            assert library._sharing is not None
            start, before = time.perf_counter(), time.process_time()
            library.pull()
            cold.append(time.perf_counter() - start)
            spent.append(time.process_time() - before)
            assert len(library._index.remotes()) == count
            library._sharing._objects.list_after = lambda *some: (requests.append(some), listed(*some))[1]  # type: ignore[method-assign]
            start = time.perf_counter()
            assert library.pull() == 0
            warm.append(time.perf_counter() - start)
        shutil.rmtree(folder / f"follower {number}")
    report.note("processor time of following, without the server's", f"{np.median(spent) * 1e3:,.0f} ms")
    report.note("looking again", f"{np.median(warm) * 1e3:.1f} ms")
    report.bars.append(Bar(f"following {count:,} manifests", 2000, float(np.median(cold)) * 1e3, "ms"))
    report.bars.append(Bar("list calls when nothing is new", 1, len(requests) / rounds, "x at most"))


def synthetic(number: int) -> RemoteSegment:
    """A segment of 2,000 positions."""
    random = np.random.default_rng(number)
    return RemoteSegment(
        name=f"{number:012x}-00000000-{number:012x}",
        namespace=NAMESPACE.digest,
        document=NAMESPACE.document,
        folder=NAMESPACE.folder,
        model="benchmark",
        position_bytes=NAMESPACE.position_bytes,
        parent=None,
        start=0,
        stop=2000,
        hashes=base64.b64encode(random.bytes(16 * 8)).decode(),
        parts=[f"segments/{NAMESPACE.digest}/{number}/0"],
        size=1 << 20,
        digests=["0" * 32],
        disk_bytes=1 << 20,
    )


if __name__ == "__main__":
    main()
