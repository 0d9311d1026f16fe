"""`kvmmap import`: make a cache of a file in another format."""
# ruff: noqa: N999

from __future__ import annotations

from typing import Any

import click

from ..asking import confirm_ending
from ..copies import copied, gguf_option, target_options
from ..output import plain
from ..progress import no_progress_option, progress


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@target_options
@click.option("--capacity", type=int, help="Positions to reserve in DST.")
@gguf_option("that made SRC, a state of llama.cpp")
@click.option("--sequence", type=int, metavar="N", help="Of a state with several sequences: which one.")
@click.option(
    "--preset",
    metavar="NAME",
    help="With --gguf and --mlx: 'native' keeps numbers bit by bit, the default; else as in create.",
)
@click.option("--mlx", is_flag=True, help="SRC is a prompt cache that mlx-lm saved, a .safetensors file.")
@no_progress_option
def command(
    source: str,
    target: str,
    gguf: str | None,
    rotated: bool | None,
    sequence: int | None,
    preset: str | None,
    mlx: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Make the cache DST of SRC: a .safetensors file, a state of llama.cpp, a Zarr group or a .kvm file.

    A .safetensors file is one of `kvmmap export`, or holds a transformers DynamicCache: `key_cache.0`, `layers.0.keys`
    and the like, [1, num_kv_heads, n, head_dim]. A slot or session file of llama.cpp needs --gguf, the model that made
    it; a prompt cache of mlx-lm needs --mlx. Everything else is copied as `kvmmap copy` does.

    \b
    Examples:
      kvmmap import prompt.safetensors prompt.kvm
      kvmmap import slot.bin prompt.kvm --gguf model.gguf
      kvmmap import chat.safetensors prompt.kvm --mlx
      kvmmap import s3://bucket/prompt.zarr prompt.kvm
    """
    import kvmmap

    if gguf is not None and mlx:
        raise click.UsageError(
            "--gguf is for states of llama.cpp, and --mlx for prompt caches of mlx-lm: give one of them"
        )
    if gguf is not None:
        confirm_ending(target, options["yes"])
        options = {name: options[name] for name in ("capacity", "compressor", "overwrite")}
        options |= {"sequence": sequence, "preset": preset or "native", "rotated": rotated is not False}
        with progress("importing", no_progress) as advance:
            kvmmap.import_llama_cpp(source, target, gguf=gguf, progress=advance, **options)
        click.echo(f"{plain(target)}: made of {plain(source)}", err=True)
        return
    if sequence is not None or rotated is not None or (preset is not None and not mlx):
        raise click.UsageError(
            "--sequence, --preset and --no-rotation are about states of llama.cpp, which need --gguf"
        )
    if mlx:
        confirm_ending(target, options["yes"])
        options = {name: options[name] for name in ("capacity", "compressor", "overwrite")}
        with progress("importing", no_progress) as advance:
            kvmmap.import_mlx(source, target, preset=preset or "native", progress=advance, **options)
        click.echo(f"{plain(target)}: made of {plain(source)}", err=True)
        return
    if not source.endswith(".safetensors"):
        copied(source, target, no_progress, **options)
        return
    confirm_ending(target, options["yes"])
    options = {name: options[name] for name in ("capacity", "compressor", "overwrite")}
    with progress("importing", no_progress) as advance:
        kvmmap.import_tensors(source, target, progress=advance, **options)
    click.echo(f"{plain(target)}: made of {plain(source)}", err=True)
