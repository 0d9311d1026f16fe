"""`kvmmap library`: look at a library of caches, and look after it."""

from __future__ import annotations

import click

from ..library import keeping, looking, sharing


@click.group("library")
def command() -> None:
    """Look at a library, a directory of many caches, and look after it.

    A library is what `kvmmap.Library(path)` makes. Looking at it is no use of its caches, and changes nothing that
    decides which of them goes first. DIR is its directory; a segment's NAME may be shortened to its beginning or end.

    \b
    Examples:
      kvmmap library ls caches/
      kvmmap library gc caches/ --max-bytes 50GiB --dry-run
    """


for each in (*looking.COMMANDS, *keeping.COMMANDS, *sharing.COMMANDS):
    command.add_command(each)
