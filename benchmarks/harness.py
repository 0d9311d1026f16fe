"""What the benchmarks share: timing in interleaved rounds, ratios within a round, bars, tables, JSON.

On a shared machine only figures measured next to each other are comparable. So every round runs every task once, a
ratio is the median of the rounds' ratios, and nothing is judged by one absolute time. This module does not know what is
measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import kvmmap

OUT = Path(__file__).resolve().parents[1] / "bench-out"


def nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to time."""

    name: str

    run: Callable[[], object]

    before: Callable[[], object] = nothing
    """Called before each run, and not timed."""

    calls: int = 1
    """How many equal operations a run makes; times are given for one of them."""

    f32_bytes: int = 0
    """Numbers that an operation handles, as the 4 bytes each that they are in f32; 0: its speed is not given."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the spread of the rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Bar:
    """A target, and what was measured."""

    what: str
    required: float
    measured: float
    unit: str
    """ "x" is a ratio, which must reach `required`; "us" and "ms" are times, and "x at most" a ratio, which must not
    exceed it."""

    ceiling: float | None = None
    """Of an "x": what was measured, in the same rounds, of something that no way of doing it can beat; None: unknown.
    A bar above it can't be met."""

    beside: str = ""
    """What it is compared with, and its version where there are several; empty where `what` says it."""

    @property
    def met(self) -> bool:
        return self.measured >= self.required if self.unit == "x" else self.measured <= self.required

    def texts(self) -> tuple[str, str, str]:
        """Return what is required, what was measured, and the verdict."""
        sign, unit = (">=", "x") if self.unit == "x" else ("<=", self.unit.removesuffix(" at most"))
        possible = "" if self.ceiling is None else f" of {self.ceiling:.2f} possible"
        verdict = "met" if self.met else "NOT MET"
        return f"{sign} {self.required:g} {unit}", f"{self.measured:.2f} {unit}{possible}", verdict


@dataclass(slots=True)
class Measured:
    """The times of some tasks, round by round."""

    tasks: dict[str, Task]
    seconds: dict[str, list[float]]

    def time(self, name: str) -> Spread:
        """Seconds of one operation."""
        return Spread.of(self.seconds[name])

    def fast(self, name: str) -> float:
        """Seconds that a tenth of the rounds was faster than: what counts where whatever else runs only adds time."""
        return float(np.percentile(self.seconds[name], 10))

    def ratio(self, name: str, baseline: str) -> Spread:
        """How many times as fast as the baseline."""
        pairs = zip(self.seconds[baseline], self.seconds[name], strict=True)
        return Spread.of([other / own for other, own in pairs])


def measure(tasks: Sequence[Task], rounds: int, clock: Callable[[], float] = time.perf_counter) -> Measured:
    """Run every task once a round, after a first round that is not counted.

    Args:
        clock: `time.process_time` is what to take on a machine with others on it, where one thread does all.
    """
    seconds: dict[str, list[float]] = {task.name: [] for task in tasks}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + 1):
            for task in tasks:
                task.before()
                start = clock()
                task.run()
                elapsed = clock() - start
                if number:
                    seconds[task.name].append(elapsed / task.calls)
    finally:
        gc.enable()
    return Measured({task.name: task for task in tasks}, seconds)


@dataclass(slots=True)
class Report:
    """What a benchmark prints, and writes as JSON."""

    name: str
    notes: dict[str, Any] = field(default_factory=dict)
    tables: list[dict[str, Any]] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(width=None if Console().is_terminal else 110))

    def show(self, title: str, measured: Measured, baselines: Sequence[str]) -> None:
        """Print and keep a table: each task's time, speed, and speed against the baselines."""
        speeds = any(task.f32_bytes for task in measured.tasks.values())
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("what")
        table.add_column("median", justify="right")
        if speeds:
            table.add_column("GB/s of f32", justify="right")
        for baseline in baselines:
            table.add_column(f"x {baseline} (range)", justify="right")
        rows = []
        for name, task in measured.tasks.items():
            seconds = measured.time(name)
            speed = task.f32_bytes / seconds.median / 1e9 if task.f32_bytes else None
            ratios = {baseline: measured.ratio(name, baseline) for baseline in baselines}
            rows.append(
                {
                    "name": name,
                    "seconds": asdict(seconds),
                    "gb_s_f32": speed,
                    "faster_than": {baseline: asdict(ratio) for baseline, ratio in ratios.items()},
                }
            )
            cells = [name, duration(seconds.median)]
            if speeds:
                cells.append("" if speed is None else f"{speed:.2f}")
            table.add_row(*cells, *(f"{r.median:.3g} ({r.min:.3g}-{r.max:.3g})" for r in ratios.values()))
        self.console.print(table)
        self.tables.append({"title": title, "rows": rows})

    def note(self, name: str, value: Any) -> None:
        """Print and record a fact that the figures depend on."""
        self.notes[name] = value
        self.console.print(f"{name}: {value}", highlight=False, soft_wrap=True)

    def finish(self, path: Path | None) -> None:
        """Print the bars, and write everything to `path`."""
        if self.bars:
            self.console.print(bar_table(self.bars))
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Return it all as plain JSON types."""
        bars = [asdict(bar) | {"met": bar.met} for bar in self.bars]
        return {"name": self.name, "machine": machine(), "notes": self.notes, "tables": self.tables, "bars": bars}


def bar_table(bars: Sequence[Bar]) -> Table:
    """Each target, the measured value, and whether it is met."""
    table = Table("bar", "beside", title="bars", title_justify="left", title_style="bold")
    for column in ("required", "measured", ""):
        table.add_column(column, justify="right")
    for bar in bars:
        required, measured, verdict = bar.texts()
        table.add_row(bar.what, bar.beside, required, measured, f"[{'green' if bar.met else 'bold red'}]{verdict}[/]")
    return table


def duration(seconds: float) -> str:
    """A time with the unit that suits it."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "kvmmap": kvmmap.__version__,
        "kernel": kvmmap.kernel(),
    }


def version_of(package: str) -> str:
    """The name of an installed package, and its version."""
    return f"{package} {metadata.version(package).partition('+')[0]}"


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="times that everything is measured")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--dir", type=Path, default=OUT, help="files are made in a folder of their own in here")
    return parser


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """A folder for the files of a run; gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    """Gaussian f32 rows, made in parts, so that no second copy is in memory."""
    rng = np.random.default_rng(seed)
    rows = np.empty(shape, np.float32)
    for part in np.array_split(rows.reshape(-1, shape[-1]), 16):
        rng.standard_normal(dtype=np.float32, out=part)
    return rows
