"""The states of one sequence: the tensors that a model works with, taken and stored as checkpoints, and restored.

States hold for one position. A pass that fails leaves them somewhere between two, so from its start to its end they
are *dirty*, and only a checkpoint restores them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import LinearAttentionLayer

from ...cache import QuantizedKvCache
from ...errors import UnsupportedModelError
from ...state_spec import StateSpec
from .state_layers import clear_states, put_state, state_tensors

SINGLE_TOKENS = frozenset({"jamba", "zamba", "mamba", "falcon_mamba"})
"""Models that drop their recurrent state, in transformers, where a pass with several tokens continues a sequence."""

LEAST_INTERVAL = 64
"""Positions at least between two checkpoints that nobody asked for."""


class SequenceStates:
    """The states of a sequence.

    Args:
        layers: those that have states, by index.
        numbers: how many states each has, as transformers counts.
        saved: a cache that is only read, if there is one.
        own: the cache that is appended to.
        device: of the model.
        settle: is called before a checkpoint is written, and waits until all positions are in `own`.
    """

    def __init__(
        self,
        layers: Mapping[int, LinearAttentionLayer],
        numbers: Mapping[int, int],
        saved: QuantizedKvCache | None,
        own: QuantizedKvCache,
        device: torch.device,
        settle: Callable[[], None],
    ) -> None:
        self._layers = layers
        self._numbers = numbers
        self._saved = saved
        self._own = own
        self._device = device
        self._settle = settle
        self.specs: Sequence[StateSpec] = own.states
        self.dirty = False
        """True from the start of a pass to its end."""
        self._prompt = False  # the last pass had several tokens
        rows = sum(layer.position_bytes for layer in own.geometry.layers)
        self._interval = max(LEAST_INTERVAL, math.ceil(own.checkpoint_bytes / max(1, rows)))

    # Passes

    def begin(self, model_type: str, count: int, length: int, kept: int) -> None:
        """Take note of a pass of `count` tokens that continues `length` positions.

        Raises:
            UnsupportedModelError: the model would drop its states.
        """
        if count > 1 and length and model_type in SINGLE_TOKENS:
            raise UnsupportedModelError(
                f"{model_type} drops its recurrent state in transformers when {count} tokens continue a sequence, so "
                f"its results would be wrong: feed one token at a time after the first pass, as generate does with "
                f"prefill_chunk_size=1 ({length} positions are stored)",
                expected=1,
                actual=count,
            )
        if self._prompt and count == 1:
            self.save(length, kept)  # the end of the prompt, before the first new token
        self._prompt = count > 1
        self.dirty = True

    def end(self, length: int, kept: int) -> None:
        """Take note of the end of a pass that reached all layers."""
        self.dirty = False
        if length - self.last(length, kept) >= self._interval and not self._prompt:
            self.save(length, kept)

    # Checkpoints

    def last(self, length: int, kept: int) -> int:
        """Return the greatest position, at most `length`, that has a checkpoint, or begins what is appended."""
        if length >= kept:
            found = max([one.position for one in self._own.checkpoints if one.position <= length - kept], default=0)
            if found or self._saved is not None or not kept:
                return kept + found
        assert self._saved is not None
        return self._saved.restorable(length)

    def save(self, length: int, kept: int, *, pin: bool = False) -> None:
        """Make the present states a checkpoint, unless there is one at their position."""
        if self.dirty or not length:
            return
        here = [one for one in self._own.checkpoints if one.position == length - kept]
        if not here:
            if length == kept:  # as in the file that is only read
                return
            self._settle()
            self._own.write_states(self.take())
        if not here or pin:
            self._own.checkpoint(pin=pin)

    def take(self) -> list[Any]:
        """Return the tensors as they are, on the CPU, in the order of the specs."""
        held = {number: state_tensors(layer) for number, layer in self._layers.items()}
        return [held[spec.layer][spec.name].detach().cpu() for spec in self.specs]

    def restore(self, position: int, kept: int) -> None:
        """Put the states of a checkpoint, or of the beginning, in place of the present ones."""
        for number, layer in self._layers.items():
            clear_states(layer, self._numbers[number])
        self.dirty = self._prompt = False
        if not position:
            return
        if position > kept or self._saved is None:
            found = self._own.read_states(position - kept)
        else:
            found = self._saved.read_states(position)
        for (number, name), array in found.items():
            put_state(self._layers[number], name, as_tensor(array).to(self._device))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return an array of a state as a tensor that shares its memory."""
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
