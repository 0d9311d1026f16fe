"""The native checks of tests/native: the kernels in C++, under sanitizers. `make sanitize` runs all of them.

Objects are kept in `build/`, so that only what has changed is compiled.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long, pytest.mark.sweep]
NATIVE = Path(__file__).parent / "native"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_kernels_agree(tmp_path):
    run = subprocess.run([NATIVE / "run.sh", tmp_path, "quick"], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "warning" not in run.stderr
    for line in run.stdout.splitlines():
        if line.startswith("skipped"):
            pytest.skip(line)


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs g++-aarch64-linux-gnu")
@pytest.mark.skipif(
    not (shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")), reason="needs qemu-user-static"
)
def test_kernels_of_aarch64_agree(tmp_path):
    """Under an emulator. Products of bytes take less than half of the instructions of floats."""
    run = subprocess.run([NATIVE / "run.sh", tmp_path, "aarch64"], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "warning" not in run.stderr
    for kernel in ("neon", "dotprod", "i8mm"):
        assert f"{kernel}: attention checked" in run.stdout
    counts = {}
    for bits, kernel, count in re.findall(r"queries of (\d+) bits, 4 a KV head, (\w+): (\d+)", run.stdout):
        counts[int(bits), kernel] = int(count)
    assert 0 < counts[16, "i8mm"] < counts[16, "dotprod"] < counts[32, "dotprod"] < counts[32, "neon"] / 2


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_threads_do_not_race(tmp_path):
    """Pieces shared between threads, attention beside appends, and a recent window that other processes read."""
    run = subprocess.run([NATIVE / "race.sh", tmp_path, "quick"], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "pieces: 0 wrong" in run.stdout
    assert run.stdout.count(" 0 wrong") - 1 == run.stdout.count("looks over") >= 3
    assert run.stdout.count("rows read, 0 numbers wrong") == run.stdout.count("rows read") == 6
