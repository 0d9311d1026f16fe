"""Sizes and ages as people write them: 500M, 10GiB, 30d, 12h."""

from __future__ import annotations

import re

import click

NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
POWERS = "KMGTP"
SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Return bytes. K, M, G, T and P are powers of 1024, with or without B or iB."""
    found = NUMBER.fullmatch(text.strip())
    unit = "" if found is None else re.sub(r"i?b$", "", found[2], flags=re.IGNORECASE).upper()
    if found is None or (unit and unit not in POWERS):
        raise click.BadParameter(f"{text!r} is no size, such as 500M or 10GiB")
    return int(float(found[1]) * 1024 ** (POWERS.index(unit) + 1 if unit else 0))


def parse_age(text: str) -> float:
    """Return seconds. Units are s, min (or m), h, d and w."""
    found = NUMBER.fullmatch(text.strip())
    if found is None or found[2] not in SECONDS:
        raise click.BadParameter(f"{text!r} is no age, such as 30d, 12h or 2w")
    return float(found[1]) * SECONDS[found[2]]
