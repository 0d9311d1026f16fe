"""The program `kvmmap`, and `python -m kvmmap_cli`: `main`, with what it does not need kept out of its way.

Loading modules makes many objects, and none of them is garbage. Nor is it worth taking them apart one by one when the
process ends, or starting a thread a processor for products of matrices, as numpy's OpenBLAS does when it is loaded. In
a program that takes a tenth of a second, each of these shows.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading
from typing import NoReturn

GARBAGE = 50_000
"""Objects between two searches for garbage."""

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
"""Environment variable that numpy's OpenBLAS reads when it is loaded. A user's own value counts."""


def program() -> NoReturn:
    """Run `main`, and exit."""
    gc.set_threshold(GARBAGE)
    os.environ.setdefault(BLAS_THREADS, "1")
    from .main import main  # which loads click

    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and _can_leave():
            _leave(end.code)
        raise
    finally:
        gc.freeze()


def _can_leave() -> bool:
    """True if nothing waits for the interpreter's own end: no other thread, debugger or profiler."""
    alone = threading.active_count() == 1
    return alone and sys.gettrace() is None and sys.getprofile() is None and not sys.flags.interactive


def _leave(code: int) -> NoReturn:
    """End the process as the interpreter does, up to where it would take modules and their objects apart."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # `main` has reported what stdout does not accept
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    program()
