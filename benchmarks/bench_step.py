"""Where a decoding step in transformers spends its time: a cache that costs nothing, and one piece at a time besides.

Models have random weights, so that other shapes than SmolLM2's can be measured: speed does not depend on what they
compute. All ways take turns, a token each a round; figures are medians of the rounds' differences.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Report, Task, arguments, measure, workspace
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvmmap.decode_step import DecodeStep
from kvmmap.integrations.transformers import CACHE_ARGUMENT, KvmmapCache

SHAPES: dict[str, dict[str, int]] = {
    "smollm2": {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "llama": {
        "num_hidden_layers": 4,
        "hidden_size": 4096,
        "intermediate_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 8192,
    },
}
"""SmolLM2-135M; and few layers of Llama 3 8B's attention, with a smaller MLP and vocabulary."""

Piece = dict[str, Callable[..., Any]]
"""What replaces methods of `DecodeStep`."""


class CostsNothing(DynamicCache):
    """A cache that keeps nothing: attention sees the new position alone."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=15)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2", help="of the model")
    parser.add_argument("--positions", type=int, default=8000, help="stored")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    report = Report("step")
    config = LlamaConfig(max_position_embeddings=32768, tie_word_embeddings=True, **SHAPES[options.shape])
    net = AutoModelForCausalLM.from_config(config).to(getattr(torch, options.dtype)).eval()
    with workspace(options.dir) as folder:
        pieces(report, net, options.positions, folder, options.rounds)
    report.finish(options.json)


def pieces(report: Report, net: Any, positions: int, folder: Path, rounds: int) -> None:
    """Time a token by all ways in turn, and print what each adds to a cache that costs nothing."""
    config, layers = net.config, net.config.num_hidden_layers
    nothing, dynamic = CostsNothing(config=config), DynamicCache(config=config)
    default, int8 = (
        KvmmapCache.create(folder / f"{preset}.kvm", config, capacity=positions + 1000, preset=preset)
        for preset in ("fidelity", "int8")
    )
    for cache in (dynamic, default, int8):
        fill(cache, net, positions)
    ways: dict[str, tuple[str, Any, Piece]] = {
        "a cache that costs nothing": ("sdpa", nothing, {}),
        "int8, without attention": ("kvmmap", int8, {"attend": _zeros}),
        "int8, attention over one position": ("kvmmap", int8, {"attend": _one}),
        "int8": ("kvmmap", int8, {}),
        "the default preset, without attention": ("kvmmap", default, {"attend": _zeros}),
        "the default preset": ("kvmmap", default, {}),
        "DynamicCache": ("sdpa", dynamic, {}),
    }
    tasks = [
        Task(name=name, run=partial(token, net, cache, piece), before=partial(net.set_attn_implementation, attention))
        for name, (attention, cache, piece) in ways.items()
    ]
    measured = measure(tasks, rounds)
    title = f"a token at {positions} positions, {net.dtype}, {layers} layers"
    report.show(title, measured, ["DynamicCache"])
    base = measured.seconds[tasks[0].name]
    for name, seconds in measured.seconds.items():
        added = statistics.median(one - other for one, other in zip(seconds, base, strict=True))
        report.note(f"{name}, over a cache that costs nothing", f"{added / layers * 1e6:.0f} us a layer")
    for cache in (default, int8):
        cache.close()


def fill(cache: Any, net: Any, positions: int) -> None:
    """Give all layers the same random keys and values."""
    config = net.config
    shape = 1, config.num_key_value_heads, positions, config.head_dim
    keys, values = torch.randn(shape).to(net.dtype), torch.randn(shape).to(net.dtype)
    for number in range(config.num_hidden_layers):
        cache.update(keys, values, number)


def token(net: Any, cache: Any, piece: Piece) -> None:
    with replaced(piece):
        net(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)


@contextmanager
def replaced(piece: Piece) -> Iterator[None]:
    kept = {name: getattr(DecodeStep, name) for name in piece}
    try:
        for name, other in piece.items():
            setattr(DecodeStep, name, other)
        yield
    finally:
        for name, own in kept.items():
            setattr(DecodeStep, name, own)


def _zeros(step: DecodeStep, query: torch.Tensor, scale: float, softcap: float | None, window: int | None) -> Any:
    return query.new_zeros(1, 1, query.shape[1], query.shape[3])


_attend = DecodeStep.attend


def _one(step: DecodeStep, query: torch.Tensor, scale: float, softcap: float | None, window: int | None) -> Any:
    return _attend(step, query, scale, softcap, 1)


if __name__ == "__main__":
    main()
