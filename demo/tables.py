"""The demo's output: the two processes' facts side by side."""

from __future__ import annotations

from statistics import median
from typing import Any

from facts import FOLLOWING_TOKENS, PROMPT_TOKENS, agreement, first_difference
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Facts = dict[str, Any]


def show(console: Console, saved: Facts, resumed: Facts) -> None:
    """Print everything about one text."""
    console.rule(f"[bold]{saved['title']}[/], {PROMPT_TOKENS:,} tokens")
    console.print(Group(time_table(saved, resumed), size_table(saved, resumed), quality_table(saved, resumed)))
    parted = first_difference(saved["greedy"], resumed["greedy"])
    if parted is not None:
        best, second = saved["greedy_chances"][parted]
        console.print(
            f"At token {parted + 1} the original's best two had {best:.2%} and {second:.2%}; from there on the "
            "continuations are two different texts."
        )
    text = Text(
        "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in resumed["greedy_text"])
    )
    console.print(Panel(text, title="what the model makes up, with the reloaded cache", title_align="left"))


def time_table(saved: Facts, resumed: Facts) -> Table:
    """Time to the first new token, by prefilling and by reopening the file."""
    table = _table("time to the first new token", "what", "time", "against prefill")
    prefill = median(saved["prefill_s"])
    warm = {name: median(values) for name, values in resumed["warm"].items()}
    runs = len(saved["prefill_s"])

    def row(what: str, seconds: float, *, ratio: bool = False) -> None:
        table.add_row(what, _seconds(seconds), f"{prefill / seconds:,.0f}x faster" if ratio else "")

    row(f"prefill the prompt (median of {runs})", prefill)
    row("reopen, load, feed one token (median)", sum(warm.values()), ratio=True)
    row("  of which: kvmmap.open", warm["open_s"])
    row("  of which: read all layers back as f32", warm["read_s"])
    row("  of which: the model's step", warm["step_s"])
    row("the same, file not in the page cache (once)", sum(resumed["cold"].values()), ratio=True)
    table.add_section()
    row("save: quantise, write, all syncs (once)", saved["save_s"])
    row("not counted: load the model, first process", saved["load_s"])
    row("not counted: load the model, second process", resumed["load_s"])
    return table


def size_table(saved: Facts, resumed: Facts) -> Table:
    """The file against the tensors it replaces."""
    table = _table("size", "what", "MB", "against f32")
    full = saved["f32_bytes"]
    for what, size in (
        ("keys and values as f32", full),
        ("keys and values as f16", full // 2),
        ("the .kvm file on disk, all of it", resumed["disk_bytes"]),
    ):
        table.add_row(what, f"{size / 1e6:,.2f}", f"{full / size:.2f}x smaller" if size != full else "")
    return table


def quality_table(saved: Facts, resumed: Facts) -> Table:
    """How the model scores the text that follows, and what it generates."""
    table = _table(
        f"the {FOLLOWING_TOKENS} tokens that follow, and {len(saved['greedy'])} made up",
        "cache",
        "perplexity",
        "change",
        "same likeliest token",
        "greedy continuation",
    )
    table.add_row("original, f32", f"{saved['perplexity']:.4f}", "", "", "")
    for what, perplexity, guesses, greedy in (
        ("original, through f16", saved["half_perplexity"], saved["half_guesses"], saved["half_greedy"]),
        ("reloaded from kvmmap", resumed["perplexity"], resumed["guesses"], resumed["greedy"]),
    ):
        parted = first_difference(saved["greedy"], greedy)
        table.add_row(
            what,
            f"{perplexity:.4f}",
            f"{perplexity / saved['perplexity'] - 1:+.3%}",
            f"{agreement(saved['guesses'], guesses):.1%}",
            "the same" if parted is None else f"differs from token {parted + 1} on",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
