"""Imports point down a table of layers, and no modules import one another in a circle.

Every import counts: at the top of a module, in `if TYPE_CHECKING`, and inside a function.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = (
    ("_core", "lazy", "errors", "paths", "closing"),
    ("arrays", "ranges", "row_arrays", "threads"),
    ("codecs", "quantize"),
    ("geometry", "metadata", "per_layer", "state_spec", "sizing"),
    ("rows", "recent", "inputs"),
    ("format",),
    ("attention",),
    (
        *("storage.verify_report", "storage.recent_store", "storage.protocols", "storage.readonly"),
        *("storage.streaming", "storage.step_store"),
        *("storage.checkpoints", "storage.rowless"),
        *("storage.receiving", "storage.registry", "storage.refusals", "storage.locks"),
    ),
    ("storage",),
    ("states",),
    ("checks", "decode_step", "encoding", "layer_reader", "layer_writer", "layer"),
    ("layers", "cache_reader", "cache"),
    ("fp8",),
    ("opening", "finding", "files"),
    ("transfer",),
    ("formats",),
    ("library",),
    ("report",),
    ("integrations",),
    ("",),  # the package itself: the public names
)
"""From the lowest layer to the highest. A module or package belongs to the entry with the longest name that begins its
own. It may import what stands in lower layers, and in its own as long as no circle comes of it."""

APART = (
    ("storage.file", "storage.zarr"),
    ("storage.file", "storage.objects"),
    ("storage.memory", "storage.file"),
    ("storage.memory", "storage.zarr"),
    ("storage.objects", "storage.zarr"),
)
"""Storages of different kinds; the first of a pair does not know the second."""

FRAMEWORKS = {
    "zarr": "storage",
    "obstore": "storage",
    "torch": "integrations",
    "transformers": "integrations",
    "llama_cpp": "integrations",
    "vllm": "integrations",
    "mlx": "integrations",
    "mlx_lm": "integrations",
    "safetensors": "formats",
    "gguf": "formats",
    "mmap": "storage",
    "sqlite3": "library",
    "opentelemetry": "library",
}
"""The one package that may import each of these libraries."""

KNOWN_VIOLATIONS: frozenset[tuple[str, str]] = frozenset({})
"""(importer, imported) that still break the rules. The list may only shrink: an entry that breaks none fails."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "kvmmap").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    """All modules but the scripts, by name; the package itself is ""."""
    return {name_of(path): path for path in sorted((ROOT / "kvmmap").rglob("*.py")) if path.name != "__main__.py"}


def rank(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for number, layer in enumerate(TABLE):
            if prefix in layer:
                return number
    raise AssertionError(f"{module} is not in the table of layers")


def imported(text: str, package: list[str]) -> Iterator[str]:
    """Yield the absolute names of everything that a module of a package imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner.removeprefix("kvmmap.") in modules() else module


@functools.cache
def imports(module: str) -> frozenset[str]:
    """Absolute names of everything that a module imports."""
    path = modules()[module]
    return frozenset(imported(path.read_text(), ["kvmmap", *path.relative_to(ROOT / "kvmmap").parent.parts]))


@functools.cache
def edges() -> frozenset[tuple[str, str]]:
    """(importer, imported) of all imports within the package."""
    found = set()
    for module in modules():
        for name in imports(module):
            if name == "kvmmap" or name.startswith("kvmmap."):
                found.add((module, name.removeprefix("kvmmap").removeprefix(".")))
    return frozenset(edge for edge in found if edge[0] != edge[1])


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def breaks_the_table(importer: str, target: str) -> bool:
    if rank(target) > rank(importer):
        return True
    return any(below(importer, first) and below(target, second) for first, second in APART)


def circle(graph: frozenset[tuple[str, str]]) -> list[str]:
    """Return the modules of one circle, or nothing if there is none."""
    targets: dict[str, list[str]] = {}
    for importer, target in sorted(graph):
        targets.setdefault(importer, []).append(target)
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for target in targets.get(module, []):
            if found := visit(target):
                return found
        path.pop()
        done.add(module)
        return []

    for module in sorted(targets):
        if found := visit(module):
            return found
    return []


def reaches(graph: frozenset[tuple[str, str]], start: str, goal: str) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        for importer, target in graph:
            if importer == here and target not in seen:
                seen.add(target)
                waiting.append(target)
    return goal in seen


@pytest.mark.parametrize("module", sorted(modules()), ids=lambda name: name or "kvmmap")
def test_imports_point_down(module: str) -> None:
    for importer, target in sorted(edges() - KNOWN_VIOLATIONS):
        if importer == module:
            assert not breaks_the_table(importer, target), f"{importer} imports {target}, which stands above it"
    for name in imports(module):
        home = FRAMEWORKS.get(name.split(".")[0])
        assert home is None or below(module, home), f"{module} imports {name}"


def test_there_are_no_circles() -> None:
    found = circle(edges() - KNOWN_VIOLATIONS)
    assert not found, " -> ".join(found)


@pytest.mark.parametrize("edge", sorted(KNOWN_VIOLATIONS), ids=" -> ".join)
def test_the_list_of_known_violations_only_shrinks(edge: tuple[str, str]) -> None:
    importer, target = edge
    assert edge in edges(), f"{importer} does not import {target} any more: delete the entry"
    assert breaks_the_table(*edge) or reaches(edges(), target, importer), f"{edge} breaks no rule: delete the entry"


def test_every_kind_of_import_is_seen() -> None:
    text = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..cache import QuantizedKvCache\n"
        "def f():\n    from .. import layer\n    import kvmmap.report\n"
    )
    assert set(imported(text, ["kvmmap", "storage"])) == {"typing", "kvmmap.cache", "kvmmap.layer", "kvmmap.report"}
    assert circle(frozenset({("a", "b"), ("b", "c"), ("c", "a")})) == ["a", "b", "c", "a"]


def test_the_command_line_uses_the_public_face() -> None:
    public = {"kvmmap", "kvmmap.library", "kvmmap.report"}
    for path in (ROOT / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                assert not name.startswith("kvmmap.") or name in public, f"{path.name} imports {name}"
