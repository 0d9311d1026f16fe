"""The report's sections, in their order: facts in, one page out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..figures import number, share
from ..output import count, moment, ranges, size
from ..pictures import shares_of
from ..summary import checkpoints_text, codecs_text, int8_note, percent, recent_text, states_text
from . import charts
from .filemap import filemap, legend
from .markup import Markup, element, facts, figure, folded, join, table, text, void

if TYPE_CHECKING:
    from kvmmap import VerifyReport
    from kvmmap.report import CacheReport, CacheStatistics, FileMap, RowStatistics, ScaleGrid

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing, from nowhere."""

MOST_DAMAGES = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that a report tells of."""

    report: CacheReport
    statistics: CacheStatistics
    grids: Sequence[ScaleGrid]
    map: FileMap | None
    verified: VerifyReport | None
    """None if it was not checked."""
    version: str
    """kvmmap's, and its kernel."""
    made: datetime


def build(facts: Facts) -> str:
    """Return the page."""
    report = facts.report
    name = os.path.basename(report.path or "") or "A cache in memory"
    lead = f"{count(report.num_layers, 'layer')}, {count(report.seq_len, 'position')} of {report.capacity:,}"
    verdict = join([f"A kvmmap cache: {lead}. ", _verdict(facts.verified)])
    return whole(name, f"A kvmmap cache: {lead}", verdict, _sections(facts), facts.version, facts.made)


def whole(
    name: str,
    about: str,
    lead: Markup,
    sections: Iterable[tuple[str, Sequence[Markup]]],
    version: str,
    made: datetime,
) -> str:
    """Return a page of sections.

    Args:
        name: its title.
        about: what it is, for those who list pages.
        lead: the line below the title.
        sections: titles, and what is below them.
        version: kvmmap's, and its kernel.
        made: when.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        void("meta", charset="utf-8"),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        void("meta", http_equiv="Content-Security-Policy", content=POLICY),
        void("meta", name="description", content=about),
        void("meta", name="referrer", content="no-referrer"),
        element("title", f"{name}: kvmmap report"),
        element("style", Markup(style)),
    )
    top = element("header", element("h1", name), element("p", lead, class_="lead"))
    main = element("main", *(element("section", element("h2", title), *parts) for title, parts in sections))
    foot = element("footer", f"Made {moment(made)} by kvmmap {version}. It loads nothing from anywhere.")
    return f"<!DOCTYPE html>\n{element('html', head, element('body', top, main, foot), lang='en')}\n"


def _sections(facts: Facts) -> Iterator[tuple[str, list[Markup]]]:
    yield "What it holds", [_about(facts.report), _layers(facts.report)]
    if facts.map is not None:
        yield "The file", list(filemap(facts.map))
    if facts.statistics.seq_len:
        note = int8_note(facts.report)
        yield "Scales", list(_scales(facts.grids, note))
        yield "What int8 costs" if note is None else "What int8 would cost", list(_costs(facts.statistics, note))
        yield "What stands out", list(_outliers(facts.statistics))
    yield "Checksums", list(_checksums(facts.verified))


def _verdict(verified: VerifyReport | None) -> Markup:
    if verified is None:
        return element("span", "Checksums were not compared.")
    if verified.sound:
        return element("span", "All checksums hold.", class_="good")
    return element("span", f"Damaged in {count(len(verified.damages), 'place')}.", class_="bad")


def _about(report: CacheReport) -> Markup:
    return facts(_facts_of(report))


def _facts_of(report: CacheReport) -> Iterator[tuple[str, Markup | str]]:
    full = report.seq_len / report.capacity if report.capacity else 0.0
    meter = element("meter", percent(full), value=f"{full:.4f}", aria_label="how full the cache is")
    yield "length", join([f"{report.seq_len:,} of {count(report.capacity, 'position')}, {percent(full)} ", meter])
    yield "token ids", f"{report.token_len:,} recorded" if report.token_len else "none recorded"
    yield "stored", f"{size(report.stored_bytes)} of {size(report.memory_bytes)} reserved"
    if report.states is not None:
        yield "states", states_text(report.states)
        yield "checkpoints", checkpoints_text(report.states)
    yield "compression", f"{report.compression_ratio:.2f}: f32 would reserve {size(report.fp32_memory_bytes)}"
    if report.recent_bytes:
        yield "in 16 bits", recent_text(report)
    if report.file_bytes is not None and report.disk_bytes is not None:
        yield "on disk", f"{size(report.disk_bytes)}, in a sparse file of {size(report.file_bytes)}"
    if report.commit is not None:
        commit = report.commit
        more = f", and {commit.uncommitted:,} more not yet" if commit.uncommitted else ""
        yield "state", commit.state
        yield "committed", f"{count(commit.committed_len, 'position')}{more}; {moment(commit.committed)}"
    if report.created is not None:
        yield "made", f"{moment(report.created)}, format version {report.format_version}"
    if report.model is not None:
        model = report.model
        named = {"model": model.name, "revision": model.revision, "fingerprint": model.fingerprint}
        yield from ((name, value) for name, value in {**named, "dtype": model.source_dtype}.items() if value)
        if model.rope:
            yield "rope", json.dumps(dict(model.rope), ensure_ascii=False)
    yield from ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in report.metadata.items())


def _layers(report: CacheReport) -> Markup:
    shapes: dict[tuple[str, ...], list[int]] = {}
    for layer in report.layers:
        shape = (f"{layer.num_kv_heads}", f"{layer.head_dim}", f"{layer.value_head_dim}", codecs_text(layer))
        shapes.setdefault(shape, []).append(layer.index)
    rows = [
        (ranges(indices), *shape, size(sum(report.layers[i].stored_bytes for i in indices)))
        for shape, indices in shapes.items()
    ]
    return table("Layers by shape", ("layers", "KV heads", "head dim", "value head dim", "codec", "stored"), rows)


def _scales(grids: Sequence[ScaleGrid], note: str | None) -> Iterator[Markup]:
    yield element(
        "p",
        "Each row of a head is stored as int8 with one scale, its largest number over 127. "
        if note is None
        else f"The scale of a row of int8 is its largest number over 127. {note} ",
        "Rows of the picture are the heads of each layer, one after the other; columns are positions.",
    )
    length = int(grids[0].edges[-1])
    names = f"layer {grids[0].layer} at the top, {grids[-1].layer} at the bottom" if len(grids) > 1 else "head by head"
    pictures = []
    for part in ("keys", "values"):
        shares, low, high = shares_of(np.concatenate([getattr(grid, part) for grid in grids]).astype(np.float64))
        about = f"Scales of {part} over {count(len(grids), 'layer')} and {count(length, 'position')}"
        axis = element("div", element("span", "position 0"), element("span", f"{length:,}"), class_="axis")
        legend = element("div", f"{number(low)}", charts.ramp(), f"{number(high)}", class_="about")
        pictures.append(figure(f"Scales of {part}, {names}", charts.heat_map(about, shares), axis, legend))
    yield element("div", *pictures, class_="pair")


def _costs(statistics: CacheStatistics, note: str | None) -> Iterator[Markup]:
    if note is not None:
        yield element("p", note)
    yield legend([("keys", "keys"), ("values", "values")])
    layers = [layer.index for layer in statistics.layers]

    def chart(title: str, field: str, factor: float = 1, unit: str = "") -> Markup:
        series = [
            (part, [factor * getattr(getattr(layer, part), field) for layer in statistics.layers])
            for part in ("keys", "values")
        ]
        return figure(title, charts.lines(title, "layer", layers, series, unit))

    yield element(
        "div",
        chart(
            "Relative error, estimated: root mean square of the error over that of the numbers",
            "relative_error",
            100,
            " %",
        ),
        chart("Crest: a row's largest number over its root mean square", "crest"),
        chart("Outlier rows: crest over 5, so that few codes are left for the rest", "outlier_ratio", 100, " %"),
        chart("Entropy: bits that a code holds, of the 8 that it takes", "entropy"),
        *(
            figure(
                f"Codes of {part}",
                charts.bars(f"How often each code of {part} occurs", part, getattr(statistics, part).code_counts, -127),
            )
            for part in ("keys", "values")
        ),
        class_="pair",
    )
    yield table("All layers together", ("", "keys", "values"), _summary(statistics))
    yield folded("Every layer in numbers", _by_layer(statistics))


def _summary(statistics: CacheStatistics) -> Iterator[tuple[str, str, str]]:
    def row(name: str, show: Callable[[RowStatistics], str]) -> tuple[str, str, str]:
        return name, show(statistics.keys), show(statistics.values)

    yield row("rows", lambda rows: f"{rows.rows:,}")
    yield row("zero rows", lambda rows: f"{rows.zero_rows:,}")
    yield row("scale, 1st percentile", lambda rows: _scale(rows, "p01"))
    yield row("scale, median", lambda rows: _scale(rows, "median"))
    yield row("scale, 99th percentile", lambda rows: _scale(rows, "p99"))
    yield row("crest", lambda rows: f"{rows.crest:.2f}")
    yield row("outlier rows", lambda rows: share(rows.outlier_ratio))
    yield row("saturated codes", lambda rows: share(rows.saturation))
    yield row("entropy", lambda rows: f"{rows.entropy:.2f} bits")
    yield row("error bound", lambda rows: number(rows.error_bound))
    yield row("relative error, estimated", lambda rows: share(rows.relative_error))


def _scale(rows: RowStatistics, name: str) -> str:
    return "-" if rows.scales is None else number(getattr(rows.scales, name))


def _by_layer(statistics: CacheStatistics) -> Markup:
    head = (
        "layer",
        "",
        "median scale",
        "crest",
        "outlier rows",
        "zero rows",
        "saturated",
        "bits",
        "error",
        "error bound",
    )
    rows = [
        (
            f"{layer.index}",
            part,
            _scale(rows, "median"),
            f"{rows.crest:.2f}",
            share(rows.outlier_ratio),
            f"{rows.zero_rows:,}",
            share(rows.saturation),
            f"{rows.entropy:.2f}",
            share(rows.relative_error),
            number(rows.error_bound),
        )
        for layer in statistics.layers
        for part, rows in (("keys", layer.keys), ("values", layer.values))
    ]
    return table("Every layer", head, rows, words=2)


def _outliers(statistics: CacheStatistics) -> Iterator[Markup]:
    found = statistics.outliers
    yield element(
        "p",
        "A channel is one number of a head's row, over all positions. A key channel that dwarfs the others sets the "
        "scale of its rows, and attention scores feel it most.",
    )
    tables = []
    for title, channels in (("Key channels", found.key_channels), ("Value channels", found.value_channels)):
        rows = [(f"{o.layer}", f"{o.head}", f"{o.channel}", f"{o.ratio:.1f}") for o in channels]
        tables.append(_ratios(title, "the layer's median channel", "channel", rows))
    for title, positions in (("Key rows", found.key_positions), ("Value rows", found.value_positions)):
        rows = [(f"{o.layer}", f"{o.head}", f"{o.position:,}", f"{o.ratio:.1f}") for o in positions]
        tables.append(_ratios(title, "their head's mean scale", "position", rows))
    yield element("div", *tables, class_="pair")


def _ratios(title: str, measure: str, place: str, rows: Sequence[tuple[str, ...]]) -> Markup:
    if not rows:
        return element("p", f"{title}: none stands out.", class_="about")
    return table(f"{title}, as multiples of {measure}", ("layer", "head", place, "ratio"), rows)


def _checksums(verified: VerifyReport | None) -> Iterator[Markup]:
    if verified is None:
        yield element("p", "They were not compared; `kvmmap verify` does.")
        return
    unverified = verified.seq_len - verified.verified
    checked = f"{count(verified.blocks, 'block')}, {size(verified.bytes)}, {count(verified.verified, 'position')}"
    if verified.sound:
        yield element("p", element("span", "Sound.", class_="good"), f" Compared {checked}.")
    else:
        yield element("p", element("span", "Damaged.", class_="bad"), f" Compared {checked}.")
        shown = [text(damage.what) for damage in verified.damages[:MOST_DAMAGES]]
        yield element("ul", *(element("li", line) for line in shown))
        if len(verified.damages) > MOST_DAMAGES:
            yield element("p", f"And {len(verified.damages) - MOST_DAMAGES:,} more: kvmmap verify --json lists all.")
    if unverified:
        yield element("p", f"{count(unverified, 'position')} are not committed yet, and have no checksum.")
