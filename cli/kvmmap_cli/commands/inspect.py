"""`kvmmap inspect`: what a cache holds, on one screen or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..output import can_show, count, moment, plain, print_json, ranges, read, show, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from kvmmap.report import CacheReport, CommitReport, LayerReport

BAR_WIDTH = 24
MOST_NOTES = 5
MOST_SHAPES = 8
MOST_TEXT = 200
STYLES = {"closed": "green", "open for writing": "cyan", "interrupted": "yellow"}


@click.command("inspect")
@click.argument("path", type=click.Path(readable=False))
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON, every layer by itself.")
def command(path: str, as_json: bool) -> None:
    """Show what the cache at PATH holds.

    Dimensions, length and capacity, sizes, layers, model and metadata, and what is committed. A cache that is being
    written shows as it is at the moment.

    \b
    Examples:
      kvmmap inspect prompt.kvm
      kvmmap inspect --json prompt.kvm | jq .seq_len
    """
    from kvmmap import report

    facts = read(path, report.inspect)
    if as_json:
        print_json(facts.to_dict())
    else:
        show(*render(facts, path))


def render(report: CacheReport, title: str) -> Iterator[RenderableType]:
    """Yield what makes up the screen."""
    from rich.text import Text

    yield Text.assemble((plain(title), "bold"), f": {count(report.num_layers, 'layer')}")
    yield ""
    yield _fields(report)
    yield ""
    yield _layers(report)


def _fields(report: CacheReport) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    def add(name: str, value: str | Text) -> None:
        table.add_row(name, value)

    add("length", _fill(report.seq_len, report.capacity))
    add("token ids", f"{report.token_len:,} recorded" if report.token_len else "none recorded")
    add("stored", f"{size(report.stored_bytes)} of {size(report.memory_bytes)} reserved")
    add("compression", f"{report.compression_ratio:.2f}: f32 would reserve {size(report.fp32_memory_bytes)}")
    if report.file_bytes is not None and report.disk_bytes is not None:
        add("on disk", f"{size(report.disk_bytes)}, in a sparse file of {size(report.file_bytes)}")
    if report.commit is not None:
        add("state", _state(report.commit))
        add("committed", _committed(report.commit))
    if report.created is not None:
        add("made", f"{moment(report.created)}, format version {report.format_version}")
    for name, value in _about(report):
        add(name, value)
    return table


def _fill(length: int, capacity: int) -> Text:
    """Draw how full the cache is; it looks neither empty nor full unless it is."""
    from rich.text import Text

    if not capacity:
        return Text("0: nothing is reserved")
    share = length / capacity
    filled = round(share * BAR_WIDTH)
    if 0 < length < capacity:
        filled = min(max(filled, 1), BAR_WIDTH - 1)
    full, free = "━─" if can_show("━─") else "#-"
    style = "yellow" if share > 0.9 else "green"
    return Text.assemble(
        f"{length:,} of {count(capacity, 'position')}  ",
        (full * filled, style),
        (free * (BAR_WIDTH - filled), "dim"),
        f"  {_percent(share)}",
    )


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{share * 100:.3g} %"


def _state(commit: CommitReport) -> Text:
    from rich.text import Text

    process = "" if commit.writer_pid is None else f" by process {commit.writer_pid}"
    detail = {"closed": "", "open for writing": process, "interrupted": f": not closed{process}"}[commit.state]
    return Text.assemble((commit.state, STYLES[commit.state]), detail)


def _committed(commit: CommitReport) -> str:
    what = count(commit.committed_len, "position")
    if commit.uncommitted:
        what += f", and {commit.uncommitted:,} more not yet"
    return f"{what}; commit {commit.sequence:,}, {moment(commit.committed)}"


def _about(report: CacheReport) -> Iterator[tuple[str, str]]:
    """Yield model and metadata, shortened to what fits a screen."""
    model = report.model
    if model is not None:
        facts = {"revision": model.revision, "fingerprint": model.fingerprint, "dtype": model.source_dtype}
        named = [f"{name} {_value(value)}" for name, value in facts.items() if value is not None]
        named += [f"rope {_value(dict(model.rope))}"] if model.rope else []
        yield "model", "unnamed" if model.name is None else _value(model.name)
        if named:
            yield "", ", ".join(named)
    notes = list(report.metadata.items())
    for number, (key, value) in enumerate(notes[:MOST_NOTES]):
        yield "" if number else "metadata", f"{_value(key)}: {_value(value)}"
    if len(notes) > MOST_NOTES:
        yield "", f"and {len(notes) - MOST_NOTES:,} more: --json shows all"


def _value(value: Any) -> str:
    text = plain(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return text if len(text) <= MOST_TEXT else f"{text[: MOST_TEXT - 3]}..."


def _layers(report: CacheReport) -> RenderableType:
    """Make the table of layers; those of one shape share a row."""
    from rich.table import Table

    shapes: dict[tuple[str, ...], list[LayerReport]] = {}
    for layer in report.layers:
        shapes.setdefault(_shape(layer), []).append(layer)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layers", overflow="fold", max_width=24)
    for name in ("KV heads", "head dim"):
        table.add_column(name, justify="right")
    table.add_column("codec")
    for name in ("stored", "reserved"):
        table.add_column(name, justify="right")
    for shape, layers in list(shapes.items())[:MOST_SHAPES]:
        stored, reserved = sum(x.stored_bytes for x in layers), sum(x.memory_bytes for x in layers)
        table.add_row(_value(ranges(x.index for x in layers)), *shape, size(stored), size(reserved))
    if len(shapes) > MOST_SHAPES:
        table.caption = f"and {len(shapes) - MOST_SHAPES:,} more shapes: --json shows every layer"
        table.caption_justify = "left"
    return table


def _shape(layer: LayerReport) -> tuple[str, ...]:
    """Return the cells that say how a layer is built; the values' only where they differ from the keys'."""
    dim = _pair(str(layer.head_dim), str(layer.value_head_dim))
    keys, values = (
        codec if transform == "none" else f"{codec} after {transform}"
        for codec, transform in (
            (layer.key_codec, layer.key_transform),
            (layer.value_codec, layer.value_transform),
        )
    )
    return str(layer.num_kv_heads), dim, _pair(keys, values)


def _pair(keys: str, values: str) -> str:
    return keys if keys == values else f"{keys}, values {values}"
