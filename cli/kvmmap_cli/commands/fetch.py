"""`kvmmap fetch`: download a remote cache into a local file."""

from __future__ import annotations

import click

from ..asking import confirm_ending, yes_option
from ..output import count, plain
from ..progress import no_progress_option, progress


@click.command("fetch")
@click.argument("source", metavar="URL")
@click.argument("target", metavar="FILE")
@click.option("--overwrite", is_flag=True, help="Replace FILE if it holds something else.")
@click.option("--no-verify", "verify", is_flag=True, flag_value=False, default=True, help="Don't read FILE back.")
@yes_option
@no_progress_option
def command(source: str, target: str, overwrite: bool, verify: bool, yes: bool, no_progress: bool) -> None:
    """Download the cache at URL into the .kvm file FILE.

    FILE is there when it is whole. If it holds the same already, nothing is downloaded; interrupted, the same command
    again continues. Where the object store is and who asks is said as for any S3 program: AWS_ENDPOINT_URL,
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE.

    \b
    Example:
      kvmmap fetch s3://bucket/prompt.zarr prompt.kvm
    """
    import kvmmap

    confirm_ending(target, yes, (".kvm",))
    with (
        progress("fetching", no_progress) as advance,
        kvmmap.fetch(source, target, overwrite=overwrite, verify=verify, progress=advance) as cache,
    ):
        length = cache.seq_len
    click.echo(f"{plain(target)}: {count(length, 'position')}", err=True)
