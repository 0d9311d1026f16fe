"""A decoding step in transformers: kvmmap beside DynamicCache and a cache that costs nothing; with --pieces, in parts.

Models have random weights, so that other shapes than SmolLM2's can be measured: speed does not depend on what they
compute. All ways take turns, a token each a round. A token of the cache that costs nothing attends to itself alone: no
cache can be faster, so it is the limit of every ratio. torch's threads wait for each other in loops, and whatever takes
a processor for a moment holds up both: bars compare 10th percentiles of the rounds. With --pieces, figures are medians
of the rounds' differences.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bar, Report, Task, arguments, measure, version_of, workspace
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

PRESETS = ("fidelity", "int8")
"""The default one, and int8 without a window."""

Piece = dict[str, Callable[..., Any]]
"""What replaces methods of `DecodeStep`."""

Clock = Callable[[], float]


class CostsNothing(DynamicCache):
    """A cache that keeps nothing: attention sees the new position alone."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
POSITIONS = (2000, 8000, 16000)

DECODE = {"f32": 1.7, "bf16": 4.6}
"""Of DynamicCache's tokens a second, with SmolLM2's shape from `FAR` positions on; elsewhere no fewer than its."""

FAR = 8000
AS_INT8 = 1.0
"""The default preset, of int8 without a recent window."""

BESIDE = version_of("transformers")


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=15)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="of the model")
    parser.add_argument("--positions", nargs="+", type=int, default=POSITIONS, help="stored")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of the model")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--processor", action="store_true", help="time by processor time, with one thread")
    parser.add_argument("--pieces", action="store_true", help="time a step with one piece at a time besides")
    options = parser.parse_args()
    threads, clock = (1, time.process_time) if options.processor else (options.threads, time.perf_counter)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    report = Report("step")
    report.note("threads", torch.get_num_threads())
    for shape, dtype in itertools.product(options.shapes, options.dtypes):
        config = LlamaConfig(max_position_embeddings=32768, tie_word_embeddings=True, **SHAPES[shape])
        net = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
        for positions in options.positions:
            with workspace(options.dir) as folder:
                decoding(report, net, f"{shape}, {dtype}", positions, folder, options.rounds, clock)
                if options.pieces:
                    pieces(report, net, positions, folder, options.rounds, clock)
    report.finish(options.json)


def decoding(report: Report, net: Any, what: str, positions: int, folder: Path, rounds: int, clock: Clock) -> None:
    """Time a token with caches of all kinds in turn.

    Not in place, a cache decodes all rows to tensors, which the model's own attention then reads.
    """
    caches = made(net, positions, folder)
    ways = {
        "kvmmap": ("kvmmap", caches["fidelity"]),
        "kvmmap int8": ("kvmmap", caches["int8"]),
        "kvmmap, not in place": ("sdpa", caches["fidelity"]),
        "kvmmap int8, not in place": ("sdpa", caches["int8"]),
        "DynamicCache": ("sdpa", caches["DynamicCache"]),
        "a cache that costs nothing": ("sdpa", caches["nothing"]),
    }
    measured = measure([task(name, net, *way) for name, way in ways.items()], rounds, clock)
    report.show(f"a token at {positions:,} positions, {what}", measured, ["DynamicCache"])
    shape, _, dtype = what.partition(", ")
    required = DECODE[dtype] if shape == "smollm2" and positions >= FAR else 1.0
    for rival, least, beside in (("DynamicCache", required, BESIDE), ("kvmmap int8", AS_INT8, "the preset int8")):
        ratio, ceiling = (measured.fast(rival) / measured.fast(way) for way in ("kvmmap", "a cache that costs nothing"))
        report.bars.append(
            Bar(f"decode at {positions:,}, {what}: kvmmap, to {rival}", least, ratio, "x", ceiling, beside)
        )
    for preset in PRESETS:
        caches[preset].close()


def made(net: Any, positions: int, folder: Path) -> dict[str, Any]:
    """Make caches of all kinds that hold the same random rows."""
    config = net.config
    caches = {
        preset: KvmmapCache.create(
            folder / f"{preset}.kvm", config, capacity=positions + 1000, preset=preset, overwrite=True
        )
        for preset in PRESETS
    }
    caches["DynamicCache"] = DynamicCache(config=config)
    for cache in caches.values():
        fill(cache, net, positions)
    return caches | {"nothing": CostsNothing(config=config)}


def task(name: str, net: Any, attention: str, cache: Any, piece: Piece | None = None) -> Task:
    return Task(
        name=name,
        run=partial(token, net, cache, piece or {}),
        before=partial(net.set_attn_implementation, attention),
    )


def pieces(report: Report, net: Any, positions: int, folder: Path, rounds: int, clock: Clock) -> None:
    """Time a token by all ways in turn, and print what each adds to a cache that costs nothing."""
    layers = net.config.num_hidden_layers
    caches = made(net, positions, folder)
    nothing, default, int8 = caches["nothing"], caches["fidelity"], caches["int8"]
    ways: dict[str, tuple[str, Any, Piece]] = {
        "a cache that costs nothing": ("sdpa", nothing, {}),
        "int8, without attention": ("kvmmap", int8, {"attend": _zeros}),
        "int8, attention over one position": ("kvmmap", int8, {"attend": _one}),
        "int8": ("kvmmap", int8, {}),
        "the default preset, without attention": ("kvmmap", default, {"attend": _zeros}),
        "the default preset": ("kvmmap", default, {}),
        "DynamicCache": ("sdpa", caches["DynamicCache"], {}),
    }
    tasks = [task(name, net, *way) for name, way in ways.items()]
    measured = measure(tasks, rounds, clock)
    report.show(f"a token at {positions:,} positions, {net.dtype}, piece by piece", measured, ["DynamicCache"])
    base = measured.seconds[tasks[0].name]
    for name, seconds in measured.seconds.items():
        added = statistics.median(one - other for one, other in zip(seconds, base, strict=True))
        report.note(f"{name}, over a cache that costs nothing", f"{added / layers * 1e6:.0f} us a layer")
    for preset in PRESETS:
        caches[preset].close()


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
