"""`kvmmap create`: make an empty cache."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..asking import confirm, confirm_ending, timeout_option, yes_option
from ..copies import codec_names
from ..output import INDEX, count, plain, show, size


@click.command("create")
@click.argument("path", type=click.Path(readable=False))
@click.option("--parent", metavar="CACHE", help="Continue another cache, a file in the same folder.")
@click.option("--parent-length", type=int, metavar="N", help="Begin with so many of its positions; all by default.")
@click.option("--like", metavar="CACHE", help="Take shape, capacity and model from another cache.")
@click.option("--config", metavar="FILE", help="Take them from a model's config.json.")
@click.option("--layers", type=int, metavar="N", help="Transformer layers.")
@click.option("--kv-heads", metavar="N[,N...]", help="Key and value heads: one number, or one a layer.")
@click.option("--head-dim", metavar="N[,N...]", help="Numbers in a key row: one, or one a layer.")
@click.option("--value-head-dim", metavar="N[,N...]", help="Numbers in a value row; as --head-dim unless given.")
@click.option("--capacity", type=int, metavar="N", help="Positions to reserve; `kvmmap resize` changes it.")
@click.option("--preset", help="Codecs: int8, fidelity, compact, small, tiny or lossless.")
@click.option("--key-codec", metavar="NAME[,NAME...]", help="The codec of keys: one, or one a layer.")
@click.option("--value-codec", metavar="NAME[,NAME...]", help="The codec of values, likewise.")
@click.option("--recent-window", type=int, metavar="N", help="Last positions to keep in 16 bits besides.")
@click.option("--sinks", type=int, metavar="N", help="First positions to keep in 16 bits besides.")
@click.option("--model", metavar="NAME", help="The model's name.")
@click.option("--revision", metavar="TEXT", help="The revision of its weights.")
@click.option("--fingerprint", metavar="TEXT", help="A digest of config and weights.")
@click.option("--dtype", help="What keys and values are before they are quantised: float32, float16, bfloat16.")
@click.option("--metadata", metavar="JSON", help="An object of your own.")
@click.option("--overwrite", is_flag=True, help="Replace a cache that is there.")
@click.option("--dry-run", is_flag=True, help="Make nothing: show what a token takes, with these codecs and others.")
@timeout_option
@yes_option
def command(path: str, overwrite: bool, dry_run: bool, timeout: float, yes: bool, **given: Any) -> None:
    """Make an empty cache at PATH.

    It appears whole, has mode 0600, and is sparse: capacity costs no disk before it is used.

    \b
    Examples:
      kvmmap create p.kvm --layers 30 --kv-heads 3 --head-dim 64 --capacity 8192
      kvmmap create p.kvm --config model/config.json --capacity 131072
      kvmmap create p.kvm --config model/config.json --preset compact
      kvmmap create p.kvm --config model/config.json --dry-run
      kvmmap create p.kvm --like other.kvm --metadata '{"user": 7}'
      kvmmap create answer.kvm --parent prompt.kvm --parent-length 4000
    """
    import kvmmap

    settings = _settings(given)
    if dry_run:
        parent = settings.get("parent")
        _show_sizes(path, settings if parent is None else _of_cache(parent) | settings)
        return
    confirm_ending(path, yes)
    if overwrite and os.path.lexists(path):
        confirm(f"Replace {plain(path)}?", yes)
    cache = kvmmap.create(path, overwrite=overwrite, timeout=timeout, **settings)
    with cache:
        full = f"{size(cache.memory_bytes)} when full"
        click.echo(
            f"{plain(path)}: {count(cache.num_layers, 'layer')}, {count(cache.capacity, 'position')} reserved, {full}"
        )


def _show_sizes(path: str, settings: dict[str, Any]) -> None:
    """Show what a token and a full cache take, as asked for and with each preset."""
    from rich.table import Table

    import kvmmap

    shape: dict[str, Any] = {
        name: settings.get(name) for name in ("num_layers", "num_kv_heads", "head_dim", "value_head_dim")
    }
    names = ("capacity", "key_codec", "value_codec", "recent_window", "sinks", "states", "checkpoint_slots")
    chosen: dict[str, Any] = {name: settings[name] for name in names if name in settings}
    # Refuses what `create` does.
    geometry = kvmmap.CacheGeometry.of_preset(settings.get("preset", "int8"), **shape, **chosen)
    asked = sum(layer.position_bytes for layer in geometry.layers)
    table = Table(box=None, pad_edge=False)
    for name in ("preset", "keys", "values"):
        table.add_column(name)
    for name in ("bits a number", "bytes a token", "when full", "in 16 bits besides"):
        table.add_column(name, justify="right")
    for one in kvmmap.sizes(**shape):
        cells = (one.preset, one.key_codec, one.value_codec, f"{one.bits_per_number:.2f}", f"{one.bytes_per_token:,}")
        table.add_row(*cells, size(one.bytes_per_token * geometry.capacity), size(one.recent_bytes))
    full = f"{size(geometry.memory_bytes)} when full with {count(geometry.capacity, 'position')}"
    besides = f", {size(geometry.recent_bytes)} in 16 bits besides" if geometry.keeps_recent else ""
    what = f"{count(asked, 'byte')} a token, {full}{besides}"
    show(f"{plain(path)}: {what}; nothing was made", table)


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `kvmmap.create`: what was given, over what it was to be like."""
    if given["parent"] is not None:
        return _of_parent(given)
    if given["parent_length"] is not None:
        raise click.UsageError("--parent-length is that of a --parent")
    if given["like"] is not None and given["config"] is not None:
        raise click.UsageError("--like and --config say the same: give one")
    settings: dict[str, Any] = {}
    if given["like"] is not None:
        settings = _of_cache(given["like"])
    elif given["config"] is not None:
        settings = _of_config(given["config"])
    if given["layers"] is not None:
        settings["num_layers"] = given["layers"]
    if given["capacity"] is not None:
        settings["capacity"] = given["capacity"]
    for option, name in (("kv_heads", "num_kv_heads"), ("head_dim", "head_dim"), ("value_head_dim", "value_head_dim")):
        if given[option] is not None:
            settings[name] = _numbers(given[option], option)
    if given["preset"] is not None:  # other codecs than those of the cache that it is like
        for name in ("key_codec", "value_codec", "recent_window", "sinks"):
            settings.pop(name, None)
        settings["preset"] = given["preset"]
    for option in ("key_codec", "value_codec"):
        if given[option] is not None:
            settings[option] = codec_names(given[option])
    for option in ("recent_window", "sinks"):
        if given[option] is not None:
            settings[option] = given[option]
    missing = {"num_layers": "layers", "num_kv_heads": "kv-heads", "head_dim": "head-dim", "capacity": "capacity"}
    for name, option in missing.items():
        if name not in settings:
            raise click.UsageError(f"--{option} is missing: give it, or --like or --config")
    if given["metadata"] is not None:
        settings["metadata"] = _object(given["metadata"])
    _name_model(settings, given)
    return settings


def _of_parent(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for a cache that continues another one."""
    shape = ("like", "config", "layers", "kv_heads", "head_dim", "value_head_dim")
    codecs = ("preset", "key_codec", "value_codec", "recent_window", "sinks")
    model = ("model", "revision", "fingerprint", "dtype")
    both = [name for name in (*shape, *codecs, *model) if given[name] is not None]
    if both:
        raise click.UsageError(f"--{both[0].replace('_', '-')} is the parent's: give --parent alone")
    settings = {name: given[name] for name in ("parent", "parent_length", "capacity") if given[name] is not None}
    if given["metadata"] is not None:
        settings["metadata"] = _object(given["metadata"])
    return settings


def _name_model(settings: dict[str, Any], given: dict[str, Any]) -> None:
    import dataclasses

    import kvmmap

    fields = {"name": "model", "revision": "revision", "fingerprint": "fingerprint", "source_dtype": "dtype"}
    named = {field: given[option] for field, option in fields.items() if given[option] is not None}
    if named:
        settings["model"] = dataclasses.replace(settings.get("model") or kvmmap.ModelInfo(), **named)


def _of_cache(path: str) -> dict[str, Any]:
    from ..output import read

    def look(cache: Any) -> dict[str, Any]:
        layers = cache.geometry.layers
        return {
            "num_layers": cache.num_layers,
            "num_kv_heads": [layer.num_kv_heads for layer in layers],
            "head_dim": [layer.head_dim for layer in layers],
            "value_head_dim": [layer.value_head_dim for layer in layers],
            "key_codec": [layer.key_codec.name for layer in layers],
            "value_codec": [layer.value_codec.name for layer in layers],
            "recent_window": cache.geometry.recent_window,
            "sinks": cache.geometry.sinks,
            "capacity": cache.capacity,
            "model": cache.model,
        }

    return read(path, look)


def _of_config(path: str) -> dict[str, Any]:
    """Read a Hugging Face config.json."""
    import kvmmap

    try:
        with open(path, encoding="utf-8") as file:
            whole = json.load(file)
        config = whole.get("text_config", whole)
        heads = config["num_attention_heads"]
        settings = {
            "num_layers": config["num_hidden_layers"],
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        }
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise click.UsageError(f"{plain(path)}: not the config.json of a transformer ({error!r})") from None
    if isinstance(config.get("max_position_embeddings"), int):
        settings["capacity"] = config["max_position_embeddings"]
    rope = {key: value for key, value in config.items() if key.startswith("rope") and value is not None}
    settings["model"] = kvmmap.ModelInfo(name=whole.get("_name_or_path") or None, rope=rope)
    return settings


def _numbers(text: str, option: str) -> int | list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(INDEX.fullmatch(part) for part in parts):
        raise click.UsageError(f"--{option.replace('_', '-')}: {text[:80]!r} is neither a number nor a list of numbers")
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--metadata is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.UsageError("--metadata must be an object: {...}")
    return found
