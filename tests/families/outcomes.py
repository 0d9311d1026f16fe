"""The recorded outcomes of all families' trials, and the table of them in docs/transformers.md."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers

RELEASE = ".".join(transformers.__version__.split(".")[:2])
"""The installed release of transformers, as the record has it."""

PATH = Path(__file__).with_name("outcomes.json")
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN = "<!-- Families: written by `python -m families` in tests/ -->"
END = "<!-- End of families -->"


def load() -> dict[str, dict[str, dict[str, Any]]]:
    """Return outcomes by release and type."""
    found: dict[str, dict[str, dict[str, Any]]] = json.loads(PATH.read_text()) if PATH.exists() else {}
    return found


def save(outcomes: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write outcomes, a type a line."""
    releases = []
    for release, types in sorted(outcomes.items()):
        lines = ",\n".join(f"    {json.dumps(kind)}: {json.dumps(outcome)}" for kind, outcome in sorted(types.items()))
        releases.append(f"  {json.dumps(release)}: {{\n{lines}\n  }}")
    PATH.write_text("{\n" + ",\n".join(releases) + "\n}\n")


def table(outcomes: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table of the newest release's outcomes: a line for every kind of outcome."""
    release = max(outcomes, key=lambda name: tuple(map(int, name.split("."))))
    lines: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for kind, outcome in outcomes[release].items():
        why = outcome.get("why", "").replace("|", "\\|")
        untested = why.startswith(("not built", "not tested"))
        if not outcome["supported"] and not untested:
            why = why.partition(" ")[2]  # without the type's name
        supported = "yes" if outcome["supported"] else "not tested" if untested else "no"
        in_place = "yes" if outcome["in_place"] else "no" if outcome["supported"] else ""
        lines[supported, in_place, why].append(kind)
    order = ["yes", "no", "not tested"]
    rows = sorted(
        lines.items(), key=lambda line: (order.index(line[0][0]), line[0][1] != "yes", -len(line[1]), line[1])
    )
    shown = [f"| {', '.join(kinds)} | {yes} | {place} | {why} |" for (yes, place, why), kinds in rows]
    supported, total = counted(outcomes[release])
    counts = (
        f"transformers {release}: {len(outcomes[release])} types. {total} of them can be built here and generate with "
        f"a cache; {supported} of these ({100 * supported / total:.1f} %) are supported."
    )
    return "\n".join([counts, "", "| family | supported | in place | why not |", "|---|---|---|---|", *shown])


_WITHOUT_CACHE = (
    "takes no cache of keys and values",
    "keeps nothing of its own",
    "has no decoder layers of its own",
)
"""Reasons why a type can't generate with a cache of its own: nobody could support it."""


def counted(families: dict[str, dict[str, Any]]) -> tuple[int, int]:
    """Return how many types are supported, and how many can be built and generate with a cache.

    Args:
        families: the outcomes of one release, by type.
    """
    why = [outcome.get("why", "") for outcome in families.values() if not outcome["supported"]]
    left_out = sum(reason.startswith("not built") or any(part in reason for part in _WITHOUT_CACHE) for reason in why)
    return len(families) - len(why), len(families) - left_out


def write_table() -> None:
    """Put the table between its marks in the page."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(load())}\n\n{END}{after}")
