"""How many threads computations take: an argument, the environment variable, the framework's, the processors'."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from helpers.support import run_python

import kvmmap
from kvmmap.threads import VARIABLE, processors, quota_of, thread_count, threads_of

LARGE = 1 << 24
"""Numbers that are worth many threads."""

COUNTED = (
    "import os, sys, time; os.environ['OPENBLAS_NUM_THREADS'] = '1'\n"
    "import numpy as np, kvmmap\n"
    "from helpers.core_threads import core_threads\n"
    "rows = np.random.default_rng(0).standard_normal((9000, 3, 64)).astype(np.float32)\n"
)
"""What a process begins with in which the core's threads are counted."""


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_the_first_that_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert thread_count(5, LARGE) == thread_count(5, 1) == 5
    assert thread_count(None, LARGE) == threads_of(None) == processors() >= 1
    assert threads_of(7) == 7
    monkeypatch.setenv(VARIABLE, "3")
    assert thread_count(5, LARGE) == 5
    assert thread_count(None, LARGE) == threads_of(None) == threads_of(7) == 3
    assert thread_count(None, 1000) == 1  # not worth a second
    monkeypatch.setenv(VARIABLE, "")
    assert threads_of(7) == 7


@pytest.mark.parametrize("wrong", ["0", "-1", "two", "1.5", "٣", " 2", "1" * 30])
def test_a_variable_that_is_no_number_is_an_error(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, wrong)
    with pytest.raises(kvmmap.KvmmapError, match=rf"{VARIABLE} must be a whole number from 1 on.*unset it"):
        thread_count(None, LARGE)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="there are no affinity masks")
def test_processors_are_those_of_the_affinity_mask() -> None:
    one = min(os.sched_getaffinity(0))
    run_python(
        f"import os; os.sched_setaffinity(0, {{{one}}})\n"
        "from kvmmap.threads import processors\n"
        "assert processors() == 1"
    )


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_quota_of_control_groups_counts(tmp_path: Path) -> None:
    mount, own = tmp_path / "cgroup", tmp_path / "own"
    assert quota_of(own, mount) is None  # no such system
    written(own, "0::/user/job/step\n")
    assert quota_of(own, mount) is None
    written(mount / "user" / "job" / "step" / "cpu.max", "max 100000\n")
    assert quota_of(own, mount) is None
    written(mount / "user" / "job" / "cpu.max", "350000 100000\n")
    assert quota_of(own, mount) == 4  # 3.5: rounded up
    written(mount / "user" / "cpu.max", "200000 100000\n")
    assert quota_of(own, mount) == 2  # the smallest around
    written(mount / "user" / "job" / "step" / "cpu.max", "5000 100000\n")
    assert quota_of(own, mount) == 1
    written(mount / "other" / "cpu.max", "1000 100000\n")
    written(own, "0::/\n")
    assert quota_of(own, mount) is None
    written(mount / "cpu.max", "300000 100000\n")  # a container's own group
    assert quota_of(own, mount) == 3
    written(own, "0::/a/name/of/the/host\n")
    assert quota_of(own, mount) == 3


@pytest.mark.parametrize("folder", ["cpu,cpuacct", "cpu"])
def test_a_quota_of_version_1_counts(folder: str, tmp_path: Path) -> None:
    mount, own = tmp_path / "cgroup", written(tmp_path / "own", "5:memory:/job\n4:cpu,cpuacct:/job\n3:cpuset:/x\n")
    group = mount / folder / "job"
    written(group / "cpu.cfs_period_us", "100000\n")
    written(group / "cpu.cfs_quota_us", "-1\n")
    assert quota_of(own, mount) is None
    written(group / "cpu.cfs_quota_us", "250000\n")
    assert quota_of(own, mount) == 3
    written(mount / "memory" / "job" / "cpu.cfs_quota_us", "1000\n")
    written(mount / folder / "cpu.cfs_quota_us", "garbage")
    assert quota_of(own, mount) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_computation_takes_more_threads_than_asked_for(tmp_path: Path) -> None:
    """Attention, encoding, decoding and hashing, each with work for several threads."""
    run_python(
        COUNTED + "shape = dict(num_layers=1, capacity=9000, num_kv_heads=3, head_dim=64)\n"
        "with kvmmap.create(sys.argv[1], **shape) as cache:\n"
        "    cache.extend([rows], [rows])\n"
        "def first():\n"
        "    with kvmmap.open(sys.argv[1]) as cache: cache.layers[0].attend(rows[:1])\n"
        "def last():\n"
        "    with kvmmap.open(sys.argv[1]) as cache: cache.layers[0].read_values()\n"
        "codes = kvmmap.quantize_rows(rows, threads=1)\n"
        "layer = kvmmap.QuantizedKvLayer(9000, 3, 64)\n"
        "layer.extend(rows, rows)\n"
        "calls = [first, last, lambda: kvmmap.quantize_rows(rows), lambda: kvmmap.dequantize_rows(*codes),\n"
        "         lambda: layer.attend(rows[:1]), layer.read_keys]\n"
        "for call in calls:\n"
        f"    os.environ[{VARIABLE!r}] = '1'\n"
        "    call()\n"
        "    assert core_threads() == 0, call\n"
        f"    os.environ[{VARIABLE!r}] = '3'\n"
        "    deadline = time.monotonic() + 30\n"
        # Where other processes want the processors, helpers may have ended before this one gets to look.
        "    seen = 0\n"
        "    while seen != 2:\n"
        "        assert time.monotonic() < deadline and seen < 2, (call, seen)\n"
        "        call()\n"
        "        seen = core_threads()\n"
        "    while core_threads():\n"
        "        time.sleep(0.01)",
        tmp_path / "a.kvm",
    )
