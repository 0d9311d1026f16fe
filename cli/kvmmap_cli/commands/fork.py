"""`kvmmap fork`: make a new cache that begins with the rows of another one."""

from __future__ import annotations

import click

from ..asking import confirm_ending, yes_option
from ..output import count, plain, size
from ..progress import no_progress_option, progress


@click.command("fork")
@click.argument("source", type=click.Path(readable=False))
@click.argument("target", type=click.Path(readable=False))
@click.option("--length", type=click.IntRange(0), metavar="N", help="Keep so many positions; all by default.")
@click.option("--capacity", type=click.IntRange(0), metavar="N", help="Positions to reserve; as SOURCE by default.")
@yes_option
@no_progress_option
def command(source: str, target: str, length: int | None, capacity: int | None, yes: bool, no_progress: bool) -> None:
    """Make a new cache at TARGET that begins with the positions of SOURCE.

    On btrfs, XFS and the like both share their rows on the disk; elsewhere they are copied. SOURCE is not changed, and
    may have a writer. Nothing may be at TARGET.

    \b
    Examples:
      kvmmap fork system-prompt.kvm user-7.kvm
      kvmmap fork --length 1024 chat.kvm what-if.kvm
    """
    import kvmmap

    confirm_ending(target, yes, (".kvm",))
    with (
        progress("forking", no_progress) as advance,
        kvmmap.fork(source, target, length=length, capacity=capacity, progress=advance) as cache,
    ):
        held = size(cache.seq_len * cache.memory_bytes // max(cache.capacity, 1))
        click.echo(f"{plain(target)}: {count(cache.seq_len, 'position')} of {plain(source)}, {held}")
