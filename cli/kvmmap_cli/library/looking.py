"""`kvmmap library ls`, `stats` and `match`: what a library has."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..output import count, plain, print_json, read, show, size
from .shared import ago, folder_argument, json_option, opened, seconds, shorten, to_dict

if TYPE_CHECKING:
    from rich.tree import Tree

    from kvmmap.library import Match, Segment


@click.command("ls")
@folder_argument
@json_option
@click.option("--long", is_flag=True, help="Whole names, and paths.")
def ls(folder: str, as_json: bool, long: bool) -> None:
    """List the segments of the library in DIR, as a tree: which continues which.

    For each: its positions, size on the disk, uses, and when it was last used.

    \b
    Examples:
      kvmmap library ls caches/
      kvmmap library ls --json caches/ | jq '.[].path'
    """
    with opened(folder) as library:
        entries = library.entries()
        models = {namespace.digest: namespace.model for namespace in library.namespaces()}
    if as_json:
        print_json([to_dict(entry) for entry in entries])
        return
    if not entries:
        click.echo("no segments")
        return
    show(_tree(folder, entries, models, long))
    click.echo(f"{count(len(entries), 'segment')}, {size(sum(entry.bytes for entry in entries))} on disk")


def _tree(folder: str, entries: Sequence[Segment], models: dict[str, str], long: bool) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text(plain(folder), "bold"))
    namespaces: dict[str, Tree] = {}
    places: dict[str, Tree] = {}
    for entry in entries:
        if entry.namespace not in namespaces:
            model = plain(models.get(entry.namespace) or "no name")
            namespaces[entry.namespace] = root.add(Text.assemble((model, "cyan"), (f"  {entry.namespace[:16]}", "dim")))
        parent = places.get(entry.parent or "", namespaces[entry.namespace])
        places[entry.name] = parent.add(_line(entry, long))
    return root


def _line(entry: Segment, long: bool) -> Any:
    from rich.text import Text

    line = Text(entry.name if long else shorten(entry.name), "bold")
    line.append(f"  [{entry.start:,}, {entry.stop:,})  {size(entry.bytes)}", "default")
    line.append(f"  {count(entry.hits, 'use')}, {ago(entry.used)}", "dim")
    for told, style in ((entry.pinned and "pinned", "green"), (entry.writing and "being written", "yellow")):
        line.append(f"  {told}" if told else "", style)
    if entry.ttl is not None:
        line.append(f"  kept for {seconds(entry.ttl)}", "dim")
    if entry.broken:
        line.append(f"  {plain(entry.broken)}", "bold red")
    if long:
        line.append(f"\n{plain(entry.path)}", "dim")
    return line


@click.command("stats")
@folder_argument
@json_option
def stats(folder: str, as_json: bool) -> None:
    """Show sizes and hits of the library in DIR, since it was made and over all processes.

    \b
    Example:
      kvmmap library stats caches/
    """
    with opened(folder) as library:
        found = library.stats()
        namespaces = library.namespaces()
    if as_json:
        told = to_dict(found) | {"hit_rate": found.hit_rate}
        print_json(told | {"namespaces": [to_dict(namespace) for namespace in namespaces]})
        return
    limit = "no limit" if found.max_bytes is None else f"of {size(found.max_bytes)}"
    rows = [
        ("segments", f"{found.segments:,}, {size(found.bytes)} on disk, {limit}"),
        ("index", size(found.index_bytes)),
        ("sessions", f"{found.sessions:,}, {found.hits:,} of them found a prefix"),
        (
            "prompts",
            f"{found.tokens_reused:,} positions reused ({found.hit_rate:.1%}), {found.tokens_computed:,} computed",
        ),
        ("saved", f"{seconds(found.seconds_saved)} of computation"),
        ("evicted", f"{count(found.evictions, 'segment')}, {size(found.bytes_evicted)}"),
    ]
    for name, value in rows:
        click.echo(f"{name:<10}{value}")
    for namespace in namespaces:
        click.echo(
            f"{'model':<10}{plain(namespace.model or 'no name')} {namespace.digest[:16]}: "
            f"{count(namespace.segments, 'segment')}, {count(namespace.positions, 'position')}, {size(namespace.bytes)}"
        )


@click.command("match")
@folder_argument
@click.option("--tokens", "source", metavar="FILE", help="Token ids: numbers, or JSON; - is stdin.")
@click.option("--like", metavar="PATH", help="The token ids of this cache.")
@json_option
def match(folder: str, source: str | None, like: str | None, as_json: bool) -> None:
    """Find the longest prefix of a prompt that the library in DIR has, for each model.

    \b
    Examples:
      kvmmap tokens prompt.kvm | kvmmap library match caches/ --tokens -
      kvmmap library match caches/ --like prompt.kvm
    """
    if (source is None) == (like is None):
        raise click.UsageError("say which prompt: --tokens FILE or --like PATH")
    ids = read(like, lambda cache: cache.token_ids.tolist()) if like is not None else _ids(source or "-")
    with opened(folder) as library:
        found = [(namespace, library.match(namespace.digest, ids)) for namespace in library.namespaces()]
    found.sort(key=lambda pair: -pair[1].length)
    if as_json:
        print_json([_match_to_dict(matched) | {"namespace": to_dict(namespace)} for namespace, matched in found])
        return
    for namespace, matched in found:
        where = f", in {plain(matched.path)}" if matched.path else ""
        model = plain(namespace.model or namespace.digest[:16])
        click.echo(f"{model}: {matched.length:,} of {count(len(ids), 'position')}{where}")
    if not found:
        click.echo("nothing: the library is empty")


def _match_to_dict(found: Match) -> dict[str, Any]:
    return {
        "length": found.length,
        "common": found.common,
        "path": found.path,
        "chain": [segment.name for segment in found.chain],
        "seconds": found.seconds,
    }


def _ids(source: str) -> list[int]:
    """Read token ids: a JSON list, or numbers with anything but digits between them.

    Raises:
        click.UsageError: that is not what is there.
    """
    try:
        if source == "-":
            text = sys.stdin.read()
        else:
            with open(source, encoding="utf-8") as file:
                text = file.read()
        found = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
        if not all(type(token) is int and 0 <= token < 2**31 for token in found):
            raise ValueError("not whole numbers from 0 to 2**31 - 1")
    except (ValueError, TypeError, RecursionError) as error:
        reason = plain(str(error))[:200]
        raise click.UsageError(
            f"{plain(source)}: these are no token ids, as `kvmmap tokens` prints them: {reason}"
        ) from None
    return list(found)


COMMANDS = (ls, stats, match)
