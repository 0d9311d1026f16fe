"""Options of the commands that copy, the copy itself, and its summary line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .asking import confirm_ending, yes_option
from .output import INDEX, count, plain, show, size
from .progress import progress

if TYPE_CHECKING:
    from rich.table import Table

    from kvmmap import LayerLoss

F = TypeVar("F", bound=Callable[..., Any])

MOST_LAYERS = 65_535


def positions_options(command: F) -> F:
    """--start and --stop."""
    stop = click.option("--stop", type=int, help="One past the last position to copy; all by default.")
    start = click.option("--start", type=int, default=0, help="First position to copy.")
    return start(stop(command))


def layers_option(command: F) -> F:
    """--layers, as indices."""
    about = 'Layers to copy, as in "0-7,12"; all by default.'
    return click.option("--layers", metavar="LIST", callback=_parse_layers, help=about)(command)


def target_options(command: F) -> F:
    """Options of the copy itself."""
    options = (
        click.option("--compressor", type=click.Choice(["zstd"]), help="Compress a Zarr group, for cold storage."),
        click.option("--overwrite", is_flag=True, help="Replace an existing DST."),
        click.option(
            "--no-verify",
            "verify",
            is_flag=True,
            flag_value=False,
            default=True,
            help="Don't read the copy back to compare it with its checksums.",
        ),
        click.option(
            "--break-lock",
            is_flag=True,
            help="Take over the object store's lock of a writer that is known to be dead.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return yes_option(command)


def gguf_option(about: str) -> Callable[[F], F]:
    """--gguf and --no-rotation: what is not in a state of llama.cpp."""

    def add(command: F) -> F:
        rotation = click.option(
            "--no-rotation",
            "rotated",
            is_flag=True,
            flag_value=False,
            default=None,
            help="Of a state with quantised rows: LLAMA_ATTN_ROT_DISABLE was set, or llama.cpp older than April 2026.",
        )
        return click.option("--gguf", metavar="MODEL", help=f"GGUF file of the model {about}.")(rotation(command))

    return add


def codec_options(command: F) -> F:
    """--preset, --codec, --key-codec and --value-codec."""
    options = (
        click.option("--preset", help="Codecs of DST: int8, fidelity, compact, small, tiny or lossless."),
        click.option("--codec", metavar="NAME", help="One codec, for keys and values."),
        click.option("--key-codec", metavar="NAME[,NAME...]", help="The codec of keys: one, or one a layer of DST."),
        click.option("--value-codec", metavar="NAME[,NAME...]", help="The codec of values, likewise."),
        click.option("--recent-window", type=int, metavar="N", help="Last positions to keep in 16 bits besides."),
        click.option("--sinks", type=int, metavar="N", help="First positions to keep in 16 bits besides."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def codec_names(text: str | None) -> str | list[str] | None:
    """Return what --key-codec or --value-codec names: one codec, or one a layer."""
    names = None if text is None else [name.strip() for name in text.split(",")]
    return names[0] if names is not None and len(names) == 1 else names


def named_codecs(
    codec: str | None, key_codec: str | None, value_codec: str | None, preset: str | None
) -> dict[str, Any]:
    """Return `key_codec` and `value_codec` as functions take them.

    Raises:
        UsageError: --codec beside another option that names codecs.
    """
    if codec is not None and (key_codec is not None or value_codec is not None or preset is not None):
        raise click.UsageError("--codec names the codec of keys and of values: leave the other options on codecs out")
    return {
        "key_codec": codec_names(codec if key_codec is None else key_codec),
        "value_codec": codec_names(codec if value_codec is None else value_codec),
    }


def _parse_layers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> list[int] | None:
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not INDEX.fullmatch(first) or (dash and not INDEX.fullmatch(last)) or len(found) > MOST_LAYERS:
            raise click.BadParameter('must be like "0-7,12"', ctx, parameter)
        low, high = int(first), int(last or first)
        if not low <= high <= MOST_LAYERS:
            raise click.BadParameter(f'{low}-{high} is no range of layers; it must be like "0-7,12"', ctx, parameter)
        found += range(low, high + 1)
    return found


def copied(
    source: str,
    target: str,
    no_progress: bool,
    *,
    yes: bool,
    codec: str | None = None,
    key_codec: str | None = None,
    value_codec: str | None = None,
    **options: Any,
) -> None:
    """Copy, with the options of `kvmmap.copy`, and print to stderr what was done; to stdout, what other codecs cost."""
    import kvmmap

    codecs = named_codecs(codec, key_codec, value_codec, options.get("preset"))
    confirm_ending(target, yes)
    with progress("copying", no_progress) as advance:
        report = kvmmap.copy(source, target, progress=advance, **codecs, **options)
    resumed = f", {count(report.resumed)} of them by an earlier run" if report.resumed else ""
    before = f" ({size(report.source_bytes)} before)" if report.losses else ""
    verified = ", verified" if report.verified else ""
    what = f"{count(report.seq_len, 'position')}{resumed}, {size(report.bytes)}{before}{verified}"
    click.echo(f"{plain(target)}: {what}", err=True)
    if report.losses:
        show(loss_table(report.losses))


def loss_table(losses: Sequence[LayerLoss]) -> Table:
    """Return a table of what each layer lost, in percent."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("layer", "keys lost", "at worst", "values lost", "at worst"):
        table.add_column(name, justify="right")
    for number, loss in enumerate(losses):
        parts = [part for one in (loss.keys, loss.values) for part in (one.mean, one.worst)]
        table.add_row(str(number), *(f"{part:.3%}" if part else "0" for part in parts))
    return table
