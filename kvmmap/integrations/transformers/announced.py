"""States of a cache as transformers' models use them, for the model that the cache was opened with alone."""

from __future__ import annotations

from typing import Any

import torch

from .sequence import WatchedCache


class AnnouncedStates(WatchedCache):
    """A cache whose states are used within forward passes that hooks have announced."""

    @property
    def _states_alone(self) -> bool:
        """True if the model keeps states, and no rows."""
        raise NotImplementedError

    def _check_announced(self) -> None:
        """Raise ModelMismatchError outside of a pass of the model that the cache was opened with."""
        raise NotImplementedError

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Update the state of a layer's convolution, as transformers' caches do.

        Raises:
            ModelMismatchError: another model object runs than the one that the cache was opened with.
        """
        self._check_announced()
        found: torch.Tensor = super().update_conv_state(*args, **kwargs)
        return found

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Update a layer's recurrent state, as transformers' caches do; raises as `update_conv_state`."""
        self._check_announced()
        found: torch.Tensor = super().update_recurrent_state(*args, **kwargs)
        return found

    def get_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Return the state of a layer's convolution, as transformers' caches do; raises as `update_conv_state`."""
        self._check_announced()
        found: torch.Tensor | None = super().get_conv_state(*args, **kwargs)
        return found

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """Return whether a layer has states, as transformers' caches do; raises as `update_conv_state` if one asks."""
        if layer_idx is not None and self._states_alone:
            self._check_announced()
        return bool(super().has_previous_state(layer_idx, *args, **kwargs))

    @property
    def is_compileable(self) -> bool:
        """No: it is no part of a compiled graph."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep states alone; none, if all do: `generate` takes such a cache for one without a length."""
        return [not self._states_alone and found for found in super().is_linear]
