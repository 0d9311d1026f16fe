"""Attention "kvmmap", registered with transformers: queries attend over the int8 rows where they lie.

`model.set_attn_implementation("kvmmap")` has a model call two functions here. The one that makes masks finds out if
plain causal attention over a KvmmapCache is asked for, and then tells the cache to hand its layers on in place of
tensors; the other attends over those. In every other case (no cache or another one, padding, an own mask) both do what
"sdpa" does, so a model may keep this implementation all the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...errors import UnsupportedModelError
from .blocks import attend_in_blocks
from .layer import KvmmapLayer
from .tensors import as_array, from_array

if TYPE_CHECKING:
    from .cache import KvmmapCache

NAME = "kvmmap"
"""What `set_attn_implementation` takes."""

# Arguments that change nothing in what is computed here. Any other that is given is refused rather than ignored.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "is_causal",  # what kind of mask was made is known
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",  # the layer knows its own, and the mask was made for that
        "use_cache",
    }
)


class MaskLength(int):
    """How many positions a mask is for, and which cache and layer it was asked of.

    transformers asks the cache for the length, and hands it to the function that makes the mask unchanged, which so
    learns what the mask is for. Where it is lost on the way, attention is computed from tensors.
    """

    cache: KvmmapCache
    layer: KvmmapLayer

    @classmethod
    def of(cls, length: int, cache: KvmmapCache, layer: KvmmapLayer) -> MaskLength:
        """Make one."""
        made = cls(length)
        made.cache, made.layer = cache, layer
        return made


def kvmmap_mask(**arguments: Any) -> torch.Tensor | None:
    """Make a mask as `sdpa_mask` does; none, if the cache's layers can be attended over in place.

    Args:
        arguments: what transformers hands to every function that makes masks.
    """
    length = arguments["kv_length"]
    if isinstance(length, MaskLength):
        length.cache.check_config(arguments.get("config"))
        pattern, padding = length.layer.pattern, arguments.get("attention_mask")
        # No function but the causal one (transformers then forbids to leave it to is_causal), the layer's own window,
        # no padding.
        plain = arguments.get("allow_is_causal_skip", True) and arguments.get("local_size") == pattern.window
        if plain and not pattern.latent and (padding is None or bool(padding.all())):
            pattern.in_place = True
            return None
    return sdpa_mask(**arguments)


def kvmmap_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a cache's layer in place, or over tensors as "sdpa" does.

    Args:
        module: the model's attention module.
        query: [1, num_q_heads, n, head_dim].
        key: a `KvmmapLayer`, or [batch, num_kv_heads, m, head_dim].
        value: the same layer, or [batch, num_kv_heads, m, value_head_dim].
        attention_mask: None over a layer.
        dropout: probability; over a layer there must be none.
        scaling: factor of the scores; head_dim ** -0.5 by default.
        softcap: bound of the scores.
        s_aux: [num_q_heads], a further score in each head's softmax that no value belongs to (attention sinks).

    Returns:
        [batch, n, num_q_heads, value_head_dim], and no weights.

    Raises:
        UnsupportedModelError: something is asked for that can't be computed here; nothing is left out silently.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    in_place = isinstance(key, KvmmapLayer)
    if not in_place and softcap is None and s_aux is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scale, **kwargs)
        return out, None
    _refuse_unknown(module, kwargs)
    if dropout or (in_place and attention_mask is not None):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {'dropout' if dropout else 'a mask of its own'}, which attention "
            f'"{NAME}" can\'t here: model.set_attn_implementation("eager"), or "sdpa"'
        )
    if in_place:
        return _attend_in_place(key, query, scale, softcap, s_aux), None
    out, lse = attend_in_blocks(query, key, value, scale=scale, softcap=softcap, mask=attention_mask)
    if s_aux is not None:
        out = _with_sink(out, lse, s_aux.float()[:, None])
    return out.transpose(1, 2).contiguous().to(query.dtype), None


def _attend_in_place(
    layer: KvmmapLayer, query: torch.Tensor, scale: float, softcap: float | None, s_aux: torch.Tensor | None
) -> torch.Tensor:
    """[1, num_q_heads, n, head_dim] -> [1, n, num_q_heads, value_head_dim]."""
    queries = as_array(query.cpu())[0].swapaxes(0, 1)
    out, lse = layer.attend(queries, scale=scale, softcap=softcap)
    if s_aux is None:
        return from_array(out[None], query)
    return _with_sink(torch.from_numpy(out), torch.from_numpy(lse), s_aux.float().cpu())[None].to(query)


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Add a score without a value to the softmax: out * exp(lse) / (exp(lse) + exp(sink))."""
    return out * torch.sigmoid(lse - sink)[..., None]


def _refuse_unknown(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _HARMLESS and value is not None and value is not False:
            raise UnsupportedModelError(
                f'attention "{NAME}" does not know {name}= of {type(module).__name__} (or can\'t do it), and does not '
                'leave it out: model.set_attn_implementation("eager"), or "sdpa"',
                actual=name,
            )


AttentionInterface.register(NAME, kvmmap_attention)
AttentionMaskInterface.register(NAME, kvmmap_mask)
