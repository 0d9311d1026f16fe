"""torch's threads: how many of them attention and decoding take, and its team of threads that are running."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

from ..._core import use_team
from ...threads import threads_of


def model_threads() -> int:
    """How many threads to take within a model: those of KVMMAP_NUM_THREADS, or as many as torch takes.

    Raises:
        KvmmapError: KVMMAP_NUM_THREADS is no whole number from 1 on.
    """
    return threads_of(torch.get_num_threads())


def join_team() -> None:
    """Have attention in this thread use torch's threads in place of its own, which would contend with them: after each
    operation torch's threads spin for a while, waiting for the next."""
    use_team(_entry(), torch.get_num_threads())


@functools.cache
def _entry() -> int:
    """The address of the function by which torch's OpenMP runtime starts a parallel region; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded already
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
