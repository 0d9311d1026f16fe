"""Files are private from their creation on, temporary ones too, whatever the umask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.shims import build_shim

PRIVACY = Path(__file__).parent / "privacy"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that records the modes of created files."""
    return build_shim(PRIVACY / "shim.c", tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("umask", ["0", "022", "077"])
def test_created_files_are_private(shim: Path, tmp_path: Path, umask: str) -> None:
    folder, log = tmp_path / "caches", tmp_path / "log"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", PRIVACY / "scenario.py", folder, umask],
        env={
            **os.environ,
            "LD_PRELOAD": str(shim),
            "MODES_LOG": str(log),
            "MODES_FOLDER": str(folder),
            "PYTHONPATH": str(PRIVACY.parent),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = [line.split(" ", 2) for line in log.read_text().splitlines()]
    wrong = [line for line in made if line[:2] not in (["open", "600"], ["mkdir", "700"])]
    assert not wrong
    temporary = [path for _, _, path in made if path.endswith((".tmp", ".partial"))]
    assert len(temporary) >= 10
    names = {Path(path).suffix for _, _, path in made}
    for left in folder.rglob("*"):  # and what has been put in its place from elsewhere
        assert left.stat().st_mode & 0o777 == (0o700 if left.is_dir() else 0o600), left
    assert {".tmp", ".zarr"} <= names
