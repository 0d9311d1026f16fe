"""The interpreters that a release is built and checked with: those of the supported versions that run here.

As a program, print these versions.
"""

from __future__ import annotations

import os
import subprocess

SUPPORTED = ("3.11", "3.12", "3.13")

STABLE_ABI = "3.12"
"""From here on one wheel serves every version, as nanobind needs this one's limited API; older ones have their own."""


def found() -> dict[str, str]:
    """Return the command of every supported version that runs; `python3.12` may be a shim that does not."""
    return {version: command for version in SUPPORTED if _runs(command := f"python{version}")}


def building() -> list[str]:
    """Return the commands to build wheels with: one for each old version, one for all new ones."""
    commands = found()
    old = [command for version, command in commands.items() if _number(version) < _number(STABLE_ABI)]
    new = [command for version, command in commands.items() if _number(version) >= _number(STABLE_ABI)]
    return old + new[:1]


def bare_environment(*paths: str) -> dict[str, str]:
    """Return an environment without a compiler, and without what would lead Python elsewhere.

    Args:
        paths: folders to find programs in.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CC", "CXX", "AWS_"))}
    return kept | {"PATH": os.pathsep.join(paths), "CC": "/nonexistent", "CXX": "/nonexistent"}


def _runs(command: str) -> bool:
    try:
        done = subprocess.run(
            [command, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0 and done.stdout.strip() == f"({command[6:].replace('.', ', ')})"


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    print(*found())
