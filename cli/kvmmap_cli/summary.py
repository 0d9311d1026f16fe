"""One cache on one screen: dimensions, fill, sizes, state, model, and its layers by shape."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .output import can_show, count, moment, plain, ranges, size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from kvmmap.report import CacheReport, CommitReport, LayerReport, StatesReport

BAR_WIDTH = 24
MOST_NOTES = 5
MOST_SHAPES = 8
MOST_TEXT = 200
MOST_PRINT = 19
STYLES = {"closed": "green", "open for writing": "cyan", "interrupted": "yellow"}


def render(report: CacheReport, title: str) -> Iterator[RenderableType]:
    """Yield the parts of the screen."""
    from rich.text import Text

    yield Text.assemble((plain(title), "bold"), f": {count(report.num_layers, 'layer')}")
    yield ""
    yield _fields(report)
    yield ""
    yield _layers(report)


def headline(report: CacheReport, title: str, layers: list[int] | None) -> Text:
    """Return one line that names the cache and the selected layers."""
    from rich.text import Text

    told = count(report.num_layers, "layer")
    if layers is not None:
        told = f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)} of {report.num_layers:,}"
        shapes = {_shape(report.layers[layer]) for layer in layers}
        if len(shapes) == 1:
            heads, dim, codec = shapes.pop()
            told += f", {heads} KV heads x {dim}, {codec}"
    return Text.assemble((plain(title), "bold"), f": {told}, {count(report.seq_len, 'position')}")


def _fields(report: CacheReport) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    def add(name: str, value: str | Text) -> None:
        table.add_row(name, value)

    add("length", fill_bar(report.seq_len, report.capacity))
    add("token ids", f"{report.token_len:,} recorded" if report.token_len else "none recorded")
    add("stored", f"{size(report.stored_bytes)} of {size(report.memory_bytes)} reserved")
    add("compression", f"{report.compression_ratio:.2f}: f32 would reserve {size(report.fp32_memory_bytes)}")
    if report.states is not None:
        add("states", states_text(report.states))
        add("checkpoints", checkpoints_text(report.states))
    if report.recent_bytes:
        add("in 16 bits", recent_text(report))
    if report.file_bytes is not None and report.disk_bytes is not None:
        add("on disk", f"{size(report.disk_bytes)}, in a sparse file of {size(report.file_bytes)}")
    for number, parent in enumerate(report.parents):
        name = plain(os.path.basename(parent.path))
        reach = f"positions {parent.start:,} to {parent.stop - 1:,} in {name}, {size(parent.disk_bytes)} on disk"
        add("" if number else "continues", reach)
    if report.commit is not None:
        add("state", state(report.commit))
        add("committed", _committed(report.commit))
    if report.created is not None:
        add("made", f"{moment(report.created)}, format version {report.format_version}")
    for name, value in _about(report):
        add(name, value)
    return table


def recent_text(report: CacheReport) -> str:
    """Return which positions are kept in 16 bits besides, and what they take."""
    last = f"the last {count(report.recent_window, 'position')}" if report.recent_window else ""
    first = f"the first {count(report.sinks, 'position') if not last else f'{report.sinks:,}'}" if report.sinks else ""
    return f"{' and '.join(filter(None, (last, first)))}, {size(report.recent_bytes)}"


def int8_note(report: CacheReport, layers: list[int] | None = None) -> str | None:
    """Return how rows are stored if not as int8: statistics are those of int8 whatever the codec, and have to say so.

    Args:
        layers: those that the statistics are of; all by default.
    """
    chosen = report.layers if layers is None else [report.layers[layer] for layer in layers]
    names = [name for layer in chosen for name in (layer.key_codec_name, layer.value_codec_name)]
    others = [name for name in dict.fromkeys(names) if name not in ("int8", "none")]
    if not others:
        return None
    return f"Rows of {', '.join(others)} are decoded, and scales, codes and errors are those that int8 would give them."


def states_text(states: StatesReport) -> str:
    """Return the number of states, and the size of a checkpoint."""
    layers = count(len({tensor.layer for tensor in states.tensors}), "layer")
    return f"{count(len(states.tensors), 'tensor')} in {layers}, {size(states.checkpoint_bytes)} a checkpoint"


def checkpoints_text(states: StatesReport) -> str:
    """Return the positions of the checkpoints."""
    found = [f"{one.position:,}{' (pinned)' if one.pinned else ''}" for one in states.checkpoints]
    text = f"at {', '.join(found)}" if found else "none"
    text += f"; {states.checkpoint_slots:,} are kept"
    if states.rows_beyond_checkpoint:
        text += f"; {count(states.rows_beyond_checkpoint, 'position')} beyond the last one"
    return text


def fill_bar(length: int, capacity: int) -> Text:
    """Draw how full the cache is. Only an empty cache has an empty bar, and only a full one a full bar."""
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
        f"  {percent(share)}",
    )


def percent(share: float) -> str:
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{share * 100:.3g} %"


def state(commit: CommitReport) -> Text:
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
    """Yield model and metadata, shortened to fit a screen."""
    model = report.model
    if model is not None:
        digest = model.fingerprint  # enough to distinguish two; --json has all of it
        short = digest if digest is None or len(digest) <= MOST_PRINT else f"{digest[: MOST_PRINT - 3]}..."
        facts = {"revision": model.revision, "fingerprint": short, "dtype": model.source_dtype}
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
    """Return the cells that describe a layer's shape; values' only where they differ from keys'."""
    return str(layer.num_kv_heads), _pair(str(layer.head_dim), str(layer.value_head_dim)), codecs_text(layer)


def codecs_text(layer: LayerReport) -> str:
    """Return the names of a layer's codecs: that of values only where it is another."""
    from kvmmap import codecs

    keys = codecs.shown_name(layer.key_codec, layer.key_transform)
    values = codecs.shown_name(layer.value_codec, layer.value_transform)
    return _pair(keys, values)


def _pair(keys: str, values: str) -> str:
    return keys if keys == values else f"{keys}, values {values}"
