"""Functions that torch.compile leaves out of its graphs: they read and write the cache, and no tensors flow through."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def outside_graph(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that runs as Python code also where a model is compiled; a full graph is then refused."""
    return cast(Callable[_P, _R], torch.compiler.disable(function))
