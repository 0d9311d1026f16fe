"""Use a hostile file with states in every way: what is read must be in some slot under the right checksums."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import xxhash

import kvmmap
from kvmmap import StateSpec
from kvmmap.format import Section
from kvmmap.format.records import CHECKPOINT_HEADER, CHECKSUM
from kvmmap.format.states import CheckpointLayout

from .checkpoints import DAMAGED, states_at
from .execute import FEW_BYTES, ForbiddenError, _attempt, _shell, _some_layers, _template, _use

States = frozenset[tuple[int, str, bytes]]
"""The tensors of a checkpoint, by layer and name: a copy may have them in another order."""


def named(specs: tuple[StateSpec, ...], tensors: Iterable[bytes]) -> States:
    return frozenset((spec.layer, spec.name, data) for spec, data in zip(specs, tensors, strict=True))


def execute(path: str, *, shell: bool = False, copies: bool = False) -> str:
    """Use a file with states in every way; return the outcome in words without numbers.

    Raises:
        Exception: anything but a KvmmapError; states were read that no slot holds.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the states of its last .* were not saved", RuntimeWarning)
        told = [_attempt("r", lambda: _read(path))]
        if shell:
            told.append(_attempt("shell", lambda: _shell(path)))
        if copies:
            acts = (kvmmap.repair, kvmmap.fork, kvmmap.copy)
            told += [_attempt(act.__name__, partial(_copy, act, path)) for act in acts]  # type: ignore[arg-type]
        told.append(_attempt("a", lambda: _write(path)))
    return " | ".join(told)


def held(cache: kvmmap.QuantizedKvCache) -> dict[int, set[States]]:
    """Return the states that the slots of a file hold under the right checksums, by position, read without kvmmap."""
    storage: Any = cache.storage
    specs, found = cache.states, dict[int, set[States]]()
    if not specs or cache.checkpoint_bytes >= FEW_BYTES:
        return found
    layout = CheckpointLayout.of(specs)
    for slot in range(cache.checkpoint_slots + 2):
        with open(storage.path, "rb") as file:  # which may be large, and a hole
            file_id = file.read(32)[16:]
            file.seek(storage.superblock.section(Section.CHECKPOINT, slot).offset)
            data, at = file.read(layout.size), 0
        fields = CHECKPOINT_HEADER.unpack(data, at)
        end = at + CHECKPOINT_HEADER.size + 8 * len(specs)
        digests = struct.unpack_from(f"<{len(specs)}Q", data, at + CHECKPOINT_HEADER.size)
        tensors = tuple(
            data[at + offset : at + offset + size] for offset, size in zip(layout.offsets, layout.sizes, strict=True)
        )
        if (
            xxhash.xxh3_64_intdigest(data[at:end]) == CHECKSUM.unpack_from(data, end)[0]
            and fields["file_id"] == file_id
            and tuple(map(xxhash.xxh3_64_intdigest, tensors)) == digests
        ):
            found.setdefault(fields["position"], set()).add(named(specs, tensors))
    return found


def _read(path: str) -> str:
    with kvmmap.open(path) as cache:
        told = [_attempt("facts", lambda: str(kvmmap.report.inspect(cache).to_dict()["commit"]["state"]))]
        layers = [layer for layer in _some_layers(cache) if cache.geometry.layers[layer].num_kv_heads]
        told += [_attempt("layer", partial(_use, cache, layer)) for layer in layers]
        allowed = held(cache)
        few = cache.checkpoint_bytes < FEW_BYTES
        read = [
            _attempt("states", partial(_read_one, cache, found.position, allowed)) for found in cache.checkpoints if few
        ]
        told += read
        if few:
            told.append(_attempt("last", lambda: _read_one(cache, None, allowed)))
        told.append(_attempt("none", lambda: _read_one(cache, cache.seq_len + 1, {})))
        sound = cache.verify().sound
        closed = cache.storage.snapshot.slot.closed  # type: ignore[attr-defined]
        if sound and closed and any("read" not in one for one in read):
            raise ForbiddenError(f"verify finds nothing, and {read}")
        told.append(f"verify: {sound}")
        told.append(_attempt("restorable", lambda: str(cache.restorable() > 0)))
        told.append(_attempt("refresh", lambda: str(cache.refresh())))
    return ", ".join(dict.fromkeys(told))


def _read_one(cache: kvmmap.QuantizedKvCache, position: int | None, allowed: dict[int, set[States]]) -> str:
    tensors = named(cache.states, [array.tobytes() for array in cache.read_states(position).values()])
    if position is None:
        position = cache.checkpoints[-1].position
    if tensors not in allowed.get(position, ()):
        raise ForbiddenError(f"states at {position} that no slot holds under the right checksums")
    if DAMAGED in str(cache.path):
        written = named(cache.states, [array.tobytes() for array in states_at(cache.states, position)])
        if tensors != written:
            raise ForbiddenError(f"other states at {position} than those that were written")
    return "read"


def _copy(act: Callable[[str, str], Any], path: str) -> str:
    """Make another file of this one, whose states must be those of this one."""
    other = f"{path}.{act.__name__}.kvm"
    try:
        with kvmmap.open(path) as cache:
            allowed = held(cache)
    except kvmmap.KvmmapError:
        allowed = None  # opens with recover=True at most
    try:
        made = act(path, other)
        if act is kvmmap.fork:
            made.close()
        with kvmmap.open(other) as cache:
            if act is not kvmmap.fork and not cache.verify().sound:  # a fork is a clone, with what is damaged
                raise ForbiddenError(f"{act.__name__} made a file that is not sound")
            for found in cache.checkpoints if cache.checkpoint_bytes < FEW_BYTES else ():
                _read_one(cache, found.position, held(cache) if allowed is None else allowed)
            return f"{len(cache.checkpoints) > 0}"
    except (OSError, MemoryError) as error:
        # A file that was cut off says how large it was, and its repaired copy is made as large: sparse, but mapped.
        if isinstance(error, OSError) and error.errno not in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
            if isinstance(error, kvmmap.KvmmapError):
                return _template(error)
            raise
        return "too large"
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(other)


def _write(path: str) -> str:
    """Append, write states and truncate; what was written is read again."""
    try:
        cache = kvmmap.open(path, "a")
    except kvmmap.CorruptCacheError:
        cache = kvmmap.open(path, "a", recover=True)
    told, written = [], None
    with cache:
        layers = cache.geometry.layers
        few = sum(layer.fp32_position_bytes for layer in layers) < FEW_BYTES and cache.checkpoint_bytes < FEW_BYTES
        if few:
            told.append(_attempt("append", lambda: _append_one(cache)))
        if few and cache.states:
            position = cache.seq_len
            told.append(_attempt("checkpoint", lambda: _checkpoint(cache)))
            if told[-1] == "checkpoint: named":
                written = position
        told.append(_attempt("flush", lambda: str(cache.flush())))
        length = cache.seq_len
    with kvmmap.open(path) as cache:  # who could write it can read it
        if cache.seq_len != length:
            raise ForbiddenError(f"{cache.seq_len} positions after closing with {length}")
        if written is not None:
            found = cache.read_states(written)
            for array, expected in zip(found.values(), states_at(cache.states, written), strict=True):
                if array.tobytes() != expected.tobytes():
                    raise ForbiddenError(f"other states at {written} than were written")
    with kvmmap.open(path, "a") as cache:
        told.append(_attempt("cut", lambda: str(cache.truncate(length // 2))))
        told.append(_attempt("flush", lambda: str(cache.flush())))
        length = cache.seq_len
    with kvmmap.open(path) as cache:
        if cache.seq_len != length:
            raise ForbiddenError(f"{cache.seq_len} positions after a truncation to {length}")
    return ", ".join(told)


def _append_one(cache: kvmmap.QuantizedKvCache) -> str:
    parts = [
        [np.ones((1, layer.num_kv_heads, dim), np.float32) if layer.num_kv_heads else None for layer, dim in shapes]
        for shapes in (
            [(layer, layer.head_dim) for layer in cache.geometry.layers],
            [(layer, layer.value_head_dim) for layer in cache.geometry.layers],
        )
    ]
    cache.extend(*parts, [1])
    return "appended"


def _checkpoint(cache: kvmmap.QuantizedKvCache) -> str:
    cache.write_states(states_at(cache.states, cache.seq_len))
    cache.checkpoint()
    return "named"
