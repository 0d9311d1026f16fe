"""Progress of long operations: a bar on stderr with rate and time left, on terminals only, after a delay.

rich is imported when a bar is drawn, and not before.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import size

if TYPE_CHECKING:
    from rich.progress import Progress, Task

F = TypeVar("F", bound=Callable[..., Any])

Advance = Callable[[int, int], None]

PATIENCE = 0.4
"""Seconds that pass before there is a bar."""

BAR_WIDTH = 24


def no_progress_option(command: F) -> F:
    """Give a command the option that `progress` takes."""
    about = "Show no progress bar. By default long operations show one if stderr is a terminal."
    return click.option("--no-progress", is_flag=True, help=about)(command)


@contextlib.contextmanager
def progress(verb: str, no_progress: bool = False, *, unit: str | None = None) -> Iterator[Advance | None]:
    """Give the function to call with (done, total); None where no bar would be visible.

    Args:
        verb: the operation: "verifying".
        no_progress: draw nothing.
        unit: what is counted, "layers"; bytes by default.
    """
    if no_progress or not sys.stderr.isatty():
        yield None
        return
    with contextlib.ExitStack() as stack:
        yield _Meter(verb, stack, unit)


class _Meter:
    def __init__(self, verb: str, stack: contextlib.ExitStack, unit: str | None) -> None:
        self._verb = verb
        self._unit = unit
        self._stack = stack
        self._start = time.monotonic()
        self._bar: tuple[Progress, Any] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if time.monotonic() - self._start < PATIENCE:
                return
            bar = self._stack.enter_context(_bar(self._verb, self._unit))
            self._bar = bar, bar.add_task("", total=total)
        bar, task = self._bar
        unit = self._unit
        told = f"{size(done)} of {size(total)}" if unit is None else f"{done:,} of {total:,} {unit}"
        bar.update(task, completed=done, total=total, description=told)


def _bar(verb: str, unit: str | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{size(int(task.speed))}/s" if task.speed and unit is None else "")

    return Progress(
        TextColumn(verb),
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.description}"),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
