"""The program `kvmmap`, and `python -m kvmmap_cli`: `main`, with the collector of garbage kept out of its way.

Loading modules makes many objects, and none of them is garbage; nor is it worth a search when the process ends. On a
program that takes a tenth of a second, both show.
"""

from __future__ import annotations

import gc
from typing import NoReturn

GARBAGE = 50_000
"""Objects between two searches for garbage."""


def program() -> NoReturn:
    """Run `main`, and exit."""
    gc.set_threshold(GARBAGE)
    from .main import main  # which loads click

    try:
        main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    program()
