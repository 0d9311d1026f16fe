"""How long `kvmmap` takes to start, next to Python alone and to importing numpy, as whole processes in turns.

    python benchmarks/bench_cli.py [--rounds 21] [--caches 1000] [--json FILE]

Modules are byte-compiled first, as pip leaves them. Bars: `kvmmap inspect` takes at most 150 ms, and at most 3 times
`python -c "import numpy"`; of a directory of 1,000 caches, at most 2 s. Ratios are medians of the rounds' own ratios:
other work on the machine slows all tasks of a round alike. Caches are those of a model of 30 layers, and are in the
page cache.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import Bar, Report

import kvmmap

PROGRAM = Path(sys.executable).with_name("kvmmap")
LAYERS, HEADS, DIM = 30, 3, 64
LENGTH = 10
BASE = "python -c 'import numpy'"
BAR_MS, BAR_RATIO, BAR_MANY_MS = 150.0, 3.0, 2000.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the start-up of the command line.")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--caches", type=int, default=1000, help="in the directory")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    for package in ("kvmmap", "kvmmap_cli"):
        spec = importlib.util.find_spec(package)
        compileall.compile_dir(next(iter(spec.submodule_search_locations)), quiet=2)
    with tempfile.TemporaryDirectory(prefix="kvmmap-bench-") as folder:
        make_caches(Path(folder), args.caches)
        one = next(Path(folder).iterdir())
        seconds = measure(
            {
                "python -c pass": [sys.executable, "-c", "pass"],
                BASE: [sys.executable, "-c", "import numpy"],
                "python -c 'import kvmmap'": [sys.executable, "-c", "import kvmmap"],
                "kvmmap --help": [PROGRAM, "--help"],
                "kvmmap inspect": [PROGRAM, "inspect", one],
                "kvmmap inspect --json": [PROGRAM, "inspect", "--json", one],
                "kvmmap tokens": [PROGRAM, "tokens", one],
            },
            args.rounds,
        )
        many = f"kvmmap inspect, {args.caches:,} caches"
        seconds |= measure({many: [PROGRAM, "inspect", folder]}, max(3, args.rounds // 5))
    results = summarize(seconds)
    show(results)
    inspect = results["kvmmap inspect"]
    report = Report("cli", notes=results)
    report.bars = [
        Bar("kvmmap inspect", BAR_MS, inspect["median"] * 1e3, "ms"),
        Bar("kvmmap inspect, relative to importing numpy", BAR_RATIO, inspect["ratio"], "x at most", beside=BASE),
        Bar(many, BAR_MANY_MS, results[many]["median"] * 1e3, "ms"),
    ]
    report.finish(args.json)


def make_caches(folder: Path, count: int) -> None:
    rows = np.random.default_rng(0).standard_normal((LAYERS, LENGTH, HEADS, DIM), dtype=np.float32)
    first = folder / "0000.kvm"
    model = kvmmap.ModelInfo(name="some/model")
    with kvmmap.create(first, num_layers=LAYERS, capacity=8192, num_kv_heads=HEADS, head_dim=DIM, model=model) as cache:
        cache.extend(rows, rows, np.arange(LENGTH))
    for number in range(1, count):
        kvmmap.fork(first, folder / f"{number:04}.kvm").close()


def measure(commands: dict[str, list[object]], rounds: int) -> dict[str, list[float]]:
    """Return seconds of every command in every round, after a first round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    results = {}
    for name, times in seconds.items():
        result = {"median": statistics.median(times), "min": min(times), "max": max(times)}
        if len(times) == len(seconds[BASE]):
            result["ratio"] = statistics.median(a / b for a, b in zip(times, seconds[BASE], strict=True))
        results[name] = result
    return results


def show(results: dict[str, dict[str, float]]) -> None:
    print(f"{'':32} {'median':>8} {'range':>15}   {'x import numpy':>14}")
    for name, r in results.items():
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
        print(f"{name:32} {r['median']:6.3f} s {r['min']:7.3f}-{r['max']:<7.3f}   {ratio:>14}")


if __name__ == "__main__":
    main()
