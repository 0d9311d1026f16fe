"""The texts of the demo: real ones that are part of Python, so that nothing is downloaded."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path


def _manual() -> str:
    from pydoc_data.topics import topics

    return str(topics["compound"])


TEXTS: Mapping[str, tuple[str, Callable[[], str]]] = {
    "manual": ("prose: the chapter on compound statements of Python's manual", _manual),
    "source": ("code: the source of Python's argparse module", lambda: inspect.getsource(argparse)),
}
"""Each text's name, what it is, and how to get it."""


def read_text(name: str) -> tuple[str, str]:
    """Return a text's description and the text: one of `TEXTS`, or the path of a file."""
    if name in TEXTS:
        title, get = TEXTS[name]
        return title, get()
    return f"the file {name}", Path(name).read_text()
