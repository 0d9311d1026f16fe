"""`kvmmap truncate`: keep the first positions of a cache, and remove the rest."""

from __future__ import annotations

import click

from ..asking import confirm, timeout_option, yes_option
from ..output import count, plain


@click.command("truncate")
@click.argument("path", type=click.Path(readable=False))
@click.argument("length", type=click.IntRange(0))
@timeout_option
@yes_option
def command(path: str, length: int, timeout: float, yes: bool) -> None:
    """Keep the first LENGTH positions of the cache at PATH, and remove the rest.

    A cache with states goes to its last checkpoint that is not beyond LENGTH. Durable when the command ends. Asks
    first. Readers that have it open are told at once.

    \b
    Examples:
      kvmmap truncate prompt.kvm 1024
      kvmmap truncate --yes prompt.kvm 0
    """
    import kvmmap

    with kvmmap.open(path, record_use=False) as cache:
        stored = cache.seq_len
        length = cache.restorable(length) if length < stored else length
    if length < stored:
        confirm(f"Drop {stored - length:,} of {count(stored, 'position')} from {plain(path)}?", yes)
    with kvmmap.open(path, "a", timeout=timeout) as cache:
        if cache.seq_len != stored:
            now = count(cache.seq_len, "position")
            raise click.UsageError(
                f"{plain(path)} has changed meanwhile, from {stored:,} to {now}: check its length and try again"
            )
        length = cache.truncate(length)
    click.echo(f"{plain(path)}: {count(length, 'position')}, {stored - length:,} dropped")
