"""The `kvmmap` command: finds its subcommands, and turns errors into one line and an exit code.

Exit codes: 0 success, 1 a damaged cache, 2 a usage error or a path that can't be read, 70 an error in kvmmap itself,
130 interrupted.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
from typing import Any, NoReturn

import click

from . import commands
from .output import CRASHED, INTERRUPTED, TERMINATED, USAGE, crash, drop_output, failure, plain

TRACEBACK = "KVMMAP_TRACEBACK"
"""Environment variable: show where in the program an unforeseen error was raised."""


class Commands(click.Group):
    """A group whose commands are the modules of `kvmmap_cli.commands`, imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        files = os.listdir(commands.__path__[0])
        return sorted(name.removesuffix(".py") for name in files if name.endswith(".py") and name[0] != "_")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"{commands.__name__}.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.list_commands(ctx) and not args[0].startswith("-"):
            known = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"there is no command {plain(args[0])!r}; there are: {known}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None
        except click.UsageError as error:
            if error.ctx is None and ctx.invoked_subcommand:
                error.ctx = click.Context(self, ctx, ctx.invoked_subcommand)  # whose --help tells more
            raise

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run, and exit; every error that a user can cause is one line on stderr."""
        extra["standalone_mode"] = False
        try:
            code = super().main(*args, **extra)
            if code != INTERRUPTED:
                sys.stdout.flush()
        except click.Abort:
            code = INTERRUPTED
        except click.UsageError as error:
            code = _usage(error)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except SystemExit:
            raise
        except BaseException as error:  # a panic in a compiled library is no Exception
            code, message = _told(error)
            click.echo(f"kvmmap: {message}", err=True)
            drop_output()
        if code == INTERRUPTED:
            drop_output()
        sys.exit(code)


def _told(error: BaseException) -> tuple[int, str]:
    """Return exit code and message of an error, whether it was foreseen or not."""
    try:
        return failure(error)
    except BaseException:
        if os.environ.get(TRACEBACK):
            import traceback

            traceback.print_exception(error)
        return CRASHED, crash(error, TRACEBACK)


def _usage(error: click.UsageError) -> int:
    context = error.ctx
    where = "kvmmap" if context is None else context.command_path
    message = plain(error.format_message())
    if type(error) is not click.UsageError:  # click ends its sentences; ours may end in a path
        message = message.removesuffix(".")
    click.echo(f"kvmmap: {message[:1].lower()}{message[1:]} ({where} --help tells more)", err=True)
    return USAGE


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        import kvmmap

        click.echo(f"kvmmap {kvmmap.__version__}, {kvmmap.kernel()} kernel")
        ctx.exit()


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version, and the compiled kernel that this processor gets.",
)
@click.pass_context
def kvmmap(ctx: click.Context) -> None:
    """Look at kvmmap caches, look after them, copy and convert them: language models' keys and values, quantised.

    A cache is a .kvm file, or a Zarr group in a folder or an object store (prompt.zarr, s3://bucket/prompt.zarr).
    Data goes to stdout, all else to stderr. `kvmmap COMMAND --help` has examples.

    \b
    Example:
      kvmmap inspect prompt.kvm
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(USAGE)


def _terminate(signum: int, frame: object) -> NoReturn:
    """End as Ctrl-C does, so that what is incomplete is removed."""
    sys.exit(TERMINATED)


def main() -> NoReturn:
    """Be the program `kvmmap`."""
    _reopen_streams()
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `kvmmap ... | head`: end quietly
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    kvmmap.main(prog_name="kvmmap")


def _reopen_streams() -> None:
    """Open /dev/null for each standard stream that the caller has closed, so that no cache gets its descriptor."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
