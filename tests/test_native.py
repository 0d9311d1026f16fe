"""The native checks of tests/native: the kernels in C++, under sanitizers, and for AArch64 emulated."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "native" / "run.sh"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_kernels_agree(tmp_path):
    run = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "warning" not in run.stderr
    for line in run.stdout.splitlines():
        if line.startswith("skipped"):
            pytest.skip(line)
