"""How many threads a computation takes: one rule for attention, encoding, decoding and hashing.

The first of these that is given: an argument `threads=`; the environment variable KVMMAP_NUM_THREADS; the threads that
torch takes, where the transformers integration calls; the processors that this process may use, by its affinity mask
and the quota of its control groups. Threads that mostly wait for a disk or a network are not counted.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import KvmmapError, ShapeMismatchError
from .ranges import index

if TYPE_CHECKING:
    from pathlib import Path

VARIABLE = "KVMMAP_NUM_THREADS"
"""The environment variable that limits threads. It is read at each call."""

# Below this many numbers a second thread never pays, and one need not ask how many there may be.
_ONE_THREAD = 1 << 18

_MOST = 1 << 20  # more than any machine has, and a number that the compiled core takes


def thread_count(threads: int | None, numbers: int) -> int:
    """Return how many threads may work on so many numbers.

    Args:
        threads: asked for by an argument; None: by the rule.
        numbers: that are read or written.

    Raises:
        ShapeMismatchError: `threads` is no whole number from 1 on.
        KvmmapError: KVMMAP_NUM_THREADS is no whole number from 1 on.
    """
    if threads is None:
        return 1 if numbers < _ONE_THREAD else threads_of(None)
    if (wanted := index(threads, "threads")) < 1:
        raise ShapeMismatchError(
            f"threads must be at least 1, not {threads}; None takes all processors", expected=1, actual=threads
        )
    return min(wanted, _MOST)


def threads_of(framework: int | None) -> int:
    """Return how many threads to take where no argument says it.

    Args:
        framework: threads of the framework that calls, if there is one.

    Raises:
        KvmmapError: KVMMAP_NUM_THREADS is no whole number from 1 on.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted:
        if not (wanted.isascii() and wanted.isdigit() and 0 < len(wanted) < 10 and int(wanted)):
            raise KvmmapError(
                f"the environment variable {VARIABLE} must be a whole number from 1 on, not {wanted!r}: unset it to "
                "use all processors",
                expected="a whole number from 1 on",
                actual=wanted,
            )
        return int(wanted)
    return processors() if framework is None else framework


def processors() -> int:
    """Return how many processors this process may use: those of its affinity mask, or fewer by a quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _own_quota()
    return allowed if quota is None else min(allowed, quota)


@functools.cache
def _own_quota() -> int | None:
    from pathlib import Path  # here: it loads urllib and ipaddress, a tenth of what importing kvmmap takes

    return quota_of(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def quota_of(membership: Path, mount: Path) -> int | None:
    """Return the smallest quota of the control groups that a process is in, in processors; None without one.

    A part of a processor counts as one: with a quota of 1.5, two threads get three quarters of a processor each.

    Args:
        membership: the process's /proc/PID/cgroup.
        mount: where control groups are mounted.
    """
    found = []
    for group in _groups(membership, mount):
        quota = _quota_v2(group) or _quota_v1(group)
        if quota is not None:
            found.append(quota)
    return min(found, default=None)


def _groups(membership: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of a process's groups, and of those around them.

    In a container the names of groups may be those of the host, which are not to be seen there: then only the outermost
    folder exists, and it is the container's own.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        roots = [mount] if not controllers else []  # version 2 has one hierarchy
        if "cpu" in controllers.split(","):
            roots = [mount / controllers, mount / "cpu"]
        for root in roots:
            inner = root / name.strip("/")
            yield from (inner, *(outer for outer in inner.parents if outer == root or root in outer.parents))


def _quota_v2(group: Path) -> int | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return _rounded_up(int(quota), int(period))
    except (OSError, ValueError):  # "max": none
        return None


def _quota_v1(group: Path) -> int | None:
    try:
        quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return _rounded_up(quota, period)
    except (OSError, ValueError):
        return None


def _rounded_up(quota: int, period: int) -> int | None:
    return -(-quota // period) if quota > 0 and period > 0 else None  # a quota of -1: none
