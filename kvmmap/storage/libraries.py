"""The libraries that Zarr-backed caches stand on, loaded when they are first needed: no other module imports them.

Importing kvmmap must not load them, and one that is missing is an error that says what to install.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..errors import MissingLibraryError


def need(library: str, extra: str) -> Any:
    """Import a library of one of our extras.

    Raises:
        MissingLibraryError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingLibraryError(
            f"this needs {library.partition('.')[0]}, which can't be imported ({error}): pip install 'kvmmap[{extra}]'",
            expected=library,
        ) from error


@functools.cache
def zarr() -> Any:
    """zarr-python, which writes the arrays' metadata."""
    return need("zarr", "zarr")


@functools.cache
def obstore() -> Any:
    """obstore, which talks to object stores."""
    need("obstore.store", "s3")
    return need("obstore", "s3")


@functools.cache
def zstd(level: int) -> Any:
    """numcodecs' zstd, which zarr-python compresses with too."""
    return need("numcodecs.zstd", "zarr").Zstd(level=level)


@functools.cache
def _google_crc32c() -> Any:
    return need("google_crc32c", "zarr")


def crc32c(data: bytes) -> int:
    """The checksum that shards' indices carry."""
    value: int = _google_crc32c().value(data)
    return value
