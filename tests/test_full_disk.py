"""A disk that is really full: a small tmpfs in a mount namespace of its own, filled to the last page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("scenario", ["push", "extend", "step", "flush", "flush again", "create"])
def test_a_full_disk(namespace: list[str], tmp_path: Path, scenario: str) -> None:
    done = subprocess.run(
        [*namespace, sys.executable, "-W", "error", "-m", "helpers.full_disk", tmp_path, scenario],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"  # -7 would be SIGBUS
    assert done.stdout == "sound\n"
