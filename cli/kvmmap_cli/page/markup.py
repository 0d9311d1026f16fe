"""HTML made of parts: elements, tables, definition lists. All text is escaped here, and nowhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ..output import plain


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Part = str | Markup


def text(part: Part) -> Markup:
    """Return a part as HTML: text is escaped, and so is what could act on its reader."""
    return part if isinstance(part, Markup) else Markup(html.escape(plain(part)))


def element(name: str, /, *parts: Part, **attributes: str) -> Markup:
    """Return `<name ...>parts</name>`; `class_` is class, and _ in names is -."""
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(plain(value))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{told}>{''.join(map(text, parts))}</{name}>")


def void(name: str, /, **attributes: str) -> Markup:
    """Return an element that has no end: `<img ...>`."""
    return Markup(element(name, **attributes).removesuffix(f"</{name}>"))


def join(parts: Iterable[Part]) -> Markup:
    """Return parts one after the other."""
    return Markup("".join(map(text, parts)))


def facts(rows: Iterable[tuple[str, Part]]) -> Markup:
    """Return a list of names and what they are."""
    return element("dl", *(element("div", element("dt", name), element("dd", value)) for name, value in rows))


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Part]], *, words: int = 1) -> Markup:
    """Return a table that scrolls by itself where it is too wide; the first `words` columns are words, not numbers."""
    titles = element("tr", *(element("th", title, scope="col", class_=_side(i, words)) for i, title in enumerate(head)))
    body = [element("tr", *(element("td", cell, class_=_side(i, words)) for i, cell in enumerate(row))) for row in rows]
    inner = element("table", element("caption", caption), element("thead", titles), element("tbody", *body))
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _side(column: int, words: int) -> str:
    return "word" if column < words else "number"


def folded(title: str, *parts: Part) -> Markup:
    """Return parts that show when their title is opened."""
    return element("details", element("summary", title), *parts)


def figure(caption: Part, *parts: Part) -> Markup:
    """Return a picture with what it shows."""
    return element("figure", element("figcaption", caption), *parts)
