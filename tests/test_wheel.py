"""What is installed: two importable packages, typed, made for any processor. `make check-wheels` does more."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("wheel")]  # one worker builds it
VECTOR = re.compile(r"_(avx2|avx512|amx)\.cpp\.o$")
TYPING = Path(__file__).parent / "typing"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, unpacked as `site`, and with `build`, what it was linked from.

    Where the environment has kept what it was compiled in, nothing is compiled again.
    """
    folder = tmp_path_factory.mktemp("wheel")
    kept = ROOT / "build" / Path(sys.prefix).name.lstrip(".")
    options = ["--config-settings=cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O1"]  # compiles in two thirds of the time
    if (kept / "CMakeCache.txt").exists() and importlib.util.find_spec("scikit_build_core"):
        options = ["--no-build-isolation"]
        (folder / "build").symlink_to(kept)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder),
        f"--config-settings=build-dir={(folder / 'build').resolve()}",
        *options,
        ROOT,
    )
    (wheel,) = folder.glob("kvmmap-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_two_packages(built: Path) -> None:
    names = [str(path.relative_to(built / "site")) for path in (built / "site").rglob("*") if path.is_file()]
    tops = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert tops == {"kvmmap", "kvmmap_cli"}
    assert "kvmmap/py.typed" in names
    assert any(name.startswith("kvmmap/_core/_kernels.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".txt")) and ".dist-info" not in name]


@pytest.mark.skipif(os.uname().machine != "x86_64" or not shutil.which("objdump"), reason="needs binutils on x86-64")
def test_instructions_of_some_processors_stay_where_they_are_asked_for(built: Path) -> None:
    objects = list((built / "build").resolve().rglob("*.o"))
    vector = [path for path in objects if VECTOR.search(path.name)]
    assert {path.stem for path in vector} == {
        path.name for pattern in ("*_avx*.cpp", "*_amx.cpp") for path in (ROOT / "kvmmap" / "_core").glob(pattern)
    }
    for path in vector:
        # An inline function that such an object shares with others would be anybody's, once linked.
        shared = re.findall(r" [WVu] (?!DW\.ref)(.*)", run("nm", "-C", path))
        assert not shared, path.name
    for path in set(objects) - set(vector):
        assert not re.search(r"%[yz]mm|\tv[a-z]+[ \t].*%xmm", run("objdump", "-d", "--no-show-raw-insn", path)), (
            path.name
        )


def test_the_public_api_as_a_type_checker_sees_it(built: Path) -> None:
    """Every line of misuses.py that says so is wrong, and nothing else is; `make check-wheels` asks pyright as well."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--config-file=",
            "--cache-dir",
            built / "mypy",
            *TYPING.glob("*.py"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MYPYPATH": str(built / "site")},
        cwd=built,
    )
    found = {(file, int(line)) for file, line in re.findall(r"(\w+\.py):(\d+): error:", done.stdout)}
    lines = enumerate((TYPING / "misuses.py").read_text().splitlines(), 1)
    assert found == {("misuses.py", number) for number, line in lines if line.endswith("# wrong")}, done.stdout
