"""Power loss and killed processes while caches continue others: no child survives without what it continues."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from crash.machine import Killed, Machine, Mutation
from helpers.support import rows

import kvmmap
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.metadata import Document
from kvmmap.storage.file.chain import ChainStorage
from kvmmap.storage.file.child import create_child, open_chain
from kvmmap.storage.file.reader import MappedReader
from kvmmap.storage.file.writer import MappedWriter

pytestmark = pytest.mark.usefixtures("small_heap")
HISTORIES = int(os.environ.get("KVMMAP_HISTORIES", "450")) // 75
GEOMETRY = CacheGeometry(200, (LayerGeometry(1, 4, 4), LayerGeometry(1, 4, 4)), block_tokens=16)
IMAGES = 6


class Family:
    """One history: a parent that is appended to and whose writer may die, and children that are made of it."""

    def __init__(self, folder: str, seed: int, mutation: Mutation | None = None) -> None:
        self.random = Random(seed)
        self.folder = os.path.join(folder, str(seed))
        os.makedirs(self.folder)
        self.machine = Machine(self.folder, mutation)
        self.names = ["0.kvm"]
        self.children_seen = 0

    def run(self) -> None:
        with self.machine.running(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the dead do not close
            MappedWriter.create(self.path("0.kvm"), GEOMETRY, Document(None, {})).close()
            for _ in range(4):
                self.grow()
                self.depart()
                for _ in range(IMAGES):
                    self.look()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @contextlib.contextmanager
    def mortal(self, most: int) -> Iterator[None]:
        """A process that may die at any operation."""
        self.machine.new_process()
        if self.random.random() < 0.7:
            self.machine.countdown = self.random.randrange(most)
            self.machine.interruption = Killed
        try:
            yield
        except Killed:
            for _ in range(2):
                self.machine.dead = False
                self.look()
        finally:
            self.machine.new_process()
            gc.collect()

    def grow(self) -> None:
        """Append to some file, and commit; its writer may die in the middle."""
        name = self.random.choice(self.names)
        writer = None
        with self.mortal(40):
            writer = MappedWriter.open_locked(self.path(name), timeout=0)
            cache = kvmmap.QuantizedKvCache.of_storage(open_chain(writer))
            count = self.random.choice([1, 5, 16, 20])
            if cache.seq_len + count <= cache.capacity:
                step = rows(2, count, 1, 4, seed=self.random.randrange(1000))
                cache.extend(step, step, np.arange(count))
            cache.flush()
            if self.random.random() < 0.5:
                cache.close()
        if writer is not None:
            writer.file.close()

    def depart(self) -> None:
        """Make a child of what some file has committed, as another process sees it."""
        name, child = self.random.choice(self.names), f"{len(self.names)}.kvm"
        made = None
        with self.mortal(60):
            with contextlib.closing(open_chain(MappedReader.open(self.path(name)))) as chain:
                committed = chain.committed_len
            if committed:
                length = self.random.randint(1, committed)
                made = create_child(self.path(child), self.path(name), length, capacity=400)
        if made is not None:
            made.own.file.close() if hasattr(made, "own") else made.close()
        if os.path.exists(self.path(child)):
            self.names.append(child)

    def look(self) -> None:
        """Lose power here, and open what is left: every child has its parents, and all is sound."""
        image = self.machine.disk.power_loss(self.random)
        boot, self.machine.boot = self.machine.boot, -1 - self.children_seen
        folder = self.folder + ".image"
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        for name, content in image.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(content)
        try:
            for name in [name for name in sorted(image) if not name.startswith(".")]:
                with contextlib.closing(open_chain(MappedReader.open(os.path.join(folder, name)))) as chain:
                    assert chain.verify().sound
                    chain.read_tokens(chain.token_len)
                    self.children_seen += name != "0.kvm"
        finally:
            self.machine.boot = boot


def test_no_child_survives_without_its_parent(machine_folder: str) -> None:
    seen = 0
    for seed in range(HISTORIES):
        family = Family(machine_folder, seed)
        family.run()
        seen += family.children_seen
    assert seen > 5 * HISTORIES


def dies_in_its_commit(folder: str, step: int, mutation: Mutation | None = None) -> bool:
    """Let the parent's writer die at a step of its second commit, and make a child of all that seems to be committed.

    Returns:
        True if the child begins with positions of that commit.
    """
    family = Family(folder, step, mutation)
    machine, parent = family.machine, family.path("0.kvm")
    step_rows = rows(2, 20, 1, 4)
    with machine.running(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        writer = MappedWriter.create(parent, GEOMETRY, Document(None, {}))
        cache = kvmmap.QuantizedKvCache.of_storage(writer)
        cache.extend(step_rows, step_rows, np.arange(20))
        cache.flush()
        cache.extend(step_rows, step_rows, np.arange(20))
        machine.countdown = step
        with contextlib.suppress(Killed):
            cache.flush()
        machine.new_process()
        writer.file.close()
        del cache, writer
        child = create_child(family.path("1.kvm"), parent, None, capacity=400)
        length = child.seq_len
        child.close()
        for _ in range(20):
            family.look()
    return length == 40


def test_a_parent_is_durable_before_its_child(machine_folder: str) -> None:
    """A commit is visible before it is durable; without the sync, a child outlives what it continues."""
    found = [step for step in range(3, 12) if dies_in_its_commit(os.path.join(machine_folder, "with"), step)]
    assert found
    skipped = os.path.join(machine_folder, "without")
    with pytest.raises(kvmmap.ParentError):
        list(map(functools.partial(dies_in_its_commit, skipped, mutation=without_the_sync), found))


def without_the_sync(kind: str, caller: str) -> bool:
    return (kind, caller) == ("sync", "make_record")


def commit_unsynced_child(folder: str, seed: int, mutation: Mutation | None = None) -> int:
    """Commit a child that was made without a sync, on a machine that loses power at any moment.

    The parent's writer may have died in the middle of a commit, and the child's may die in its own.

    Returns:
        How many images had the child after its commit was acknowledged.
    """
    family = Family(folder, seed, mutation)
    machine, random, parent, path = family.machine, family.random, family.path("0.kvm"), family.path("1.kvm")
    step, length = rows(2, 20, 1, 4), 0
    with machine.running(), contextlib.ExitStack() as stack:
        writer = MappedWriter.create(parent, GEOMETRY, Document(None, {}))
        stack.callback(writer.file.close)
        cache = kvmmap.QuantizedKvCache.of_storage(writer)
        for _ in range(2):
            cache.extend(step, step, np.arange(20))
            machine.countdown = random.randrange(3, 12) if cache.seq_len == 40 else None
            with contextlib.suppress(Killed):
                cache.flush()
            machine.new_process()
        writer.file.close()
        chain = create_child(path, parent, None, capacity=400, durable=False)
        assert isinstance(chain, ChainStorage)
        for one in (chain.own, chain.ancestors[0].reader):
            stack.callback(one.file.close)
        child, base = kvmmap.QuantizedKvCache.of_storage(chain), chain.seq_len
        child.extend(step, step, np.arange(20))
        machine.countdown = random.randrange(2, 20) if random.random() < 0.5 else None
        with contextlib.suppress(Killed):
            child.flush()
            length = base + 20
        machine.new_process()
        return sum(look_at_child(family, length, base) for _ in range(12))


def look_at_child(family: Family, length: int, base: int) -> bool:
    """Lose power, and open the child: all of it is there if its commit was acknowledged, and never something else."""
    image = family.machine.disk.power_loss(family.random)
    boot, family.machine.boot = family.machine.boot, -1
    folder = family.folder + ".image"
    os.makedirs(folder, exist_ok=True)
    for name in ("0.kvm", "1.kvm"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(image.get(name, b""))
    try:
        with contextlib.closing(open_chain(MappedReader.open(os.path.join(folder, "1.kvm")))) as chain:
            assert chain.seq_len in ((length,) if length else (base, base + 20))
            damages = chain.verify().damages
            if chain.seq_len == base:  # nothing of it was committed: its metadata need not be durable yet
                damages = [damage for damage in damages if damage.layer is not None]
            assert not damages
            np.testing.assert_array_equal(chain.read_tokens(chain.seq_len)[base:], np.arange(chain.seq_len - base))
    except kvmmap.FormatError:
        assert not length  # nothing of it had to be durable yet
    finally:
        family.machine.boot = boot
    return length > 0


def test_the_first_commit_makes_an_unsynced_child_durable(machine_folder: str) -> None:
    assert sum(commit_unsynced_child(machine_folder, seed) for seed in range(HISTORIES * 2)) > 12


@pytest.mark.parametrize("function", ["_sync_parent", "_commit", "_write_slot", "_sync_name"])
def test_an_unsynced_child_needs_every_sync(machine_folder: str, function: str) -> None:
    def without(kind: str, caller: str) -> bool:
        return caller == function and kind.startswith("sync")

    with pytest.raises((AssertionError, kvmmap.ParentError)):
        list(map(functools.partial(commit_unsynced_child, machine_folder, mutation=without), range(40)))
