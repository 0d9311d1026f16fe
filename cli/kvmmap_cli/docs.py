"""The reference of the commands, as Markdown, from their own help: `python -m kvmmap_cli.docs > docs/cli.md`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from .main import kvmmap

INTRO = """\
# The command line

<!-- Generated from the commands' help: python -m kvmmap_cli.docs > docs/cli.md -->

`kvmmap` looks at caches, and looks after them. Commands that only look take no lock, so a cache that is being written
may be looked at. Those that change one (`truncate`, `resize`, `compact`, `gc`) take the writer's lock, so they never
touch a cache that a writer holds; where something is lost they ask, unless there is `--yes`; and whether they end by
themselves, by Ctrl-C or by a signal, what they have not finished they have not done.

Data goes to stdout; errors, each one line, and progress bars go to stderr. Colours and bars are for terminals only;
`NO_COLOR` turns colours off, `--no-progress` the bars, which come only with work that takes a while. Completion of
commands, options and paths: `kvmmap completion --install`. With `--json` a command prints what the Python API gives:
`kvmmap.report.inspect(cache).to_dict()` for `inspect` (of many, a list of these), with `statistics`, `token_ids` and
`text` where they were asked for; the fields of `cache.verify()` for `verify`;
`kvmmap.report.compare(a, b).to_dict()` for `diff`.

| exit code | meaning |
|---:|---|
| 0 | all is well |
| 1 | the cache is damaged: `verify` found it, or it can't be opened for damage; `diff`: the caches are different |
| 2 | a usage error, or the path is no cache, or it can't be read, or a writer holds it; nothing was changed |
| 130 | interrupted with Ctrl-C |
| 143 | ended by SIGTERM |
| 141 | whoever read the output stopped reading, as `head` does |
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
