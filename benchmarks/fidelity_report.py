"""Medians over texts of the fidelity benchmark's results, printed and as the JSON that docs/fidelity.md is made of."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from reading import OTHERS, perplexity_change
from recipes import CACHES, F32, RECIPES
from results import Store


def show(store: Store, path: Path) -> None:
    """Print a line for each recipe, the one that loses least first, and write the JSON."""
    by_recipe: dict[str, dict[str, Any]] = {}
    for result in store.all("loss"):
        by_recipe.setdefault(result["recipe"], {})[result["text"]] = result
    exact = by_recipe.pop(F32.name)
    rows = []
    for name, found in by_recipe.items():
        if name not in _shown():
            continue
        changes = [perplexity_change(one["loss"], exact[text]["loss"]) for text, one in found.items()]
        median = {
            key: statistics.median(one[key] for one in found.values()) for key in ("kl", "kl_p99", "top1", "bits")
        }
        facts = {"recipe": name, "texts": len(found), "worst": max(one["kl"] for one in found.values())}
        rows.append(facts | median | {"perplexity": statistics.median(changes)})
    rows.sort(key=lambda row: float(row["kl"]))
    for row in rows:
        print(f"{row['recipe']:32} {row['bits']:6.2f} bits  {row['kl']:8.2g}, worst {row['worst']:8.2g}")
    path.write_text(json.dumps({"texts": sorted(exact), "rows": rows}, indent=1) + "\n")


def _shown() -> set[str]:
    """The recipes of the table: one of those that are the same."""
    kept = {repr(recipe.settings): recipe.name for recipe in reversed(CACHES)}
    return {*kept.values(), *(recipe.name for recipe in RECIPES), *OTHERS}


def by_recipe(store: Store, task: str) -> dict[str, list[dict[str, Any]]]:
    """Group the results of a task."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in store.all(task):
        found.setdefault(result["recipe"], []).append(result)
    return found


def show_tasks(store: Store) -> None:
    """Print what there is of the other tasks."""
    for name, results in by_recipe(store, "passkey").items():
        print(f"pass key: {name:32} {sum(one['found'] for one in results)} of {len(results)} found")
    for name, results in by_recipe(store, "greedy").items():
        agree = statistics.median(one["agree"] for one in results)
        print(f"greedy: {name:32} agrees for {agree:g} of {results[0]['generated']} tokens, in the median")
    for name, results in by_recipe(store, "small").items():
        median = statistics.median(one["kl"] for one in results)
        print(f"small model: {name:32} {results[0]['bits']:6.2f} bits  {median:8.2g}")
