"""A sequence whose prompt may have images, videos or audio: which of these are stored, and what a model is told.

What rows are computed from is told by forward passes (`recording`) and by `generate` (`generation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import UnsupportedModelError
from .arguments import has_effect
from .checkpointed import CheckpointedSequence
from .dispatch import images_see_both_ways
from .indexed import IndexedLayer
from .media import digested, groups, media_tokens, without_first
from .media_record import MediaRecord
from .opening import NOTES, note_media


class IllustratedSequence(CheckpointedSequence):
    """What a cache of a model that takes images, videos or audio can do besides."""

    placeholders: frozenset[int]
    """Token ids that stand for a part of an image, a video or audio."""

    _media: MediaRecord
    _media_tokens: Mapping[str, frozenset[int]]

    def _make_media(self, config: Any, metadata: Mapping[str, Any], length: int) -> None:
        """Read what is recorded of the first `length` positions."""
        self._media_tokens = media_tokens(config)
        self.placeholders = frozenset().union(*self._media_tokens.values())
        self._both_ways = bool(self._media_tokens) and images_see_both_ways(config)
        notes = (metadata.get(NOTES) or {}).get("media") if self.placeholders else None
        self._media = MediaRecord.of(notes, length)
        for layer in self._layers:
            if isinstance(layer, IndexedLayer):
                layer.first_shifted = min([item.start for item in self._media.items], default=self._media.until)

    def _cut_notes(self, length: int) -> None:
        """Forget what is not about the first `length` positions."""
        self._media.cut(length)

    def _copy_notes(self, target: QuantizedKvCache, length: int) -> None:
        """Record with a copy of the first positions what they were computed from."""
        if self._media.notes():
            note_media(target, self._media.up_to(length).notes())

    def _note_media(self) -> None:
        """Keep what is known of images with the rows."""
        note_media(self._own, self._media.notes())

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer."""
        raise NotImplementedError

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len]; -1 where they are not known."""
        raise NotImplementedError

    @property
    def _has_placeholder(self) -> bool:
        return bool(self.placeholders) and bool(np.isin(self.token_ids, [*self.placeholders]).any())

    @property
    def position_ids(self) -> torch.Tensor:
        """The positions of all index keys, [3, 1, n]; there are none without index keys, and before the first pass.

        transformers 5.20 has Qwen4-Exp keep them here, later releases in the first layer with index keys.
        """
        found = next((layer.indexer_position_ids for layer in self._layers if isinstance(layer, IndexedLayer)), None)
        if found is None:
            raise AttributeError("position_ids")
        return found

    @position_ids.setter
    def position_ids(self, positions: torch.Tensor) -> None:
        for layer in self._layers:
            if isinstance(layer, IndexedLayer):
                layer.indexer_position_ids = positions
                break

    def agreeing(self, count: int, ids: NDArray[Any], inputs: Mapping[str, Any]) -> int:
        """Return how many of the first `count` tokens of a prompt stand for the same images, videos and audio as here.

        Args:
            count: tokens whose ids are those that are stored.
            ids: those of the prompt, [n].
            inputs: what a processor made of the prompt, by name: pixel values, grids and the like. A placeholder whose
                image is not among them, or not known here, does not agree.
        """
        if not self.placeholders:
            # Kosmos does not name the tokens that stand for an image: nothing is reused beside one.
            return 0 if any(has_effect(*one) for one in inputs.items()) else count
        prompt = digested(inputs, ids, self._media_tokens)
        return self._media.agreeing(count, ids, self.placeholders, prompt)

    def announce(self, ids: NDArray[Any], inputs: Mapping[str, Any]) -> None:
        """Take note of what `generate` was called with; hooks call it.

        Args:
            ids: of the whole prompt, [n].
            inputs: the other arguments of the model by name.

        Raises:
            UnsupportedModelError: the prompt has other images, where rows are stored, than these were computed from.
        """
        if not self.placeholders:
            return
        found = groups(inputs, ids, self._media_tokens)
        self._media.announce(ids, found)
        for item in sorted(item for group in found for item in group.items):
            if item.start < self._length and item not in self._media.items:
                raise UnsupportedModelError(
                    f"the {item.kind} at position {item.start} of the prompt is not the one that the cache holds "
                    "there, or it is not known which one that is: give the prompt with all that the processor made of "
                    "it to reuse(cache, **inputs), and then to generate",
                    actual=item.digest,
                )

    def without_stored(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `generate` without what belongs to images that are stored: these are not encoded."""
        return without_first(inputs, self._media.announced, self._length)

    def restore_deltas(self, holders: list[Any]) -> None:
        """Tell a model with several positions a token how far those of text are from where it is stored.

        Args:
            holders: the parts of the model that keep this in an attribute `rope_deltas`.
        """
        if not self._length:
            return
        new = any(item.stop > self._length for group in self._media.announced for item in group.items)
        known = self._media.deltas or not self._has_placeholder
        for part in holders:
            device = next(part.parameters()).device
            delta = torch.tensor([[self._media.delta(self._length)]], device=device)
            # None: the model computes positions of the whole prompt anew, from the grids of all of its images.
            part.rope_deltas = None if new or not known else delta
