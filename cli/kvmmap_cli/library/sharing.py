"""`kvmmap library push` and `pull`: share a library through an object store."""

from __future__ import annotations

import click

from ..output import count, plain
from .shared import folder_argument, opened


@click.command("push")
@folder_argument
@click.option("--remote", metavar="URL", help="The object store, as s3://bucket/prefix; remembered.")
def push(folder: str, remote: str | None) -> None:
    """Store every segment of the library in DIR that its object store does not have.

    Credentials and endpoint are taken from the usual environment variables and files.

    \b
    Examples:
      kvmmap library push caches/ --remote s3://bucket/prefix
      kvmmap library push caches/
    """
    with opened(folder, remote) as library:
        pushed = library.push()
        click.echo(f"pushed {count(pushed, 'segment')} to {plain(library.remote or '')}")


@click.command("pull")
@folder_argument
@click.option("--remote", metavar="URL", help="The object store, as s3://bucket/prefix; remembered.")
@click.option("--segments", is_flag=True, help="Fetch the segments too, as far as the budget goes.")
def pull(folder: str, remote: str | None, segments: bool) -> None:
    """Look what other machines have stored for the library in DIR.

    Segments are fetched when a prompt needs them, or with --segments now.

    \b
    Examples:
      kvmmap library pull caches/
      kvmmap library pull --segments caches/
    """
    with opened(folder, remote) as library:
        found = library.pull(segments=segments)
        what = count(found, "segment") if segments else count(found, "new manifest")
        click.echo(f"{'fetched' if segments else 'read'} {what} from {plain(library.remote or '')}")


COMMANDS = (push, pull)
