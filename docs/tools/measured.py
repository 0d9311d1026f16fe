"""The measurements in docs/figures/measured.json: collected from benchmarks, and looked up for charts and tables."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).resolve().parents[1] / "figures"
MEASURED = FIGURES / "measured.json"

Topics = dict[str, dict[str, Any]]
"""By the name of a benchmark, such as "append" for benchmarks/bench_append.py."""


def load() -> Topics:
    """Return all topics."""
    topics: Topics = json.loads(MEASURED.read_text())
    return topics


def collect(folder: Path, conditions: str) -> None:
    """Take over every topic in a folder of results that says which machine it is from."""
    topics = load() if MEASURED.exists() else {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "machine" in found:
            topics[path.stem] = {
                "command": f"python benchmarks/run.py {path.stem}",
                "date": date.fromtimestamp(path.stat().st_mtime).isoformat(),
                "conditions": conditions,
                "machine": found["machine"],
                "bars": found.get("bars", []),
                "notes": found.get("notes", {}),
                "speeds": speeds(found),
            }
    MEASURED.write_text(json.dumps(topics, indent=1) + "\n")


def speeds(found: dict[str, Any]) -> dict[str, Any]:
    """By table and row: the median time, and how many times as fast as each baseline."""
    if "rows" in found:
        return {"": {row["name"]: {key: row[key] for key in row if key != "name"} for row in found["rows"]}}
    return {
        table["title"]: {
            row["name"]: {
                "seconds": row["seconds"]["median"],
                "faster_than": {name: ratio["median"] for name, ratio in row["faster_than"].items()},
            }
            for row in table["rows"]
        }
        for table in found["tables"]
    }


def bar(topic: dict[str, Any], *words: str) -> dict[str, Any]:
    """The one bar that has all of these words."""
    found = [bar for bar in topic["bars"] if all(word in bar["what"] for word in words)]
    if len(found) != 1:
        raise SystemExit(f"{len(found)} bars with {words}")
    return found[0]


def table(topic: dict[str, Any], start: str) -> dict[str, Any]:
    """The rows of the table whose title begins so."""
    return next(rows for title, rows in topic["speeds"].items() if title.startswith(start))
