"""The kernels' helper threads: they don't outstay their welcome, don't come between a process and its forks, and change
no result by when they come.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.support import rows, run_python

from kvmmap import QuantizedKvLayer

# numpy's own threads are none of what is counted; and the system still counts one for some microseconds after it was
# joined, so that a fork is warned of.
ALONE = (
    "import os, threading, warnings; os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"
    "from test_parallel import *\n"
    "warnings.filterwarnings('ignore', '.*multi-threaded.*fork', DeprecationWarning)\n"
)
"""What a process begins with that does one of these tests."""


def attend_by_three() -> tuple[QuantizedKvLayer, np.ndarray]:
    """A layer that is long enough for three threads, and its attention by as many."""
    layer = QuantizedKvLayer(9000, 3, 64)
    layer.extend(rows(9000, 3, 64), rows(9000, 3, 64, seed=1))
    return layer, layer.attend(rows(1, 9, 64, seed=2), threads=3)


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("n", [1, 5, 40])
def test_the_same_call_gives_the_same_bits(n: int) -> None:
    """Whichever thread takes which piece, and when."""
    layer, _ = attend_by_three()
    queries = rows(n, 9, 64, seed=3)
    first = layer.attend(queries, threads=3)
    for _ in range(50):
        np.testing.assert_array_equal(layer.attend(queries, threads=3), first)


@pytest.mark.parametrize("length", [1024, 4353, 9000])
@pytest.mark.parametrize("options", [{}, {"window": 3000, "sinks": 4}, {"positions": (100, 1000)}])
def test_no_number_of_threads_loses_a_position(length: int, options: dict[str, Any]) -> None:
    layer = QuantizedKvLayer(length, 3, 64)
    layer.extend(rows(length, 3, 64), rows(length, 3, 64, seed=1))
    queries = rows(1, 9, 64, seed=3)
    out, lse = layer.attend(queries, threads=1, return_lse=True, **options)
    for threads in (2, 3, 7, 40):
        found, others = layer.attend(queries, threads=threads, return_lse=True, **options)
        np.testing.assert_allclose(found, out, rtol=0, atol=1e-6)
        np.testing.assert_allclose(others, lse, rtol=0, atol=1e-6)


def wait_for_threads(count: int, between: Callable[[], object] = lambda: time.sleep(0.001)) -> None:
    """Wait until there are so many, doing something between looks."""
    deadline = time.monotonic() + 30
    while threads_of_process() != count:
        assert time.monotonic() < deadline, f"{threads_of_process()} threads, not {count}"
        between()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_helpers_end_after_a_call() -> None:
    run_python(
        ALONE + "before = threads_of_process()\n"
        "layer, _ = attend_by_three()\n"
        "attend = lambda: layer.attend(rows(1, 9, 64), threads=3)\n"
        # Where other processes want the processors, helpers may have ended before this one gets to look.
        "wait_for_threads(before + 2, attend)\n"
        "wait_for_threads(before)\n"
        "wait_for_threads(before + 2, attend)"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_forked_child_starts_its_own_helpers() -> None:
    run_python(
        ALONE + "before = threads_of_process()\n"
        "for _ in range(20):\n"
        "    layer, out = attend_by_three()\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        alone = threads_of_process() == 1\n"
        "        same = (layer.attend(rows(1, 9, 64, seed=2), threads=3) == out).all()\n"
        "        os._exit(0 if alone and same else 1)\n"
        "    wait_for_threads(before)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    assert (layer.attend(rows(1, 9, 64, seed=2), threads=3) == out).all()"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_during_a_call_does_not_stop_its_helpers() -> None:
    """Another thread computes attention at that moment: its helpers stay."""
    run_python(
        ALONE + "layer, out = attend_by_three()\n"
        "query, ended, wrong = rows(1, 9, 64, seed=2), threading.Event(), []\n"
        "def attend():\n"
        "    while not ended.is_set():\n"
        "        if not (layer.attend(query, threads=3) == out).all(): wrong.append(1)\n"
        "thread = threading.Thread(target=attend); thread.start()\n"
        "for _ in range(50):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0 if (layer.attend(query, threads=3) == out).all() else 1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "ended.set(); thread.join(); assert not wrong"
    )
