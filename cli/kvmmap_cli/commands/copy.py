"""`kvmmap copy`: a cache to another place."""

from __future__ import annotations

from typing import Any

import click

from ..copies import copied, layers_option, positions_options, target_options
from ..progress import no_progress_option


@click.command("copy")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@positions_options
@layers_option
@target_options
@click.option("--capacity", type=int, help="Positions to reserve in DST; as in SRC by default.")
@no_progress_option
def command(source: str, target: str, no_progress: bool, **options: Any) -> None:
    """Copy the cache SRC to DST, both of them paths or URLs.

    DST is a .kvm file unless it ends with .zarr or is a URL. Interrupted, DST is not there (a file) or as of its last
    commit (a group), and the same command again goes on from there.

    \b
    Examples:
      kvmmap copy prompt.kvm /archive/prompt.zarr --compressor zstd
      kvmmap copy prompt.kvm head.kvm --stop 4096 --layers 0-7
    """
    copied(source, target, no_progress, **options)
