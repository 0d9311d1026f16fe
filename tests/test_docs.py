"""The documentation matches the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from kvmmap_cli.docs import reference
from kvmmap_cli.main import kvmmap as group

import kvmmap
from kvmmap import library
from kvmmap.integrations import transformers

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CLI = DOCS / "cli.md"
COMMANDS = group.list_commands(click.Context(group))


def test_the_cli_reference_is_up_to_date() -> None:
    assert CLI.read_text() == reference(), "run: python -m kvmmap_cli.docs > docs/cli.md"


def test_every_extra_is_documented_and_checked() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "howto" / "install.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(declared.keys() - {"dev"})
    programs = {path.stem.removeprefix("extra_") for path in (ROOT / "release" / "smoke").glob("extra_*.py")}
    assert programs == declared.keys() - {"dev", "all"}


def test_the_cli_reference_is_made_for_80_columns() -> None:
    blocks = CLI.read_text().split("```")[1::2]
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert f"\n## kvmmap {name}\n" in CLI.read_text()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_text_says_something_and_has_an_example(name: str) -> None:
    context = click.Context(group)
    command = group.get_command(context, name) if name else group
    assert command is not None
    assert command.help
    assert "Example" in command.help
    assert f"  kvmmap {name}" in command.help.partition("Example")[2]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_every_public_name_has_a_place_in_the_api_reference() -> None:
    placed = set(
        re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE)
    )
    public = {f"kvmmap.{name}" for name in kvmmap.__all__ if name != "report"}
    public |= {f"kvmmap.report.{name}" for name in kvmmap.report.__all__}
    public |= {f"kvmmap.integrations.transformers.{name}" for name in transformers.__all__}
    public |= {f"kvmmap.library.{name}" for name in library.__all__ if name not in kvmmap.__all__}
    for engine in ("llama_cpp", "vllm", "mlx"):  # they want what need not be installed
        text = (ROOT / "kvmmap" / "integrations" / engine / "__init__.py").read_text()
        names = ast.literal_eval(text.partition("__all__ = ")[2])
        public |= {f"kvmmap.integrations.{engine}.{name}" for name in names}
    public |= {f"kvmmap.codecs.{name}" for name in ("RowArray", "RowCodec", "register")}  # to write one's own
    assert placed == public


def test_charts_and_tables_are_those_of_the_measured_figures() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "tools" / "figures.py", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_map_of_the_modules_is_that_of_the_imports() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "tools" / "modules.py", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_design_page_names_modules_that_exist() -> None:
    page = (DOCS / "design.md").read_text().partition("## What it is")[0]
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", page):
        found = [ROOT / "kvmmap" / name, ROOT / "kvmmap" / "storage" / "file" / name, ROOT / name]
        assert any(path.exists() for path in found), name


def test_every_command_is_tested() -> None:
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for name in COMMANDS:
        assert re.search(rf'[(\[]\s*"{name}",', tests), name
