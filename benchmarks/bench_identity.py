"""The identity checks of the transformers integration: their share of a decoding step, and of opening a cache.

A random model with the shapes of SmolLM2-135M, f32, on the CPU: 30 layers of 576, 272 tensors.

    python benchmarks/bench_identity.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Bar, Report, arguments
from transformers import LlamaConfig, LlamaForCausalLM

from kvmmap.integrations.transformers import KvmmapCache
from kvmmap.integrations.transformers.identity import weights_fingerprint
from kvmmap.integrations.transformers.weights import weights_of

STEPS = 10
OPENINGS = 100


def main() -> None:
    args = arguments(__doc__.partition("\n")[0], rounds=1).parse_args()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation("kvmmap")
    first = seconds(lambda: weights_fingerprint(model))
    cache = KvmmapCache(model)
    model(torch.randint(0, 49152, (1, 100)), **cache.argument)
    step = median(lambda: model(torch.tensor([[5]]), **cache.argument), STEPS)
    look = median(lambda: weights_of(model), STEPS)
    print(f"a decoding step at 100 positions   {step * 1e3:8.2f} ms")
    print(f"looking at the weights in it       {look * 1e3:8.3f} ms, {100 * look / step:.2f} % of the step")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.kvm"
        KvmmapCache.create(path, model).close()
        opening = median(lambda: KvmmapCache.open(path, model, room=1).close(), OPENINGS)
        print(f"opening with a known fingerprint   {opening * 1e3:8.2f} ms")
    report = Report("identity")
    report.bars = [
        Bar("opening for a model with a known fingerprint", 3, opening * 1e3, "ms"),
        Bar("looking at the weights, of a step", 0.01, look / step, "x at most"),
    ]
    report.finish(args.json)
    print(f"the fingerprint of all weights     {first * 1e3:8.1f} ms, once a process")


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median(action: Callable[[], Any], times: int) -> float:
    return statistics.median(seconds(action) for _ in range(times))


if __name__ == "__main__":
    main()
