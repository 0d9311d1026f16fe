"""What the commands of `kvmmap library` share: opening one, ages, and a segment in a few words."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..output import plain

if TYPE_CHECKING:
    from kvmmap import Library

F = TypeVar("F", bound=Callable[..., Any])


def folder_argument(command: F) -> F:
    """Add the library's directory."""
    return click.argument("folder", metavar="DIR", type=click.Path(readable=False))(command)


def json_option(command: F) -> F:
    """Add the option for JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


@contextlib.contextmanager
def opened(folder: str, remote: str | None = None) -> Iterator[Library]:
    """Open a library that is there, and close it; nothing is done in the background."""
    import kvmmap

    with kvmmap.Library(folder, create=False, remote=remote, write_through=False, follow_every=None) as library:
        yield library


def to_dict(thing: Any) -> dict[str, Any]:
    """Return a dataclass of the library as plain JSON types."""
    hidden = ("id", "parent_id", "namespace_id", "token_offset")
    return {key: value for key, value in dataclasses.asdict(thing).items() if key not in hidden}


def ago(moment: float) -> str:
    """Return how long ago a time was: "3 min", "2 days"."""
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            number = int(seconds / length)
            return f"{number} {unit}{'s' if unit == 'day' and number != 1 else ''} ago"
    return f"{int(seconds)} s ago"


def seconds(value: float) -> str:
    """Return a time that something takes: "3.2 s", "4 min"."""
    if value >= 120:
        return f"{value / 60:,.0f} min"
    return f"{value:.3g} s"


def shorten(name: str) -> str:
    """Return the end of a segment's name, which tells it from others."""
    return plain(name[-8:])
