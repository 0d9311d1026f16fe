"""What of a model's modules changes what they compute, besides weights: numbers they hold, and parts without weights.

A norm's epsilon, an attention's scale or a factor of the embeddings are plain Python numbers, computed from the config
when a module is made, and can be set to anything later. They are compared with those of a model of the same class and
config, made on the meta device: what differs is part of a model's identity, whichever release of transformers names it.
Hooks and replaced methods are not looked at: most of them observe, and nothing tells them from those that change
numbers. Knows modules; nothing of caches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_PLAIN = (int, float, bool, str, type(None))

_IRRELEVANT = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "gradient_checkpointing",
        "in_features",
        "name_or_path",
        "num_embeddings",
        "num_labels",
        "out_features",
        "output_attentions",
        "output_hidden_states",
        "p",
        "pad_token_id",
        "padding_idx",
        "problem_type",
        "rope_deltas",  # of the last prompt; each cache keeps its own
        "training",
        "use_cache",
        "vocab_size",
    }
)
"""Attributes that keys and values don't depend on, or that weights tell by their shapes: a model whose embeddings were
resized and one that was loaded so are the same. Rates of dropout are looked at in training mode (`randomness`)."""

_ROTARY = ("attention_scaling", "max_seq_len_cached")
"""Attributes of rotary modules: a factor that is looked at with their frequencies, and one that follows the length."""


class Behavior:
    """What the modules of a model were set to at one moment."""

    def __init__(self, body: torch.nn.Module) -> None:
        self._numbers = [(held, name, value) for held in map(vars, body.modules()) for name, value in _numbers(held)]

    def unchanged(self) -> bool:
        """Whether all of it is still what it was."""
        return all(held.get(name, ...) is value for held, name, value in self._numbers)


def changed_settings(body: torch.nn.Module) -> dict[str, Any]:
    """Return the numbers and parts of a model that its config does not give, by name; plain JSON.

    Empty, too, if no second model can be made of the config.
    """
    made = _made_anew(body)
    if made is None:
        return {}
    found: dict[str, Any] = {}
    modules = dict(body.named_modules())
    for path, expected in made.named_modules():
        module = modules.get(path)
        if module is None:
            continue
        if type(module) is not type(expected):
            if _computes_alone(module) and _computes_alone(expected):
                found[path] = f"{type(module).__module__}.{type(module).__qualname__}"
            continue
        right = dict(_numbers(vars(expected)))
        for name, value in _numbers(vars(module)):
            if name in right and not _same(value, right[name]):
                found[f"{path}.{name}".lstrip(".")] = list(value) if isinstance(value, tuple) else value
    return found


def state(body: torch.nn.Module) -> list[str]:
    """Return all numbers of a model's modules, to be compared within a process."""
    return [
        f"{path}.{name} {value!r}" for path, module in body.named_modules() for name, value in _numbers(vars(module))
    ]


def _numbers(held: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A module's plain attributes that a pass computes with."""
    for name, value in held.items():
        if (
            not name.startswith("_")
            and name not in _IRRELEVANT
            and "drop" not in name
            and not name.endswith(_ROTARY)
            and (type(value) in _PLAIN or (type(value) in (tuple, list) and all(type(one) in _PLAIN for one in value)))
        ):
            yield name, value


def _made_anew(body: torch.nn.Module) -> torch.nn.Module | None:
    """A model of the same class and config without weights; None if its class can't be made of a config alone."""
    kind: Any = type(body)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = kind(copy.deepcopy(body.config))
    except Exception:  # a class of another package may raise anything
        return None
    return made if isinstance(made, torch.nn.Module) else None


def _computes_alone(module: torch.nn.Module) -> bool:
    """Whether a module has no weights and no parts, as activation functions: replaced ones are no wrappers."""
    return not (module._parameters or module._buffers or module._modules)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)
