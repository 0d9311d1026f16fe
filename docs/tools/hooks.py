"""Hooks of mkdocs: charts become part of the pages, and nothing is loaded from other sites.

A chart is an image in Markdown, so that it is seen wherever Markdown is shown; put into the page itself it follows the
colours that the reader chooses there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
CHART = re.compile(r'<img [^>]*src="([^"]*figures/[^"]+\.svg)"[^>]*>')
ERRORS = re.compile(r"<code>\((<a [^\n]*?)\)</code>")
"""Several errors for one reason, `A, B: why`, which mkdocstrings takes for a tuple of types."""

SHIM = re.compile(r'(<script src=")https://unpkg\.com/iframe-worker/shim("></script>)')
"""The theme's `offline` plugin loads it, so that search works in pages that are opened from disk."""


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put charts where images of them are."""

    def chart(image: re.Match[str]) -> str:
        return (DOCS / posixpath.dirname(page.file.src_uri) / image[1]).read_text()

    # The theme makes links of images relative to the page that is built, which lies as deep as its source.
    return CHART.sub(chart, html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load our own copy of the one script that the theme has elsewhere, and list errors as their docstrings do."""
    output = ERRORS.sub(r"<code>\1</code>", output)
    up = "../" * page.file.src_uri.count("/")
    return SHIM.sub(rf"\g<1>{up}assets/iframe-worker.js\2", output)


def on_post_template(output: str, **_: Any) -> str:
    """404.html is for servers alone: no copy is needed."""
    return SHIM.sub("", output)
