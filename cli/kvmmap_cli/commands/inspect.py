"""`kvmmap inspect`: what caches hold, on one screen, as pictures, or as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from .. import summary
from ..outfile import overwrite_option
from ..output import DAMAGED, USAGE, can_colour, failure, indices, plain, print_json, read, show, width
from ..paths import find, names_one
from ..progress import no_progress_option, progress
from ..units import Seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvmmap import QuantizedKvCache
    from kvmmap.report import CacheReport, CacheStatistics, ScaleGrid

    from ..tokenizer import Decode

PLOT_BINS = 400
"""Ranges of positions in a plot's heat maps; in a terminal there are as many as columns."""

SHOWN_TOKENS = 48
"""Token ids that are shown of the first and of the last."""


@click.command("inspect")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(readable=False))
@click.option("--layer", "wanted", metavar="LAYERS", help="Only these layers, each by itself: 3, 0-5, 0,7,20-22.")
@click.option("--stats", is_flag=True, help="What int8 costs in each layer: scales, outliers, entropy, errors.")
@click.option("--heatmap", is_flag=True, help="Draw key and value scales over layers, heads and positions.")
@click.option("--tokens", is_flag=True, help="Show the first and last token ids; `kvmmap tokens` has all.")
@click.option("--tokenizer", metavar="NAME", help="Decode them: a tokenizer.json, its folder, or a model's name.")
@click.option("--plot", metavar="FILE", help="Draw the pictures into a .png, .svg or .pdf (needs kvmmap[plot]).")
@overwrite_option
@click.option("--watch", is_flag=True, help="Go on looking while another process writes; Ctrl-C ends.")
@click.option(
    "--interval",
    type=Seconds(0.01, 86400),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="Seconds between two looks of --watch.",
)
@click.option(
    "--sort",
    type=click.Choice(["name", "length", "size", "time"]),
    default="name",
    show_default=True,
    help="Order of a table of many.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON, every layer by itself.")
@no_progress_option
def command(paths: tuple[str, ...], **options: Any) -> None:
    """Show what the cache at PATH holds; of many, a table.

    Dimensions, length and capacity, sizes, layers, model and metadata, and what is committed. A cache that is being
    written shows as it is at the moment. PATH may be a file, a .zarr directory or an s3:// address; several of them,
    a pattern, or a directory, whose caches are looked for at any depth, give a table with totals. In an object store
    a directory ends with a slash.

    Exit code 1: a cache is damaged. 2: usage, or one is no cache or can't be read.

    \b
    Examples:
      kvmmap inspect prompt.kvm
      kvmmap inspect --stats --heatmap prompt.kvm
      kvmmap inspect --layer 0-3 --json prompt.kvm | jq .layers
      kvmmap inspect --watch --interval 0.2 prompt.kvm
      kvmmap inspect --sort size caches/ 'old/*.kvm'
      kvmmap inspect s3://bucket/prompts/ 's3://bucket/old/*.zarr'
    """
    if names_one(paths):
        _one(paths[0], **options)
    else:
        _many(paths, **options)


def _many(paths: tuple[str, ...], sort: str, as_json: bool, no_progress: bool, **details: Any) -> None:
    from .. import listing

    for name in ("wanted", "stats", "heatmap", "tokens", "plot", "watch"):
        if details[name]:
            option = "layer" if name == "wanted" else name
            raise click.UsageError(f"--{option} is for one cache, not for several")
    unreadable: list[OSError] = []
    found = find(paths, unreadable.append)
    for error in unreadable:
        click.echo(f"kvmmap: {failure(error)[1]}", err=True)
    if not found and unreadable:
        click.get_current_context().exit(USAGE)
    if not found:
        raise click.UsageError(f"no caches (*.kvm, *.zarr) in {', '.join(map(plain, paths))}")
    entries = listing.sort([listing.look(path) for path in found], sort)
    if as_json:
        print_json([entry.to_dict() for entry in entries])
    else:
        show(*listing.render(entries))
    code = listing.worst(entries)
    click.get_current_context().exit(USAGE if unreadable and code != DAMAGED else code)


def _one(
    path: str,
    wanted: str | None,
    stats: bool,
    heatmap: bool,
    tokens: bool,
    tokenizer: str | None,
    plot: str | None,
    watch: bool,
    interval: float,
    overwrite: bool,
    as_json: bool,
    no_progress: bool,
    sort: str,
) -> None:
    if watch:
        from ..watching import watch as go_on_looking

        go_on_looking(path, interval, as_json=as_json)
        return
    decode = _decoder(tokenizer)
    if plot is not None:
        from ..plot import check

        plot = check(plot, path, overwrite=overwrite)
    bins = PLOT_BINS if plot else width() if heatmap else 0
    with progress("reading", no_progress) as advance:
        look = _Look(path, wanted, stats=stats or bool(wanted or plot), bins=bins)
        read(path, lambda cache: look.take(cache, advance))
    if plot is not None and look.statistics is not None:
        from ..plot import draw

        draw(plot, look.report, look.statistics, look.grids)
    if as_json:
        print_json(look.to_dict(decode if tokens or tokenizer else None, tokens=tokens or tokenizer is not None))
    else:
        show(*look.render(tokens=tokens or tokenizer is not None, decode=decode, stats=stats, heatmap=heatmap))


def _decoder(tokenizer: str | None) -> Decode | None:
    if tokenizer is None:
        return None
    from ..tokenizer import load

    return load(tokenizer)


class _Look:
    """What was asked for, and what was found."""

    report: CacheReport
    statistics: CacheStatistics | None = None
    grids: list[ScaleGrid]
    token_ids: list[int]

    def __init__(self, path: str, wanted: str | None, *, stats: bool, bins: int) -> None:
        self.path = path
        self.wanted = wanted
        self.want_statistics = stats
        self.bins = bins
        self.layers: list[int] | None = None
        self.grids = []

    def take(self, cache: QuantizedKvCache, advance: Callable[[int, int], None] | None) -> None:
        """Look at an open cache."""
        from kvmmap import report

        self.report = report.inspect(cache)
        self.layers = None if self.wanted is None else indices(self.wanted, cache.num_layers, "layer")
        self.token_ids = cache.token_ids[: cache.token_len].tolist()
        if self.want_statistics:
            self.statistics = report.statistics(cache, self.layers, progress=advance)
        if self.bins:
            self.grids = report.scale_grids(cache, self.bins, self.layers)

    def to_dict(self, decode: Decode | None, *, tokens: bool) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        from ..tokenizer import text_of

        told = self.report.to_dict()
        if self.layers is not None:
            told["layers"] = [told["layers"][layer] for layer in self.layers]
        if self.statistics is not None:
            told["statistics"] = self.statistics.to_dict()
        if tokens:
            told["token_ids"] = self.token_ids
            if decode is not None:
                told["text"] = text_of(self.token_ids, decode)
        return told

    def render(self, *, tokens: bool, decode: Decode | None, stats: bool, heatmap: bool) -> Iterator[RenderableType]:
        """Yield what makes up the screen: the summary, or the details that were asked for."""
        if self.layers is None and not (stats or heatmap):
            yield from summary.render(self.report, self.path)
        else:
            yield summary.headline(self.report, self.path, self.layers)
        if tokens:
            yield ""
            yield from _tokens(self.token_ids, decode)
        drawn = heatmap and self.grids
        measured = self.statistics is not None and (stats or self.layers is not None)
        note = summary.int8_note(self.report, self.layers)
        if note is not None and (drawn or measured):
            yield note
        if self.statistics is not None and measured:
            yield ""
            yield from _statistics(self.statistics)
        if drawn:
            from ..pictures import heat_maps

            yield ""
            yield from heat_maps(self.grids, width(), colours=can_colour())


def _statistics(found: CacheStatistics) -> Iterator[RenderableType]:
    from .. import figures
    from ..pictures import histograms

    if len(found.layers) > 1:
        yield figures.table(found.layers, width())
        yield ""
    yield figures.summary(found)
    yield ""
    yield from histograms(found.keys, found.values, width())
    yield from figures.outliers(found)


def _tokens(ids: list[int], decode: Decode | None) -> Iterator[RenderableType]:
    """Yield the first and the last of the recorded ids, as text if they can be decoded."""
    from rich.text import Text

    from ..tokenizer import text_of

    if not ids:
        yield Text("no token ids are recorded", "dim")
        return
    last = len(ids) - SHOWN_TOKENS
    parts = [(0, ids)] if last <= SHOWN_TOKENS else [(0, ids[:SHOWN_TOKENS]), (last, ids[last:])]
    for first, part in parts:
        yield Text(f"tokens {first:,} to {first + len(part) - 1:,}", "dim")
        yield Text(" ".join(map(str, part)) if decode is None else plain(text_of(part, decode)))
