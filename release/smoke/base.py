"""kvmmap alone: make a cache, reopen it, attend, and run the command; what needs an extra says which."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

import kvmmap

PROGRAM = [*os.environ.get("UNDER", "").split(), sys.executable, str(Path(sys.executable).with_name("kvmmap"))]
"""The command; `UNDER` names an emulator that this program runs under, and what it starts must, too."""
LAYERS, HEADS, DIM, LENGTH = 2, 2, 16, 40


def main() -> None:
    make_and_reopen()
    shell()
    missing(set(sys.argv[1:]))


def make_and_reopen() -> None:
    rows = np.random.default_rng(0).standard_normal((LAYERS, LENGTH, HEADS, DIM), dtype=np.float32)
    shape = {"num_layers": LAYERS, "capacity": 64, "num_kv_heads": HEADS, "head_dim": DIM}
    with kvmmap.create("a.kvm", overwrite=True, **shape, metadata={"title": "smoke"}) as cache:
        cache.extend(rows[:, :-1], rows[:, :-1], np.arange(LENGTH - 1))
        cache.push_step(rows[:, -1], rows[:, -1], LENGTH - 1)
    with kvmmap.open("a.kvm") as cache:
        assert cache.seq_len == LENGTH
        assert cache.verify().sound
        codes, scales = kvmmap.quantize_rows(rows[1])
        np.testing.assert_array_equal(cache.layers[1].key_codes, codes)
        layer = cache.layers[1]
        queries = rows[1, -3:]
        expected = attention(queries, kvmmap.dequantize_rows(codes, scales))
        np.testing.assert_allclose(layer.attend(queries), expected, atol=1e-5)
        assert layer.read_keys(dtype="bfloat16").dtype.name == "bfloat16"


def attention(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Causal softmax attention of the last queries, where keys and values are the same."""
    scores = np.einsum("nhd,shd->hns", queries, rows) / np.sqrt(DIM)
    seen = np.arange(LENGTH) <= np.arange(LENGTH - len(queries), LENGTH)[:, None]
    weights = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("hns,shd->nhd", weights / weights.sum(-1, keepdims=True), rows)


def shell() -> None:
    version = run("--version")
    assert version == f"kvmmap {kvmmap.__version__}, {kvmmap.kernel()} kernel\n", version
    assert "40 of 64 positions" in run("inspect", "a.kvm")
    assert "sound" in run("verify", "a.kvm")
    run("report", "a.kvm", "-o", "report.html")
    assert "<style>" in Path("report.html").read_text()


def run(*arguments: str) -> str:
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def missing(extras: set[str]) -> None:
    """What is not installed is told with the command that installs it."""
    Path("tokenizer.json").write_text("{}")
    Path("a.safetensors").write_bytes(b"")

    def transformers() -> None:
        import kvmmap.integrations.transformers  # noqa: F401

    uses: dict[str, Callable[[], object]] = {
        "zarr": lambda: kvmmap.copy("a.kvm", "a.zarr"),
        "s3": lambda: kvmmap.open("s3://bucket/a.zarr"),
        "safetensors": lambda: kvmmap.import_tensors("a.safetensors", "b.kvm"),
        "transformers": transformers,
        "plot": lambda: shell_error("inspect", "a.kvm", "--plot", "a.png"),
        "tokens": lambda: shell_error("inspect", "a.kvm", "--tokenizer", "tokenizer.json"),
    }
    for extra in uses.keys() - extras:
        try:
            uses[extra]()
        except kvmmap.MissingLibraryError as error:
            assert isinstance(error, ImportError)
            assert f"pip install 'kvmmap[{extra}]'" in str(error), error
        else:
            raise AssertionError(f"{extra} is not installed, and works")


def shell_error(*arguments: str) -> None:
    """Run a command that fails for want of a library; its one line as the exception that it came from."""
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    raise kvmmap.MissingLibraryError(done.stderr)


if __name__ == "__main__":
    main()
    print("sound")
