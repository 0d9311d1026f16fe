"""`kvmmap import`: a cache out of another form."""
# ruff: noqa: N999

from __future__ import annotations

from typing import Any

import click

from ..asking import confirm_ending
from ..copies import copied, target_options
from ..output import plain
from ..progress import no_progress_option, progress


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@target_options
@click.option("--capacity", type=int, help="Positions to reserve in DST.")
@no_progress_option
def command(source: str, target: str, no_progress: bool, **options: Any) -> None:
    """Make the cache DST of SRC: a .safetensors file, a Zarr group or a .kvm file.

    A .safetensors file is one of `kvmmap export`, or holds a transformers DynamicCache: `key_cache.0`, `layers.0.keys`
    and the like, [1, num_kv_heads, n, head_dim]. Everything else is copied as `kvmmap copy` does.

    \b
    Examples:
      kvmmap import prompt.safetensors prompt.kvm
      kvmmap import s3://bucket/prompt.zarr prompt.kvm
    """
    import kvmmap

    if not source.endswith(".safetensors"):
        copied(source, target, no_progress, **options)
        return
    confirm_ending(target, options["yes"])
    options = {name: options[name] for name in ("capacity", "compressor", "overwrite")}
    with progress("importing", no_progress) as advance:
        kvmmap.import_tensors(source, target, progress=advance, **options)
    click.echo(f"{plain(target)}: made of {plain(source)}", err=True)
