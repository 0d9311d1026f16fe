"""The reference of the commands, as Markdown, from their own help: `python -m kvmmap_cli.docs > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from .main import kvmmap

INTRO = """\
# The command line

<!-- Generated from the commands' help: python -m kvmmap_cli.docs > docs/cli.md -->

`kvmmap` inspects and maintains caches. Commands that only read take no lock and work beside a writer. Those that change
a cache (`truncate`, `resize`, `compact`, `gc`) take the writer's lock, so they never change a cache that a writer has
open. They ask before they delete anything, unless `--yes` is given. An interrupted command (Ctrl-C, a signal) leaves
the cache as it was.

Data goes to stdout; errors (one line each) and progress bars go to stderr. Colours and bars are for terminals only;
`NO_COLOR` turns colours off, and `--no-progress` the bars, which only long operations show. `kvmmap completion
--install` sets up completion of commands, options and paths. With `--json` a command prints what Python returns:
`kvmmap.report.inspect(cache).to_dict()` for `inspect` (of many, a list of these), with `statistics`, `token_ids` and
`text` where they were asked for; the fields of `cache.verify()` for `verify`;
`kvmmap.report.compare(a, b).to_dict()` for `diff`.

| exit code | meaning |
|---:|---|
| 0 | success |
| 1 | the cache is damaged: found by `verify`, or the reason that it can't be opened; `diff`: the caches differ |
| 2 | a usage error; the path is no cache or can't be read; or a writer has it open. Nothing was changed |
| 130 | interrupted with Ctrl-C |
| 143 | ended by SIGTERM |
| 141 | the reader of the output closed the pipe, as `head` does |
"""


def reference() -> str:
    """Return the whole document."""
    root = kvmmap.make_context("kvmmap", [], resilient_parsing=True, terminal_width=80, max_content_width=80)
    sections = [INTRO, _section(root)]
    for name in kvmmap.list_commands(root):
        command = kvmmap.get_command(root, name)
        if command is not None:
            sections += _sections(command, name, root)
    return "\n".join(sections)


def _sections(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    """Yield the section of a command, and of those in it."""
    context = command.make_context(name, [], parent, resilient_parsing=True)
    yield _section(context)
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is not None:
                yield from _sections(found, inner, context)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n$ {context.command_path} --help\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    click.echo(reference(), nl=False)
