"""Watch a cache that another process writes: length, rate and writer, read repeatedly."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import click

from .output import can_show, count, moment, plain, read, size
from .summary import fill_bar, state

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmmap.report import CacheReport

MEMORY = 60
"""Samples that are kept and drawn."""

RATE_OVER = 10
"""Samples that a rate is computed over."""

SPARKS = "▁▂▃▄▅▆▇█"


class Look(NamedTuple):
    """One sample of the cache."""

    seconds: float
    length: int


def watch(path: str, interval: float, *, as_json: bool) -> None:
    """Sample every `interval` seconds until Ctrl-C; update the screen, or print a line per change to a pipe."""
    looks: deque[Look] = deque(maxlen=MEMORY)
    screen = sys.stdout.isatty() and not as_json
    with _screen() if screen else contextlib.nullcontext(_print_lines(as_json)) as draw:
        while True:
            report = _look(path)
            looks.append(Look(time.monotonic(), report.seq_len))
            draw(report, looks)
            time.sleep(interval)


def _look(path: str) -> CacheReport:
    # Opened again each time, so that a cache that was replaced (resized) or truncated is shown as it is now.
    from kvmmap import report

    return read(path, report.inspect)


Draw = Callable[["CacheReport", "deque[Look]"], None]


@contextlib.contextmanager
def _screen() -> Iterator[Draw]:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(markup=False, highlight=False, emoji=False)
    with Live(console=console, auto_refresh=False, screen=False) as live:
        yield lambda report, looks: live.update(Group(*_lines(report, looks)), refresh=True)


def _print_lines(as_json: bool) -> Draw:
    last: list[tuple[int, str]] = []

    def draw(report: CacheReport, looks: deque[Look]) -> None:
        now = (report.seq_len, report.commit.state if report.commit else "")
        if last == [now]:
            return
        last[:] = [now]
        if as_json:
            click.echo(json.dumps(report.to_dict()))
        else:
            writer = "" if report.commit is None else f", {state(report.commit).plain}"
            click.echo(f"{count(report.seq_len, 'position')}, {rate(looks):,.1f} a second{writer}")
        sys.stdout.flush()

    return draw


def rate(looks: deque[Look]) -> float:
    """Return positions a second over the last samples; 0.0 after the first."""
    recent = list(looks)[-RATE_OVER - 1 :]
    seconds = recent[-1].seconds - recent[0].seconds
    return (recent[-1].length - recent[0].length) / seconds if seconds > 0 else 0.0


def _lines(report: CacheReport, looks: deque[Look]) -> Iterator[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    grid.add_row("length", fill_bar(report.seq_len, report.capacity))
    speed = rate(looks)
    row_bytes = report.stored_bytes / report.seq_len if report.seq_len else 0
    grid.add_row("appending", f"{speed:,.1f} positions a second, {size(int(speed * row_bytes))}/s")
    grid.add_row("", Text(_sparks(looks), "cyan"))
    if speed > 0 and report.seq_len < report.capacity:
        grid.add_row("full in", _duration((report.capacity - report.seq_len) / speed))
    if report.commit is not None:
        grid.add_row("state", state(report.commit))
        grid.add_row("committed", f"{report.commit.committed_len:,}, {moment(report.commit.committed)}")
    yield Text(plain(report.path or ""), "bold")
    yield grid
    yield Text("Ctrl-C ends", "dim")


def _sparks(looks: deque[Look]) -> str:
    """Draw the growth between samples."""
    lengths = [look.length for look in looks]
    steps = [max(0, after - before) for before, after in pairwise(lengths)]
    characters = SPARKS if can_show(SPARKS) else "_.-=#"
    top = max(steps, default=0) or 1
    return "".join(characters[round(step / top * (len(characters) - 1))] for step in steps)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{count(days, 'day')} {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
