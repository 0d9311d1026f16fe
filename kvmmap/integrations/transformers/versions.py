"""Which releases of transformers this integration is tested with, and what a cache argument is called in them.

Knows no models and no caches.
"""

from __future__ import annotations

import inspect
import warnings

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
