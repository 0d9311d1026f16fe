"""The reference of the commands, as Markdown, from their own help: `python -m kvmmap_cli.docs > docs/cli.md`."""

from __future__ import annotations

import click

from .main import kvmmap

INTRO = """\
# The command line

<!-- Generated from the commands' help: python -m kvmmap_cli.docs > docs/cli.md -->

`kvmmap` looks at cache files and changes none. It takes no lock, so a cache that is being written may be looked at.
Data goes to stdout; errors, each one line, and the progress bar go to stderr. Colours and the bar are for terminals
only, and `NO_COLOR` turns colours off. With `--json` a command prints what the Python API gives:
`kvmmap.report.inspect(cache).to_dict()` for `inspect` (of many, a list of these), with `statistics`, `token_ids` and
`text` where they were asked for; the fields of `cache.verify()` for `verify`.

| exit code | meaning |
|---:|---|
| 0 | all is well |
| 1 | the cache is damaged: `verify` found it, or it can't be opened for damage |
| 2 | a usage error, or the path is no cache, or it can't be read |
| 130 | interrupted with Ctrl-C |
| 141 | whoever read the output stopped reading, as `head` does |
"""


def reference() -> str:
    """Return the whole document."""
    root = kvmmap.make_context("kvmmap", [], resilient_parsing=True, terminal_width=80, max_content_width=80)
    sections = [INTRO, _section(root)]
    for name in kvmmap.list_commands(root):
        command = kvmmap.get_command(root, name)
        if command is not None:
            sections.append(_section(command.make_context(name, [], root, resilient_parsing=True)))
    return "\n".join(sections)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n$ {context.command_path} --help\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
