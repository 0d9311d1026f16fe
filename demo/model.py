"""SmolLM2-135M and its KV cache as tensors: load, prefill, continue. Knows nothing of kvmmap."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging
from weights import weights

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer, f32 [n, num_kv_heads, head_dim]: kvmmap's order."""

NAME = "SmolLM2-135M-Instruct"

logging.set_verbosity_error()
logging.disable_progress_bar()


@dataclass
class Model:
    """The model and its tokenizer."""

    net: Any
    tokenizer: Any
    fingerprint: str
    """SHA-256 of the weights' file: a cache made with other weights means nothing to this model."""

    @classmethod
    def load(cls) -> Model:
        """Load it in f32 from the installed package; some 25 s, nearly all of it spent on reading GGUF."""
        path = weights()
        with path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        net = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        return cls(net, tokenizer, fingerprint)

    @property
    def config(self) -> Any:
        return self.net.config

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text."""
        return str(self.tokenizer.decode(list(ids)))

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], cache: DynamicCache, keep: int = 1) -> torch.Tensor:
        """Run tokens through the model, their keys and values into `cache`; logits of the last `keep` (0: of all)."""
        tokens = torch.tensor([list(ids)])
        # By position: the argument is called past_key_values before transformers 5.24, and cache since.
        return self.net(tokens, None, None, cache, use_cache=True, logits_to_keep=keep).logits[0]

    def prefill(self, ids: Sequence[int]) -> DynamicCache:
        """Run a prompt through the model and return its cache."""
        cache = DynamicCache(config=self.config)
        self.feed(ids, cache)
        return cache

    def greedy(self, last: int, cache: DynamicCache, count: int) -> tuple[list[int], list[list[float]]]:
        """Continue after `last` with the most probable tokens; then remove them from the cache.

        Returns:
            `count` tokens, and for each the probabilities of the best two that there were to choose from.
        """
        start = cache.get_seq_length()
        found, chances = [last], []
        while len(found) <= count:
            best = self.feed(found[-1:], cache)[-1].softmax(-1).topk(2)
            found.append(int(best.indices[0]))
            chances.append(best.values.tolist())
        cache.crop(start - cache.get_seq_length())
        return found[1:], chances

    @torch.inference_mode()
    def score(self, ids: Sequence[int], cache: DynamicCache) -> tuple[list[float], list[int]]:
        """Score the next tokens `ids` of a real text, of which `cache` has the beginning.

        Returns:
            For each token but the first: minus the log probability that the model gave it, and the token that it
            thought most probable in its place. What this adds to the cache is taken out again.
        """
        start = cache.get_seq_length()
        logits = self.feed(ids[:-1], cache, keep=0)
        cache.crop(start - cache.get_seq_length())
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        return losses.tolist(), logits.argmax(-1).tolist()


def pairs_of(cache: DynamicCache) -> list[Pair]:
    """Return a cache's tensors, layer by layer, as views."""
    return [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]


def cache_of(pairs: Sequence[Pair], config: Any) -> DynamicCache:
    """Make a cache of tensors, from which the model continues."""
    cache = DynamicCache(config=config)
    for number, (keys, values) in enumerate(pairs):
        # [n, heads, dim] -> [1, heads, n, dim]
        cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], number)
    return cache
