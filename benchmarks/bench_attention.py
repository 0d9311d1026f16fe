"""The speed of `layer.attend` relative to reading the same bytes and to torch, by length and threads; and its error.

    python benchmarks/bench_attention.py [--rounds 15] [--length 32768] [--longest 1048576] [--json FILE]
    python benchmarks/bench_attention.py --chunks [N...] [--processor]

The limit of attention that reads every byte once is reading them: the sum of the same int8 codes and scales as 64-bit
words, by numpy, in the same rounds. torch's `scaled_dot_product_attention` gets the same keys and values as f32 and as
bf16, in its fastest layout ([head, position, dim], contiguous), with `enable_gqa` where heads are grouped.
Where requirements-transformers.txt is installed, so are transformers' own quantised caches, at the same shapes.
bench_llama_cpp.py compares with llama.cpp's attention.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from harness import Bar, Report, Task, arguments, gaussian, measure
from ml_dtypes import bfloat16
from torch.nn.functional import scaled_dot_product_attention

import kvmmap

HEADS, DIM = 8, 128
BARS = {1: (0.75, 10.0), 4: (0.44, 35.0), 8: (0.23, None)}
"""By query heads a KV head, of f32 queries: of the read limit, and of torch in f32."""

BARS_16_BITS = {1: (0.75, None), 4: (0.65, 60.0), 8: (0.4, None)}
"""The same of bf16 queries, and of torch in bf16."""

CHUNKS = {64: 2.0, 512: 1.5, 2048: 1.5}
"""By queries in a chunk of a prompt: of torch's attention over the same dtype."""

CHUNK_LENGTHS = {4096: 8, 8192: 8, 16_384: 4, 32_768: 2}
"""Positions, and KV heads: fewer of them over many positions, so that torch takes no minutes."""

CHUNK_GROUP = 4
"""Query heads a KV head."""

ERRORS = (2.0, 400.0)
"""Millionths of the output's largest number that are lost, of f32 queries and of bf16 ones."""

TWO_THREADS = 1.7
"""Of one thread, where two processors read and multiply that much faster than one."""

ONE_CORE = 1.6
"""Two streams of products that gain less than this share a core."""

OF_TWO_PROCESSORS = 0.9
"""The same where they don't: of what two streams of reading or of products reach, whichever is less."""


def main() -> None:
    parser = arguments("Benchmark attention.", rounds=15)
    parser.add_argument("--length", type=int, default=32_768, help="positions")
    parser.add_argument("--longest", type=int, default=1 << 20, help="positions, where cost by length is measured")
    parser.add_argument("--chunks", type=int, nargs="*", help="chunks alone, over so many positions")
    parser.add_argument("--processor", action="store_true", help="time chunks by processor time")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("attention")
    if args.chunks is None:
        report.note("shape", f"{args.length:,} positions, {HEADS} KV heads, head_dim {DIM}; one thread unless said")
        layer = filled(args.length, HEADS, DIM)
        decode(report, layer, args.rounds, processors(report))
        quantized_caches(report, layer, args.rounds)
        by_length(report, args.longest)
    report.note("chunks", f"{CHUNK_GROUP} query heads a KV head, head_dim {DIM}; one thread")
    for length in args.chunks or CHUNK_LENGTHS:
        prompt(report, length, args.rounds, time.process_time if args.processor else time.perf_counter)
    report.finish(args.json)


def filled(length: int, heads: int, dim: int) -> kvmmap.QuantizedKvLayer:
    """A layer in memory; long ones repeat the same rows."""
    layer = kvmmap.QuantizedKvLayer(length, heads, dim)
    part = min(length, 16_384)
    keys, values = gaussian(part, heads, dim), gaussian(part, heads, dim, seed=1)
    while len(layer) < length:
        count = min(part, length - len(layer))
        layer.extend(keys[:count], values[:count])
    return layer


def slabs(layer: kvmmap.QuantizedKvLayer) -> list[np.ndarray]:
    arrays = (layer.key_codes, layer.key_scales, layer.value_codes, layer.value_scales)
    return [array.reshape(-1).view(np.uint64) for array in arrays]


def decode(report: Report, layer: kvmmap.QuantizedKvLayer, rounds: int, two_processors: float) -> None:
    """One query, as in a decoding step; `two_processors` reach so much of one."""
    words = slabs(layer)
    keys, values = (torch.from_numpy(x.swapaxes(0, 1).copy())[None] for x in (layer.read_keys(), layer.read_values()))
    for group, (of_limit, of_torch) in BARS.items():
        queries = gaussian(1, HEADS * group, DIM, seed=2)
        out = np.empty_like(queries)
        theirs = torch.from_numpy(queries.swapaxes(0, 1).copy())[None]
        half = [x.bfloat16() for x in (theirs, keys, values)]
        halved, out_half = queries.astype(bfloat16), np.empty_like(queries)
        tasks = [
            Task(name="read", run=lambda: read(words)),
            Task(name="attend", run=lambda q=queries, o=out: layer.attend(q, out=o, threads=1)),
            Task(name="attend, bf16", run=lambda q=halved, o=out_half: layer.attend(q, out=o, threads=1)),
            Task(name="attend, 2 threads", run=lambda q=queries, o=out: layer.attend(q, out=o, threads=2)),
            Task(name="torch f32", run=lambda q=theirs: torch_attention(q, keys, values)),
            Task(name="torch bf16", run=lambda h=half: torch_attention(*h)),
        ]
        found = measure(tasks, rounds)
        title = f"decode, {group} query head{'s' * (group > 1)} a KV head"
        report.show(title, found, ["read", "torch f32", "torch bf16"])
        report.bars.append(Bar(f"{title}: of the read limit", of_limit, found.ratio("attend", "read").median, "x"))
        if of_torch:
            report.bars.append(Bar(f"{title}: of torch f32", of_torch, found.ratio("attend", "torch f32").median, "x"))
        of_limit, of_torch = BARS_16_BITS[group]
        ratio = found.ratio("attend, bf16", "read").median
        report.bars.append(Bar(f"{title}, bf16: of the read limit", of_limit, ratio, "x"))
        if of_torch:
            ratio = found.ratio("attend, bf16", "torch bf16").median
            report.bars.append(Bar(f"{title}, bf16: of torch bf16", of_torch, ratio, "x"))
        if two_processors:
            required = min(TWO_THREADS, OF_TWO_PROCESSORS * two_processors)
            gain = found.ratio("attend, 2 threads", "attend").median
            report.bars.append(Bar(f"{title}: two threads of one", round(required, 2), gain, "x"))
        worst, worst_half = error(layer, queries, out), error(layer, halved, out_half)
        of_theirs = torch_attention(*half)[0].float().numpy().swapaxes(0, 1)[None]
        what = "error, millionths of the largest"
        report.bars.append(Bar(f"{title}: {what}", ERRORS[0], worst * 1e6, "x at most"))
        report.bars.append(Bar(f"{title}, bf16: {what}", ERRORS[1], worst_half * 1e6, "x at most"))
        report.note(f"{title}, torch bf16: {what}", round(error(layer, halved, of_theirs.reshape(out.shape)) * 1e6))


def read(words: list[np.ndarray]) -> None:
    for array in words:
        array.sum()


def torch_attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[1, heads, n, dim]."""
    return scaled_dot_product_attention(queries, keys, values, enable_gqa=queries.shape[1] != keys.shape[1])


def error(layer: kvmmap.QuantizedKvLayer, queries: np.ndarray, out: np.ndarray) -> float:
    """Largest difference to plain f64 attention over the same codes, over the largest number of that."""
    expected = np.empty(out.shape)
    group = queries.shape[1] // layer.num_kv_heads
    for head in range(layer.num_kv_heads):
        keys = layer.key_codes[:, head] * layer.key_scales[:, head, None].astype(np.float64)
        values = layer.value_codes[:, head] * layer.value_scales[:, head, None].astype(np.float64)
        scores = queries.astype(np.float64)[0, head * group : (head + 1) * group] @ keys.T * layer.head_dim**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected[0, head * group : (head + 1) * group] = weights @ values / weights.sum(axis=1, keepdims=True)
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def prompt(report: Report, length: int, rounds: int, clock: Callable[[], float]) -> None:
    """Chunks of a prompt, causal: the last queries of so many positions, as far as there are as many."""
    heads = CHUNK_LENGTHS.get(length, 2)
    layer = filled(length, heads, DIM)
    keys, values = (torch.from_numpy(x.swapaxes(0, 1).copy())[None] for x in (layer.read_keys(), layer.read_values()))
    keys_and_values = [x.bfloat16() for x in (keys, values)]
    for n, required in CHUNKS.items():
        if n > length:
            break
        queries = gaussian(n, heads * CHUNK_GROUP, DIM, seed=3)
        halved, out = queries.astype(bfloat16), np.empty_like(queries)
        theirs = torch.from_numpy(queries.swapaxes(0, 1).copy())[None]
        mask = torch.arange(length)[None] <= torch.arange(length - n, length)[:, None]
        options = {"query_start": length - n, "out": out, "threads": 1}
        inputs, half = [theirs, keys, values], [theirs.bfloat16(), *keys_and_values]
        tasks = [
            Task(name="attend", run=lambda q=queries, o=options: layer.attend(q, **o)),
            Task(name="attend, bf16", run=lambda q=halved, o=options: layer.attend(q, **o)),
            Task(name="torch f32", run=lambda t=inputs, m=mask: masked(t, m)),
            Task(name="torch bf16", run=lambda t=half, m=mask: masked(t, m)),
        ]
        title = f"a chunk of {n:,} queries over {length:,} positions"
        found = measure(tasks, min(rounds, 3), clock)
        report.show(f"{title}, {heads} KV heads", found, ["torch f32", "torch bf16"])
        for name, rival in (("attend", "torch f32"), ("attend, bf16", "torch bf16")):
            report.bars.append(Bar(f"{title}: of {rival}", required, found.ratio(name, rival).median, "x"))


def masked(inputs: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)


def processors(report: Report) -> float:
    """What two processors reach of one, reading memory and multiplying in cache: the lower, or 0 where there is one.

    Two threads of one core share what multiplies, and reach 1.3 to 1.5 there.
    """
    if len(os.sched_getaffinity(0)) < 2:
        return 0
    two = ThreadPoolExecutor(2)
    queries = gaussian(1, HEADS * 4, 64)

    def multiply(layer: kvmmap.QuantizedKvLayer) -> None:
        for _ in range(50):
            layer.attend(queries, threads=1)

    layers = [filled(1024, HEADS, 64) for _ in range(2)]
    words = [np.full(1 << 22, i, np.uint64) for i in range(2)]
    tasks = [
        Task(name="multiply", run=lambda: multiply(layers[0])),
        Task(name="multiply, two", run=lambda: list(two.map(multiply, layers))),
        Task(name="read", run=lambda: words[0].max()),
        Task(name="read, two", run=lambda: list(two.map(np.max, words))),
    ]
    found = measure(tasks, 15)
    products, reading = (2 * found.ratio(f"{name}, two", name).median for name in ("multiply", "read"))
    which = "two threads of one core, or a busy one" if products < ONE_CORE else "two cores"
    report.note("two processors, of one", f"products in cache {products:.2f}x, reading {reading:.2f}x: {which}")
    return min(products, reading)


def quantized_caches(report: Report, layer: kvmmap.QuantizedKvLayer, rounds: int) -> None:
    """A step of one layer over transformers' own quantised caches: dequantise everything, then attention by torch.

    The step that quantises everything anew, one in 128 with their settings, is left out in their favour.
    """
    try:
        from bench_transformers import LIBRARIES, QUANTIZED, pack_every
        from transformers import LlamaConfig, QuantizedCache
    except ImportError as error:
        report.note("transformers' quantised caches", f"left out: {error} (requirements-transformers.txt)")
        return
    keys, values = (torch.from_numpy(x.swapaxes(0, 1).copy())[None] for x in (layer.read_keys(), layer.read_values()))
    caches = {}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM)
    for name, (backend, settings) in QUANTIZED.items():
        if backend in LIBRARIES and importlib.util.find_spec(LIBRARIES[backend]) is None:
            report.note(name, f"left out: {LIBRARIES[backend]} is not installed (requirements-transformers.txt)")
            continue
        caches[name] = QuantizedCache(backend, config, **settings)
        caches[name].update(keys, values, 0)
        pack_every(caches[name], 1 << 20)
    for group in (1, 4):
        queries = gaussian(1, HEADS * group, DIM, seed=2)
        theirs = torch.from_numpy(queries.swapaxes(0, 1).copy())[None]
        tasks = [Task(name="attend", run=lambda q=queries: layer.attend(q, threads=1))]
        tasks += [
            Task(
                name=name,
                run=lambda c=cache, q=theirs: torch_attention(q, *c.update(keys[:, :, :1], values[:, :, :1], 0)),
            )
            for name, cache in caches.items()
        ]
        title = f"transformers' quantised caches, {group} query head{'s' * (group > 1)} a KV head"
        found = measure(tasks, min(rounds, 3))
        report.show(title, found, ["attend"])
        times = ", ".join(f"{name} {found.ratio('attend', name).median:.0f}" for name in caches)
        report.note("attend is so many times as fast", times)


def by_length(report: Report, longest: int) -> None:
    """Time a position must not grow with the length; printed from 1,024 positions on."""
    layer = filled(longest, 2, DIM)
    queries = gaussian(1, 8, DIM, seed=2)
    lengths = [n for n in (1 << k for k in range(10, 21, 2)) if n <= longest]
    tasks = [
        Task(
            name=f"{length:,}",
            run=lambda n=length: [
                layer.attend(queries, positions=(0, n), threads=1) for _ in range(max(1, 65_536 // n))
            ],
            calls=max(1, 65_536 // length),
        )
        for length in lengths
    ]
    found = measure(tasks, 5)
    report.show("by length, 2 KV heads, 4 query heads each", found, [])
    costs = [found.time(f"{n:,}").median / n * 1e9 for n in lengths]
    report.note("ns a position", {f"{n:,}": round(cost, 2) for n, cost in zip(lengths, costs, strict=True)})
    slope = np.polyfit(np.log(lengths), np.log([found.time(f"{n:,}").median for n in lengths]), 1)[0]
    report.note("exponent of cost by length (1 is linear)", round(float(slope), 3))


if __name__ == "__main__":
    main()
