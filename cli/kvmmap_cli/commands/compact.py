"""`kvmmap compact`: remove unused capacity."""

from __future__ import annotations

import click

from ..asking import timeout_option
from ..progress import no_progress_option
from .resize import resize


@click.command("compact")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True, type=click.Path(readable=False))
@timeout_option
@no_progress_option
def command(paths: tuple[str, ...], timeout: float, no_progress: bool) -> None:
    """Remove the capacity that the cache at PATH does not use.

    The file is then as large as its contents, for file systems, archives and uploads without sparse files.
    As with `kvmmap resize`, a new file takes the place of the old one.

    \b
    Example:
      kvmmap compact prompt.kvm
    """
    for path in paths:
        resize(path, None, timeout, no_progress)
