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
    "arrays",
    "paths",
    "geometry",
    "metadata",
    "quantize",
    "attention.kernel",
    "format",
    "storage.protocols",
    "storage.readonly",
    "storage.streaming",
    "storage.checksums",
    "storage.sketches",
    "storage.memory",
    "storage.temporary",
    "storage.posix",
    "storage.after_fork",
    "storage.file.page_cache",
    "storage.file.live_record",
    "storage.file.last_use",
    "storage.file.commit_slots",
    "storage.file.verified_blocks",
    "storage.file.verify",
    "storage.file.reader_layer",
    "storage.file.reader",
    "storage.file.section_map",
    "storage.file.placement",
    "storage.file.writer_layer",
    "storage.file.commit_checksums",
    "storage.file.writer",
    "storage.file.resize",
    "storage.file.recovery",
    "storage.file.repair",
    "storage.file.clone",
    "storage.libraries",
    "storage.objects.protocol",
    "storage.objects.lock",
    "storage.objects.local",
    "storage.objects.remote",
    "storage.zarr.shard",
    "storage.zarr.layout",
    "storage.zarr.root",
    "storage.zarr.download",
    "storage.zarr.streaming",
    "storage.zarr.upload",
    "storage.zarr.verify",
    "storage.zarr.layer",
    "storage.zarr.reader",
    "storage.zarr.writer",
    "storage.zarr.placement",
    "inputs",
    "attention.run",
    "attention.topk",
    "layer",
    "cache",
    "opening",
    "finding",
    "transfer.filling",
    "transfer.copying",
    "formats.safetensors",
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
    if (ROOT / "kvmmap" / module.replace(".", "/") / "__init__.py").exists():
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
