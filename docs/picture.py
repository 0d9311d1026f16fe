"""Draw docs/inspect.svg: what `kvmmap inspect` shows of a real cache, as the README's picture.

make demo && python docs/picture.py demo-out/manual.kvm > docs/inspect.svg
"""

from __future__ import annotations

import io
import os
import re
import sys

from kvmmap_cli import pictures, summary
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

import kvmmap

COLUMNS = 88

# Without fonts that would be fetched: readers' own are good enough, and a picture should ask nobody for anything.
FORMAT = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main() -> None:
    path = sys.argv[1]
    os.chdir(os.path.dirname(path) or ".")
    name = os.path.basename(path)
    console = Console(width=COLUMNS, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    with kvmmap.open(name) as cache:
        report = kvmmap.report.inspect(cache)
        parts = [
            *summary.render(report, name),
            "",
            summary.headline(report, name, None),
            "",
            *pictures.heat_maps(kvmmap.report.scale_grids(cache, COLUMNS), COLUMNS, colours=True),
        ]
    console.print(*parts, sep="\n", markup=False, highlight=False, emoji=False)
    print(
        console.export_svg(title=f"kvmmap inspect {name}; kvmmap inspect --heatmap {name}", code_format=FORMAT), end=""
    )


if __name__ == "__main__":
    main()
