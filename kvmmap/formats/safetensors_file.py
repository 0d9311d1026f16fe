"""A safetensors file, read with the library of that name. All failures are kvmmap errors or OSErrors."""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheNotFoundError, DtypeError, KvmmapError, MissingLibraryError, NotACacheError

ROW_DTYPES = ("F32", "F16", "BF16")
"""What rows of numbers may be, as safetensors calls it."""

ID_DTYPES = ("I32", "I64", "I16", "I8", "U8", "U16", "U32", "U64")
"""What token ids may be."""

LONGEST_NAME = 80
"""Characters of a tensor's name that a message shows."""


class TensorFile:
    """An open file: names, dtypes and shapes of its tensors, and their numbers."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._names: frozenset[str] | None = None
        self.path = path

    def names(self) -> list[str]:
        """Names of all tensors, in order."""
        with _errors_of(self.path):
            return sorted(self._file.keys())

    def has(self, name: str) -> bool:
        """True if there is a tensor of that name."""
        if self._names is None:
            self._names = frozenset(self.names())
        return name in self._names

    def metadata(self) -> dict[str, str]:
        """The header's metadata."""
        with _errors_of(self.path):
            return dict(self._file.metadata() or {})

    def dtype(self, name: str) -> str:
        """The dtype of a tensor, as safetensors calls it."""
        with _errors_of(self.path):
            return str(self._file.get_slice(name).get_dtype())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        with _errors_of(self.path):
            return tuple(int(size) for size in self._file.get_slice(name).get_shape())

    def check_dtype(self, name: str, allowed: tuple[str, ...]) -> None:
        """Refuse a tensor of another dtype than those.

        Raises:
            DtypeError: names the tensor and its dtype.
        """
        found = self.dtype(name)
        if found not in allowed:
            raise DtypeError(
                f"{self.path}: tensor {shown(name)} is {found}, and must be {' or '.join(allowed[:3])}: convert it "
                "before saving",
                expected=allowed,
                actual=found,
            )
        if found == "BF16":
            import ml_dtypes  # noqa: F401  # which gives numpy the dtype by the name that the library asks for

    def read(self, name: str, index: Any = slice(None)) -> NDArray[Any]:
        """Return a part of a tensor as an array.

        Args:
            name: which tensor; of a dtype that numpy has (`check_dtype`).
            index: slices of its axes, not beyond its shape.
        """
        with _errors_of(self.path):
            if 0 in self.shape(name) or not self.shape(name):  # the library slices neither
                whole: NDArray[Any] = np.asarray(self._file.get_tensor(name))
                return whole[index] if whole.ndim else whole
            part: NDArray[Any] = np.asarray(self._file.get_slice(name)[index])
            return part


@contextlib.contextmanager
def open_tensors(path: str) -> Iterator[TensorFile]:
    """Open a file for reading.

    Raises:
        MissingLibraryError: safetensors is not installed.
        CacheNotFoundError: there is nothing at the path.
        NotACacheError: a folder, a device, or a file that is no safetensors file.
        OSError: it can't be read.
    """
    try:
        library = importlib.import_module("safetensors")
    except ImportError as error:
        raise MissingLibraryError(
            f"this needs safetensors, which can't be imported ({error}): pip install 'kvmmap[safetensors]'",
            expected="safetensors",
        ) from error
    _check_regular(path)
    with _errors_of(path):
        file = library.safe_open(path, "numpy")
    with file:
        yield TensorFile(file, path)


def shown(name: str) -> str:
    """Return a tensor's name for a message: in quotes, and not longer than a line."""
    return repr(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}...")


def _check_regular(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not hang
    except FileNotFoundError:
        raise CacheNotFoundError(f"{path}: there is no such file", path=path) from None
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise NotACacheError(f"{path}: not a safetensors file: it is {what}", path=path)


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Turn whatever the library raises into a NotACacheError; its panics in Rust are BaseExceptions."""
    try:
        yield
    except (KvmmapError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), path) from error
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise NotACacheError(f"{path}: not a safetensors file that can be read: {reason}", path=path) from error
