"""Sizes, ages and seconds as people write them: 500M, 10GiB, 30d, 12h, 0.5."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import click

NUMBER = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)")
POWERS = "KMGTP"
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
LARGEST_SIZE = 2**63 - 1
LARGEST_AGE = 1000 * 365 * 86400
SHOWN = 40
"""Characters that a message repeats."""


def parse_size(text: str) -> int:
    """Return bytes. K, M, G, T and P are powers of 1024, with or without B or iB."""
    found = NUMBER.fullmatch(text.strip())
    unit = "" if found is None else re.sub(r"i?b$", "", found[2], flags=re.IGNORECASE).upper()
    if found is None or (unit and unit not in POWERS) or len(unit) > 1:
        raise click.BadParameter(f"{_shown(text)} is no size, such as 500M or 10GiB")
    size = int(Fraction(found[1]) * 1024 ** (POWERS.index(unit) + 1 if unit else 0))
    if size > LARGEST_SIZE:
        raise click.BadParameter(f"{_shown(text)} is more than any disk holds")
    return size


def parse_age(text: str) -> float:
    """Return seconds. Units are s, min (or m), h, d and w."""
    found = NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in UNITS:
        raise click.BadParameter(f"{_shown(text)} is no age, such as 30d, 12h or 2w")
    age = Fraction(found[1]) * UNITS[found[2]]
    if age > LARGEST_AGE:
        raise click.BadParameter(f"{_shown(text)} is longer than 1000 years")
    return float(age)


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A finite number of seconds within bounds."""

    name = "seconds"

    def __init__(self, least: float, most: float) -> None:
        self.least = least
        self.most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            self.fail(f"{_shown(str(value))} is not a number of seconds", param, ctx)
        if math.isnan(seconds) or not self.least <= seconds <= self.most:
            self.fail(f"{_shown(str(value))} is not within {self.least:g} and {self.most:g} seconds", param, ctx)
        return seconds


SECONDS_FROM_ZERO = Seconds(0, 86400 * 365)


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
