"""Imports point one way: each module may import only what stands above it in the table (docs/design.md, layers)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLE = [
    "_core",
    "lazy",
    "errors",
    "geometry",
    "metadata",
    "quantize",
    "attention",
    "format",
    "storage.base",
    "storage.readonly",
    "storage.checksums",
    "storage.sketches",
    "storage.memory",
    "storage.file",
    "storage.forking",
    "storage.residency",
    "storage.live",
    "storage.slots",
    "storage.proven",
    "storage.verify",
    "storage.mapped_layer",
    "storage.mapped",
    "storage.extents",
    "storage.placing",
    "storage.writer_layer",
    "storage.signing",
    "storage.writer",
    "storage.resize",
    "storage.wreck",
    "storage.repair",
    "storage.fork",
    "storage.zarr_needs",
    "storage.zarr_objects",
    "storage.zarr_lock",
    "storage.zarr_folder",
    "storage.zarr_bucket",
    "storage.zarr_shard",
    "storage.zarr_layout",
    "storage.zarr_root",
    "storage.zarr_fetch",
    "storage.zarr_pour",
    "storage.zarr_upload",
    "storage.zarr_verify",
    "storage.zarr_layer",
    "storage.zarr_reader",
    "storage.zarr_writer",
    "storage.zarr_place",
    "inputs",
    "attend",
    "selection",
    "layer",
    "cache",
    "opening",
    "finding",
    "filling",
    "copying",
    "tensors",
    "report",
    "integrations",
]
FRAMEWORKS = {
    "zarr": "storage",
    "obstore": "storage",
    "torch": "integrations",
    "transformers": "integrations",
    "mmap": "storage",
}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "kvmmap").rglob("*.py") if "__main__" not in path.name)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "kvmmap").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int:
    for length in range(module.count(".") + 1, 0, -1):
        prefix = ".".join(module.split(".")[:length])
        if prefix in TABLE:
            return TABLE.index(prefix)
    raise AssertionError(f"{module} is not in the table of layers")


def imports(path: Path) -> list[str]:
    """Absolute names of what a module imports at its top level."""
    package = ["kvmmap", *path.relative_to(ROOT / "kvmmap").parent.parts]
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            inner = [f"{module}.{alias.name}" for alias in node.names]
            known = [name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).exists()]
            names += known or [module if module != "kvmmap" else f"kvmmap.{node.names[0].name}"]
    return names


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    module = name_of(path)
    if module in ("", "storage"):
        return
    for name in imports(path):
        if name.startswith("kvmmap."):
            other = name.removeprefix("kvmmap.")
            same_package = other.split(".")[0] == module.split(".")[0] and rank(other) == rank(module)
            assert rank(other) < rank(module) or same_package, f"{module} imports {other}"
        home = FRAMEWORKS.get(name.split(".")[0])
        assert home is None or module.startswith(home), f"{module} imports {name}"


def test_the_command_line_uses_the_public_face() -> None:
    public = {"kvmmap", "kvmmap.report"}
    for path in (ROOT / "cli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                assert not name.startswith("kvmmap.") or name in public, f"{path.name} imports {name}"
