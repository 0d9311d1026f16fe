"""What makes a model's passes random while it is in training mode: dropout, skipped layers, jitter.

Knows modules; nothing of caches.
"""

from __future__ import annotations

import torch


class RandomParts:
    """The modules of a model that drop or disturb numbers in training mode."""

    def __init__(self, body: torch.nn.Module) -> None:
        self._found = [
            (name, module, rate)
            for name, module in body.named_modules()
            for rate, value in vars(module).items()
            if isinstance(value, float | int)
            and not isinstance(value, bool)
            and ("drop" in rate or "jitter" in rate or (rate == "p" and "dropout" in type(module).__name__.lower()))
        ]

    def active(self) -> str | None:
        """Return the first one that is active: "layers.0.self_attn (attention_dropout=0.1)"; None if none is."""
        for name, module, rate in self._found:
            if module.training and (value := getattr(module, rate, 0)):
                return f"{name or type(module).__name__} ({rate}={value})"
        return None
