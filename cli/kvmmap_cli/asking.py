"""Before something is lost: ask, or take --yes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .output import USAGE

F = TypeVar("F", bound=Callable[..., Any])


def yes_option(command: F) -> F:
    """Give a command the option that `confirm` takes."""
    return click.option("--yes", "-y", is_flag=True, help="Don't ask.")(command)


def timeout_option(command: F) -> F:
    """Give a command the option to wait for a writer."""
    about = "Seconds to wait for a writer to finish."
    return click.option("--timeout", default=0.0, metavar="SECONDS", help=about)(command)


def confirm(question: str, yes: bool) -> None:
    """Return if the user wants it; end the program if not.

    Raises:
        click.UsageError: there is nobody to ask.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} There is no terminal to ask at: give --yes")
    if not click.confirm(question, err=True):
        click.echo("kvmmap: nothing was changed", err=True)
        raise click.exceptions.Exit(USAGE)
