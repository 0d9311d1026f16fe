"""Writers killed at random moments, and mutations that must be detected. `make soak` is the long form.

What the writers do is the same in each run, other than with `make soak`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import sweep

KILLS = int(os.environ.get("KVMMAP_KILLS", "20"))
MUTATIONS = ("publish-first", "truncate-silently", "forget-lengths", "commit-nothing", "misplace-recent")


@pytest.fixture(params=[KILLS, *sweep(3 * KILLS)])
def kills(request: pytest.FixtureRequest) -> int:
    """How many writers are killed."""
    count: int = request.param
    return count


def soak(folder: Path, kills: int, *more: str, module: str = "soak.kills") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", module, "--seed", "1", "--folder", folder, "--kills", str(kills), *more],
        capture_output=True,
        text=True,
        timeout=60 + 10 * kills,
        check=False,
        cwd=Path(__file__).parent,
    )


def test_readers_get_every_published_row_unchanged(tmp_path: Path, kills: int) -> None:
    done = soak(tmp_path, kills)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost, nothing wrong\n")
    assert not list(tmp_path.iterdir())


def test_readers_of_a_cache_that_continues_another_do_too(tmp_path: Path, kills: int) -> None:
    done = soak(tmp_path, kills // 2, "--inherited", "300")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_soak_detects_missing_safeguards(tmp_path: Path, mutation: str) -> None:
    done = soak(tmp_path, 300, "--mutation", mutation)
    assert done.returncode == 1, f"{done.stdout}\nwith {mutation}, and nobody noticed"
    assert "Error" in done.stderr


def test_checkpoints_of_states_are_those_of_their_rows(tmp_path: Path, kills: int) -> None:
    done = soak(tmp_path, kills, module="soak.states")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("nothing lost, nothing wrong\n")


def test_states_before_their_rows_are_detected(tmp_path: Path) -> None:
    done = soak(tmp_path, 300, "--early", module="soak.states")
    assert done.returncode == 1
    assert "is not that of its rows" in done.stderr
