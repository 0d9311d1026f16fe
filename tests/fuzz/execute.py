"""Use a hostile file in every way that a user would; only errors of kvmmap may result."""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np

import kvmmap

_NEVER = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "subprocess.",
    "os.system",
    "os.exec",
    "ctypes.",
    "pickle.",
)
_SYSTEM = ("/proc/", "/sys/fs/cgroup/", os.devnull)  # a quota of processors stands with the control groups
FEW_LAYERS = 8
FEW_BYTES = 1 << 22  # rows that are read, attended over or pushed at once


class ForbiddenError(AssertionError):
    """Something was done that no file may lead to."""


class Watch:
    """An audit hook: nothing is opened but the file itself, nothing is started, and no map reaches beyond the file."""

    def __init__(self) -> None:
        self.folder = ""
        self.on = False
        sys.addaudithook(self._see)

    @contextmanager
    def watching(self, folder: str) -> Iterator[None]:
        self.folder, self.on = folder, True
        try:
            yield
        finally:
            self.on = False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path = arguments[0]
            if isinstance(path, str) and not path.startswith(
                (self.folder, *_SYSTEM, sys.prefix, sys.base_prefix, _LIBRARIES, _HERE)
            ):
                raise ForbiddenError(f"opened {path}")
        elif event == "mmap.__new__":
            fd, length, _, offset = arguments
            pages = -(-os.fstat(fd).st_size // mmap.PAGESIZE) * mmap.PAGESIZE
            if offset + length > pages:
                raise ForbiddenError(f"mapped [{offset}, {offset + length}) of a file of {pages}")
        elif event.startswith(_NEVER) and not _asks_for_the_file_system(event, arguments):
            raise ForbiddenError(f"{event} {arguments}")


def _asks_for_the_file_system(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether this is part of calling libc's fstatfs, which tells whether a file is on overlayfs."""
    match event:
        case "ctypes.create_string_buffer":
            return True
        case "ctypes.dlopen":
            return arguments == (None,)
        case "ctypes.dlsym":
            return bool(arguments[1] == "fstatfs")
    return False


_LIBRARIES = os.path.dirname(os.path.dirname(np.__file__))
_HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def execute(path: str, *, shell: bool = False, copies: bool = False) -> str:
    """Use a file in every way; return the outcome in words without numbers, equal for equal code paths.

    Args:
        path: the file.
        shell: run commands on it too.
        copies: repair and fork it too.

    Raises:
        Exception: anything but a KvmmapError.
    """
    told = [_attempt("r", lambda: _read(path))]
    if shell:
        told.append(_attempt("shell", lambda: _shell(path)))
    if copies:
        told += [_attempt(act.__name__, partial(_copy, act, path)) for act in (kvmmap.repair, kvmmap.fork)]
    told.append(_attempt("a", lambda: _write(path)))
    return " | ".join(told)


def _attempt(name: str, act: Callable[[], str]) -> str:
    try:
        return f"{name}: {act()}"
    except kvmmap.KvmmapError as error:
        return f"{name}: {_template(error)}"


def _template(error: Exception) -> str:
    text = re.sub(r"/\S+", "PATH", str(error))
    text = re.sub(r"0x[0-9a-f]+|[\d,]*\d", "N", text)
    return f"{type(error).__name__} {text[:90]}"


def _read(path: str) -> str:
    told = []
    with kvmmap.open(path) as cache:
        told.append(_attempt("facts", lambda: str(kvmmap.report.inspect(cache).to_dict()["commit"]["state"])))
        told.append(_attempt("ids", lambda: str(cache.token_ids.size > 0)))
        told += [_attempt("layer", partial(_use, cache, layer)) for layer in _some_layers(cache)]
        told.append(_attempt("verify", lambda: _verify(cache)))
        told.append(_attempt("refresh", lambda: str(cache.refresh())))
    return ", ".join(dict.fromkeys(told))


def _some_layers(cache: kvmmap.QuantizedKvCache) -> list[int]:
    count = cache.num_layers
    return sorted({0, count // 2, count - 1})


def _use(cache: kvmmap.QuantizedKvCache, index: int) -> str:
    layer = cache.layers[index]
    geometry, length = layer.geometry, len(layer)
    few = max(0, min(length, FEW_BYTES // geometry.fp32_position_bytes))
    keys = layer.read_keys(length - few)
    values = layer.read_values(0, few, dtype="float16")
    if keys.shape[0] != few or values.shape[0] != few:
        raise ForbiddenError(f"{keys.shape} and {values.shape} for {few}")
    if not few:
        return "nothing"
    layer.get_key(length - 1, geometry.num_kv_heads - 1)
    query = np.ones((1, geometry.num_kv_heads, geometry.head_dim), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows may hold NaN
        layer.attend(query, positions=(length - few, length), threads=1)
        if length == few:
            layer.attend(query, positions=layer.select_blocks(query[0], 2), threads=1)
    return "used"


def _verify(cache: kvmmap.QuantizedKvCache) -> str:
    damages = cache.verify().damages
    return f"{len(damages) > 0} {re.sub(r'[0-9,]+', 'N', damages[0].what.split(':')[-1]) if damages else ''}"


def _write(path: str) -> str:
    try:
        cache = kvmmap.open(path, "a")
    except kvmmap.CorruptCacheError:
        cache = kvmmap.open(path, "a", recover=True)
    told = []
    with cache:
        geometry, length = cache.geometry, cache.seq_len
        if geometry.num_layers <= FEW_LAYERS and sum(g.fp32_position_bytes for g in geometry.layers) < FEW_BYTES:
            told.append(_attempt("push", lambda: _push(cache)))
        told.append(_attempt("flush", lambda: str(cache.flush())))
        told.append(_attempt("cut", lambda: str(cache.truncate(length // 2))))
        told.append(_attempt("note", lambda: str(setattr(cache, "metadata", {"a": 1}))))
        told.append(_attempt("flush", lambda: str(cache.flush())))
        length = cache.seq_len
    with kvmmap.open(path) as cache:  # who could write it can read it
        if cache.seq_len != length:
            raise ForbiddenError(f"{cache.seq_len} positions after closing with {length}")
    return ", ".join(told)


def _push(cache: kvmmap.QuantizedKvCache) -> str:
    layers = cache.geometry.layers
    keys = [np.ones((layer.num_kv_heads, layer.head_dim), np.float32) for layer in layers]
    values = [np.ones((layer.num_kv_heads, layer.value_head_dim), np.float32) for layer in layers]
    cache.push_step(keys, values, 1)
    return "pushed"


def _copy(act: Callable[[str, str], Any], path: str) -> str:
    """Make another file of this one, which must be sound as far as this one was, and open."""
    other = f"{path}.{act.__name__}"
    try:
        made = act(path, other)
        if act is kvmmap.fork:
            made.close()
        return _read(other)
    except (OSError, MemoryError) as error:
        # A file that was cut off says how large it was, and its repaired copy is made as large: sparse, but mapped.
        if isinstance(error, OSError) and error.errno not in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC):
            raise
        return "too large"
    finally:
        with suppress(FileNotFoundError):
            os.unlink(other)


def _shell(path: str) -> str:
    """What a person would type; a command's exit code says what it found."""
    from click.testing import CliRunner
    from kvmmap_cli.main import kvmmap as group

    codes = []
    for arguments in (["inspect", path], ["inspect", "--json", "--tokens", path], ["verify", path]):
        result = CliRunner().invoke(group, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        codes.append(result.exit_code)
    return str(codes)
