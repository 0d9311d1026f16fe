"""`kvmmap resize`: change the capacity of a cache."""

from __future__ import annotations

import click

from ..asking import timeout_option
from ..output import plain, size
from ..progress import no_progress_option, progress


@click.command("resize")
@click.argument("path", type=click.Path(readable=False))
@click.argument("capacity", type=click.IntRange(0))
@timeout_option
@no_progress_option
def command(path: str, capacity: int, timeout: float, no_progress: bool) -> None:
    """Change the capacity of the cache at PATH to CAPACITY positions.

    A new file is built, verified, and renamed over the old one; nothing stored is lost, and an interrupted
    resize leaves the old one. It needs disk for both meanwhile.

    \b
    Example:
      kvmmap resize prompt.kvm 131072
    """
    resize(path, capacity, timeout, no_progress)


def resize(path: str, capacity: int | None, timeout: float, no_progress: bool) -> None:
    """Resize, or compact if capacity is None, and print the result."""
    import kvmmap

    before = kvmmap.open(path, record_use=False)
    with before, progress("resizing" if capacity is not None else "compacting", no_progress) as advance:
        if capacity is None:
            kvmmap.compact(path, timeout=timeout, progress=advance)
        else:
            kvmmap.resize(path, capacity, timeout=timeout, progress=advance)
    with kvmmap.open(path, record_use=False) as after:
        click.echo(
            f"{plain(path)}: capacity {before.capacity:,} -> {after.capacity:,} positions, "
            f"{size(before.memory_bytes)} -> {size(after.memory_bytes)} reserved"
        )
