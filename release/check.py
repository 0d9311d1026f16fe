"""Check what `build.py` made, as a stranger would get it: in new environments, with no compiler in reach.

python release/check.py [--dist dist] [WHAT...]

contents   sdist and wheels hold what they should, and nothing else
wheels     in every interpreter here: install the wheel without extras, run smoke/base.py
portable   the same on an emulated processor that has no AVX (needs qemu-user)
extras     each extra by itself: its own program runs, and what needs another says which
types      mypy --strict and pyright over tests/typing, against the installed wheel
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pythons

HERE = Path(__file__).parent
ROOT = HERE.parent
SMOKE = HERE / "smoke"
TYPING = ROOT / "tests" / "typing"
MARK = "# wrong"

# Extras that others depend on: what needs them works then, and reports nothing.
BRINGS = {"s3": {"zarr"}, "transformers": {"safetensors", "tokens"}}

NOTHING: Mapping[str, str] = MappingProxyType({})

EMULATED = "Nehalem"
"""A processor that numpy's wheels still run on (x86-64-v2), and that has no AVX."""


def main() -> None:
    checks: dict[str, Callable[[Path, Path], None]] = {
        "contents": contents,
        "wheels": wheels,
        "portable": portable,
        "extras": extras,
        "types": types,
    }
    parser = argparse.ArgumentParser(description="Check sdist and wheels.")
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(checks)}; all by default")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    for name in args.what or checks:
        with tempfile.TemporaryDirectory(prefix="kvmmap-check-") as folder:
            checks[name](args.dist.absolute(), Path(folder))


# What is in them


def contents(dist: Path, folder: Path) -> None:
    """The sdist has every file of the checkout but those for its keeping; each wheel its modules and nothing else."""
    tracked = set(output("git", "-C", ROOT, "ls-files").splitlines())
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in tracked if not name.startswith(".")} | {"PKG-INFO"}
    expect(packed == wanted, f"{sdist.name} lacks {wanted - packed}, and should not have {packed - wanted}")
    modules = {name.removeprefix("cli/") for name in tracked if name.startswith(("kvmmap/", "cli/kvmmap_cli/"))}
    modules = {name for name in modules if not name.endswith((".cpp", ".h"))}
    for wheel in dist.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
            (core,) = {name for name in names if re.fullmatch(r"kvmmap/_core/_kernels\..*so", name)}
            expect(names - {core} == modules, f"{wheel.name}: {(names - {core}) ^ modules}")
            for name in modules:
                path = ROOT / (name if name.startswith("kvmmap/") else f"cli/{name}")
                expect(archive.read(name) == path.read_bytes(), f"{wheel.name}: {name} is another than the checkout's")
        expect("linux_" not in wheel.name or "manylinux" in wheel.name, f"{wheel.name}: no index takes this tag")
        report("contents", wheel.name, f"{len(names)} files, those of the checkout")


# As a stranger gets them


def wheels(dist: Path, folder: Path) -> None:
    for version in pythons.found():
        python = install(dist, version, folder / version)
        report("wheels", f"Python {version}", smoke(python, folder / f"work-{version}", "base.py"))


def portable(dist: Path, folder: Path) -> None:
    emulator = shutil.which("qemu-x86_64")
    if os.uname().machine != "x86_64" or emulator is None:
        report("portable", "skipped", "this needs qemu-user (Debian's package) on x86-64")
        return
    for version in pythons.found():
        python = install(dist, version, folder / version)
        under = [emulator, "-cpu", EMULATED]
        kernel = run_in(folder, *under, python, "-c", "import kvmmap; print(kvmmap.kernel())", path=python.parent)
        expect(kernel == "portable", f"the kernel of a {EMULATED} is {kernel}")
        said = smoke(python, folder / f"work-{version}", "base.py", under=under)
        report("portable", f"Python {version}", f"{said} on an emulated {EMULATED}")


def extras(dist: Path, folder: Path) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [name for name in declared if name not in ("all", "dev")]
    version = next(iter(pythons.found()))
    with server(folder) as environment:
        for name in [*names, "all"]:
            python = install(dist, version, folder / name, f"[{name}]")
            there = set(names) if name == "all" else {name} | BRINGS.get(name, set())
            for extra in names if name == "all" else [name]:
                smoke(python, folder / f"work-{name}-{extra}", f"extra_{extra}.py", environment=environment)
            said = smoke(python, folder / f"work-{name}", "base.py", *sorted(there))
            report("extras", f"kvmmap[{name}]", said)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[dict[str, str]]:
    """Give what points S3's clients to a server of ours."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.seaweed import Server  # type: ignore[import-not-found]

    (folder / "server").mkdir()
    with Server(folder / "server") as running:
        yield running.environment()


# As type checkers see them


def types(dist: Path, folder: Path) -> None:
    version = next(iter(pythons.found()))
    python = install(dist, version, folder / version)
    for source in TYPING.glob("*.py"):
        shutil.copy(source, folder)
    tools = Path(sys.executable).parent
    checkers = {
        "mypy": (
            "mypy",
            "--strict",
            "--no-error-summary",
            "--python-executable",
            python,
            "--cache-dir",
            folder / "mypy",
        ),
        "pyright": ("pyright", "--pythonpath", python),
    }
    for name, command in checkers.items():
        path = os.pathsep.join([str(tools), os.environ["PATH"]])  # pyright needs node
        said = subprocess.run(
            [tools / command[0], *map(str, command[1:]), "uses.py", "misuses.py"],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path},
        ).stdout
        errors = {(file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+)(?::\d+)?(?: -|:) error:", said)}
        lines = enumerate((folder / "misuses.py").read_text().splitlines(), 1)
        wrong = {("misuses.py", number) for number, line in lines if line.endswith(MARK)}
        expect(errors == wrong, f"{name} and {MARK!r} differ in {sorted(errors ^ wrong)}:\n{said}")
        report("types", name, f"uses.py is right, and {len(wrong)} lines of misuses.py are wrong")


# Tools


def install(dist: Path, version: str, folder: Path, extra: str = "") -> Path:
    """Make an environment that has the wheel, and return its Python. Nothing may be compiled for it."""
    output(pythons.found()[version], "-m", "venv", folder)
    python = folder / "bin" / "python"
    tag = "cp311" if version == "3.11" else "abi3"
    (wheel,) = dist.glob(f"*-{tag}-*.whl")
    constraints = ["--constraint", HERE / "constraints.txt"]
    run_in(
        folder,
        *(python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *constraints),
        f"kvmmap{extra} @ {wheel.as_uri()}",
        path=python.parent,
    )
    return python


def smoke(
    python: Path,
    work: Path,
    program: str,
    *arguments: str,
    under: Sequence[str] = (),
    environment: Mapping[str, str] = NOTHING,
) -> str:
    """Run one of the smoke programs in a folder for its files, and return what it says."""
    work.mkdir(exist_ok=True)
    command = [*under, python, SMOKE / program, *arguments]
    return run_in(work, *command, path=python.parent, environment={"UNDER": " ".join(under), **environment})


def run_in(folder: Path, *command: object, path: Path, environment: Mapping[str, str] = NOTHING) -> str:
    """Run a program where nothing but what lies in `path` is found by its name."""
    return output(*command, cwd=folder, env={**pythons.bare_environment(str(path)), **environment})


def output(*command: object, **options: Any) -> str:
    """Run a program, and return what it wrote; end with that if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    expect(done.returncode == 0, f"{done.stdout}{done.stderr}\nfailed: {' '.join(map(str, command))}")
    said: str = done.stdout.strip()
    return said


def report(check: str, what: str, said: str) -> None:
    print(f"{check:9} {what:45} {said}", flush=True)


def expect(true: bool, otherwise: str) -> None:
    if not true:
        sys.exit(f"release/check.py: {otherwise}")


if __name__ == "__main__":
    main()
