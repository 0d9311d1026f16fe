"""`kvmmap report`: describe a cache on one HTML page."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from .. import outfile
from ..output import DAMAGED, SOUND, plain, read, size
from ..progress import no_progress_option, progress

if TYPE_CHECKING:
    from kvmmap import QuantizedKvCache

    from ..page import Facts
    from ..progress import Advance

ENDINGS = (".html", ".htm")
LONGEST_STEM = 250

BINS = 240
"""Ranges of positions in the page's heat maps."""


@click.command("report")
@click.argument("path", type=click.Path(readable=False))
@click.option("-o", "--output", metavar="FILE", help="Where to write the page; NAME.html here by default.")
@outfile.overwrite_option
@click.option("--no-verify", is_flag=True, help="Don't compare checksums.")
@no_progress_option
def command(path: str, output: str | None, overwrite: bool, no_verify: bool, no_progress: bool) -> None:
    """Write a report on the cache at PATH as one HTML page, or on a library of caches.

    Geometry, state, the memory map of its file drawn to scale, charts of what int8 costs in every layer, what stands
    out, and whether all checksums hold. The page needs no network, can be read on a phone and in the dark, and holds
    neither token ids nor rows; model and metadata are in it.

    Where PATH is the directory of a library, the page has its tree of segments, with their sizes, uses and ages.

    Exit code 1: damage was found, and the page says where.

    \b
    Examples:
      kvmmap report prompt.kvm -o report.html
      kvmmap report caches/ -o library.html
    """
    from .. import page

    target = _page_of(path) if output is None else output
    target = outfile.check(target, "--output", ENDINGS, path, overwrite=overwrite)
    if os.path.isfile(os.path.join(path, "library.json")):
        library_page = _of_library(path).encode()
        outfile.write(target, library_page)
        click.echo(f"{plain(target)}: {size(len(library_page))}")
        return
    with progress("comparing checksums", no_progress) as verifying, progress("reading", no_progress) as reading:
        facts = read(path, lambda cache: _look(cache, None if no_verify else verifying or _quiet, reading), "none")
    written = page.build(facts).encode()
    outfile.write(target, written)
    click.echo(f"{plain(target)}: {size(len(written))}")
    damaged = facts.verified is not None and not facts.verified.sound
    click.get_current_context().exit(DAMAGED if damaged else SOUND)


def _of_library(path: str) -> str:
    """Return the page of a library."""
    import kvmmap

    from ..page.library import LibraryFacts, build

    with kvmmap.Library(path, create=False) as library:
        facts = LibraryFacts(
            path=path,
            stats=library.stats(),
            namespaces=library.namespaces(),
            entries=library.entries(),
            going=library.evict((library.stats().bytes * 3) // 4, dry_run=True),
            version=f"{kvmmap.__version__}, {kvmmap.kernel()} kernel",
            made=datetime.now(UTC),
        )
    return build(facts)


def _page_of(path: str) -> str:
    """Return the file name of a cache's page: NAME.html, cut to the longest name that file systems allow."""
    stem = os.path.splitext(os.path.basename(path.rstrip("/")))[0] or "report"
    while len(os.fsencode(stem)) > LONGEST_STEM:
        stem = stem[:-1]
    return f"{stem}.html"


def _quiet(done: int, total: int) -> None:
    """Show no progress."""


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
