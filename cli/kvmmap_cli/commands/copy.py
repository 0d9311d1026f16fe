"""`kvmmap copy`: copy a cache to another path or URL."""

from __future__ import annotations

from typing import Any

import click

from ..copies import codec_options, copied, layers_option, positions_options, target_options
from ..progress import no_progress_option


@click.command("copy")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@positions_options
@layers_option
@target_options
@click.option("--capacity", type=int, help="Positions to reserve in DST; as in SRC by default.")
@codec_options
@no_progress_option
def command(source: str, target: str, no_progress: bool, **options: Any) -> None:
    """Copy the cache SRC to DST, both of them paths or URLs.

    DST is a .kvm file unless it ends with .zarr or is a URL. Interrupted, DST is not there (a file) or as of its last
    commit (a group), and the same command again continues from there.

    With other codecs than SRC's, rows are decoded and encoded again; a table on stdout shows what each layer lost by
    it: |new - old| / |old| of a row, on average and of the row that lost most.

    \b
    Examples:
      kvmmap copy prompt.kvm /archive/prompt.zarr --compressor zstd
      kvmmap copy prompt.kvm head.kvm --stop 4096 --layers 0-7
      kvmmap copy prompt.kvm small.kvm --preset compact
      kvmmap copy prompt.kvm bridge.kvm --codec fp8-e4m3
    """
    copied(source, target, no_progress, **options)
