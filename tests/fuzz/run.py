"""Fuzz: `python -m fuzz.run --executions 1000000`. Hostile files are built, and everything is done with each.

A worker process does it, so that a crash or a hang is seen and told from which recipe it came. Recipes that lead to an
outcome not seen before are mutated further; each run first goes through those of `corpus/`.
"""

from __future__ import annotations

import argparse
import gc
import json
import mmap
import os
import resource
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np

from kvmmap.storage.file.checkpoints import FileCheckpoints
from kvmmap.storage.file.snapshot import SnapshotHolder

from . import checkpoint_use, checkpoints, children, files, groups, states, tensors
from .execute import Watch, execute
from .image import Recipe
from .mutate import key

SECONDS_EACH = 20
"""No file may keep kvmmap busy for longer, on however loaded a machine."""

ROOM, GROUPS_ROOM = 1 << 30, 1 << 36
"""Bytes of address space that a worker may take more than it had after the corpus. Room for the shards of groups is as
large as the root says, up to a bound, and touched as far as there are rows."""

SHELL_EVERY, COPIES_EVERY = 500, 20


def _read_what_there_is(source: Any, offset: int, size: int) -> Any:
    return np.fromfile(source.name, np.uint8, min(size, 1 << 20), offset=offset)


class _Agreeing(int):
    """A digest that equals any other."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


def _fill_and_agree(self: Any, offset: int, tensor: Any) -> int:
    return _Agreeing(FILL(self, offset, tensor))


def _header_that_agrees(self: Any, slot: int) -> Any:
    found, entry = HEADER(self, slot), self._entries()[slot]
    return found and replace(found, position=entry.position, checksum=entry.checksum)


FILL, HEADER = FileCheckpoints._fill, FileCheckpoints.header
MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "sections-unchecked": lambda: mock.patch("kvmmap.format.layout._check_sections"),
    "lengths-unchecked": lambda: mock.patch.object(SnapshotHolder, "_contradiction", return_value=None),
    "tensor-errors-let-through": lambda: mock.patch(
        "kvmmap.formats.safetensors_file._errors_of", return_value=nullcontext()
    ),
    "states-unbounded": lambda: mock.patch("kvmmap.formats.llama_cpp.source.Source.read", _read_what_there_is),
    "parent-names-unchecked": lambda: mock.patch("kvmmap.format.parent.name_fault", return_value=None),
    "checkpoint-digests-unchecked": lambda: mock.patch.object(FileCheckpoints, "_fill", _fill_and_agree),
    "checkpoint-headers-unchecked": lambda: mock.patch.object(FileCheckpoints, "header", _header_that_agrees),
    "depth-unchecked": lambda: mock.patch("kvmmap.metadata._is_deep", return_value=False),
}
"""What fuzzing must notice: checks that are left out."""


class Shared:
    """What the worker is doing, for the process that finds it dead: numbers and the recipe."""

    SIZE = 1 << 22

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, self.SIZE)

    def put(self, done: int, recipe: str) -> None:
        data = recipe.encode()
        self.memory[8 : 12 + len(data)] = struct.pack("<I", len(data)) + data
        self.memory[:8] = struct.pack("<Q", done)

    @property
    def done(self) -> int:
        number: int = struct.unpack("<Q", self.memory[:8])[0]
        return number

    @property
    def recipe(self) -> str:
        (size,) = struct.unpack("<I", self.memory[8:12])
        return self.memory[12 : 12 + size].decode()


class Worker:
    """Runs recipes, and finds new ones."""

    def __init__(self, folder: str, seed: int, shared: Shared, keep: Path | None, *, bounded: bool = True) -> None:
        self.folder = folder
        self.random, self.shared, self.keep = Random(seed), shared, keep
        self.bounded = bounded
        self.watch = Watch()
        time.sleep = lambda seconds: None  # nobody is there to wait for
        self.known: list[Recipe] = []
        self.seen: Counter[str] = Counter()
        self.done = 0

    def run(self, recipes: list[Recipe], executions: int) -> None:
        """Go through known recipes, then through new ones."""
        for recipe in recipes:
            self.one(recipe)
        if self.bounded:
            self.limit(GROUPS_ROOM if "group" in recipes[0] else ROOM)
        gc.collect()
        gc.freeze()
        while self.done < executions:
            recipe = self.random.choice(self.known)
            self.one(_kind(recipe).mutate(self.random, recipe))

    def limit(self, room: int) -> None:
        """From here on, what a file makes kvmmap allocate is bounded."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + room,) * 2)

    def one(self, recipe: Recipe) -> None:
        self.shared.put(self.done, key(recipe))
        path = _kind(recipe).place(recipe, self.folder)
        with self.watch.watching(self.folder):
            shell, copies = self.done % SHELL_EVERY == 0, self.done % COPIES_EVERY == 0
            if "tensors" in recipe or "state" in recipe:
                outcome = (tensors if "tensors" in recipe else states).execute(path)
            else:
                act = checkpoint_use.execute if "checkpoints" in recipe else execute
                outcome = act(path, shell=shell, copies=copies)
        self.done += 1
        self.seen[outcome] += 1
        if self.seen[outcome] == 1:
            self.known.append(recipe)
            if self.keep is not None:
                with self.keep.open("a") as file:
                    file.write(key(recipe) + "\n")


def _kind(recipe: Recipe) -> ModuleType:
    if "state" in recipe:
        return states
    if "chain" in recipe:
        return children
    if "checkpoints" in recipe:
        return checkpoints
    return groups if "group" in recipe else tensors if "tensors" in recipe else files


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__)
    parser.add_argument("--executions", type=int, default=1_000_000)
    parser.add_argument("--groups", action="store_true", help="Zarr groups instead of files")
    parser.add_argument("--tensors", action="store_true", help="safetensors files instead, which are imported")
    parser.add_argument("--states", action="store_true", help="states of llama.cpp instead, which are imported")
    parser.add_argument("--children", action="store_true", help="files that continue others instead")
    parser.add_argument("--checkpoints", action="store_true", help="files with states instead")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None, help="a file to add recipes with new outcomes to")
    parser.add_argument("--recipe", help="run this one alone, as a failure has printed it")
    parser.add_argument("--mutation", choices=MUTATIONS, default="none", help="leave a check out, to see it noticed")
    parser.add_argument("--unbounded", action="store_true", help="leave memory alone: AddressSanitizer needs terabytes")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    folder = tempfile.mkdtemp(prefix="kvmmap-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    shared = Shared()
    pid = os.fork()
    if pid == 0:
        worker = Worker(folder, seed, shared, arguments.keep, bounded=not arguments.unbounded)
        os._exit(work(worker, arguments))
    problem = watch(pid, shared, seed)
    shutil.rmtree(folder)
    if problem:
        print(f"{problem}, seed {seed}; see it again with", file=sys.stderr)
        print(f"python -m fuzz.run --recipe {shlex.quote(shared.recipe)}", file=sys.stderr)
        return 1
    return 0


def work(worker: Worker, arguments: argparse.Namespace) -> int:
    """What the worker process does."""
    try:
        with MUTATIONS[arguments.mutation]():
            if arguments.recipe:
                worker.one(json.loads(arguments.recipe))
                print(next(iter(worker.seen)))
            else:
                kind = groups if arguments.groups else tensors if arguments.tensors else files
                kind = states if arguments.states else children if arguments.children else kind
                kind = checkpoints if arguments.checkpoints else kind
                worker.run(kind.recipes(), arguments.executions)
        print(f"{worker.done:,} files, {len(worker.seen):,} different outcomes", flush=True)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def watch(pid: int, shared: Shared, seed: int) -> str | None:
    """Wait for the worker; say what went wrong with it."""
    last, stuck = -1, 0.0
    start = before = told = time.monotonic()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            if os.WIFSIGNALED(status):
                return f"killed by {signal.Signals(os.WTERMSIG(status)).name} after {shared.done:,} files"
            return f"failed after {shared.done:,} files" if status else None
        now = time.monotonic()
        # While this process was stopped itself, as by a suspended machine, nobody was stuck.
        stuck, before = stuck + min(now - before, 1.0), now
        if shared.done != last:
            last, stuck = shared.done, 0.0
        elif stuck > SECONDS_EACH:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"hung after {shared.done:,} files"
        if now - told > 60:
            told = now
            print(f"{shared.done:,} files, {shared.done / (now - start):.0f} a second (seed {seed})", flush=True)
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
