"""A library on a disk that is really full, so that even its index can't be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvmmap
from kvmmap.library.database import Database

TESTS = Path(__file__).parent


def test_a_full_disk(namespace: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*namespace, sys.executable, "-W", "error", "-m", "helpers.full_library", tmp_path],
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr}"
    assert done.stdout == "sound\n"


def test_an_index_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmmap.library.database.BUSY_SECONDS", 0.05)
    with kvmmap.Library(tmp_path / "library") as library:
        other = Database(library.path)
        with other.writing(), pytest.raises(kvmmap.CacheLockedError, match="has held the index"):
            library.session(kvmmap.Namespace.build(num_layers=1, num_kv_heads=1, head_dim=8), [1, 2])
        assert library.match("0" * 32, [1]).length == 0
        other.release()
