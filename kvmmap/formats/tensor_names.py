"""Names of tensors: which layer, and which of its arrays, one stands for. And names of dtypes.

    layers.3.keys, layers.3.key_codes, model.layers.3.self_attn.value_states, past_key_values.3.key, 3.v
    key_cache.3, value_states_3

Exports of kvmmap are of the first form; the others are what people call the tensors of a transformers DynamicCache.
"""

from __future__ import annotations

import re

from ..geometry import MAX_LAYERS

KINDS = {"k": "key", "ks": "key", "key": "key", "keys": "key", "v": "value", "vs": "value", "value": "value"}
KINDS["values"] = "value"
STORED = ("codes", "scales")
"""What follows "key_" and "value_" in the names of quantised arrays."""
WITHOUT_MEANING = ("cache", "states")

_NUMBER = re.compile("0*([0-9]{1,5})")


def place_of_tensor(name: str) -> tuple[int, str] | None:
    """Return layer and array ("keys", "values", "key_codes" ...) of a tensor; None if its name does not tell."""
    words = re.split(r"[._/]", name)
    if (number := _layer(words[-1])) is not None:
        words.pop()
        if len(words) > 1 and words[-1] in WITHOUT_MEANING:
            words.pop()
        kind = KINDS.get(words[-1]) if words else None
        return None if kind is None else (number, f"{kind}s")
    part = words.pop() if words[-1] in STORED + WITHOUT_MEANING else ""
    kind = KINDS.get(words.pop()) if words else None
    number = next((found for word in reversed(words) if (found := _layer(word)) is not None), None)
    if kind is None or number is None:
        return None
    return number, f"{kind}_{part}" if part in STORED else f"{kind}s"


def _layer(word: str) -> int | None:
    match = _NUMBER.fullmatch(word)
    return int(match[1]) if match and int(match[1]) < MAX_LAYERS else None
