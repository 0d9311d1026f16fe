"""`kvmmap export`: a cache into another place or form."""

from __future__ import annotations

from typing import Any

import click

from ..asking import CACHES, confirm_ending
from ..copies import copied, layers_option, positions_options, target_options
from ..output import plain
from ..progress import no_progress_option, progress

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "int8": "int8"}


@click.command("export")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@positions_options
@layers_option
@target_options
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="f16",
    show_default=True,
    help="For .safetensors: rows as numbers, or as the codes and scales that are stored.",
)
@no_progress_option
def command(source: str, target: str, dtype: str, no_progress: bool, **options: Any) -> None:
    """Export the cache SRC to DST: a Zarr group, a .kvm file, or a .safetensors file.

    SRC and DST are paths or URLs, and what they end with says what they are. Codes, scales, token ids and metadata
    come along bit by bit, and everything is compared with its checksums. Interrupted, SRC is untouched; the same
    command again goes on where it broke off.

    \b
    Examples:
      kvmmap export prompt.kvm prompt.zarr
      kvmmap export prompt.kvm s3://bucket/prompt.zarr
      kvmmap export --dtype bf16 prompt.kvm prompt.safetensors
    """
    import kvmmap

    if not target.endswith(".safetensors"):
        confirm_ending(target, options["yes"], (*CACHES, ".safetensors"))
        copied(source, target, no_progress, **options | {"yes": True})
        return
    options = {name: options[name] for name in ("start", "stop", "layers", "overwrite")}
    with progress("exporting", no_progress) as advance:
        kvmmap.export_tensors(source, target, dtype=DTYPES[dtype], progress=advance, **options)  # type: ignore[arg-type]
    click.echo(f"{plain(target)}: written", err=True)
