"""The longest prefix of a prompt among all segments: hashes find where to look, token ids decide.

One indexed query for each step of a binary search finds the deepest block boundary whose prefix is stored: a segment's
parents are stored as long as it is, so all shallower boundaries are. From there on segments are walked as a radix tree.
Segments that continue one parent at one position are sorted by their first token ids, so the one with the longest
common prefix is a neighbour of the prompt's place among them.

A model with states continues at a checkpoint alone. Of each checkpoint, the index has the hash of the prefix that ends
there, and that of the last block boundary before: the last one within the common prefix is looked for block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..geometry import BLOCK_TOKENS
from .hashing import Prompt, common_length
from .index import Index
from .segment import Segment

TokenReader = Callable[[Segment, int], NDArray[np.int32]]
"""Returns a segment's own token ids from its first on, at most so many; none where its file can't be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The longest prefix of a prompt that can be restored."""

    length: int
    """Positions, from 0, whose keys and values are stored. 0 if nothing matches."""

    common: int
    """Positions whose token ids are alike; more than `length` where a model with states has no checkpoint there."""

    chain: tuple[Segment, ...]
    """Segments that hold them, the one with position 0 first. Empty if nothing matches."""

    @property
    def segment(self) -> Segment | None:
        """The segment that holds the last of them; None if nothing matches."""
        return self.chain[-1] if self.chain else None

    @property
    def path(self) -> str | None:
        """Path of that segment's file: its first `length` positions are those of the prompt."""
        return self.chain[-1].path if self.chain else None

    @property
    def seconds(self) -> float:
        """Time that computing them takes, as measured for this namespace."""
        last = self.segment
        return 0.0 if last is None or not last.positions else last.seconds / last.positions * self.length


class Search:
    """One search of a prompt.

    Args:
        index: the library's.
        namespace: the namespace's number.
        prompt: what to look for.
        tokens: reads segments' token ids.
    """

    def __init__(self, index: Index, namespace: int, prompt: Prompt, tokens: TokenReader) -> None:
        self._index = index
        self._namespace = namespace
        self._prompt = prompt
        self._tokens = tokens
        self._matched: dict[int, int] = {}
        """Position up to which a segment, and all of its chain, has the prompt's ids."""
        self._visited: set[int] = set()
        self._best: tuple[int, Segment] | None = None

    def run(self) -> Match:
        """Return the longest match."""
        block = self._index.deepest(self._prompt.hash, self._prompt.blocks)
        boundary = block * BLOCK_TOKENS
        found = self._index.candidates(self._prompt.hash(block)) if block else []
        for segment in found:
            self._visit(segment, boundary)
        for parent, start in {(segment.parent_id, segment.start) for segment in found} or {(0, 0)}:
            # Siblings that share the boundary's block with the candidates, and more of the prompt than they.
            self._visit_all(parent, start, boundary)
        return self._restorable()

    def _visit_all(self, parent: int, start: int, boundary: int) -> None:
        for segment in self._index.neighbours(self._namespace, parent, start, self._prompt.head(start)):
            self._visit(segment, boundary)

    def _visit(self, segment: Segment, boundary: int) -> None:
        if segment.id in self._visited:
            return
        self._visited.add(segment.id)
        end = self._common(segment)
        if end > segment.start and (self._best is None or end > self._best[0]):
            self._best = end, segment
        if segment.children and end > segment.start:
            if end < len(self._prompt):
                self._visit_all(segment.id, end, boundary)
            # A session that found the segment busy made a child at its end; then the segment grew, maybe by the same.
            for child in self._index.children(self._namespace, segment.id, max(boundary, segment.start + 1), end):
                self._visit(child, boundary)

    def _common(self, segment: Segment) -> int:
        """Return the position up to which a segment's chain has the prompt's ids; at most its start if it does not
        follow on."""
        known = self._matched.get(segment.id)
        if known is not None:
            return known
        chain = self._index.chain(segment)
        if chain[0].parent_id or any(one.broken for one in chain):
            return 0
        end = 0
        for number, one in enumerate(chain):
            if one.start > end:
                break
            if one.id in self._matched:
                mine = self._matched[one.id]
            else:
                own = self._tokens(one, min(one.stop, len(self._prompt)) - one.start)
                mine = one.start + common_length(own, self._prompt.ids[one.start :])
                self._matched[one.id] = mine
            next_start = chain[number + 1].start if number + 1 < len(chain) else one.stop
            end = min(mine, next_start)
        else:
            return end
        self._matched[segment.id] = 0
        return 0

    def _restorable(self) -> Match:
        if self._best is None:
            return Match(length=0, common=0, chain=())
        common, segment = self._best
        chain = self._index.chain(segment)
        if segment.checkpoints is None:
            return Match(length=common, common=common, chain=tuple(one for one in chain if one.start < common))
        length, last = self._last_checkpoint(common)
        return Match(length=length, common=common, chain=tuple(self._index.chain(last)) if last is not None else ())

    def _last_checkpoint(self, common: int) -> tuple[int, Segment | None]:
        """Return the last checkpoint of any segment within the prompt's first `common` ids, and that segment.

        It may be of another segment than the one with most ids of the prompt.
        """
        prompt = self._prompt
        for block in range(common // BLOCK_TOKENS, -1, -1):
            anchor = prompt.hash(block)
            below = min(common, (block + 1) * BLOCK_TOKENS - 1) + 1
            while (position := self._index.last_point(anchor, below)) is not None:
                for segment in self._index.pointed(prompt.hash_at(position)):
                    # A segment that continues another one has a checkpoint where it begins, before ids of its own.
                    if segment.namespace_id == self._namespace and self._common(segment) >= position:
                        return position, segment
                below = position
        return 0, None
