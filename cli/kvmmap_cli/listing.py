"""Many caches as a table, one a row, with what they come to together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from .output import DAMAGED, SOUND, USAGE, WIDE, count, failure, moment, plain, read, size, width
from .summary import STYLES, percent

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from kvmmap.report import CacheReport

ASCENDING = {"name"}
NUMBERS = {"length", "full", "layers", "on disk"}
SPARE = ("model", "layers", "full", "committed")
"""Columns that go, in this order, where there is no room."""

MOST_MODEL = 28
LEAST_NAME = 24
SHORT = {"closed": "closed", "open for writing": "open", "interrupted": "interrupted"}
LONG = {short: long for long, short in SHORT.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One cache of many, or why it can't be read."""

    path: str
    report: CacheReport | None
    error: str | None
    exit_code: int
    file: tuple[int, int] | None = None
    """Device and inode of a file: two names of one file are counted once."""

    @property
    def disk_bytes(self) -> int:
        """What it takes: on the disk where that is known, else of codes and scales that are stored."""
        if self.report is None:
            return 0
        known = self.report.disk_bytes
        return self.report.stored_bytes if known is None else known

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: the report, or path and error."""
        if self.report is None:
            return {"path": self.path, "error": self.error}
        return self.report.to_dict() | {"path": self.path}


def look(path: str) -> Entry:
    """Read what one cache says of itself; an error becomes part of the entry."""
    from kvmmap import report

    try:
        return Entry(path, read(path, report.inspect), None, SOUND, _identity(path))
    except Exception as error:
        code, message = failure(error)
        return Entry(path, None, message.removeprefix(f"{os.path.abspath(path)}: "), code)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # a URL, or gone
        return None
    return status.st_dev, status.st_ino


SORTS: dict[str, Callable[[Entry], Any]] = {
    "name": lambda entry: entry.path,
    "length": lambda entry: entry.report.seq_len if entry.report else -1,
    "size": lambda entry: entry.disk_bytes,
    "time": lambda entry: entry.report.commit.committed.timestamp() if entry.report and entry.report.commit else 0.0,
}


def sort(entries: Sequence[Entry], by: str) -> list[Entry]:
    """Order entries: by name from A on, by all else the largest or latest first."""
    return sorted(entries, key=SORTS[by], reverse=by not in ASCENDING)


def worst(entries: Sequence[Entry]) -> int:
    """Return the exit code of a run over many: 1 if any is damaged, else 2 if any can't be read."""
    codes = {entry.exit_code for entry in entries}
    return DAMAGED if DAMAGED in codes else USAGE if USAGE in codes else SOUND


def render(entries: Sequence[Entry]) -> Iterator[RenderableType]:
    """Yield the table, what can't be read, and the totals."""
    from rich.text import Text

    readable = [entry for entry in entries if entry.report is not None]
    if readable:
        yield _table(readable)
    for entry in entries:
        if entry.error is not None:
            style = "bold red" if entry.exit_code == DAMAGED else "yellow"
            yield Text.assemble((plain(entry.path), style), f": {entry.error}")
    yield Text(_totals(readable, len(entries) - len(readable)), "dim")


def _table(entries: Sequence[Entry]) -> Table:
    """Make the table: numbers are never cut, the name is, and what fits beside neither is left out."""
    from rich.table import Table
    from rich.text import Text

    rows = [_cells(entry) for entry in entries]
    columns = list(rows[0])
    room = width() if sys.stdout.isatty() else WIDE
    while (left := room - _width(rows, columns[1:])) < LEAST_NAME and (spare := [x for x in SPARE if x in columns]):
        columns.remove(spare[0])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True)
    for row in rows:
        name = row["cache"] if len(row["cache"]) <= left else f"...{row['cache'][3 - max(left, 8) :]}"
        cells = [Text(row[column], STYLES.get(LONG.get(row[column], ""), "")) for column in columns[1:]]
        table.add_row(name, *cells)
    return table


def _cells(entry: Entry) -> dict[str, str]:
    report = entry.report
    assert report is not None
    commit = report.commit
    model = "" if report.model is None or report.model.name is None else plain(report.model.name)
    return {
        "cache": plain(os.path.relpath(entry.path) if _is_below(entry.path) else entry.path),
        "length": f"{report.seq_len:,}",
        "full": percent(report.seq_len / report.capacity) if report.capacity else "-",
        "layers": str(report.num_layers),
        "on disk": size(entry.disk_bytes),
        "model": model if len(model) <= MOST_MODEL else f"{model[: MOST_MODEL - 3]}...",
        "state": report.kind if commit is None else SHORT[commit.state],
        "committed": "" if commit is None else moment(commit.committed)[:-3],
    }


def _width(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """Return what columns take, with a gap before each."""
    return sum(2 + max(len(column), *(len(row[column]) for row in rows)) for column in columns)


@cache
def _here() -> str:
    return os.getcwd() + os.sep


def _is_below(path: str) -> bool:
    return path.startswith(_here())


def _totals(readable: Sequence[Entry], unreadable: int) -> str:
    readable = list({entry.file or entry.path: entry for entry in readable}.values())
    reports = [entry.report for entry in readable if entry.report is not None]
    told = f"{count(len(reports), 'cache')}, {count(sum(report.seq_len for report in reports), 'position')}"
    told += f", {size(sum(entry.disk_bytes for entry in readable))} on disk"
    writing = sum(report.commit is not None and report.commit.state == "open for writing" for report in reports)
    told += f", {writing} being written" if writing else ""
    return told + (f"; {unreadable} can't be read" if unreadable else "")
