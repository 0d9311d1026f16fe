"""`kvmmap report`: all about a cache as one HTML page to share."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from ..output import DAMAGED, SOUND, plain, read, size
from ..progress import no_progress_option, progress

if TYPE_CHECKING:
    from kvmmap import QuantizedKvCache

    from ..page import Facts
    from ..progress import Advance

BINS = 240
"""Stretches of positions in the page's heat maps."""


@click.command("report")
@click.argument("path", type=click.Path(readable=False))
@click.option("-o", "--output", metavar="FILE", help="Where to write the page; NAME.html here by default.")
@click.option("--no-verify", is_flag=True, help="Don't compare checksums.")
@no_progress_option
def command(path: str, output: str | None, no_verify: bool, no_progress: bool) -> None:
    """Write a report on the cache at PATH as one HTML page.

    Geometry, state, the memory map of its file drawn to scale, charts of what int8 costs in every layer, what stands
    out, and whether all checksums hold. The page needs no network, can be read on a phone and in the dark, and holds
    neither token ids nor rows; model and metadata are in it.

    Exit code 1: damage was found, and the page says where.

    \b
    Example:
      kvmmap report prompt.kvm -o report.html
    """
    from .. import page

    target = output or f"{os.path.splitext(os.path.basename(path.rstrip('/')))[0]}.html"
    _check(path, target)
    with progress("comparing checksums", no_progress) as verifying, progress("reading", no_progress) as reading:
        facts = read(path, lambda cache: _look(cache, None if no_verify else verifying or _quiet, reading), "none")
    written = page.build(facts)
    _write(target, written)
    click.echo(f"{plain(target)}: {size(len(written.encode()))}")
    damaged = facts.verified is not None and not facts.verified.sound
    click.get_current_context().exit(DAMAGED if damaged else SOUND)


def _quiet(done: int, total: int) -> None:
    """Show nothing."""


def _check(path: str, target: str) -> None:
    """Refuse to write where a page does not belong, before any work is done."""
    if os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target):
        raise click.UsageError(f"{plain(target)} is the cache itself: give another --output")
    if os.path.isdir(target):
        raise click.UsageError(f"{plain(target)} is a directory: give a file as --output")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise click.UsageError(f"{plain(os.path.dirname(target))}: there is no such directory")


def _look(cache: QuantizedKvCache, verifying: Advance | None, reading: Advance | None) -> Facts:
    import kvmmap
    from kvmmap import report

    from .. import page

    return page.Facts(
        report=report.inspect(cache),
        statistics=report.statistics(cache, progress=reading),
        grids=report.scale_grids(cache, BINS),
        map=report.file_map(cache),
        verified=None if verifying is None else cache.verify(verifying),
        version=f"{kvmmap.__version__}, {kvmmap.kernel()} kernel",
        made=datetime.now(UTC),
    )


def _write(target: str, page: str) -> None:
    """Put the page in its place, whole or not at all."""
    beside = f"{target}.{os.getpid()}.tmp"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(beside, target)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise
