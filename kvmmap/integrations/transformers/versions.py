"""Which releases of transformers this integration is tested with, and what a cache argument is called in them.

Knows no models and no caches.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import transformers
from transformers import GenerationMixin

OLDEST = (5, 20)
"""The first release that is tested, as (major, minor)."""

NEWEST = (5, 24)
"""The last release that is tested, as (major, minor)."""


def _argument() -> str:
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


CACHE_ARGUMENT = _argument()
"""The argument of `generate` and of models that takes a cache: "cache" since 5.24, "past_key_values" before."""


CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What models call their cache: since transformers 5.24, before, and in state space models before."""


def argument_of(model: Any) -> str:
    """Return what a model's forward pass, and so its `generate`, calls the cache; `CACHE_ARGUMENT` if it does not say.

    Args:
        model: a model, its config, or None.
    """
    forward = getattr(model, "forward", None)
    known = () if forward is None else inspect.signature(forward).parameters
    return next((name for name in (CACHE_ARGUMENT, *CACHE_NAMES) if name in known), CACHE_ARGUMENT)


def check_version(version: str = transformers.__version__) -> None:
    """Warn if a release is outside of the tested range.

    Args:
        version: as `transformers.__version__` has it.
    """
    found = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= found <= NEWEST:
        warnings.warn(
            "kvmmap is tested with transformers {}.{} to {}.{}, and this is {}: check its results, or install "
            "kvmmap[transformers], which brings a tested release".format(*OLDEST, *NEWEST, version),
            RuntimeWarning,
            stacklevel=2,
        )
