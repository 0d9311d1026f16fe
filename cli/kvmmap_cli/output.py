"""How things are shown: consoles, numbers, times, text that came from files, and the exit codes.

rich is imported when something is printed with it, and not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmmap import QuantizedKvCache

T = TypeVar("T")

SOUND = 0
DAMAGED = 1
USAGE = 2
INTERRUPTED = 130

WIDE = 10_000
"""Columns where there is no terminal to fold lines for."""


def read(path: str, look: Callable[[QuantizedKvCache], T]) -> T:
    """Open a cache for reading, look, and close it; look anew if its writer took positions back meanwhile."""
    import kvmmap

    tries = 5
    while True:
        tries -= 1
        try:
            with kvmmap.open(path) as cache:
                return look(cache)
        except kvmmap.CacheChangedError:
            if not tries:
                raise


def drop_output() -> None:
    """Throw away what stdout has not taken yet: nobody will, and the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(*parts: RenderableType) -> None:
    """Print to stdout with rich. Nothing in a text is taken for markup."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    # Nobody looks: lines are as long as they are, and have no blanks at their ends.
    console.width = WIDE
    with console.capture() as text:
        console.print(*parts, sep="\n")
    for line in text.get().splitlines():
        click.echo(line.rstrip())


def can_show(characters: str) -> bool:
    """True if stdout's encoding has these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_json(data: Any) -> None:
    """Print plain JSON types to stdout."""
    click.echo(json.dumps(data, indent=2))


def plain(text: str) -> str:
    """Return text from outside as one line that can do nothing to a terminal: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(number: int, noun: str = "") -> str:
    """Return a number with its noun: "1 layer", "2,048 positions"."""
    return f"{number:,} {noun}{'s' if noun and number != 1 else ''}".rstrip()


def size(number: int) -> str:
    """Return bytes for a person: "24.1 MiB"."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1000 or unit == "PiB":
            break
        value /= 1024
    return f"{number} B" if unit == "B" else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def moment(time: datetime) -> str:
    """Return a time as the clock on the wall shows it."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ranges(numbers: Iterable[int]) -> str:
    """Return rising numbers with their runs drawn together: "0-4, 6, 8-9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
