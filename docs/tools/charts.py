"""Bar charts as SVG, in colours that follow the page or the system, light or dark.

Labels stand above their bars, so that a chart can be as narrow as a phone. Marks say where a bar should have reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 460
LEFT, RIGHT = 10, 118
"""Space beside the bars; their values are on the right."""

TITLE, GROUP, ROW, GAP = 32, 24, 42, 10
BAR = 12

LIGHT = "--ink:#1f2328;--dim:#59636e;--own:#3949ab;--other:#8b949e;--mark:#b3361b;--rule:#d1d9e0;--paper:#fff"
DARK = "--ink:#e6edf3;--dim:#9aa4af;--own:#8c9eff;--other:#6e7681;--mark:#ff9b71;--rule:#3d444d;--paper:#0d1117"

STYLE = f"""
.chart{{{LIGHT}}}
@media (prefers-color-scheme:dark){{.chart{{{DARK}}}}}
[data-md-color-scheme=default] .chart{{{LIGHT};--paper:none}}
[data-md-color-scheme=slate] .chart{{{DARK};--paper:none}}
.chart text{{font:13px -apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--ink)}}
.chart .title,.chart .group,.chart .value{{font-weight:600}}
.chart .dim{{fill:var(--dim)}}
.chart .missed{{fill:var(--mark)}}
.chart .own{{fill:var(--own)}}
.chart .other{{fill:var(--other)}}
.chart .mark{{stroke:var(--mark);stroke-width:2}}
.chart .rule{{stroke:var(--rule)}}
.chart .paper{{fill:var(--paper)}}
"""
"""An image stands on paper of its own, as it does not know what page it is in; a part of the site's page does not."""


@dataclass(frozen=True, slots=True)
class Row:
    """One bar."""

    label: str
    value: float

    text: str
    """The value in words, at the bar's end."""

    own: bool = True
    """True for kvmmap, False for a baseline."""

    target: float | None = None
    """Where the bar should reach."""


@dataclass(frozen=True, slots=True)
class Group:
    """Bars that belong together, under a heading of their own unless that is empty."""

    heading: str
    rows: Sequence[Row]


def chart(title: str, groups: Sequence[Group]) -> str:
    """Return a chart as one SVG element.

    Args:
        title: what the bars mean; also what is read out.
        groups: all of them to the same scale.
    """
    most = max(max(row.value, row.target or 0) for group in groups for row in group.rows)
    scale = (WIDTH - LEFT - RIGHT) / most
    parts: list[str] = []
    y = TITLE
    for group in groups:
        if group.heading:
            parts.append(f'<text class="group" x="{LEFT}" y="{y + 16}">{escape(group.heading)}</text>')
            y += GROUP
        for row in group.rows:
            parts += _row(row, y, scale)
            y += ROW
        y += GAP
    told = "; ".join(f"{g.heading + ', ' if g.heading else ''}{r.label}: {r.text}" for g in groups for r in g.rows)
    head = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'role="img" aria-label="{escape(f"{title}: {told}")}"><style>{STYLE}</style>',
        f'<rect class="paper" width="{WIDTH}" height="{y}" rx="6"/>',
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
    ]
    return "".join([*head, *parts, "</svg>\n"])


def _row(row: Row, y: float, scale: float) -> list[str]:
    length, middle = row.value * scale, y + 17 + BAR / 2
    missed = row.target is not None and row.value < row.target
    parts = [
        f'<text class="dim" x="{LEFT}" y="{y + 11}">{escape(row.label)}</text>',
        f'<line class="rule" x1="{LEFT}" y1="{y + 16}" x2="{LEFT}" y2="{y + 18 + BAR}"/>',
        f'<rect class="{"own" if row.own else "other"}" x="{LEFT}" y="{y + 17}" width="{length:.1f}" height="{BAR}" '
        'rx="2"/>',
    ]
    end = length
    if row.target is not None:
        x = LEFT + row.target * scale
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="{y + 14}" x2="{x:.1f}" y2="{y + 20 + BAR}"/>')
        end = max(end, row.target * scale + 2)
    parts.append(
        f'<text class="value{" missed" if missed else ""}" x="{LEFT + end + 6:.1f}" y="{middle + 4.5}">'
        f"{escape(row.text)}</text>"
    )
    return parts
