"""What a cache knows of the source that its rows were computed with: see `sources`.

Kept with the cache's notes, so that another process can tell whether a prompt has the same source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Self


class SourceRecord:
    """The source of one sequence."""

    def __init__(self) -> None:
        self.known = False
        """True once a pass has computed rows with a source, or without one."""
        self.inputs: str | None = None
        """A digest of the encoder's inputs; None: there are none, or they are not known."""
        self.outputs: list[str] = []
        """Digests of the encoder's output; several where processes computed it with sums in another order."""
        self.runs: list[tuple[int, str]] = []
        """[first position, digest of which parts of the source the positions from there on see], by position."""

    @classmethod
    def of(cls, notes: Mapping[str, Any] | None, length: int) -> Self:
        """Return what `notes` has returned, for the first `length` positions."""
        made = cls()
        if notes:
            made.known, made.inputs = True, notes.get("inputs")
            made.outputs = list(notes.get("outputs", []))
            made.runs = [(first, digest) for first, digest in notes.get("runs", [])]
            made.cut(length)
        return made

    def notes(self) -> dict[str, Any]:
        """Return all of it as JSON has it; empty if nothing is known."""
        runs = [list(run) for run in self.runs]
        return {"inputs": self.inputs, "outputs": list(self.outputs), "runs": runs} if self.known else {}

    def become(self, inputs: str | None, output: str | None) -> None:
        """Note the source of the first positions."""
        self.known, self.inputs, self.outputs, self.runs = True, inputs, [] if output is None else [output], []

    @property
    def empty(self) -> bool:
        """Whether rows were computed without a source."""
        return self.known and self.inputs is None and not self.outputs

    def same(self, inputs: str | None, output: str | None) -> bool | None:
        """Return whether a source is the one that rows were computed with; None: that can't be told.

        Args:
            inputs: a digest of the encoder's inputs, if they are known.
            output: a digest of its output, likewise. One that agrees is enough: the same inputs give an output that
                may differ by the order of sums from one machine to the next.
        """
        if not self.known:
            return None
        if inputs is None and output is None:
            return self.empty
        if (inputs is not None and inputs == self.inputs) or (output is not None and output in self.outputs):
            return True
        comparable = self.empty or (inputs and self.inputs) or (output and self.outputs)
        return False if comparable else None

    def cut(self, length: int) -> None:
        """Forget what is not about the first `length` positions."""
        self.runs = [run for run in self.runs if run[0] < length]
        if not length:
            self.known, self.inputs, self.outputs = False, None, []

    def extend(self, start: int, digests: Sequence[str]) -> bool:
        """Note which parts of the source new positions see; return whether that is another than before.

        Args:
            start: the first new position.
            digests: of each of them.
        """
        before, self.runs = self.runs, [run for run in self.runs if run[0] < start]
        at = start
        for digest, run in itertools.groupby(digests):
            if not self.runs or self.runs[-1][1] != digest:
                self.runs.append((at, digest))
            at += len(list(run))
        return self.runs != before

    def agreeing(self, digests: Sequence[str]) -> int:
        """Return how many tokens from the start see the same parts of the source as those that are stored.

        Args:
            digests: of each token of a prompt.
        """
        stops = [first for first, _ in self.runs[1:]] + [len(digests)]
        for (first, digest), stop in zip(self.runs, stops, strict=True):
            for position in range(first, min(stop, len(digests))):
                if digests[position] != digest:
                    return position
        return len(digests)
