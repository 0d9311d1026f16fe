"""Pairs of codecs by what they are good for."""

from __future__ import annotations

from ..errors import DtypeError

PRESETS: dict[str, tuple[str, str]] = {
    "int8": ("int8", "int8"),
    "fidelity": ("int8-rotated", "int8-rotated"),
    "compact": ("int8-rotated", "int4-rotated"),
    "small": ("int5-rotated", "int4-rotated"),
    "tiny": ("int4-rotated", "int4-rotated"),
    "lossless": ("bf16", "bf16"),
}
"""Codec of keys and codec of values; "lossless" is so for a model that computes in bfloat16."""


def preset_codecs(preset: str) -> tuple[str, str]:
    """Return the names of a preset's codecs, of keys and of values.

    Raises:
        DtypeError: there is no such preset.
    """
    if preset not in PRESETS:
        raise DtypeError(
            f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}",
            expected=tuple(PRESETS),
            actual=str(preset),
        )
    return PRESETS[preset]
