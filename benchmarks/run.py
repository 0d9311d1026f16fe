"""All benchmarks, one process each, and at the end one page: all targets with what was measured, met or missed.

    python benchmarks/run.py [NAME...]

NAME is a topic, such as `append` for bench_append.py; by default all but those that take long or need an environment of
their own: llama.cpp's (`make bench-llama-cpp`), and what codecs lose (`bench_fidelity.py`, `bench_loss.py`). Results go
to bench-out/: a JSON file a topic, and page.md, the last table as Markdown. All together are to take at most 20 minutes
on an idle machine with two processors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import OUT, Bar, bar_table
from rich.console import Console

HERE = Path(__file__).resolve().parent
ARGUMENTS = {
    "append": ["--rounds", "5"],
    "attention": ["--rounds", "7"],
    "cli": ["--rounds", "7"],
    "codec": ["--mib", "64", "--rounds", "9"],
    "library": ["--rounds", "9"],
    "reopen": ["--rounds", "11"],
    "segments": ["--rounds", "21"],
    "step": ["--positions", "16000", "--rounds", "5"],
    "streaming": ["--gb", "1.2", "--rounds", "2"],
    "transformers": ["--contexts", "8000", "--rounds", "5"],
    "verify": ["--rounds", "3"],
    "zarr": ["s3", "--mib", "128", "--rounds", "3"],
}
"""What a topic is run with, so that all together take no longer; what else its program can do is left out here."""

APART = {"llama_cpp", "llama_cpp_cache", "fidelity", "loss", "sketches"}
"""Topics that are run when they are named, and else not."""

TOPICS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
LONGEST = 20 * 60
"""Seconds that all topics may take together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TOPICS)}")
    names = parser.parse_args().names or [name for name in TOPICS if name not in APART]
    unknown = [name for name in names if name not in TOPICS]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(TOPICS)}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 140)
    bars: dict[str, list[Bar]] = {}
    seconds, failed = {}, []
    for name in names:
        console.rule(f"[bold]{name}")
        sys.stdout.flush()
        OUT.mkdir(exist_ok=True)
        path = OUT / f"{name}.json"
        program = [sys.executable, HERE / f"bench_{name}.py", *ARGUMENTS.get(name, []), "--json", path]
        start = time.monotonic()
        done = subprocess.run(program, check=False)
        seconds[name] = time.monotonic() - start
        if done.returncode:
            failed.append(name)
        else:
            bars[name] = [bar_of(facts) for facts in json.loads(path.read_text()).get("bars", [])]
    console.rule("[bold]all bars")
    console.print(bar_table([bar for found in bars.values() for bar in found]))
    page = markdown(bars, seconds, failed)
    (OUT / "page.md").write_text(page)
    console.print(page.partition("\n")[0], highlight=False)
    console.print(", ".join(f"{name} {taken:.0f} s" for name, taken in seconds.items()), highlight=False)
    if sum(seconds.values()) > LONGEST:
        console.print(f"together {sum(seconds.values()):.0f} s, more than {LONGEST}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def bar_of(facts: dict[str, Any]) -> Bar:
    """Make a bar of what a benchmark wrote."""
    known = ("what", "required", "measured", "unit", "ceiling", "beside")
    return Bar(**{name: facts[name] for name in known if facts.get(name) is not None})


def markdown(bars: dict[str, list[Bar]], seconds: dict[str, float], failed: list[str]) -> str:
    """The page: how many targets are met, each with its figure, its limit and what it is beside, and what it took."""
    every = [bar for found in bars.values() for bar in found]
    lines = [f"{sum(bar.met for bar in every)} of {len(every)} targets are met, in {sum(seconds.values()):.0f} s.", ""]
    lines += ["| | beside | required | measured | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {name}: {bar.what} | {bar.beside} | {' | '.join(bar.texts())} |"
        for name, found in bars.items()
        for bar in found
    ]
    lines += [f"| {name} | | | failed | |" for name in failed]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
