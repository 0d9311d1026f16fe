"""Attention "kvmmap", registered with transformers: queries attend over the coded rows where they lie.

`model.set_attn_implementation("kvmmap")` has a model call two functions here. The one that makes masks finds out if
plain causal attention over a KvmmapCache is asked for, and then tells the cache to hand its layers on in place of
tensors; the other attends over those. In every other case (no cache or another one, padding, an own mask) both do what
"sdpa" does, so a model may keep this implementation all the time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ...errors import UnsupportedModelError
from .batch_layer import BatchLayer
from .blocks import attend_in_blocks
from .dispatch import attends
from .graphs import outside_graph
from .layer import KvmmapLayer
from .selection import selected_blocks, selected_keys
from .sequence import MaskLength
from .team import join_team
from .tensors import as_array, from_array

NAME = "kvmmap"
"""What `set_attn_implementation` takes."""

# Arguments that change nothing in what is computed here. Any other that is given is refused rather than ignored.
_HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "assistant_tokenizer",
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
        "stop_strings",
        "tokenizer",  # generate passes on what stop_strings= needs
        "use_cache",
    }
)

# Those that "sdpa" computes with, or leaves out itself because the mask has what they say.
_SDPA = frozenset({"cache", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "position_bias"})


@outside_graph
def kvmmap_mask(**arguments: Any) -> torch.Tensor | None:
    """Make a mask as `sdpa_mask` does; none, if the cache's layers can be attended over in place.

    A model that computes attention itself adds its mask to the scores: it gets one of numbers, as `eager_mask` makes.

    Args:
        arguments: what transformers hands to every function that makes masks.
    """
    length, how = arguments["kv_length"], attends(arguments.get("config"))
    if isinstance(length, MaskLength):
        length.cache.check_config(arguments.get("config"))
        padding = arguments.get("attention_mask")
        # No function but the causal one (transformers then forbids to leave it to is_causal), no padding. A model that
        # sees ahead (PaliGemma's text part) attends in both directions without a mask.
        plain = (
            how == "interface"
            and getattr(arguments.get("config"), "use_bidirectional_attention", None) is not True
            and arguments.get("allow_is_causal_skip", True)
            and (padding is None or length.cache.leaves_padding_out or bool(padding.all()))
        )
        if length.cache.attend_in_place(arguments.get("local_size"), plain):
            join_team()
            return None
    return eager_mask(**arguments) if how == "own" else sdpa_mask(**arguments)


@outside_graph
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
    sinks: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a cache's layer in place, or over tensors as "sdpa" does.

    Args:
        module: the model's attention module.
        query: [1, num_q_heads, n, head_dim].
        key: a `KvmmapLayer` or a `BatchLayer`, or [batch, num_kv_heads, m, head_dim].
        value: the same layer, or [batch, num_kv_heads, m, value_head_dim].
        attention_mask: None over a layer; bool, True where a query sees a key, or numbers to add to the scores.
        dropout: probability; there must be none but over tensors without soft cap and sinks.
        scaling: factor of the scores; head_dim ** -0.5 by default.
        softcap: bound of the scores.
        s_aux: [num_q_heads], a further score in each head's softmax that no value belongs to (attention sinks).
        sinks: [batch, num_q_heads, n, 1], such scores of each query.
        indices: int [batch, n, k], the keys that each query sees at most (DeepSeek's sparse attention).
        block_indices: the blocks of keys that each query sees at most (MiniMax's).
        kwargs: what else models pass.

    Returns:
        [batch, n, num_q_heads, value_head_dim], and no weights.

    Raises:
        UnsupportedModelError: something is asked for that can't be computed here; nothing is left out silently.
    """
    if (
        isinstance(key, KvmmapLayer)
        and key.step is not None
        and key.chunk is None
        and attention_mask is s_aux is sinks is indices is block_indices is None
        and not dropout
        and getattr(module, "is_causal", True)
        and _HARMLESS.issuperset(kwargs)
        and kwargs.get("is_causal") is not False
    ):
        found = key.step.attend(
            query, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, key.kind.window
        )
        if found is not None:
            return found, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    in_place = isinstance(key, KvmmapLayer | BatchLayer)
    sink = sinks[..., 0] if sinks is not None else s_aux[:, None] if s_aux is not None else None
    if not hasattr(module, "indexer"):  # nobody knows what it means by a selection
        _refuse_unknown(module, {"indices": indices, "block_indices": block_indices}, _HARMLESS)
    elif indices is not None and not in_place:
        attention_mask = selected_keys(indices, attention_mask, query, key)
    elif block_indices is not None and not in_place:
        attention_mask = selected_blocks(module, block_indices, attention_mask, query, key, kwargs.get("position_ids"))
    if not in_place and softcap is None and sink is None:
        # Image encoders use no cache, and get what Kosmos-2's `generate` was called with: "sdpa" is what is asked for.
        if hasattr(module, "layer_idx") or getattr(module, "is_causal", True):
            _refuse_unknown(module, kwargs, _HARMLESS | _SDPA)
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scale, **kwargs)
        return out, None
    bias = None if in_place else kwargs.pop("position_bias", None)
    _refuse_unknown(module, kwargs, _HARMLESS)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    refused = (
        "dropout"
        if dropout
        else "a mask of its own"
        if in_place and attention_mask is not None
        else "a selection of keys"
        if in_place and (indices is not None or block_indices is not None)
        else "no causality"
        if in_place and not causal
        else "both softcap= and position_bias="
        if softcap is not None and bias is not None
        else None
    )
    if refused is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {refused}, which attention "
            f'"{NAME}" can\'t here: model.set_attn_implementation("eager"), or "sdpa"'
        )
    if in_place:
        attend = _attend_in_place if isinstance(key, KvmmapLayer) else _attend_to_each
        return attend(key, query, scale, softcap, sink), None
    if attention_mask is None and query.shape[2] > 1 and causal:
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]  # a cache of fixed size, still empty
    elif attention_mask is None:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    out, lse = attend_in_blocks(query, key, value, scale=scale, softcap=softcap, mask=attention_mask, bias=bias)
    if sink is not None:
        out = _with_sink(out, lse, sink.float())
    return out.transpose(1, 2).contiguous().to(query.dtype), None


def _attend_in_place(
    layer: KvmmapLayer, query: torch.Tensor, scale: float, softcap: float | None, sink: torch.Tensor | None
) -> torch.Tensor:
    """[1, num_q_heads, n, head_dim] -> [1, n, num_q_heads, value_head_dim]."""
    queries = as_array(query.cpu())[0].swapaxes(0, 1)
    out, lse = layer.attend(queries, scale=scale, softcap=softcap)
    if sink is None:
        return from_array(out[None], query)
    sink = sink.float().cpu().reshape(len(out[0]), -1).T  # [1 or n, num_q_heads]
    return _with_sink(torch.from_numpy(out), torch.from_numpy(lse), sink)[None].to(query)


def _attend_to_each(
    layer: BatchLayer, query: torch.Tensor, scale: float, softcap: float | None, sink: torch.Tensor | None
) -> torch.Tensor:
    """[batch, num_q_heads, n, head_dim] -> [batch, n, num_q_heads, value_head_dim]; zeros where there is padding."""
    found: dict[int, torch.Tensor] = {}
    for number, own, fed in layer.sequences():
        mine = sink if sink is None or sink.ndim < 3 else sink[number : number + 1, :, -fed:]
        found[number] = _attend_in_place(own, query[number : number + 1, :, -fed:], scale, softcap, mine)
    if len(found) == len(query) and all(one.shape[1] == query.shape[2] for one in found.values()):
        return torch.cat(list(found.values()))
    one = next(iter(found.values()))
    out = one.new_zeros(len(query), query.shape[2], *one.shape[2:])
    for number, one in found.items():
        out[number, -one.shape[1] :] = one[0]
    return out


def _with_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    """Add a score without a value to the softmax: out * exp(lse) / (exp(lse) + exp(sink))."""
    return out * torch.sigmoid(lse - sink)[..., None]


def _refuse_unknown(module: torch.nn.Module, arguments: dict[str, Any], known: frozenset[str]) -> None:
    for name, value in arguments.items():
        if name not in known and value is not None and value is not False:
            raise UnsupportedModelError(
                f'attention "{NAME}" does not know {name}= of {type(module).__name__} (or can\'t do it), and does not '
                'leave it out: model.set_attn_implementation("eager"), or "sdpa"',
                actual=name,
            )


AttentionInterface.register(NAME, kvmmap_attention)
AttentionMaskInterface.register(NAME, kvmmap_mask)
