"""Pairs of codecs by what they are good for."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import DtypeError

Codecs = str | Sequence[str]
"""The name of a codec for all layers, or one a layer."""

PRESETS: dict[str, tuple[str, str]] = {
    "int8": ("int8", "int8"),
    "fidelity": ("int8-rotated", "int8-rotated"),
    "compact": ("int8-rotated", "int4-rotated"),
    "small": ("int5-rotated", "int4-rotated"),
    "tiny": ("int4-rotated", "int4-rotated"),
    "lossless": ("bf16", "bf16"),
}
"""Codec of keys and codec of values; "lossless" is so for a model that computes in bfloat16."""

SINKS = 4
"""First positions that presets with a recent window keep in 16 bits besides."""

RECENT: dict[str, tuple[int, int]] = {
    "fidelity": (128, SINKS),
    "compact": (256, SINKS),
    "small": (512, SINKS),
    "tiny": (256, SINKS),
}
"""How many of the last and of the first positions a preset keeps in 16 bits besides; others keep none. The coarser the
codes, the further back the loss of a row counts: docs/fidelity.md has both windows for each."""


def preset_codecs(preset: str) -> tuple[str, str]:
    """Return the names of a preset's codecs, of keys and of values.

    Raises:
        DtypeError: there is no such preset.
    """
    if not isinstance(preset, str) or preset not in PRESETS:
        raise DtypeError(
            f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}",
            expected=tuple(PRESETS),
            actual=str(preset),
        )
    return PRESETS[preset]


UNROTATED = {"int8-rotated": "int8"}
"""What takes the place of a rotated codec at the same size where rows can't be rotated."""


def preset_recent(preset: str) -> tuple[int, int]:
    """Return how many of the last and of the first positions a preset keeps in 16 bits besides.

    Raises:
        DtypeError: there is no such preset.
    """
    preset_codecs(preset)
    return RECENT.get(preset, (0, 0))


def chosen_codecs(preset: str, key_codec: Codecs | None, value_codec: Codecs | None) -> tuple[Codecs, Codecs]:
    """Return the codecs of keys and values that a caller asks for: those of a preset unless others are named.

    Raises:
        DtypeError: there is no such preset.
    """
    keys, values = preset_codecs(preset)
    return keys if key_codec is None else key_codec, values if value_codec is None else value_codec


AS_EXACT = ("f16", "f32")
"""Codecs whose rows are at least as exact as those that are kept in 16 bits besides."""


def chosen_recent(
    preset: str, recent_window: int | None, sinks: int | None, key_codec: Codecs, value_codec: Codecs
) -> tuple[int, int]:
    """Return how many of the last and of the first positions a caller asks for: a preset's unless others are named.

    A preset's are left out where nothing would gain by them: rows of f32 would even lose.

    Args:
        preset: its name.
        recent_window, sinks: what the caller asks for.
        key_codec, value_codec: what `chosen_codecs` returned.

    Raises:
        DtypeError: there is no such preset.
    """
    preset_window, preset_sinks = preset_recent(preset)
    if _as_exact(key_codec) and _as_exact(value_codec):
        preset_window = preset_sinks = 0
    return preset_window if recent_window is None else recent_window, preset_sinks if sinks is None else sinks


def _as_exact(codec: Codecs) -> bool:
    names = codec if isinstance(codec, Sequence) and not isinstance(codec, str) else [codec]
    return all(isinstance(name, str) and name in AS_EXACT for name in names)
