"""Hostile `.kvm` files: where their recipes come from, and putting one in its place. `groups` is the same for Zarr."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .image import Recipe, build
from .mutate import mutate, seeds

__all__ = ["mutate", "place", "recipes"]

CORPUS = Path(__file__).parent / "corpus" / "recipes.jsonl"
LONGEST = 1 << 28
"""Bytes of a file; all of it is mapped, and a map is address space."""


def recipes() -> list[Recipe]:
    """The recipes that are kept, the sound files first."""
    return seeds() + [json.loads(line) for line in CORPUS.read_text().splitlines()]


def place(recipe: Recipe, folder: str) -> str:
    """Put a recipe's file into a folder; pages that are there already are used again, for speed."""
    data, size = build(recipe)
    path = os.path.join(folder, "hostile.kvm")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if size > len(data):
        os.ftruncate(fd, 0)
    os.pwrite(fd, data[:size], 0)
    os.ftruncate(fd, min(size, LONGEST))
    os.close(fd)
    return path
