"""Before something is lost, or written where a cache would not be found: ask, or take an option for yes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .output import USAGE, plain
from .units import SECONDS_FROM_ZERO

F = TypeVar("F", bound=Callable[..., Any])

CACHES = (".kvm", ".zarr")
"""What caches' names end in; `find` and `inspect DIR` look for these."""


def yes_option(command: F) -> F:
    """Add the option that `confirm` takes."""
    return click.option("--yes", "-y", is_flag=True, help="Don't ask.")(command)


def timeout_option(command: F) -> F:
    """Add the option to wait for a writer."""
    about = "Seconds to wait for a writer to finish."
    return click.option("--timeout", default=0.0, type=SECONDS_FROM_ZERO, metavar="SECONDS", help=about)(command)


def confirm(question: str, yes: bool, option: str = "--yes") -> None:
    """Return if the user says yes; end the program if not.

    Args:
        question: what to ask.
        yes: the answer that an option gave.
        option: that option.

    Raises:
        click.UsageError: there is no terminal to ask at.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask at: give {option}")
    if not click.confirm(question, err=True):
        click.echo("kvmmap: nothing was changed", err=True)
        raise click.exceptions.Exit(USAGE)


def confirm_ending(path: str, yes: bool, endings: tuple[str, ...] = CACHES) -> None:
    """Ask if a new cache's name has none of the endings that caches have; a URL may have any.

    Raises:
        click.UsageError: there is no terminal to ask at.
    """
    if path and not path.rstrip("/").endswith(endings) and "://" not in path.removeprefix("file://"):
        known = ", ".join(endings[:-1]) + f" or {endings[-1]}"
        confirm(f"{plain(path)} does not end in {known}. Make a .kvm file of that name?", yes)
