"""Processes that use a library, killed at random moments. `make soak` is the long form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KILLS = int(os.environ.get("KVMMAP_LIBRARY_KILLS", "10"))


def test_a_library_survives_the_death_of_its_users(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "soak.library", "--folder", tmp_path, "--kills", str(KILLS)],
        capture_output=True,
        text=True,
        timeout=120 + 10 * KILLS,
        check=False,
        cwd=Path(__file__).parent,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost, nothing wrong\n")
    assert not list(tmp_path.iterdir())
