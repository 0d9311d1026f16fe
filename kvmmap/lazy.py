"""Names of a package that are loaded when they are first used: what few programs need, and takes long to load."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    Args:
        package: its globals.
        homes: by name, the module within the package that has it.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{homes[name]}", package["__name__"]), name)
        package[name] = value
        return value

    return find, lambda: sorted({*package, *homes})
