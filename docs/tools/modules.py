"""The map of the modules: docs/figures/modules.svg, drawn from the imports of the code.

    python docs/tools/modules.py draw
    python docs/tools/modules.py check

A box is a part of the package: a top-level module or package, a kind of storage, or the command line. A line leads from
a part down to one that it imports; lines that follow from others are left out. `check` tells whether `draw` would
change the picture.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

from charts import STYLE

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "figures" / "modules.svg"
SOURCES = {"kvmmap": ROOT / "kvmmap", "kvmmap_cli": ROOT / "cli" / "kvmmap_cli"}

TOGETHER = {
    "arrays": "row_arrays",
    "checks": "layer",
    "layer_reader": "layer",
    "encoding": "layer",
    "layer_writer": "layer",
    "cache_reader": "cache",
    "closing": "cache",
    "layers": "cache",
}
"""Modules that share a box with another one, whose halves they are."""

WIDTH, BOX, ROW, MARGIN = 720, 30, 66, 12
"""Pixels: the picture, a box's height, from one row of boxes to the next, at the edges."""

LETTER, LINE = 7.8, 16
"""Pixels that a letter of a name takes at most, and a line that passes a row."""

SWEEPS = 24
"""How often rows are sorted by their neighbours, upwards and downwards in turn, so that few lines cross."""

BOXES = """
.chart .box{fill:var(--paper);stroke:var(--own);stroke-width:1.5}
.chart .edge{fill:none;stroke:var(--other);stroke-width:1.1}
"""

Graph = dict[str, set[str]]


def main() -> int:
    match sys.argv[1:]:
        case ["draw"]:
            PICTURE.write_text(rendered())
        case ["check"]:
            if not PICTURE.exists() or PICTURE.read_text() != rendered():
                print(f"{PICTURE.relative_to(ROOT)} is not what the imports say: python docs/tools/modules.py draw")
                return 1
        case _:
            print(__doc__)
            return 2
    return 0


def modules() -> dict[str, Path]:
    """Return the path of every module, by its absolute name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str | None:
    """Return the part that a module belongs to; None for the package itself, which only names what is public."""
    package, *inner = module.split(".")
    if package == "kvmmap_cli":
        return package
    if not inner:
        return None
    folder = SOURCES["kvmmap"].joinpath(*inner[:2])
    if inner[0] == "storage" and len(inner) > 1 and folder.is_dir():
        return ".".join(inner[:2])
    return TOGETHER.get(inner[0], inner[0])


def graph(known: dict[str, Path]) -> Graph:
    """Return which parts each part imports."""
    found: Graph = {}
    for module, path in known.items():
        part = part_of(module)
        if part is None:
            continue
        targets = found.setdefault(part, set())
        for name in imported(path, module, known):
            target = part_of(name)
            if target is not None and target != part:
                targets.add(target)
    return found


def imported(path: Path, module: str, known: dict[str, Path]) -> Iterator[str]:
    """Yield the names of this project's modules that a module imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                if inner in known or name in known:
                    yield inner if inner in known else name


def levels(parts: Graph) -> dict[str, int]:
    """Return the row of each part, 0 for the lowest: one above the highest part that it imports."""
    found: dict[str, int] = {}

    def visit(part: str, path: tuple[str, ...]) -> int:
        if part in path:
            raise SystemExit("imports in a circle: " + " -> ".join((*path[path.index(part) :], part)))
        if part not in found:
            found[part] = 1 + max((visit(target, (*path, part)) for target in sorted(parts[part])), default=-1)
        return found[part]

    for part in sorted(parts):
        visit(part, ())
    return found


def reduced(parts: Graph) -> list[tuple[str, str]]:
    """Return the imports that do not follow from others, in order."""

    def reach(part: str) -> set[str]:
        return {part}.union(*(reach(target) for target in parts[part]))

    return [
        (part, target)
        for part in sorted(parts)
        for target in sorted(parts[part])
        if not any(target in reach(other) for other in parts[part] - {target})
    ]


def placed(parts: Graph) -> tuple[list[list[str]], list[list[str]]]:
    """Return rows from the top down, and the lines, each as what it passes on its way down.

    A line that crosses a row has a place of its own there, named like no part, so that it runs behind no box.
    """
    level = levels(parts)
    lines = [
        [part, *(f"{part}>{target}@{row}" for row in range(level[part] - 1, level[target], -1)), target]
        for part, target in reduced(parts)
    ]
    rows: list[list[str]] = [
        [part for part in sorted(parts) if level[part] == row] for row in range(max(level.values()) + 1)
    ]
    for line in lines:
        for place in line[1:-1]:
            rows[int(place.rpartition("@")[2])].append(place)
    near: Graph = {place: set() for row in rows for place in row}
    for line in lines:
        for upper, lower in pairwise(line):
            near[upper].add(lower)
            near[lower].add(upper)
    where = {place: (number + 0.5) / len(row) for row in rows for number, place in enumerate(row)}
    for sweep in range(SWEEPS):
        for number in range(len(rows)) if sweep % 2 else reversed(range(len(rows))):
            beside = {place for other in (number - 1, number + 1) if 0 <= other < len(rows) for place in rows[other]}
            middle = {
                place: mean([where[other] for other in near[place] & beside], where[place]) for place in rows[number]
            }
            rows[number].sort(key=lambda place, middle=middle: (middle[place], place))
            where |= {place: (count + 0.5) / len(rows[number]) for count, place in enumerate(rows[number])}
    return rows[::-1], lines


def mean(numbers: list[float], otherwise: float) -> float:
    return sum(sorted(numbers)) / len(numbers) if numbers else otherwise


def width(place: str) -> float:
    """Return the pixels that a box takes, or a line that passes."""
    return LINE if "@" in place else len(place) * LETTER + 24


def rendered() -> str:
    """Return the picture as one SVG element."""
    parts = graph(modules())
    rows, lines = placed(parts)
    height = MARGIN + ROW * (len(rows) - 1) + BOX + MARGIN
    middles: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        space = (WIDTH - 2 * MARGIN - sum(map(width, row))) / (len(row) + 1)
        x = MARGIN + space
        for place in row:
            middles[place] = (x + width(place) / 2, MARGIN + ROW * number)
            x += width(place) + space
    drawn = []
    for line in lines:
        path = ""
        for upper, lower in pairwise(line):
            (x, y), (to_x, to_y) = middles[upper], middles[lower]
            bend = (to_y - y - BOX) / 2
            path += f"L{x:.0f} {y + BOX}C{x:.0f} {y + BOX + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y}"
        drawn.append(f'<path class="edge" d="M{path[1:]}"/>')
    for part in sorted(parts):
        x, y = middles[part]
        targets = ", ".join(sorted(parts[part])) or "nothing"
        drawn.append(
            f"<g><title>{escape(part)} imports {escape(targets)}</title>"
            f'<rect class="box" x="{x - width(part) / 2:.0f}" y="{y}" width="{width(part):.0f}" height="{BOX}" rx="6"/>'
            f'<text class="group" text-anchor="middle" x="{x:.0f}" y="{y + 20}">{escape(part)}</text></g>'
        )
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="The parts of kvmmap, and which imports which">\n<style>{STYLE}{BOXES}</style>\n'
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
