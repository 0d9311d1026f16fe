"""Results of the fidelity benchmark as files, one for each text and recipe of a task; what is there is not redone."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Text
from reading import OTHERS, Prompt, Reader
from recipes import CACHES, F32, RECIPES, Kept, Recipe


class Store:
    """A folder of results: task/text/recipe.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, task: str, text: str, recipe: str) -> Path:
        """Return the path of a result."""
        return self.folder / task / _plain(text) / f"{_plain(recipe)}.json"

    def has(self, task: str, text: str, recipe: str, key: str) -> bool:
        """True if there is a result that was computed from the same input."""
        path = self.path(task, text, recipe)
        return path.exists() and json.loads(path.read_text()).get("key") == key

    def put(self, task: str, text: Text, recipe: str, key: str, result: dict[str, Any]) -> None:
        """Keep a result."""
        path = self.path(task, text.name, recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"text": text.name, "kind": text.kind, "digest": text.digest, "recipe": recipe, "key": key}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(facts | result, indent=1) + "\n")
        os.replace(temporary, path)

    def all(self, task: str) -> list[dict[str, Any]]:
        """Return all results of a task."""
        return [json.loads(path.read_text()) for path in sorted((self.folder / task).glob("*/*.json"))]


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9_.+-]+", "_", name.lower())


def key_of(name: str, ids: Sequence[int], *facts: Any) -> str:
    """Return a digest of what a recipe's result is computed from: tokens, numbers, and last the model's config."""
    *numbers, config = facts
    if name not in OTHERS and isinstance(recipe := recipe_of(name), Kept):
        numbers.append(recipe.settings)
    shape = [config.head_dim, config.num_hidden_layers, config.hidden_size]
    return hashlib.sha256(json.dumps([list(ids), numbers, shape]).encode()).hexdigest()[:16]


def read_on(reader: Reader, prompt: Prompt, ids: Sequence[int], name: str) -> torch.Tensor:
    """Read on through the recipe of a name."""
    if name in OTHERS:
        return reader.read_on_with(prompt, ids, *OTHERS[name])
    recipe = recipe_of(name)
    if isinstance(recipe, Kept):
        return reader.read_on_kept(prompt, ids, recipe)
    return reader.read_on(prompt, ids, recipe)


def tried(reader: Reader, prompt: Prompt, ids: Sequence[int], name: str) -> torch.Tensor | None:
    """As `read_on`; None, and a line that says so, where one of transformers' caches can't do it.

    HQQ packs pairs of positions, and caches that quantise take no model with windows.
    """
    try:
        return read_on(reader, prompt, ids, name)
    except (RuntimeError, ValueError) as error:
        if name not in OTHERS:
            raise
        print(f"{name} fails: {error}", flush=True)
        return None


def recipe_of(name: str) -> Recipe | Kept:
    """Return the recipe of a name."""
    return next(recipe for recipe in (F32, *RECIPES, *CACHES) if recipe.name == name)


def bits_of(name: str, dim: int) -> float:
    """Bits a number. Of quanto and HQQ, scale and zero point of each group of 64 are counted as 16 bits each."""
    if name not in OTHERS:
        return recipe_of(name).bits(dim)
    _, settings = OTHERS[name]
    return settings["nbits"] + 0.5 if settings else 8.0
