"""What the commands that copy have in common: options, the copy itself, and the line that says what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .asking import confirm_ending, yes_option
from .output import INDEX, count, plain, size
from .progress import progress

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
    """What there is to say of the copy itself."""
    options = (
        click.option("--compressor", type=click.Choice(["zstd"]), help="Compress a Zarr group, for cold storage."),
        click.option("--overwrite", is_flag=True, help="Replace what is at DST already."),
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
            help="Take an object store's lock from a writer that is certainly gone.",
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


def copied(source: str, target: str, no_progress: bool, *, yes: bool, **options: Any) -> None:
    """Copy, with the options of `kvmmap.copy`, and print to stderr what was done."""
    import kvmmap

    confirm_ending(target, yes)
    with progress("copying", no_progress) as advance:
        report = kvmmap.copy(source, target, progress=advance, **options)
    resumed = f", {count(report.resumed)} of them by an earlier run" if report.resumed else ""
    what = (
        f"{count(report.seq_len, 'position')}{resumed}, {size(report.bytes)}{', verified' if report.verified else ''}"
    )
    click.echo(f"{plain(target)}: {what}", err=True)
