"""A short fuzzing run, and checks that the fuzzer must miss if they are left out. `make fuzz` is the long form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.support import sweep

EXECUTIONS = int(os.environ.get("KVMMAP_EXECUTIONS", "1000"))
SEED = int(os.environ.get("KVMMAP_FUZZ_SEED", "1"))
"""The same files each time, so that a change is judged by what it changes; `make fuzz` makes others each time."""
WITH_MANY_ROWS = (
    '{"changes": [["length", 1, 8], ["plan", 16, 1048576, [[1, 1, 1], [4561, 8, 8]], 1, 4096], '
    '["plan", 16, 2, [[9793, 8, 1]], 1, 8193]], "geometry": [0, 256, [[1, 8, 8]]], "length": 0, "open": true}'
)


@pytest.fixture(params=[EXECUTIONS, *sweep(4 * EXECUTIONS)])
def executions(request: pytest.FixtureRequest) -> int:
    """How many files a run makes."""
    count: int = request.param
    return count


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "fuzz.run", "--seed", str(SEED), *map(str, arguments)],
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


def test_the_first_file_may_have_many_rows() -> None:
    """How many threads read it is asked once in a process: of the system, not of the file."""
    done = fuzz("--recipe", WITH_MANY_ROWS)
    assert done.returncode == 0, done.stderr
    assert "layer: used" in done.stdout


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
    done = fuzz("--checkpoints", "--executions", executions // 3)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutation", ["checkpoint-digests-unchecked", "checkpoint-headers-unchecked"])
def test_the_fuzzer_detects_wrong_states(mutation: str) -> None:
    done = fuzz("--checkpoints", "--executions", 5_000, "--mutation", mutation)
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"
    assert "ForbiddenError: " in done.stderr


def test_the_fuzzer_detects_parents_elsewhere() -> None:
    done = fuzz("--children", "--executions", 5_000, "--mutation", "parent-names-unchecked")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


def test_the_fuzzer_detects_states_that_are_read_beyond_their_end() -> None:
    done = fuzz("--states", "--executions", 5_000, "--mutation", "states-unbounded")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


def test_the_fuzzer_detects_errors_of_the_library() -> None:
    done = fuzz("--tensors", "--executions", 5_000, "--mutation", "tensor-errors-let-through")
    assert done.returncode == 1, f"{done.stdout}\nand nothing happened"


@pytest.mark.parametrize("mutation", ["sections-unchecked", "lengths-unchecked", "depth-unchecked"])
def test_the_fuzzer_detects_missing_checks(mutation: str) -> None:
    done = fuzz("--executions", 20_000, "--mutation", mutation)
    assert done.returncode == 1, f"{done.stdout}\nwith {mutation}, and nothing happened"
    assert "see it again with" in done.stderr


def test_random_command_lines_end_as_they_should() -> None:
    """In short; `make fuzz` runs 20,000."""
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.commands", "--seed", str(SEED), "--count", "200", "--process-every", "100"],
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
