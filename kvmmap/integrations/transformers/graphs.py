"""Functions that torch.compile leaves out of its graphs: they read and write the cache, and no tensors flow through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

from ...errors import UnsupportedModelError

_WHY = "a KvmmapCache can't be part of a graph: compile the model without fullgraph=True"

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graph(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that runs as Python code also where a model is compiled; a full graph is then refused."""
    return cast(Callable[_P, _R], torch.compiler.disable(function, reason=_WHY))


def check_graphs(model: torch.nn.Module) -> None:
    """Refuse a model that is compiled with fullgraph=True.

    A model that is compiled later is refused by torch, in its first pass.

    Raises:
        UnsupportedModelError: it, its body or a forward method of these is.
    """
    for part in (model, getattr(model, "_orig_mod", None), getattr(model, "base_model", None)):
        if part is None:
            continue
        if any(_is_whole(vars(part).get(name)) for name in ("dynamo_ctx", "forward", "_compiled_call_impl")):
            raise UnsupportedModelError(
                f"{type(part).__name__} is compiled with fullgraph=True, and {_WHY}", expected=False, actual=True
            )


def _is_whole(compiled: Any) -> bool:
    """Whether a compiled function, or torch's context of it, allows no breaks in its graph."""
    cells = getattr(compiled, "__closure__", None) or ()
    held = [compiled, *(cell.cell_contents for cell in cells)]
    return any(type(one).__module__.startswith("torch._dynamo") and getattr(one, "fullgraph", False) for one in held)
