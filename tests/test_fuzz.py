"""A short fuzzing run, and checks that the fuzzer must miss if they are left out. `make fuzz` is the long form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import sweep

EXECUTIONS = int(os.environ.get("KVMMAP_EXECUTIONS", "1000"))


@pytest.fixture(params=[EXECUTIONS, *sweep(4 * EXECUTIONS)])
def executions(request: pytest.FixtureRequest) -> int:
    """How many files a run makes."""
    count: int = request.param
    return count


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fuzz.run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parent,
    )


def test_hostile_files_are_refused_or_read(executions: int) -> None:
    done = fuzz("--executions", executions)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{executions:,} files" in done.stdout


def test_hostile_groups_are_refused_or_read(executions: int) -> None:
    done = fuzz("--groups", "--executions", executions // 10)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hostile_tensors_are_refused_or_imported(executions: int) -> None:
    done = fuzz("--tensors", "--executions", executions // 2)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hostile_states_are_refused_or_imported(executions: int) -> None:
    done = fuzz("--states", "--executions", executions // 2)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hostile_children_are_refused_or_read(executions: int) -> None:
    done = fuzz("--children", "--executions", executions // 2)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hostile_checkpoints_are_refused_or_read(executions: int) -> None:
    done = fuzz("--checkpoints", "--executions", executions // 3, "--seed", 1)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", ["checkpoint-digests-unchecked", "checkpoint-headers-unchecked"])
def test_the_fuzzer_detects_wrong_states(mutation: str) -> None:
    done = fuzz("--checkpoints", "--executions", 5_000, "--seed", 1, "--mutation", mutation)
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"
    assert "ForbiddenError: " in done.stderr


def test_the_fuzzer_detects_parents_elsewhere() -> None:
    done = fuzz("--children", "--executions", 5_000, "--seed", 1, "--mutation", "parent-names-unchecked")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


def test_the_fuzzer_detects_states_that_are_read_beyond_their_end() -> None:
    done = fuzz("--states", "--executions", 5_000, "--seed", 1, "--mutation", "states-unbounded")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


def test_the_fuzzer_detects_errors_of_the_library() -> None:
    done = fuzz("--tensors", "--executions", 5_000, "--seed", 1, "--mutation", "tensor-errors-let-through")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


@pytest.mark.parametrize("mutation", ["sections-unchecked", "lengths-unchecked", "depth-unchecked"])
def test_the_fuzzer_detects_missing_checks(mutation: str) -> None:
    done = fuzz("--executions", 20_000, "--seed", 1, "--mutation", mutation)
    assert done.returncode == 1, f"{done.stdout}\nwith {mutation}, and nothing happened"
    assert "see it again with" in done.stderr


def test_random_command_lines_end_as_they_should() -> None:
    """In short; `make fuzz` runs 20,000."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.commands", "--count", "200", "--process-every", "100"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parent,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_fuzzer_of_command_lines_sees_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvmmap_cli.commands.verify
    from fuzz.commands import LyingError, fuzz

    monkeypatch.setattr(kvmmap_cli.commands.verify, "to_dict", None)
    monkeypatch.setattr(kvmmap_cli.commands.verify, "render", None)
    with pytest.raises(LyingError, match="exit code 70"):
        fuzz(400, 1, 1_000_000, print)
