"""Libraries for LD_PRELOAD, that stand between Python and the system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def build_shim(source: Path, folder: Path) -> Path:
    """Return a library for LD_PRELOAD, built of a C file; skips the test where it can't be."""
    if not shutil.which("gcc") or sys.platform != "linux":
        pytest.skip("needs gcc and LD_PRELOAD")
    built = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
    return built
