"""`kvmmap tokens`: the token ids of a cache, or their text."""

from __future__ import annotations

import click

from ..output import plain, print_json, read


@click.command("tokens")
@click.argument("path", type=click.Path(readable=False))
@click.option("--tokenizer", metavar="NAME", help="Decode: a tokenizer.json, its folder, or a model's name.")
@click.option("--start", type=click.IntRange(0), default=0, metavar="N", help="First position; 0 by default.")
@click.option("--stop", type=click.IntRange(0), metavar="N", help="One past the last; all by default.")
@click.option("--each", is_flag=True, help="A line for each position: its number, id, and text in quotes.")
@click.option("--json", "as_json", is_flag=True, help="Print start, ids and text as JSON.")
def command(path: str, tokenizer: str | None, start: int, stop: int | None, each: bool, as_json: bool) -> None:
    """Print the token ids of the cache at PATH, one a line; with --tokenizer, their text.

    -1 is a position whose id was not recorded; in text it is [?].

    \b
    Examples:
      kvmmap tokens prompt.kvm | tail -1
      kvmmap tokens --tokenizer model/ prompt.kvm
      kvmmap tokens --tokenizer model/ --each --start 100 --stop 120 prompt.kvm
    """
    from .. import tokenizer as tokenizers

    decode = None if tokenizer is None else tokenizers.load(tokenizer)
    ids: list[int] = read(path, lambda cache: cache.token_ids[start:stop].tolist())
    if as_json:
        told = {"start": start, "ids": ids}
        print_json(told if decode is None else told | {"text": tokenizers.text_of(ids, decode)})
    elif each:
        for position, token in enumerate(ids, start):
            text = "" if decode is None else f"\t{tokenizers.text_of([token], decode)!r}"
            click.echo(f"{position}\t{token}{text}")
    elif decode is None:
        click.echo("".join(f"{token}\n" for token in ids), nl=False)
    else:
        # Its lines are what makes a text readable; all else that could act on a terminal is escaped.
        click.echo("\n".join(plain(line) for line in tokenizers.text_of(ids, decode).split("\n")))
