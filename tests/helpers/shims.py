"""Libraries for LD_PRELOAD between Python and the system."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def build_shim(source: Path, folder: Path) -> Path:
    """Return a library for LD_PRELOAD, compiled from a C file; skip the test where there is no compiler."""
    if not shutil.which("gcc") or sys.platform != "linux":
        pytest.skip("needs gcc and LD_PRELOAD")
    built = folder / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", built, source, "-ldl"], check=True)
    return built
