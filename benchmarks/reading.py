"""A model that reads on after a stored prompt, through a recipe for keys and values; what its predictions lose by it.

The prompt's keys and values are computed in f32 once, as a prefill does, and then stored by the recipe; what follows is
read, and stored, through it. Caches of transformers that requantise what they have (quanto's, HQQ's) get the prompt as
one pass, and what follows in chunks of their residual length, which gives every token the rows that it sees when tokens
come one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from recipes import F32, Kept, Recipe
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, QuantizedCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmmap.integrations.transformers import ATTENTION, KvmmapCache

CHUNK = 128
"""Tokens that a requantising cache gets at a time: its residual length."""

OTHERS: dict[str, tuple[str, dict[str, int]]] = {
    "transformers' quanto int4": ("quanto", {"nbits": 4}),
    "transformers' HQQ int4": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "transformers' HQQ int8": ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}),
    "transformers' fp8": ("fp8", {}),
}
"""Caches of transformers, as `QuantizedCache` makes them: backend and settings, HQQ's axes as its pages recommend."""


class Prompt:
    """A prompt, read in f32.

    Attributes:
        pairs: keys and values of each layer, [1, num_kv_heads, n, dim].
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class Reader:
    """Reads with one recipe at a time."""

    def __init__(self, net: PreTrainedModel) -> None:
        self.net = net
        self._recipe = F32
        self._prompt: Prompt | None = None
        self._recorded: Prompt | None = None
        ALL_ATTENTION_FUNCTIONS.register("recipe", self._attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("recipe", _no_mask)  # a recipe knows what is seen
        ALL_ATTENTION_FUNCTIONS.register("plain", ALL_ATTENTION_FUNCTIONS["sdpa"])
        ALL_MASK_ATTENTION_FUNCTIONS.register("plain", sdpa_mask)

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: object,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **others: object,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        if self._recorded is not None:
            self._recorded.pairs[layer] = key.clone(), value.clone()
        if self._prompt is not None:
            keys, values = self._prompt.pairs[layer]
            key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        out = self._recipe.attend(query, key, value, scaling, sliding_window)
        return out.transpose(1, 2).contiguous(), None

    @torch.inference_mode()
    def prompt(self, ids: Sequence[int]) -> Prompt:
        """Read a prompt in f32."""
        recorded = Prompt(len(ids))
        self._recipe, self._prompt, self._recorded = F32, None, recorded
        self.net.set_attn_implementation("recipe")
        try:
            if len(ids):
                self.net.get_decoder()(torch.tensor([list(ids)]), use_cache=False)
        finally:
            self._recorded = None
        return recorded

    @torch.inference_mode()
    def read_on(self, prompt: Prompt, ids: Sequence[int], recipe: Recipe) -> torch.Tensor:
        """Read what follows a prompt, both kept by a recipe; return logits, [n, vocabulary]."""
        self._recipe, self._prompt = recipe, prompt if prompt.length else None
        self.net.set_attn_implementation("recipe")
        positions = torch.arange(prompt.length, prompt.length + len(ids))[None]
        hidden = self.net.get_decoder()(torch.tensor([list(ids)]), position_ids=positions, use_cache=False)[0][0]
        return self._logits(hidden)

    @torch.inference_mode()
    def read_on_with(self, prompt: Prompt, ids: Sequence[int], backend: str, settings: dict[str, int]) -> torch.Tensor:
        """As `read_on`, through one of transformers' quantised caches."""
        self.net.set_attn_implementation("plain")
        cache = QuantizedCache(backend, self.net.config, **settings)
        for layer, (keys, values) in prompt.pairs.items():
            cache.update(keys, values, layer)
        hidden = []
        for start in range(0, len(ids), CHUNK):
            tokens = torch.tensor([list(ids[start : start + CHUNK])])
            hidden.append(self.net.get_decoder()(tokens, past_key_values=cache, use_cache=True)[0][0])
        return self._logits(torch.cat(hidden))

    @torch.inference_mode()
    def read_on_kept(self, prompt: Prompt, ids: Sequence[int], kept: Kept) -> torch.Tensor:
        """As `read_on`, through a `KvmmapCache` that is attended in place."""
        self.net.set_attn_implementation(ATTENTION)
        cache = KvmmapCache(self.net.config, prompt.length + len(ids), **kept.settings)
        for layer, (keys, values) in prompt.pairs.items():
            cache.update(keys, values, layer)
        hidden = self.net.get_decoder()(torch.tensor([list(ids)]), **cache.argument, use_cache=True)[0][0]
        return self._logits(hidden)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net.get_output_embeddings()(hidden)
        return logits.float()


def _no_mask(*args: object, **others: object) -> None:
    return None


def losses(found: torch.Tensor, expected: torch.Tensor, following: Sequence[int]) -> dict[str, float]:
    """Compare predictions of the next token with those of f32.

    Args:
        found, expected: logits, [n, vocabulary].
        following: the n tokens that really come next.

    Returns:
        Mean and 99th percentile of the KL divergence in nats, the part of positions where the most probable token is
        the same, and the mean loss on the real tokens, in nats.
    """
    kl = divergence(expected, found).double()
    return {
        "kl": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1": float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        "loss": float(cross_entropy(found, torch.tensor(list(following)))),
    }


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row's distribution, in nats, from logits in f32.

    With d = expected - found, it is E[d] + log E[exp(-d)] over the expected distribution. Taken about the mean of d,
    nothing large is subtracted from anything, and divergences of 1e-9 come out right.
    """
    chances = expected.softmax(-1)
    difference = expected - found
    difference -= (chances * difference).sum(-1, keepdim=True)
    return torch.log1p((chances * torch.expm1(-difference)).sum(-1)).clamp(min=0)


def perplexity_change(loss: float, reference: float) -> float:
    """How much greater perplexity is, as a part of the reference's."""
    return math.expm1(loss - reference)
