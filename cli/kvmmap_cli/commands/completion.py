"""`kvmmap completion`: complete commands, options and paths in a shell."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ..output import plain

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.option("--install", is_flag=True, help="Put the script where the shell looks for it, instead of printing it.")
def command(shell: str | None, install: bool) -> None:
    """Print the script that lets SHELL complete kvmmap's commands, options and paths.

    SHELL is bash, zsh or fish; the one that you use by default.

    \b
    Examples:
      kvmmap completion --install
      eval "$(kvmmap completion bash)"
    """
    from click.shell_completion import get_completion_class

    shell = shell or _present_shell()
    completion = get_completion_class(shell)
    assert completion is not None
    root = click.get_current_context().find_root()
    script = completion(root.command, {}, "kvmmap", "_KVMMAP_COMPLETE").source()
    if not install:
        click.echo(script)
        return
    target = _place(shell)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{script}\n")
    click.echo(f"wrote {plain(str(target))}; it counts in new shells")
    if shell == "zsh":
        click.echo("for zsh to look there, ~/.zshrc needs: fpath=(~/.zfunc $fpath); autoload -Uz compinit; compinit")


def _present_shell() -> str:
    name = os.path.basename(os.environ.get("SHELL", ""))
    if name not in SHELLS:
        raise click.UsageError(f"which shell? give one of {', '.join(SHELLS)}")
    return name


def _place(shell: str) -> Path:
    """Return where a shell looks for a user's completions."""
    try:
        home = Path.home()
    except RuntimeError as error:
        raise click.UsageError(f"{error}: set HOME") from None
    if shell == "bash":
        data = os.environ.get("XDG_DATA_HOME")
        return (Path(data) if data else home / ".local/share") / "bash-completion/completions/kvmmap"
    if shell == "fish":
        config = os.environ.get("XDG_CONFIG_HOME")
        return (Path(config) if config else home / ".config") / "fish/completions/kvmmap.fish"
    return home / ".zfunc/_kvmmap"
