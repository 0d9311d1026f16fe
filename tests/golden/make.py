"""Make the golden files of the present format: `python tests/golden/make.py tests/golden/v1-sketches.kvm`.

`v1.kvm` was made before there were sketches; `v1-codecs.kvm` has a layer for each codec, and `v1-states.kvm` states
and their checkpoints; `v1-parent.kvm` continues `v1-sketches.kvm`, which has to lie beside it. Run it once, when
something is new in the format; from then on the file that was committed is what must still open.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np

import kvmmap
from kvmmap import codecs

LENGTH = 261  # a complete block, and a tail
SHAPE = (2, LENGTH, 2, 5)


def golden_rows(start: int) -> np.ndarray:
    """Rows that any version of numpy computes alike."""
    numbers = np.arange(start, start + np.prod(SHAPE), dtype=np.int64) * 7919 % 2001 - 1000
    return (numbers.astype(np.float32) / np.float32(64)).reshape(SHAPE)


def make(path: Path) -> None:
    """Write the file; the same bytes every time."""
    with (
        mock.patch("os.urandom", return_value=bytes(range(16))),
        mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000),
        mock.patch("os.getpid", return_value=4242),
        kvmmap.create(
            path,
            num_layers=2,
            capacity=300,
            num_kv_heads=2,
            head_dim=5,
            value_head_dim=[5, 5],
            metadata={"purpose": "golden", "version": 1},
            model=kvmmap.ModelInfo(name="golden", source_dtype="float32", rope={"theta": 10000.0}),
            metadata_room=1000,
        ) as cache,
    ):
        keys, values = golden_rows(0), golden_rows(12345)
        cache.extend(keys[:, :200], values[:, :200], np.arange(200))
        cache.flush()
        cache.extend(keys[:, 200:], values[:, 200:], np.arange(200, LENGTH))


def make_codecs(path: Path) -> None:
    """Write a file with a layer for each codec of keys, and the next one of values; the same bytes every time."""
    names = [codec.name for codec in codecs.COMPILED]
    with (
        mock.patch("os.urandom", return_value=bytes(range(16))),
        mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000),
        mock.patch("os.getpid", return_value=4242),
        kvmmap.create(
            path,
            num_layers=len(names),
            capacity=12,
            num_kv_heads=1,
            head_dim=80,
            key_codec=names,
            value_codec=names[1:] + names[:1],
            metadata_room=1000,
        ) as cache,
    ):
        cache.extend(codec_rows(0), codec_rows(1), np.arange(10))


def make_recent(path: Path) -> None:
    """Write a file with the last and first positions in 16 bits, of both forms; the same bytes every time."""
    with (
        mock.patch("os.urandom", return_value=bytes(range(16))),
        mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000),
        mock.patch("os.getpid", return_value=4242),
        kvmmap.create(
            path,
            num_layers=2,
            capacity=40,
            num_kv_heads=2,
            head_dim=5,
            value_codec=["int8", "bf16"],
            recent_window=8,
            sinks=3,
            metadata_room=1000,
        ) as cache,
    ):
        rows = recent_rows()
        cache.extend(rows[:, :20], -rows[:, :20])
        cache.extend(rows[:, 20:], -rows[:, 20:])


def recent_rows() -> np.ndarray:
    """Rows of every layer of `make_recent`: whole numbers, the last of them beyond f16."""
    numbers = np.arange(2 * 21 * 2 * 5, dtype=np.int64) * 7919 % 2001 - 1000
    rows = numbers.astype(np.float32).reshape(2, 21, 2, 5)
    rows[:, 20] *= 256
    return rows


def make_child(path: Path) -> None:
    """Write a file that continues `v1-sketches.kvm` in the same folder at position 259; the same bytes every time."""
    with (
        mock.patch("os.urandom", return_value=bytes(range(16, 32))),
        mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000),
        mock.patch("os.getpid", return_value=4242),
        kvmmap.create(
            path,
            parent=path.with_name("v1-sketches.kvm"),
            parent_length=259,
            capacity=600,
            metadata={"purpose": "golden", "version": 1},
            metadata_room=1000,
        ) as cache,
    ):
        keys, values = golden_rows(777), golden_rows(999)
        cache.extend(keys, values, np.arange(LENGTH))


def codec_rows(start: int) -> np.ndarray:
    """Rows of every layer of `make_codecs`."""
    shape = (len(codecs.COMPILED), 10, 1, 80)
    numbers = np.arange(start, start + np.prod(shape), dtype=np.int64) * 7919 % 2001 - 1000
    return (numbers.astype(np.float32) / np.float32(64)).reshape(shape)


STATES = (
    kvmmap.StateSpec(1, "conv", "float32", (1, 6, 3)),
    kvmmap.StateSpec(2, "recurrent", "bfloat16", (2, 8, 5)),
    kvmmap.StateSpec(2, "ids", "int64", (3,)),
)


def golden_states(position: int) -> list[np.ndarray]:
    """States that any version of numpy computes alike."""
    found = []
    for number, spec in enumerate(STATES):
        bits = np.arange(spec.nbytes, dtype=np.int64) * 31 + position * 7 + number
        found.append((bits % 251).astype(np.uint8).view(spec.numpy_dtype).reshape(spec.shape))
    return found


def make_states(path: Path) -> None:
    """Write a file with states, checkpoints, and a layer without rows; the same bytes every time."""
    with (
        mock.patch("os.urandom", return_value=bytes(range(16))),
        mock.patch("time.time_ns", return_value=1_700_000_000_000_000_000),
        mock.patch("os.getpid", return_value=4242),
        kvmmap.create(
            path,
            num_layers=3,
            capacity=60,
            num_kv_heads=[2, 0, 2],
            head_dim=5,
            states=STATES,
            checkpoint_slots=2,
            metadata_room=1000,
        ) as cache,
    ):
        keys, values = golden_rows(0), golden_rows(12345)
        for start, stop in ((0, 20), (20, 30), (30, 50)):
            cache.extend(
                [keys[0, start:stop], None, keys[1, start:stop]],
                [values[0, start:stop], None, values[1, start:stop]],
                np.arange(start, stop),
            )
            cache.write_states(golden_states(stop))
            cache.checkpoint(pin=stop == 20)
        cache.extend([keys[0, 50:55], None, keys[1, 50:55]], [values[0, 50:55], None, values[1, 50:55]])


if __name__ == "__main__":
    target = Path(sys.argv[1])
    makers = {"codecs": make_codecs, "recent": make_recent, "states": make_states, "parent": make_child}
    makers.get(target.stem.partition("-")[2], make)(target)
