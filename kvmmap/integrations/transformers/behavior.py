"""What of a model's modules changes what they compute, besides weights: numbers they hold, hooks, replaced methods.

A norm's epsilon, an attention's scale or a factor of the embeddings are plain Python numbers, computed from the config
when a module is made, and can be set to anything later. They are compared with those of a model of the same class and
config, made on the meta device: what differs is part of a model's identity, whichever release of transformers names it.
Of hooks and replaced `forward` methods only the names can be compared between processes. Knows modules; nothing of
caches.
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

_HARMLESS = ("kvmmap", "torch", "transformers", "accelerate", "peft")
"""Packages whose hooks and methods observe, move or compile, and compute the same."""


class Behavior:
    """What the modules of a model were set to at one moment."""

    def __init__(self, body: torch.nn.Module) -> None:
        modules = list(body.modules())
        self._numbers = [
            (held, name, value) for module in modules for held in [vars(module)] for name, value in _numbers(held)
        ]
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [vars(module) for module in modules]
        self._added = self._look()

    def unchanged(self) -> bool:
        """Whether all of it is still what it was."""
        return all(held.get(name, ...) is value for held, name, value in self._numbers) and self._look() == self._added

    def _look(self) -> list[int]:
        """The ids of all hooks and replaced methods that may change something."""
        hooks = [id(hook) for hooks in self._hooks if hooks for hook in hooks.values() if not _harmless(hook)]
        replaced = [held["forward"] for held in self._attributes if "forward" in held]
        return hooks + [id(method) for method in replaced if not _harmless(method)]


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


def added_hooks(body: torch.nn.Module) -> list[str]:
    """Return the names of hooks and methods that somebody has put into a model: "layers.0: package.function"."""
    found = []
    for path, module in body.named_modules():
        added = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module):
            added.append(vars(module)["forward"])
        found += [f"{path or type(module).__name__}: {_name(one)}" for one in added if not _harmless(one)]
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
    except Exception:  # whatever a class of somebody else's may raise
        return None
    return made if isinstance(made, torch.nn.Module) else None


def _computes_alone(module: torch.nn.Module) -> bool:
    """Whether a module has no weights and no parts, as activation functions: replaced ones are no wrappers."""
    return not (module._parameters or module._buffers or module._modules)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _function(hook: Any) -> Any:
    """The function behind a method, a partial one, or an object that is called."""
    while True:
        inner = getattr(hook, "__func__", None) or getattr(hook, "func", None)
        if inner is None:
            break
        hook = inner
    return hook if hasattr(hook, "__globals__") else type(hook).__call__


def _harmless(hook: Any) -> bool:
    # Where it was defined: `functools.wraps` copies `__module__`.
    module = str(getattr(_function(hook), "__globals__", {}).get("__name__") or type(hook).__module__)
    return module.partition(".")[0] in _HARMLESS


def _name(hook: Any) -> str:
    function = _function(hook)
    module = getattr(function, "__globals__", {}).get("__name__") or type(hook).__module__
    return f"{module}.{getattr(function, '__qualname__', type(hook).__qualname__)}"
