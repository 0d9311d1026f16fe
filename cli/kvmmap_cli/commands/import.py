"""`kvmmap import`: make a cache of a file in another format."""
# ruff: noqa: N999

from __future__ import annotations

from typing import Any

import click

from ..asking import confirm_ending
from ..copies import codec_options, copied, gguf_option, named_codecs, target_options
from ..output import plain
from ..progress import no_progress_option, progress

CODECS = ("preset", "codec", "key_codec", "value_codec", "recent_window", "sinks")
"""What `codec_options` adds."""


@click.command("import")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@target_options
@codec_options
@click.option("--capacity", type=int, help="Positions to reserve in DST.")
@gguf_option("that made SRC, a state of llama.cpp")
@click.option("--sequence", type=int, metavar="N", help="Of a state with several sequences: which one.")
@click.option("--mlx", is_flag=True, help="SRC is a prompt cache that mlx-lm saved, a .safetensors file.")
@no_progress_option
def command(
    source: str,
    target: str,
    gguf: str | None,
    rotated: bool | None,
    sequence: int | None,
    mlx: bool,
    no_progress: bool,
    **options: Any,
) -> None:
    """Make the cache DST of SRC: a .safetensors file, a state of llama.cpp, a Zarr group or a .kvm file.

    A .safetensors file is one of `kvmmap export`, or holds a transformers DynamicCache: `key_cache.0`, `layers.0.keys`
    and the like, [1, num_kv_heads, n, head_dim]. A slot or session file of llama.cpp needs --gguf, the model that made
    it; a prompt cache of mlx-lm needs --mlx. Everything else is copied as `kvmmap copy` does.

    States of llama.cpp and prompt caches of mlx-lm keep their numbers bit by bit, unless --preset says otherwise.
    Numbers of a .safetensors file become int8 unless codecs are given; what was exported with --dtype stored has its
    codecs already.

    \b
    Examples:
      kvmmap import prompt.safetensors prompt.kvm --preset fidelity
      kvmmap import slot.bin prompt.kvm --gguf model.gguf
      kvmmap import chat.safetensors prompt.kvm --mlx
      kvmmap import s3://bucket/prompt.zarr prompt.kvm
    """
    import kvmmap

    if gguf is not None and mlx:
        raise click.UsageError(
            "--gguf is for states of llama.cpp, and --mlx for prompt caches of mlx-lm: give one of them"
        )
    if gguf is None and (sequence is not None or rotated is not None):
        raise click.UsageError("--sequence and --no-rotation are about states of llama.cpp, which need --gguf")
    codecs = {name: options.pop(name) for name in CODECS}
    preset, other = codecs["preset"], [value for name, value in codecs.items() if name != "preset"]
    is_other = gguf is not None or mlx
    if is_other and any(value is not None for value in other):
        raise click.UsageError("with --gguf and --mlx, --preset alone says how rows are stored")
    if not is_other and not source.endswith(".safetensors"):
        if any(value is not None for value in codecs.values()):
            raise click.UsageError(
                "options on codecs are for .safetensors files, for states of llama.cpp, which need --gguf, and for "
                "prompt caches of mlx-lm, which need --mlx; `kvmmap copy` gives a cache others"
            )
        copied(source, target, no_progress, **options)
        return
    confirm_ending(target, options["yes"])
    options = {name: options[name] for name in ("capacity", "compressor", "overwrite")}
    with progress("importing", no_progress) as advance:
        options |= {"progress": advance}
        if gguf is not None:
            options |= {"sequence": sequence, "rotated": rotated is not False, "preset": preset or "native"}
            kvmmap.import_llama_cpp(source, target, gguf=gguf, **options)
        elif mlx:
            kvmmap.import_mlx(source, target, preset=preset or "native", **options)
        else:
            codecs |= named_codecs(codecs.pop("codec"), codecs["key_codec"], codecs["value_codec"], preset)
            kvmmap.import_tensors(source, target, **codecs, **options)
    click.echo(f"{plain(target)}: made of {plain(source)}", err=True)
