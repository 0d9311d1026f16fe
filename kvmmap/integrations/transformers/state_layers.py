"""Layers of a model's cache that keep states: transformers' own, beside rows of ours, or alone.

The tensors that a model works with are private: decoding writes into them, also without a call of the cache. What of
them is stored, and when, is `states`' business.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from .layer import KvmmapLayer
from .resident import ResidentLayer


class WithStates:
    """What layers with rows and states have in common."""

    is_compileable = False
    """No: it is no part of a compiled graph."""

    is_croppable = False
    """No: states can't be rolled back."""

    number_of_states = 1

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Make the states; rows were reserved when the cache was made."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)  # type: ignore[arg-type]

    def offload(self) -> None:
        """Nothing to do: states stay with the model."""

    def prefetch(self) -> None:
        """Nothing to do."""


class KvmmapHybridLayer(WithStates, KvmmapLayer, LinearAttentionLayer):
    """A layer with rows, as `KvmmapLayer`, and states, as transformers' `LinearAttentionLayer`."""


class ResidentHybridLayer(WithStates, ResidentLayer, LinearAttentionLayer):
    """A layer with rows, as `ResidentLayer`, and states, as transformers' `LinearAttentionLayer`."""


def clear_states(layer: LinearAttentionLayer, number_of_states: int) -> None:
    """Make a layer's states as they are before the first token."""
    LinearAttentionLayer.__init__(layer, number_of_states=number_of_states)


def state_tensors(layer: LinearAttentionLayer) -> dict[str, torch.Tensor]:
    """Return the states that a layer has, by the names that they are stored under."""
    found = {}
    for kind, tensors, made in (
        ("conv", layer.conv_states, layer.is_conv_states_initialized),
        ("recurrent", layer.recurrent_states, layer.is_recurrent_states_initialized),
    ):
        for number, tensor in tensors.items():
            if made[number] and tensor is not None:
                found[f"{kind}.{number}"] = tensor
    return found


def put_state(layer: Any, name: str, tensor: torch.Tensor) -> None:
    """Set a state of a layer that was cleared, as if the model had made it."""
    kind, _, index = name.partition(".")
    number = int(index)
    if kind == "conv":
        layer.conv_states[number] = tensor
        layer.is_conv_states_initialized[number] = True
        layer.conv_kernel_size[number] = tensor.shape[-1]
        layer.has_previous_state[number] = True
        if layer.device is None:
            layer.dtype, layer.device = tensor.dtype, tensor.device
    else:
        layer.recurrent_states[number] = tensor
        layer.is_recurrent_states_initialized[number] = True
