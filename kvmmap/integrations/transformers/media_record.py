"""What a cache knows of the images and the like in its sequence, and of positions that they shift.

Kept with the cache's notes, so that another process can tell whether a prompt has the same images. Models with several
positions a token (M-RoPE) count an image's tokens by its grid, and text behind it continues from there: how far that is
from where rows are stored is a *delta*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .media import Group, Item


class MediaRecord:
    """Images, videos and audio of one sequence."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        """What is stored, by position."""
        self.deltas: list[tuple[int, int]] = []
        """[first position, delta of the positions from there on], by position; none before the first one."""
        self.until: int | None = None
        """The position from which on nothing can be told of what rows were computed from; None: there is none."""
        self.announced: tuple[Group, ...] = ()
        """What `generate` was called with, before forward passes feed it."""
        self._prompt: NDArray[Any] = np.empty(0, np.int32)

    @classmethod
    def of(cls, notes: Mapping[str, Any] | None, length: int) -> Self:
        """Return what `notes` has returned, for the first `length` positions."""
        made = cls()
        if notes:
            made.items = [Item(*item) for item in notes.get("items", [])]
            made.deltas = [(first, delta) for first, delta in notes.get("deltas", [])]
            made.until = notes.get("until")
            made.cut(length)
        return made

    def notes(self) -> dict[str, Any]:
        """Return all of it as JSON has it; empty if there is nothing."""
        found: dict[str, Any] = {}
        if self.items:
            found["items"] = [list(item) for item in self.items]
        if self.deltas:
            found["deltas"] = [list(delta) for delta in self.deltas]
        if self.until is not None:
            found["until"] = self.until
        return found

    def up_to(self, length: int) -> MediaRecord:
        """Return an independent record of the first `length` positions."""
        return self.of(self.notes(), length)

    def become(self, other: MediaRecord) -> None:
        """Take over what another record has."""
        self.items, self.deltas, self.until = list(other.items), list(other.deltas), other.until

    def cut(self, length: int) -> None:
        """Forget what is not among the first `length` positions."""
        self.items = [item for item in self.items if item.stop <= length]
        self.deltas = [delta for delta in self.deltas if delta[0] <= length]
        if self.until is not None and self.until >= length:
            self.until = None

    def delta(self, position: int) -> int:
        """Return how far the position of a text token is from where it is stored."""
        return next((delta for first, delta in reversed(self.deltas) if first <= position), 0)

    # What generate is called with

    def announce(self, ids: NDArray[Any], found: Sequence[Group]) -> None:
        """Note what a prompt consists of; passes that feed its ids feed its items."""
        self._prompt, self.announced = ids, tuple(found)

    def expected(self, start: int, ids: NDArray[Any]) -> list[Item] | None:
        """Return the announced items that begin or go on among new tokens; None if these were not announced.

        Args:
            start: the position of the first new token.
            ids: of the new tokens.
        """
        stop = start + len(ids)
        if not self.announced or not np.array_equal(self._prompt[start:stop], ids):
            return None
        found = [item for group in self.announced for item in group.items]
        return sorted(item for item in found if item.stop > start and item.start < stop)

    # What passes have fed

    def extend(
        self, start: int, stop: int, items: Sequence[Item], deltas: NDArray[Any] | None, unverified: int | None
    ) -> bool:
        """Take note of a pass over positions [start, stop); return whether the notes have changed.

        Args:
            start, stop: positions.
            items: what it fed, those that end in it count.
            deltas: behind each of its positions; None if the model has one position a token.
            unverified: the first position that something else was fed for.
        """
        before = self.notes()
        new = [item for item in items if start < item.stop <= stop]
        self.items += new
        if deltas is not None:
            for position in (*(item.stop for item in new), stop):
                delta = int(deltas[position - start - 1])
                if delta != self.delta(position):
                    self.deltas.append((position, delta))
        if unverified is not None and self.until is None:
            self.until = unverified
        if all(item.stop <= stop for group in self.announced for item in group.items):
            self.announced = ()
        return self.notes() != before

    def agreeing(self, count: int, ids: NDArray[Any], placeholders: frozenset[int], prompt: Sequence[Item]) -> int:
        """Return how many of the first `count` tokens, whose ids agree, stand for the same images as well.

        Args:
            count: tokens.
            ids: of the prompt.
            placeholders: token ids that stand for a part of an image.
            prompt: the prompt's items.
        """
        if self.until is not None:
            count = min(count, self.until)
        same = set(self.items) & set(prompt)
        covered = np.zeros(len(ids), bool)
        for item in same:
            covered[item.start : item.stop] = True
        bare = np.isin(ids[:count], list(placeholders)) & ~covered[:count]
        if bare.any():
            count = int(np.argmax(bare))
        return self.whole(count, prompt)

    def whole(self, count: int, prompt: Sequence[Item] = ()) -> int:
        """Return the greatest number of positions, at most `count`, that ends within no item."""
        for item in sorted({*self.items, *prompt}, reverse=True):
            if item.start < count < item.stop:
                count = item.start
        return count
