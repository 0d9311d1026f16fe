"""The tests of the transformers integration on the oldest supported and the newest existing release of transformers.

Each release gets an environment of its own, .venv-transformers-VERSION; arguments are passed on to pytest. The newest
release is tested even if pyproject.toml does not allow it yet, so that a change in it is noticed when it is published.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_transformers*.py", "tests/families"]


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    oldest = _supported(settings["transformers"])
    failed = []
    for release in dict.fromkeys([_first(oldest), _releases()[0]]):
        print(f"transformers {release}", flush=True)
        python = _environment(release, [line for line in settings["dev"] if not line.startswith("transformers=")])
        tests = [str(found.relative_to(ROOT)) for pattern in TESTS for found in sorted(ROOT.glob(pattern))]
        untested = "ignore:kvmmap is tested with:RuntimeWarning"
        command = [python, "-m", "pytest", "-W", untested, *tests, *sys.argv[1:]]
        if subprocess.run(command, cwd=ROOT, env=os.environ | {"KVMMAP_FAMILIES": "all"}).returncode:
            failed.append(release)
    print(f"failed with transformers {', '.join(failed)}" if failed else "passed")
    return bool(failed)


def _supported(requirements: list[str]) -> str:
    """The lower bound of transformers in a list of requirements."""
    found = (re.match(r"transformers>=([\d.]+),<", line) for line in requirements)
    return next(match[1] for match in found if match)


def _first(version: str) -> str:
    """A version with all three numbers: 5.20 -> 5.20.0."""
    return version + ".0" * (2 - version.count("."))


def _releases() -> list[str]:
    """All releases of transformers that pip finds, the newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"^Available versions: (.*)$", shown, re.MULTILINE)[1].split(", ")


def _environment(release: str, requirements: list[str]) -> str:
    """Make an environment with a release of transformers, if there is none; return its Python."""
    folder = ROOT / f".venv-transformers-{release}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        needed = [line.replace("kvmmap[", ".[") if line.startswith("kvmmap[") else line for line in requirements]
        editable = [line for line in needed if line.startswith(".")]
        others = [line for line in needed if not line.startswith(".")]
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *(word for line in editable for word in ("--editable", line)), *others,
                        f"transformers=={release}"], cwd=ROOT, check=True)  # fmt: skip
        (folder / ".installed").touch()
    return str(python)


if __name__ == "__main__":
    sys.exit(main())
