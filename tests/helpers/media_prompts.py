"""Prompts with images for small random models, with what a processor would make of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from families.configs import config, model

from .tiny_models import past

GRIDS = ([1, 4, 6], [1, 4, 4], [1, 6, 4], [1, 2, 4])
"""Patches of images: those of models that take any size."""

_TEXT = [0, *range(80, 96)]


def net(kind: str) -> Any:
    """A new random model of a type, always the same; it has seen no prompt."""
    return copy.deepcopy(_net(kind))


@cache
def _net(kind: str) -> Any:
    return model(config(kind, {"mm_tokens_per_image": 4} if kind == "gemma3" else None), kind)


def pixels(net: Any, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return what a processor makes of images, one a seed."""
    vision = net.config.vision_config
    if not has_grids(net):
        size = vision.image_size
        return {"pixel_values": torch.cat([_noise(seed, 1, 3, size, size) for seed in seeds])}
    grids = [GRIDS[seed % len(GRIDS)] for seed in seeds]
    dim = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    patches = [_noise(seed, grid[1] * grid[2], dim) for seed, grid in zip(seeds, grids, strict=True)]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def has_grids(net: Any) -> bool:
    """Whether a model counts positions by images' grids (M-RoPE)."""
    return any(hasattr(part, "rope_deltas") for part in net.modules())


def prompt(net: Any, *parts: int | Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the inputs of a prompt: token ids as lists, and images as the seeds of their pixels."""
    seeds = [part for part in parts if isinstance(part, int)]
    images = pixels(net, seeds) if seeds else {}
    vision = net.config.vision_config
    if "image_grid_thw" in images:
        counts = [int(grid.prod()) // vision.spatial_merge_size**2 for grid in images["image_grid_thw"]]
    else:
        each = getattr(net.config, "mm_tokens_per_image", None)
        counts = [each or (vision.image_size // vision.patch_size) ** 2] * len(seeds)
    ids: list[int] = []
    left = iter(counts)
    for part in parts:
        ids += [net.config.image_token_id] * next(left) if isinstance(part, int) else list(part)
    made = {"input_ids": torch.tensor([ids])}
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    types = (made["input_ids"] == net.config.image_token_id).int()
    if has_grids(net):
        made["mm_token_type_ids"] = types
    elif net.config.model_type == "gemma3":
        made["token_type_ids"] = types
    return made | images


def generate(net: Any, inputs: dict[str, torch.Tensor], cache: Any, count: int = 5, **more: Any) -> tuple[Any, Any]:
    """Greedy tokens of text, and the logits of every step."""
    found = net.generate(
        **inputs,
        **past(cache),
        max_new_tokens=count,
        do_sample=False,
        suppress_tokens=_TEXT,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )
    return found.sequences, torch.cat(found.logits)


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
