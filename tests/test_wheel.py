"""What is installed: exactly two importable packages, typed, and nothing of the compiled core's sources."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_two_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("kvmmap-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"kvmmap", "kvmmap_cli"}
    assert "kvmmap/py.typed" in names
    assert any(name.startswith("kvmmap/_core/_kernels.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".txt")) and ".dist-info" not in name]
