"""Charts as inline SVG, and heat maps as inline PNG. Numbers in, markup out; colours are the style sheet's."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..figures import number
from ..pictures import colour
from .markup import Markup, element, text, void

WIDTH, HEIGHT = 440, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 34
"""Room around the plot, for its axes, in the units of the view box."""

Series = tuple[str, Sequence[float]]
"""A name, which is also its class in the style sheet, and its numbers."""


def lines(about: str, x_title: str, xs: Sequence[int], series: Sequence[Series], unit: str = "") -> Markup:
    """Draw each series over xs, from 0 up."""
    top = _round_up(max((y for _, ys in series for y in ys), default=0.0))
    span = max(xs[-1] - xs[0], 1) if xs else 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - (xs[0] if xs else 0)) / span * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM),
        )

    drawn = [*_grid(top, unit), *_x_axis(x_title, [(x, place(x, 0)[0]) for x in _ticks(xs)])]
    for name, ys in series:
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        drawn.append(element("polyline", class_=name, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points)))
        for (x, y), layer, value in zip(points, xs, ys, strict=True):
            told = element("title", f"{x_title} {layer}, {name}: {number(value)}{unit}")
            drawn.append(element("circle", told, class_=name, cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.5"))
    return _svg(about, drawn)


def bars(about: str, name: str, counts: Sequence[int], first: int) -> Markup:
    """Draw how often each of the numbers from `first` on occurs, as shares of all."""
    total = max(sum(counts), 1)
    shares = [count / total * 100 for count in counts]
    top = _round_up(max(shares, default=0.0))
    step = (WIDTH - LEFT - RIGHT) / max(len(counts), 1)
    middles = {first + i: LEFT + (i + 0.5) * step for i in range(len(counts))}
    ticks = [x for x in (-127, -64, 0, 64, 127) if x in middles]
    outline = [f"M{LEFT},{HEIGHT - BOTTOM}"]
    for i, share in enumerate(shares):
        y = HEIGHT - BOTTOM - share / top * (HEIGHT - TOP - BOTTOM)
        outline.append(f"V{y:.1f}H{LEFT + (i + 1) * step:.1f}")
    path = element("path", class_=name, d="".join([*outline, f"V{HEIGHT - BOTTOM}Z"]))
    return _svg(about, [*_grid(top, " %"), path, *_x_axis("code", [(x, middles[x]) for x in ticks])])


def strip(about: str, pieces: Sequence[tuple[str, float, float, str]], total: float) -> Markup:
    """Draw pieces (class, start, size, what it is) of a whole to scale, on one line; what is too thin stays a hair."""
    drawn = []
    for name, start, size, what in pieces:
        x, wide = start / total * 1000, max(size / total * 1000, 0.4)
        drawn.append(
            element("rect", element("title", what), class_=name, x=f"{x:.2f}", width=f"{wide:.2f}", height="10")
        )
    return element(
        "svg", *drawn, class_="strip", viewBox="0 0 1000 10", preserveAspectRatio="none", role="img", aria_label=about
    )


def heat_map(about: str, shares: NDArray[np.float64]) -> Markup:
    """Draw cells, numbers from 0 to 1 in [rows, columns], as pixels that are enlarged without blurring."""
    data = base64.b64encode(_png((np.clip(shares, 0, 1) * 255).round().astype(np.uint8))).decode()
    return void("img", class_="heat", alt=about, src=f"data:image/png;base64,{data}")


def ramp() -> Markup:
    """Draw the colours of a heat map from low to high."""
    data = base64.b64encode(_png(np.arange(256, dtype=np.uint8)[None])).decode()
    return void("img", class_="ramp", alt="from low to high", src=f"data:image/png;base64,{data}")


def _png(cells: NDArray[np.uint8]) -> bytes:
    """Return a PNG of [rows, columns] palette indices (W3C, "Portable Network Graphics", colour type 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = cells.shape
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    palette = bytes(part for i in range(256) for part in colour(i / 255))
    rows = b"".join(b"\0" + row.tobytes() for row in cells)
    chunks = (
        chunk(b"IHDR", head) + chunk(b"PLTE", palette) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def _svg(about: str, parts: Sequence[Markup]) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about)


def _grid(top: float, unit: str) -> Iterator[Markup]:
    for step in range(5):
        y = HEIGHT - BOTTOM - step / 4 * (HEIGHT - TOP - BOTTOM)
        yield element("line", class_="grid", x1=f"{LEFT}", x2=f"{WIDTH - RIGHT}", y1=f"{y:.1f}", y2=f"{y:.1f}")
        label = f"{top * step / 4:.3g}{unit}"
        yield element("text", label, x=f"{LEFT - 6}", y=f"{y + 4:.1f}", text_anchor="end")


def _x_axis(title: str, ticks: Sequence[tuple[int, float]]) -> Iterator[Markup]:
    for value, x in ticks:
        yield element("text", f"{value:,}", x=f"{x:.1f}", y=f"{HEIGHT - BOTTOM + 15}", text_anchor="middle")
    yield element("text", text(title), x=f"{(LEFT + WIDTH - RIGHT) / 2}", y=f"{HEIGHT - 3}", text_anchor="middle")


def _ticks(xs: Sequence[int]) -> list[int]:
    """Return every so many of xs, about seven."""
    return list(xs[:: max(1, -(-len(xs) // 7))])


def _round_up(value: float) -> float:
    """Return the next 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6 or 8 times a power of ten: quarters of it are short numbers."""
    if value <= 0 or not math.isfinite(value):
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))
