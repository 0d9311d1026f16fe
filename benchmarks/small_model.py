"""A small model of another architecture than SmolLM2's, trained on the benchmark's texts in minutes.

Its layers have head_dim 128 and one KV head for four query heads, and every other layer sees a window of 256 positions
only: a Mistral of bytes in all but size. Weights stay beside the results, outside of git.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from corpus import Text
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

STEPS, BATCH, LENGTH = 600, 4, 512

CONFIG = Qwen3Config(
    vocab_size=256,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=128,
    max_position_embeddings=4096,
    use_sliding_window=True,
    sliding_window=256,
    layer_types=["sliding_attention", "full_attention"] * 2,
    tie_word_embeddings=True,
)


def small_model(folder: Path, found: Sequence[Text], held_out: int = 16_384) -> PreTrainedModel:
    """Return the model: trained now, or as it was trained before from the same texts.

    The first `held_out` bytes of each text, which the benchmark reads, are not among those that it learns from.
    """
    corpus = [text.text.encode()[held_out:] for text in found]
    corpus = [part[:200_000] for part in corpus if len(part) > LENGTH + 1]
    digest = hashlib.sha256(b"".join(corpus) + repr((STEPS, BATCH, LENGTH, CONFIG)).encode()).hexdigest()[:16]
    place = folder / f"small-{digest}.pt"
    torch.manual_seed(0)
    net = Qwen3ForCausalLM(CONFIG)
    if place.exists():
        net.load_state_dict(torch.load(place, weights_only=True))
        return net.eval()
    data = [torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in corpus]
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    started = time.process_time()
    for step in range(STEPS):
        chosen = [data[int(number)] for number in torch.randint(len(data), (BATCH,))]
        starts = [int(torch.randint(len(part) - LENGTH, ())) for part in chosen]
        batch = torch.stack([part[start : start + LENGTH] for part, start in zip(chosen, starts, strict=True)])
        loss = net(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(
                f"small model: step {step + 1}, loss {float(loss):.2f}, {time.process_time() - started:.0f} s",
                flush=True,
            )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), place)
    return net.eval()
