"""The source of a decoder: what its layers attend to besides the tokens of the sequence, and a digest of it.

Examples are the output of an encoder, and an image or a protein that cross-attention layers attend to. Keys and values
of the decoder depend on it, so they belong to one source.

Pure: knows configs and arguments of models; no caches, models or hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import xxhash

from .media import hash_value

_BY_NAME = frozenset({"blip", "blip_text_model", "evolla", "idefics"})
"""Models with cross-attention layers that nothing in their configs tells."""

_DECODER = {
    "decoder_input_ids": "input_ids",
    "decoder_inputs_embeds": "inputs_embeds",
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
}
"""Arguments of an encoder-decoder that are about the decoder's tokens, and what its decoder calls them."""

_PREFIXES = (
    *("encoder_", "cross_attention_", "pixel_", "image_", "perceiver_", "aspect_ratio_", "full_text_row_"),
    *("protein_", "structure_", "msa_", "interpolate_pos_encoding"),
)
"""How names of arguments begin that are about the source, in models whose other arguments are about tokens."""

_OUTPUTS = (
    *("encoder_outputs", "encoder_hidden_states", "cross_attention_states"),
    *("image_encoder_embeddings", "perceiver_embeddings"),
)
"""Arguments that are the output of an encoder. Where one is given, the inputs of the encoder are not looked at."""

_BY_TOKEN = ("cross_attention_mask", "image_attention_mask")
"""Masks with a row for each token: which parts of the source it sees."""

_WITHOUT_EFFECT = frozenset(
    {
        *("cache", "past_key_values", "labels", "logits_to_keep", "num_items_in_batch", "return_dict", "use_cache"),
        *("output_attentions", "output_hidden_states", "full_text_row_masked_out_mask"),
    }
)
"""Arguments that change nothing in what an encoder computes, or that follow from others."""


class Parts(NamedTuple):
    """The arguments of a forward pass, or of `generate`."""

    own: dict[str, Any]
    """Those about the decoder's tokens, as a decoder calls them."""

    inputs: dict[str, Any]
    """Those that an encoder computes its output from."""

    output: torch.Tensor | None
    """The encoder's output, [1, n, dim], if it is among them."""

    mask: torch.Tensor | None
    """Which positions of the output the decoder sees, if something says so."""

    by_token: torch.Tensor | None
    """Which parts of the source each token sees, [1, n, ...]; or numbers to add to scores, [1, 1, n, m]."""


def has_source(config: Any) -> bool:
    """Return whether a model's decoder attends to something besides its own tokens through layers of its own.

    Args:
        config: of the whole model.
    """
    return any(
        part.is_encoder_decoder
        or bool(getattr(part, "add_cross_attention", False))
        or bool(getattr(part, "cross_attention_layers", None))
        or part.model_type in _BY_NAME
        for part in (config, config.get_text_config(decoder=True))
    )


def why_source(config: Any) -> str:
    """Return what a model is for which `has_source` is true, to follow its name in a message."""
    parts = (config, config.get_text_config(decoder=True))
    if any(part.is_encoder_decoder for part in parts):
        return "is an encoder-decoder"
    added = any(getattr(part, "add_cross_attention", False) for part in parts)
    return "has cross-attention layers (add_cross_attention=True)" if added else "has cross-attention layers"


def parted(given: Mapping[str, Any], encodes: bool) -> Parts:
    """Divide arguments into those about the decoder's tokens and those about its source.

    Args:
        given: by name.
        encodes: True if they are those of a whole encoder-decoder: `input_ids` are the encoder's then.
    """
    if encodes:
        own = {_DECODER[name]: value for name, value in given.items() if name in _DECODER}
        others = {name: value for name, value in given.items() if name not in _DECODER}
    else:
        others = {name: value for name, value in given.items() if name.startswith(_PREFIXES)}
        own = {name: value for name, value in given.items() if name not in others}
    output = next((found for name in _OUTPUTS if (found := _first_tensor(others.get(name))) is not None), None)
    mask = others.get("encoder_attention_mask", others.get("attention_mask") if encodes else None)
    by_token = next((others[name] for name in _BY_TOKEN if isinstance(others.get(name), torch.Tensor)), None)
    inputs = {
        name: value
        for name, value in others.items()
        if name not in (*_OUTPUTS, *_BY_TOKEN) and name not in _WITHOUT_EFFECT and _counts(name, value)
    }
    if output is not None or all(name.endswith("mask") for name in inputs):
        inputs = {}
    mask = mask if isinstance(mask, torch.Tensor) and _counts("mask", mask) else None
    return Parts(own, inputs, output, mask, by_token)


def digest_of_inputs(inputs: Mapping[str, Any]) -> str | None:
    """Return the XXH3 (128 bits, hexadecimal) of what an encoder computes its output from; None if that is nothing."""
    if not inputs:
        return None
    hashed = xxhash.xxh3_128()
    for name, value in sorted(inputs.items()):
        hash_value(hashed, name, value)
    return hashed.hexdigest()


def digest_of_output(output: torch.Tensor, mask: torch.Tensor | None) -> str:
    """Return the XXH3 (128 bits, hexadecimal) of an encoder's output, and of which of its positions are seen."""
    hashed = xxhash.xxh3_128()
    hash_value(hashed, "output", output)
    if mask is not None:
        hash_value(hashed, "mask", mask if mask.is_floating_point() else mask != 0)
    return hashed.hexdigest()


def digests_by_token(mask: torch.Tensor | None, count: int, start: int = 0) -> list[str]:
    """Return a digest of what each of `count` tokens sees of the source; "" where nothing says so.

    Args:
        mask: as `Parts.by_token`, of these tokens alone or of the whole sequence. Tokens beyond it see what its last
            one does, as in `generate`.
        count: tokens.
        start: the position of the first one.
    """
    if mask is None or mask.ndim < 3:
        return [""] * count
    rows = mask[0, 0] if mask.ndim == 4 and mask.is_floating_point() else mask[0]
    rows = rows.reshape(len(rows), -1)
    rows = (rows != 0).to(torch.uint8) if not rows.is_floating_point() else rows
    rows = rows[start : start + count] if len(rows) > count else rows
    found = [xxhash.xxh3_64_hexdigest(row.cpu().contiguous().view(torch.uint8).numpy()) for row in rows]
    return found + found[-1:] * (count - len(found))


def _counts(name: str, value: Any) -> bool:
    """Whether an argument can change an encoder's output. A mask that hides nothing is as good as none."""
    if value is None or value is False:
        return False
    if name.endswith("mask") and isinstance(value, torch.Tensor) and not value.is_floating_point():
        return not bool((value != 0).all())
    return isinstance(value, torch.Tensor | list | tuple | str | int | float)


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next(_tensors(value), None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
