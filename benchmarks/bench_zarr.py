"""The speed of Zarr-backed caches: on a local disk relative to memcpy, on an S3 server relative to obstore alone.

    python benchmarks/bench_zarr.py local [--mib 1024] [--rounds 5] [--dir DIR] [--json FILE]
    python benchmarks/bench_zarr.py s3 [--mib 256] [--rounds 5] [--dir DIR] [--json FILE]

Everything of a round is done right after its baseline, in one process; ratios are medians of the rounds' own. "local"
compares with the memcpy of the same bytes, into memory that was touched before, and shows what writing and reading
the same files costs by itself, without a checksum, in whatever the disk and its cache are here. "s3" starts SeaweedFS
on loopback (`tests/helpers/seaweed.py`) and compares with obstore putting and getting the same objects, by as many
threads. What obstore gets is thrown away in one baseline; in another it is written to a file, and that synced: the
least that a program with the job of `fetch` would do.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from harness import Bar, Report, version_of

import kvmmap
from kvmmap.storage.objects.local import FolderObjects
from kvmmap.storage.zarr.handle import LOCAL_THREADS, REMOTE_THREADS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LAYERS, HEADS, DIM = 8, 8, 128

Task = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark Zarr-backed caches.")
    parser.add_argument("what", choices=["local", "s3"])
    parser.add_argument("--mib", type=int, help="of codes and scales; 1024 locally, 256 on S3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where files go; the temporary directory by default")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        report = (local if args.what == "local" else s3)(folder, args.mib, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = Report("zarr", notes=report)
    if args.what == "s3":
        ratio = report["fetch"]["ratio"]
        found.bars.append(Bar("fetch from S3, of gets thrown away", 0.8, ratio, "x", beside=version_of("obstore")))
    found.finish(args.json)


def make_source(path: Path, mib: int) -> int:
    """Make a committed `.kvm` file; return its bytes of codes and scales."""
    with kvmmap.create(path, num_layers=LAYERS, capacity=2**20, num_kv_heads=HEADS, head_dim=DIM) as cache:
        each = cache.geometry.layers[0].position_bytes * LAYERS
        length = mib * 2**20 // each
        random = np.random.default_rng(0)
        codes = random.integers(-127, 128, (8192, HEADS, DIM), np.int8)
        scales = random.random((8192, HEADS), np.float32) + np.float32(0.01)
        for layer in cache.layers:
            for start in range(0, length, 8192):
                n = min(8192, length - start)
                layer.extend_quantized(codes[:n], scales[:n], codes[:n], scales[:n])
        return length * each


# On a local disk


def local(folder: Path, mib: int | None, rounds: int) -> dict:
    size = make_source(folder / "a.kvm", mib or 1024)
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    kvmmap.copy(folder / "a.kvm", folder / "whole.zarr")
    objects = list(objects_of(folder / "whole.zarr"))
    largest = max(data.nbytes for _, data in objects)
    scratch = [np.zeros(largest, np.uint8) for _ in range(LOCAL_THREADS)]

    def fresh(*names: str) -> None:
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)

    def export(*, durable: bool, verify: bool) -> Task:
        return lambda: kvmmap.copy(folder / "a.kvm", folder / "b.zarr", durable=durable, verify=verify)

    def write(*, durable: bool) -> None:
        place = FolderObjects(str(folder / "b.zarr"), durable=durable)
        with ThreadPoolExecutor(LOCAL_THREADS) as pool:
            list(pool.map(lambda each: place.put(each[0], [each[1]]), objects))
        place.settle()

    def read() -> None:
        def one(number: int) -> None:
            for key, data in objects[number::LOCAL_THREADS]:
                with open(folder / "whole.zarr" / key, "rb", buffering=0) as file:
                    file.readinto(memoryview(scratch[number])[: data.nbytes])

        with ThreadPoolExecutor(LOCAL_THREADS) as pool:
            list(pool.map(one, range(LOCAL_THREADS)))

    tasks: dict[str, Task] = {
        "memcpy": lambda: np.copyto(target, source),
        "write the same files": lambda: write(durable=False),
        "export": export(durable=False, verify=False),
        "export, read back": export(durable=False, verify=True),
        "read the same files": read,
        "read all rows, verified": lambda: read_all(folder / "whole.zarr", 64 * 2**20),
        "the same, keeping 256 MiB": lambda: read_all(folder / "whole.zarr", None),
        "verify": lambda: check(kvmmap.open(folder / "whole.zarr")),
        "write and sync the same files": lambda: write(durable=True),
        "export, durable": export(durable=True, verify=False),
    }
    print(f"{size >> 20} MiB, {len(objects)} objects, {rounds} rounds; {LOCAL_THREADS} threads, memcpy has one")
    return show(measure(tasks, rounds, lambda: fresh("b.zarr")), "memcpy", "x memcpy")


def objects_of(group: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the objects of a group with their keys."""
    for path in sorted(group.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(group)), np.fromfile(path, np.uint8)


def read_all(path: Path, cache_bytes: int | None) -> None:
    """Read every row into memory once, with each block verified."""
    with kvmmap.open(path, cache_bytes=cache_bytes) as cache:
        for layer in cache.storage.layers:
            for rows in layer.iter_rows(0, layer.length):
                assert len(rows.key_codes)


def check(cache: kvmmap.QuantizedKvCache) -> None:
    with cache:
        assert cache.verify().sound


# On an S3 server


def s3(folder: Path, mib: int | None, rounds: int) -> dict:
    import obstore
    from helpers.seaweed import BUCKET, Server

    size = make_source(folder / "a.kvm", mib or 256)
    kvmmap.copy(folder / "a.kvm", folder / "whole.zarr")
    objects = [(key, data.tobytes()) for key, data in objects_of(folder / "whole.zarr")]
    shutil.rmtree(folder / "whole.zarr")
    (folder / "server").mkdir()
    with Server(folder / "server") as server:
        options, url = server.options(), f"s3://{BUCKET}/ours.zarr"
        store = server.store("theirs.zarr")

        def put() -> None:
            with ThreadPoolExecutor(REMOTE_THREADS) as pool:
                list(pool.map(lambda each: obstore.put(store, each[0], each[1], use_multipart=False), objects))

        def get() -> None:
            with ThreadPoolExecutor(REMOTE_THREADS) as pool:
                list(pool.map(lambda each: len(obstore.get(store, each[0]).bytes()), objects))

        def get_into_file() -> None:
            with open(folder / "b.kvm", "wb", buffering=0) as file:

                def one(number: int) -> None:
                    key, _ = objects[number]
                    os.pwrite(file.fileno(), memoryview(obstore.get(store, key).bytes()), starts[number])

                starts = [0, *itertools.accumulate(len(data) for _, data in objects)]
                with ThreadPoolExecutor(REMOTE_THREADS) as pool:
                    list(pool.map(one, range(len(objects))))
                os.fdatasync(file.fileno())

        def export() -> None:
            kvmmap.copy(folder / "a.kvm", url, verify=False, target_options=options)

        def fetch() -> None:
            kvmmap.fetch(url, folder / "b.kvm", verify=False, storage_options=options).close()

        def read() -> None:
            with kvmmap.open(url, storage_options=options) as cache:
                for layer in cache.storage.layers:
                    for rows in layer.iter_rows(0, layer.length):
                        assert len(rows.key_codes)

        def fresh() -> None:
            (folder / "b.kvm").unlink(missing_ok=True)

        def clear() -> None:
            fresh()
            kvmmap.remove(url, storage_options=options)

        print(f"{size >> 20} MiB, {len(objects)} objects, {rounds} rounds, {REMOTE_THREADS} threads each")
        export()
        up = show(measure({"obstore puts": put, "export": export}, rounds, clear), "obstore puts", "x obstore")
        into_file = "obstore gets into a file"
        seconds = measure(
            {"obstore gets": get, into_file: get_into_file, "fetch": fetch, "read all rows, verified": read},
            rounds,
            fresh,
        )
        down = show(seconds, "obstore gets", "x gets")
        files = show({name: seconds[name] for name in (into_file, "fetch")}, into_file, "x into file")
        return up | down | {f"{name}, of files": ratio for name, ratio in files.items()}


def measure(tasks: dict[str, Task], rounds: int, before: Callable[[], None]) -> dict[str, list[float]]:
    """Return seconds of every task in every round, after a first round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, run in tasks.items():
            prepare(name, before)
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
    return seconds


def prepare(name: str, before: Callable[[], None]) -> None:
    """Remove the last task's files, and wait until the disk is idle."""
    if any(word in name for word in ("write", "export", "fetch", "file")):
        before()
        os.sync()


def show(seconds: dict[str, list[float]], baseline: str, column: str) -> dict:
    report = {}
    print(f"\n{'':32} {column:>10} {'range':>13}")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[baseline], times, strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        report[name] = {"ratio": middle, "min": low, "max": high}
        print(f"{name:32} {middle:10.2f} {low:6.2f}-{high:<6.2f}")
    return report


if __name__ == "__main__":
    main()
