"""The library as the page shows it: its sums, and its segments as a tree."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict
from typing import Any

import kvmmap
from kvmmap.library import Segment

MOST = 300
"""Segments that the page shows: those used last, and what they continue."""

SHOWN_TOKENS = 24
"""Tokens of a segment whose text is shown."""


class Tree:
    """What there is to see of a library.

    Args:
        library: the library.
        tokenizer: to show the text that segments begin with; None shows none.
    """

    def __init__(self, library: kvmmap.Library, tokenizer: Any = None) -> None:
        self._library = library
        self._tokenizer = tokenizer
        self._texts: dict[str, str] = {}

    def now(self) -> dict[str, Any]:
        """Return its present state, as JSON."""
        entries = {entry.name: entry for entry in self._library.entries()}
        shown: set[str] = set()
        for entry in sorted(entries.values(), key=lambda entry: entry.used, reverse=True):
            if len(shown) >= MOST:
                break
            one: Segment | None = entry
            while one is not None and one.name not in shown:
                shown.add(one.name)
                one = entries.get(one.parent or "")
        self._texts = {name: text for name, text in self._texts.items() if name in entries}
        stats = self._library.stats()
        return {
            "now": time.time(),
            "stats": asdict(stats) | {"hit_rate": stats.hit_rate},
            "segments": [self._segment(entry) for entry in entries.values() if entry.name in shown],
            "hidden": len(entries) - len(shown),
        }

    def _segment(self, entry: Segment) -> dict[str, Any]:
        names = ("name", "parent", "start", "stop", "bytes", "hits", "reused", "used", "writing", "pinned", "broken")
        found: dict[str, Any] = {name: getattr(entry, name) for name in names}
        # A model that was loaded from a folder is called by its path, which is nobody's business.
        return found | {"model": os.path.basename(entry.model.rstrip("/")), "text": self._text(entry)}

    def _text(self, entry: Segment) -> str | None:
        if self._tokenizer is None or entry.broken or not entry.positions:
            return None
        if entry.name not in self._texts:
            with contextlib.suppress(kvmmap.KvmmapError, OSError):  # evicted since, or damaged
                with kvmmap.open(entry.path, record_use=False) as cache:
                    ids = cache.token_ids[entry.start : entry.start + SHOWN_TOKENS]
                self._texts[entry.name] = self._tokenizer.decode(ids.tolist())
        return self._texts.get(entry.name)
