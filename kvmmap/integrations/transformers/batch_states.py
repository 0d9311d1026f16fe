"""States of a batch: one tensor for all sequences, as a model works with it; each sequence's cache has its line of it.

Between two passes a sequence's states are its own cache's, which stores and restores them. `gather` puts them together
where they were restored or are another sequence's since; `bind` gives each sequence's layers the lines of a pass that
has ended. Knows no files and no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.cache_utils import LinearAttentionLayer

from ...errors import UnsupportedModelError
from .batch_layer import BatchLayer, Members
from .cache import KvmmapCache
from .state_layers import WithStates, clear_states, put_state, state_tensors
from .states import SINGLE_TOKENS

MASKS_PADDING = frozenset(
    {"bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "glm5_next_text", "granitemoehybrid",
     "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba", "kimi_linear", "lara_mini", "lfm2",
     "lfm2_moe", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text",
     "qwen3_5_text", "qwen3_next", "qwen4_exp_text", "zamba", "zamba2", "zaya"}
)  # fmt: skip
"""Models that keep padding on the left out of their states, in transformers, in a pass that begins sequences."""


class BatchStateLayer(LinearAttentionLayer):
    """A layer of a batch that keeps states alone."""

    is_compileable = False
    """No: it is no part of a compiled graph."""

    is_croppable = False
    """No: states can't be rolled back."""


class BatchHybridLayer(WithStates, BatchLayer, LinearAttentionLayer):
    """A layer of a batch with rows, as `BatchLayer`, and states, as transformers' `LinearAttentionLayer`."""


class BatchStates:
    """The states of a batch.

    Args:
        members: its sequences.
        numbers: the layers that have states, and how many each has, as transformers counts.
    """

    def __init__(self, members: Members, numbers: dict[int, int]) -> None:
        self._members = members
        self._numbers = numbers
        self.layers: dict[int, Any] = {}
        """Those layers as a model gets them, by index."""
        for number, count in numbers.items():
            hybrid = isinstance(members.caches[0].layers[number], WithStates)
            made: Any = BatchHybridLayer(members, number) if hybrid else BatchStateLayer(count)
            clear_states(made, count)
            self.layers[number] = made

    def gather(self) -> None:
        """Put the sequences' states together, before a pass. A sequence that has none yet gets zeros."""
        for number, layer in self.layers.items():
            held = [state_tensors(own) for own in self._own(number)]
            whole = state_tensors(layer)
            names = list(dict.fromkeys(name for states in held for name in states))
            if names == list(whole) and all(
                _is_line(states.get(name), whole[name], line) for line, states in enumerate(held) for name in names
            ):
                continue
            clear_states(layer, self._numbers[number])
            for name in names:
                like = next(states[name] for states in held if name in states)
                lines = [states[name] if name in states else torch.zeros_like(like) for states in held]
                put_state(layer, name, torch.cat(lines))

    def bind(self) -> None:
        """Let each sequence's layers have their lines of what a pass has left."""
        for number, layer in self.layers.items():
            for name, whole in state_tensors(layer).items():
                for line, own in enumerate(self._own(number)):
                    if not _is_line(state_tensors(own).get(name), whole, line):
                        put_state(own, name, whole[line : line + 1])

    def reorder(self, sources: list[int]) -> None:
        """Let sequence i have the states of sequence sources[i]; caches have been reordered already."""
        for layer in self.layers.values():
            for name, whole in state_tensors(layer).items():
                put_state(layer, name, whole[torch.tensor(sources, device=whole.device)])
        self.bind()

    def _own(self, number: int) -> list[Any]:
        return [cache.layers[number] for cache in self._members.caches]


def _is_line(state: torch.Tensor | None, whole: torch.Tensor, line: int) -> bool:
    """Whether a sequence's state is a line of the batch's tensor, in the same memory."""
    return (
        state is not None
        and state.shape == (1, *whole.shape[1:])
        and state.dtype == whole.dtype
        and state.data_ptr() == whole[line].data_ptr()
    )


def check_fed(caches: Sequence[KvmmapCache], fed: Sequence[int], width: int, kind: str) -> None:
    """Refuse a pass that would feed padding, or what is stored already, into the states of a sequence.

    Args:
        caches: of the batch.
        fed: tokens of each sequence in the pass that its cache lacks.
        width: columns of the pass.
        kind: the model's type.

    Raises:
        UnsupportedModelError: it would.
    """
    begins = not any(cache.seq_len for cache in caches)
    if all(count == width for count in fed) or (begins and all(fed) and kind in MASKS_PADDING):
        return
    number = next(number for number, count in enumerate(fed) if count != width)
    raise UnsupportedModelError(
        f"sequence {number} has {fed[number]} tokens to feed in a pass of {width}, and the others would go into its "
        "states: call batch.reuse(input_ids, attention_mask) before generate, which feeds what a sequence has left "
        "beyond the others by itself, and do not chunk the prefill",
        expected=width,
        actual=fed[number],
    )


def feed_beginnings(caches: Sequence[KvmmapCache], prompts: Sequence[torch.Tensor], kind: str) -> None:
    """Feed each sequence alone up to where all of them have equally many tokens left, unless one pass can do it.

    Args:
        caches: of the batch, cut back to what their prompts share with them.
        prompts: ids of each sequence, [n], without padding.
        kind: the model's type.

    Raises:
        UnsupportedModelError: an image is among what would be fed.
    """
    left = [len(ids) - cache.seq_len for ids, cache in zip(prompts, caches, strict=True)]
    begins = not any(cache.seq_len for cache in caches)
    one_by_one = kind in SINGLE_TOKENS and not begins
    if (begins and kind in MASKS_PADDING) or (len(set(left)) == 1 and not (one_by_one and left[0] > 1)):
        return
    rest = 1 if kind in SINGLE_TOKENS else min(left)
    for number, (cache, ids) in enumerate(zip(caches, prompts, strict=True)):
        stop = len(ids) - rest
        placeholders = [token for tokens in cache._media_tokens.values() for token in tokens]
        if np.isin(ids[cache.seq_len : stop].cpu(), placeholders).any():
            raise UnsupportedModelError(
                f"sequence {number} of the batch has an image (video, audio) before its last {rest} tokens, which are "
                "what all sequences lack: feed it by its own cache first"
            )
        _feed(cache, ids, stop, 1 if kind in SINGLE_TOKENS and cache.seq_len else stop)


def _feed(cache: KvmmapCache, ids: torch.Tensor, stop: int, step: int) -> None:
    """Feed tokens up to `stop`, at most `step` a pass, as `generate` does: it knows what a model takes besides ids."""
    model = cache._model()
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, use_cache=True, pad_token_id=0)
    while cache.seq_len < stop:
        prompt = ids[None, : min(cache.seq_len + step, stop)]
        model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, **cache.argument)
