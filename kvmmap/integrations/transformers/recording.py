"""What a cache knows of the forward pass that runs: whose it is, which tokens it feeds, and if these can be recorded.

One a cache; hooks on the model call it (`passes`), for the outermost part of a model that they are on and for those
inside. What arguments mean is told by `arguments`; knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arguments import check_padding, check_positions, check_rope, has_effect, is_plain, known_ids
from .kinds import LayerKind
from .media import Item, groups, odd_type
from .media_record import MediaRecord
from .models import Counting


class PassRecord:
    """The forward pass that a cache is in."""

    def __init__(
        self, tokens: Mapping[str, frozenset[int]], media: MediaRecord, both_ways: bool, counting: Counting
    ) -> None:
        self._tokens = tokens  # those that stand for images and the like, by kind
        self._placeholders = frozenset().union(*tokens.values())
        self._media = media
        self._both_ways = both_ways  # tokens of an image see one another
        self._counting = counting
        self._running: list[int] = []  # ids of the parts of the model that are in their forward pass, outermost first
        self._start = 0
        self._ids: NDArray[np.int32] | None = None  # None: no part that got token ids has been entered yet
        self._fed = 0
        self.count = 0
        """Positions that the pass feeds, as the outermost part of the model that says so has it."""
        self._known = 0  # ids from the start of the pass that can be recorded
        self._items: list[Item] = []
        self._deltas: NDArray[np.int64] | None = None
        self._unverified: int | None = None

    @property
    def active(self) -> bool:
        """Whether a pass runs."""
        return bool(self._running)

    @property
    def start(self) -> int:
        """Positions that were stored before the pass that runs, or before the last one."""
        return self._start

    def begins(self, model: torch.nn.Module) -> bool:
        """Return whether `begin` of a part of a model begins a pass, or enters a part of one that runs."""
        return not self._running or id(model) in self._running

    def begin(self, model: torch.nn.Module, given: Mapping[str, Any], length: int, seen: bool) -> bool:
        """Enter a part of a model.

        Args:
            model: the part.
            given: its arguments by name.
            length: positions stored.
            seen: True if a placeholder is among them.

        Returns:
            True if it is the outermost part.

        Raises:
            UnsupportedModelError: padding, or tokens that are not those that come next.
        """
        if id(model) in self._running:  # an earlier pass ended without its hooks
            self._running.clear()
        outermost = not self._running
        if outermost:
            self._start, self._ids, self._known, self.count = length, None, 0, 0
            self._items, self._deltas, self._unverified = [], None, None
        self._running.append(id(model))
        if self._ids is None and given.get("input_ids") is not None:
            self._ids = known_ids(given, length, self._placeholders, seen)
            self._known, self._fed = len(self._ids), given["input_ids"].shape[-1]
            self._find_items(given, self._ids, seen)
            if given.get("position_ids") is None and not self._counting.alike:
                self._known = 0  # `generate` would give these tokens other positions
        ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        count = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim > 1 else 0
        self.count = self.count or count
        check_padding(given.get("attention_mask"), length + count)
        wrong = self._check_positions(given.get("position_ids"), length)
        check_positions(given.get("cache_position"), length)
        if wrong is not None and not (seen or self._has_placeholder(wrong + 1)):
            self._known = min(self._known, wrong)
        elif wrong is not None:
            self._doubt(length + wrong)
        return outermost

    def _find_items(self, given: Mapping[str, Any], ids: NDArray[np.int32], seen: bool) -> None:
        """Find the images and the like that a pass feeds, and what it feeds besides without being seen."""
        if not seen and not self._has_placeholder(len(ids)):
            return
        found = sorted(item for group in groups(given, ids, self._tokens, self._start) for item in group.items)
        if not found:
            announced = self._media.expected(self._start, ids)
            effects = any(has_effect(*one) for one in given.items() if not one[0].endswith("token_type_ids"))
            if announced is None and effects and not self._has_placeholder(len(ids)):
                self._doubt(self._start)
            found = announced if announced is not None and effects else []
        self._items = found
        odd = odd_type(given, found, self._start, len(ids))
        if odd is not None:
            self._doubt(self._start + odd)

    def _check_positions(self, position_ids: Any, length: int) -> int | None:
        """Return the index of the first token whose positions are not those that come next."""
        if not isinstance(position_ids, torch.Tensor) or position_ids.ndim < 3 or position_ids.shape[-2] != 1:
            return check_positions(position_ids, length, self._counting.first)
        count = position_ids.shape[-1]
        media = np.zeros(count, bool)
        if self._ids is not None:
            media[: len(self._ids)] = np.isin(self._ids[:count], list(self._placeholders))
        for item in self._items:
            media[max(item.start - length, 0) : max(item.stop - length, 0)] = True
        found = check_rope(position_ids, length + self._counting.first, self._media.delta(length), media)
        self._deltas = found.deltas
        for item in self._items:  # a model that was not told of an image's grid counts its tokens like text
            part = found.like_text[max(item.start - length, 0) : max(item.stop - length, 0)]
            if item.kind != "audio" and len(part) > 1 and part.all():
                self._doubt(max(item.start, length))
        return found.wrong

    def _doubt(self, position: int) -> None:
        """Note that from a position on it is not known what rows are computed from."""
        self._unverified = position if self._unverified is None else min(self._unverified, position)

    def check_mask(self, module: torch.nn.Module, mask: Any, kind: LayerKind) -> None:
        """Look at the mask that an attention module gets: token ids are not recorded if it is not plainly causal."""
        if not self._known or (mask is None and self._fed == 1):
            return
        if mask is None:
            how = getattr(getattr(module, "config", None), "_attn_implementation", None)
            plain = getattr(module, "is_causal", True) and how != "eager"
        elif isinstance(mask, torch.Tensor) and mask.ndim == 2:
            plain = bool(mask.all())
        else:
            stop = self._start + self._fed
            blocks = [(item.start, item.stop) for item in self._items if self._start <= item.start < item.stop <= stop]
            plain = is_plain(mask, self._start, self._fed, kind.window, kind.chunk)
            if self._both_ways and blocks:  # older releases forget it behind a prefix
                plain = False
            plain = plain or (bool(blocks) and is_plain(mask, self._start, self._fed, kind.window, kind.chunk, blocks))
        if not plain and not self._has_placeholder(self._known):
            self._known = 0
        elif not plain:
            self._doubt(self._start)

    def end(self, model: torch.nn.Module) -> bool:
        """Leave a part of a model; True if it is the outermost part."""
        if id(model) not in self._running:
            return False
        del self._running[self._running.index(id(model)) :]
        return not self._running

    def recordable(self, stored: int) -> tuple[int, NDArray[np.int32]]:
        """Return the first position of a pass that has ended, and the ids to record from there on.

        Args:
            stored: positions stored now.
        """
        ids = self._ids
        if ids is None or stored - self._start != self._fed:  # it did not reach all layers, or fed something besides
            return self._start, np.empty(0, np.int32)
        return self._start, ids[: self._known]

    def note_media(self, stored: int) -> bool:
        """Record the images and the like of a pass that has ended; return whether there is anything new.

        Args:
            stored: positions stored now.
        """
        if not self._items and self._deltas is None and self._unverified is None:
            return False
        start = self._start
        if stored - start != self._fed:
            return self._media.extend(start, stored, [], None, start)
        return self._media.extend(start, stored, self._items, self._deltas, self._unverified)

    def _has_placeholder(self, stop: int) -> bool:
        """Whether a placeholder is among the first `stop` tokens of the pass."""
        ids = self._ids
        return bool(self._placeholders) and ids is not None and bool(np.isin(ids[:stop], [*self._placeholders]).any())
