"""Output: consoles, numbers, times, escaped text from files, and exit codes.

rich is imported when something is printed with it, and not before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmmap import QuantizedKvCache

T = TypeVar("T")

INDEX = re.compile("[0-9]{1,9}")

SOUND = 0
DAMAGED = 1
USAGE = 2
CRASHED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
TERMINATED = 143

WIDE = 10_000
"""Columns where there is no terminal."""

NARROW = 80
"""Columns of a picture where there is no terminal."""

NARROWEST = 24
"""Columns that pictures and tables take at least; a narrower terminal folds them."""

MOST_REASON = 300
"""Characters of an unforeseen error's own message."""


def read(path: str, look: Callable[[QuantizedKvCache], T], verify: Literal["read", "none"] = "read") -> T:
    """Open a cache for reading, call `look`, and close it; repeat if its writer truncated meanwhile.

    Args:
        verify: as in `kvmmap.open`; "none" for callers that verify everything themselves, or examine damage.
    """
    import kvmmap

    tries = 5
    while True:
        tries -= 1
        try:
            with kvmmap.open(path, verify=verify, record_use=False) as cache:
                return look(cache)
        except kvmmap.CacheChangedError:
            if not tries:
                raise


def failure(error: BaseException) -> tuple[int, str]:
    """Return exit code and message of an expected error; raise it again if it is a bug."""
    from kvmmap import CacheExistsError, CacheLockedError, CorruptCacheError, KvmmapError

    # Their messages suggest Python calls; here commands are suggested.
    if isinstance(error, CacheLockedError):
        who = "another process" if error.actual is None else f"process {error.actual}"
        return USAGE, f"{plain(str(error.path))}: {who} has it open for writing; close it there, or try again later"
    if isinstance(error, CacheExistsError) and error.path is not None:
        return USAGE, f"{plain(str(error.path))}: exists already, and was not changed; give another name"
    if isinstance(error, KvmmapError):
        return DAMAGED if isinstance(error, CorruptCacheError) else USAGE, plain(str(error))
    if isinstance(error, OSError):
        what = error.strerror or str(error)
        named = error.filename2 or error.filename  # of a renaming, the place that was asked for
        return USAGE, plain(what if named is None else f"{_name(named)}: {what}")
    if isinstance(error, MemoryError):
        return USAGE, f"not enough memory{f': {plain(str(error))}' if str(error) else ''}"
    raise error


def _name(filename: Any) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes | os.PathLike) else str(filename)


def crash(error: BaseException, variable: str) -> str:
    """Return the message of an unexpected error.

    Args:
        variable: the environment variable that shows more of it.
    """
    what = plain(str(error).strip().partition("\n")[0])[:MOST_REASON]
    return (
        f"an error in kvmmap itself: {type(error).__name__}{f': {what}' if what else ''}; it says nothing about the "
        f"cache. Please report it with what {variable}=1 shows"
    )


def drop_output() -> None:
    """Discard what stdout has not accepted: the interpreter would try again to write it when it ends."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


def show(*parts: RenderableType) -> None:
    """Print to stdout with rich. Markup in texts is not interpreted."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    # No terminal: lines are not folded, and have no trailing blanks.
    console.width = WIDE
    with console.capture() as text:
        console.print(*parts, sep="\n")
    for line in text.get().splitlines():
        click.echo(line.rstrip())


def width() -> int:
    """Return the width for pictures and wide tables, in columns."""
    if not sys.stdout.isatty():
        return NARROW
    import shutil  # which loads compressors

    return max(shutil.get_terminal_size().columns, NARROWEST)


def can_colour() -> bool:
    """True if stdout supports colours."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.no_color and console.color_system is not None


def can_show(characters: str) -> bool:
    """True if stdout's encoding can represent these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def print_json(data: Any) -> None:
    """Print plain JSON types to stdout."""
    click.echo(json.dumps(data, indent=2))


def plain(text: str) -> str:
    """Return text from files as one line that is safe to print: unprintable characters are escaped."""
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
    """Return a time in the local time zone."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def indices(text: str, end: int, noun: str) -> list[int]:
    """Parse "0-4, 6, 8-9" into ascending numbers, each once; the inverse of `ranges`.

    Raises:
        click.UsageError: that is no such list, or not all of it is below `end`.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not INDEX.fullmatch(first) or (dash and not INDEX.fullmatch(last)):
            raise click.UsageError(f"{text[:80]!r} is no list of {noun}s, such as 3, 0-5 or 0,7,20-22")
        low, high = int(first), int(last or first)
        if low > high:
            raise click.UsageError(f"{text[:80]!r}: {low}-{high} runs backwards")
        if high >= end:
            raise click.UsageError(f"{noun} {low if low >= end else high} does not exist: there are {end}, from 0 on")
        found.update(range(low, high + 1))
    return sorted(found)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers with consecutive ones as ranges: "0-4, 6, 8-9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
