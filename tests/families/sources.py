"""What small models attend to besides their tokens: an encoder's input, an image, a protein; by type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Arguments = dict[str, Any]


def _text(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(100 + seed).integers(1, 80, (1, 11)))


def _numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(200 + seed).standard_normal(shape).astype(np.float32))


def _image(seed: int) -> torch.Tensor:
    return _numbers(seed, 1, 3, 32, 32)


def _patches(seed: int) -> Arguments:
    places = torch.tensor([[[row, column] for row in (1, 2) for column in (1, 2, 3)]], dtype=torch.float32)
    return {"flattened_patches": torch.cat([places, _numbers(seed, 1, 6, 768)], -1)}


def _boxes(seed: int) -> Arguments:
    return {"input_ids": _text(seed), "bbox": torch.linspace(0.1, 0.9, 44).reshape(1, 11, 4)}


def _protein(seed: int) -> Arguments:
    ids = _text(seed)
    return {"protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


def _tiles(seed: int) -> Arguments:
    return {
        "pixel_values": _numbers(seed, 1, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1, 0, 0]]]),
    }


def _waves(seed: int) -> Arguments:
    return {"input_values": _numbers(seed, 1, 4000)}


_SOURCES: dict[str, Callable[[int], Arguments]] = {
    "blip": lambda seed: {"pixel_values": _image(seed)},
    "evolla": _protein,
    "florence2": lambda seed: {"input_ids": _text(seed)},
    "idefics": lambda seed: {"pixel_values": _image(seed)[:, None]},
    "mllama": _tiles,
    "pix2struct": _patches,
    "pp_formulanet": lambda seed: {"pixel_values": _image(seed)},
    "t5gemma2": lambda seed: {"input_ids": _text(seed)},
    "udop": _boxes,
    "vision-encoder-decoder": lambda seed: {"pixel_values": _image(seed)},
    "moonshine": _waves,
    "speech-encoder-decoder": _waves,
    "speecht5": _waves,
    "speech_to_text": lambda seed: {"input_features": _numbers(seed, 1, 24, 80)},
    "whisper": lambda seed: {"input_features": _numbers(seed, 1, 32, 128)},
}

START = 3
"""The first of a decoder's tokens; not the one of padding, which some models give no position."""

BOS, SEP = 1, 2
"""BLIP's first token, and the one that its `generate` leaves out at the end of a prompt."""


def source_of(config: Any, count: int, seed: int = 0) -> Arguments:
    """Return what a model is given besides `count` tokens; none of these arguments, if it has no source."""
    kind = config.model_type
    found: Arguments = {}
    if kind in _SOURCES and (config.is_encoder_decoder or kind != "whisper"):  # there is a decoder of its name, too
        found = _SOURCES[kind](seed)
    elif config.is_encoder_decoder:
        found = {"input_ids": _text(seed)}
    if kind == "idefics":
        seen = torch.ones(1, count, 1, dtype=torch.long)
        seen[:, :2] = 0
        found["image_attention_mask"] = seen
    if kind == "mllama":
        seen = torch.ones(1, count, 1, 4, dtype=torch.long)
        seen[:, :2], seen[..., 2:] = 0, 0
        found["cross_attention_mask"] = seen
    return found


def decoder_ids(config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a prompt as a type's decoder takes it, with the same number of tokens."""
    if not (config.is_encoder_decoder or config.model_type == "blip"):
        return ids
    ids = ids.clone()
    ids[:, 0] = BOS if config.model_type == "blip" else START
    return ids


def arguments(config: Any, ids: torch.Tensor, seed: int = 0) -> Arguments:
    """Return a prompt, and what a model attends to besides, as arguments of `generate`."""
    ids = decoder_ids(config, ids)
    found = source_of(config, ids.shape[1], seed)
    if config.is_encoder_decoder:
        return found | {"decoder_input_ids": ids}
    if config.model_type == "blip":
        return found | {"input_ids": torch.cat([ids, torch.full_like(ids[:, :1], SEP)], 1)}
    return found | {"input_ids": ids}


def pass_arguments(config: Any, ids: torch.Tensor, start: int, stop: int, reopened: bool = False) -> Arguments:
    """Return what a forward pass over some tokens of a prompt is given; the first one of a cache that is `reopened`."""
    found = source_of(config, ids.shape[1])
    for name in ("image_attention_mask", "cross_attention_mask"):
        if name in found:
            found[name] = found[name][:, start:stop]
    if config.model_type == "mllama" and start and not reopened:  # the cache has the image's rows
        found = {"cross_attention_mask": found["cross_attention_mask"]}
    name = "decoder_input_ids" if config.is_encoder_decoder else "input_ids"
    return found | {name: decoder_ids(config, ids)[:, start:stop]}
