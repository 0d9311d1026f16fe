"""All benchmarks, one process each, and at the end all targets with what was measured.

    python benchmarks/run.py [NAME...]

NAME is a topic, such as `append` for bench_append.py; by default all but those of llama.cpp, which need an environment
of their own (`make bench-llama-cpp`). Results go to bench-out/: a JSON file a topic, and bars.md, the last table as
Markdown.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import OUT, Bar, bar_table
from rich.console import Console

HERE = Path(__file__).resolve().parent
ARGUMENTS = {"zarr": ["local"]}
"""What a topic is run with besides; the rest of what its program can do is left out here."""

APART = {"llama_cpp", "llama_cpp_cache"}
"""Topics that are run when they are named, and else not."""

TOPICS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> int:
    names = sys.argv[1:] or [name for name in TOPICS if name not in APART]
    unknown = [name for name in names if name not in TOPICS]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(TOPICS)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 110)
    bars, failed = [], []
    for name in names:
        console.rule(f"[bold]{name}")
        sys.stdout.flush()
        OUT.mkdir(exist_ok=True)
        path = OUT / f"{name}.json"
        program = [sys.executable, HERE / f"bench_{name}.py", *ARGUMENTS.get(name, []), "--json", path]
        done = subprocess.run(program, check=False)
        if done.returncode:
            failed.append(name)
        else:
            bars += [bar_of(facts) for facts in json.loads(path.read_text()).get("bars", [])]
    if bars:
        console.rule("[bold]all bars")
        console.print(bar_table(bars))
        (OUT / "bars.md").write_text(markdown(bars))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def bar_of(facts: dict[str, Any]) -> Bar:
    """Make a bar of what a benchmark wrote."""
    return Bar(facts["what"], facts["required"], facts["measured"], facts["unit"], facts.get("ceiling"))


def markdown(bars: list[Bar]) -> str:
    """The table of bars for a page."""
    lines = ["| | required | measured | |", "|---|---:|---:|---|"]
    lines += [f"| {bar.what} | {' | '.join(bar.texts())} |" for bar in bars]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
