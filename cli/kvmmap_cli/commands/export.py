"""`kvmmap export`: write a cache in another format."""

from __future__ import annotations

from typing import Any

import click

from ..asking import CACHES, confirm_ending
from ..copies import copied, gguf_option, layers_option, positions_options, target_options
from ..output import plain
from ..progress import no_progress_option, progress

KINDS = ("slot", "session", "sequence", "context")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "stored": "stored", "int8": "int8"}


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
    help="For .safetensors: rows as numbers, or as they are stored, from which import makes the same cache again.",
)
@gguf_option("that is to load DST: makes DST a file of llama.cpp")
@click.option(
    "--state", type=click.Choice(KINDS), help="With --gguf: what to write; as SRC was imported, or a slot file."
)
@click.option("--kv-type", metavar="K[:V]", help='With --gguf: types of keys and values, such as "f16" or "q8_0:f16".')
@click.option("--transposed", is_flag=True, default=None, help="With --gguf: for a context without flash attention.")
@click.option(
    "--accept-weights", metavar="TYPE", help="With --gguf: continue with the model's weights of another type."
)
@click.option("--mlx", is_flag=True, help="Make DST a prompt cache that mlx-lm loads, in --dtype f32, f16 or bf16.")
@no_progress_option
def command(
    source: str,
    target: str,
    dtype: str,
    gguf: str | None,
    rotated: bool | None,
    state: str | None,
    kv_type: str | None,
    transposed: bool | None,
    accept_weights: str | None,
    mlx: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Export the cache SRC to DST: a Zarr group, a .kvm file, a .safetensors file, or a file of llama.cpp.

    SRC and DST are paths or URLs, and what they end with says what they are. Codes, scales, token ids and metadata
    come along bit by bit, and everything is compared with its checksums. Interrupted, SRC is untouched; the same
    command again continues where it broke off.

    With --gguf, DST is a file that llama.cpp loads with that model. A cache that was imported from such a file gives
    the same bytes again.

    \b
    Examples:
      kvmmap export prompt.kvm prompt.zarr
      kvmmap export prompt.kvm s3://bucket/prompt.zarr
      kvmmap export --dtype bf16 prompt.kvm prompt.safetensors
      kvmmap export --dtype stored prompt.kvm prompt.safetensors
      kvmmap export prompt.kvm slot.bin --gguf model.gguf
      kvmmap export prompt.kvm chat.safetensors --mlx --dtype bf16
    """
    import kvmmap

    about_states = {"rotated": rotated, "kind": state, "transposed": transposed, "accept_weights": accept_weights}
    if gguf is not None and mlx:
        raise click.UsageError(
            "--gguf is for files of llama.cpp, and --mlx for prompt caches of mlx-lm: give one of them"
        )
    part = bool(options["start"]) or options["stop"] is not None or options["layers"] is not None
    if mlx:
        if part or dtype in ("stored", "int8"):
            raise click.UsageError("--mlx exports all positions and layers, as f32, f16 or bf16")
        with progress("exporting", no_progress) as advance:
            kvmmap.export_mlx(
                source,
                target,
                dtype=DTYPES[dtype],  # type: ignore[arg-type]
                overwrite=options["overwrite"],
                progress=advance,
            )
        click.echo(f"{plain(target)}: written", err=True)
        return
    if gguf is not None:
        if part:
            raise click.UsageError("--gguf exports all positions and layers: leave out --start, --stop and --layers")
        keys, colon, values = (kv_type or "").partition(":")
        about_states |= {"key_type": keys or None, "value_type": (values if colon else keys) or None}
        with progress("exporting", no_progress) as advance:
            kvmmap.export_llama_cpp(
                source,
                target,
                gguf=gguf,
                overwrite=options["overwrite"],
                progress=advance,
                **about_states,  # type: ignore[arg-type]
            )
        click.echo(f"{plain(target)}: written", err=True)
        return
    if kv_type is not None or any(value is not None for value in about_states.values()):
        raise click.UsageError(
            "--state, --kv-type, --transposed, --accept-weights and --no-rotation are about files of llama.cpp, "
            "which need "
            "--gguf"
        )
    if not target.endswith(".safetensors"):
        confirm_ending(target, options["yes"], (*CACHES, ".safetensors"))
        copied(source, target, no_progress, **options | {"yes": True})
        return
    options = {name: options[name] for name in ("start", "stop", "layers", "overwrite")}
    with progress("exporting", no_progress) as advance:
        kvmmap.export_tensors(source, target, dtype=DTYPES[dtype], progress=advance, **options)  # type: ignore[arg-type]
    click.echo(f"{plain(target)}: written", err=True)
