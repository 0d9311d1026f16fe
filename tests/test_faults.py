"""Every system call on a cache's file fails once, and in turn all from there on: beneath Python, with LD_PRELOAD."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.shims import build_shim
from helpers.support import MEMORY

FAULTS = Path(__file__).parent / "faults"
CALLS = {"fallocate", "fdatasync", "fsync", "ftruncate", "link", "mmap", "open", "pread", "pwrite", "rename", "unlink"}


@pytest.mark.long
def test_every_system_call_may_fail(tmp_path: Path) -> None:
    shim = build_shim(FAULTS / "shim.c", tmp_path)
    base = Path(MEMORY or tmp_path)  # thousands of syncs
    folder = base / f"kvmmap-faults-{os.getpid()}"
    done = subprocess.run(
        [sys.executable, FAULTS / "scenario.py"],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "FAULT_FOLDER": str(folder),
            "PYTHONPATH": str(FAULTS.parent),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    for left in base.glob(f"{folder.name}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    count, *calls = done.stdout.split()
    assert set(calls) == CALLS
    assert int(count) > 500
