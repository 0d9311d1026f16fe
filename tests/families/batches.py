"""A family's batch: two prompts of lengths of their own, and then longer ones, beside what each gives alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvmmap.errors import UnsupportedModelError
from kvmmap.integrations.transformers import KvmmapBatch, KvmmapCache

from .configs import TEXT, VOCABULARY
from .outcomes import RELEASE

REFUSED = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "bloom", "exaone4_5", "git", "glm5_next",
     "hyperclovax_vision_v2", "kosmos-2.5", "marian", "mbart", "minimax_m3_vl", "minimax_m3_vl_text",
     "moss_transcribe_diarize", "mpt", "mvp", "pegasus", "plbart", "qwen4_exp", "qwen4_exp_text", "roformer",
     "trocr", "whisper"}
)  # fmt: skip
"""Types that are refused where prompts have other lengths: most are given no positions by `generate`."""

STATES_ALONE = frozenset({"falcon_mamba", "mamba", "mamba2"})
"""Types whose prompts older releases feed from their start, so that a second turn is refused."""


def check_batch(net: Any, kind: str, reference: Callable[[], Any], argument: str, bound: float) -> str:
    """Generate two prompts in a batch, and then longer ones that begin with these.

    Args:
        net: the model.
        kind: its type.
        reference: makes transformers' own cache over what a KvmmapCache serves.
        argument: the name that the model has for a cache.
        bound: how far logits may be off, in standard deviations of them.

    Returns:
        What is wrong, if anything.
    """
    ids = torch.arange(1, 31) * 7 % (TEXT - 1) + 1
    turns = [[ids[:12], ids[10:17]], [torch.cat([ids[:12], ids[20:23]]), torch.cat([ids[10:17], ids[24:30]])]]
    try:
        with KvmmapBatch([KvmmapCache(net, 64), KvmmapCache(net, 64)]) as batch:
            for number, prompts in enumerate(turns):
                padded, mask = _padded(prompts)
                if number:
                    batch.reuse(padded, mask)
                found = _logits(net, padded, mask, {argument: batch})
                for line, prompt in enumerate(prompts):
                    alone = prompt[None]
                    right = _logits(net, alone, torch.ones_like(alone), {argument: reference()})[:, 0]
                    if not (off := float((found[:, line] - right).abs().max() / right.std())) <= bound:
                        return f"sequence {line} of turn {number} is off by {off:.3f} standard deviations"
    except UnsupportedModelError as error:
        return "" if kind in REFUSED or (kind in STATES_ALONE and RELEASE < "5.24") else str(error)
    return "it is not refused" if kind in REFUSED and RELEASE >= "5.24" else ""


def _padded(prompts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.ones(2, len(prompts), width, dtype=torch.long)
    for line, prompt in enumerate(prompts):
        mask[line, : width - len(prompt)] = 0
        ids[line, width - len(prompt) :] = prompt
    return ids, mask


def _logits(net: Any, ids: torch.Tensor, mask: torch.Tensor, cache: dict[str, Any]) -> torch.Tensor:
    """[steps, batch, vocabulary]."""
    found = net.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        do_sample=False,
        suppress_tokens=[0, *range(TEXT, VOCABULARY)],
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
        **cache,
    )
    return torch.stack(list(found.logits))
