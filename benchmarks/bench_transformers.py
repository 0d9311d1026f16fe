"""SmolLM2-135M with its real weights on real text: a KvmmapCache compared with transformers' own caches.

Caches are filled with the keys and values of one real prefill, and then take turns, a token each a round. Needs
benchmarks/requirements-transformers.txt and the weights (demo/requirements-model.txt).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Bar, Measured, Report, Task, arguments, measure, nothing, version_of, workspace
from transformers import DynamicCache, QuantizedCache

from kvmmap.integrations.transformers import CACHE_ARGUMENT, KvmmapBatch, KvmmapCache, reuse
from kvmmap.integrations.transformers.identity import weights_fingerprint

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))
from facts import perplexity  # noqa: E402
from model import Model  # noqa: E402
from texts import TEXTS, read_text  # noqa: E402

PROMPT = 4000
CONTEXTS = (4000, 8000)
RESIDENT = (1000, 8000)
"""Positions at which device-resident caches decode."""

BATCH = (2000, 4)
"""Positions of a sequence, and sequences, that a batch decodes."""

DECODE = {"f32": 1.7, "bf16": 4.6}
"""Of DynamicCache's tokens a second, at 8,000 tokens."""

AS_INT8 = 1.0
"""The default preset, of int8 without a recent window."""

BESIDE = version_of("transformers")
STEPS = 8
"""Tokens that they decode at a time, so that rows written behind are part of what is measured."""

SCORED = 2000
PARTS = ("perplexity", "first", "decode", "resident", "batch", "memory")
LLAMA_CPP_LOAD_S = 0.6
"""Seconds that llama.cpp took to load its saved state of 7,900 tokens, f16, measured apart on 2 threads; beside
ours, but without the model's identity, bench_llama_cpp.py measures it."""

PACKED = 128
PACKING = ", packing"
"""transformers' integer caches quantise everything anew after so many tokens; a step that does is timed apart."""

QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "quanto int4": ("quanto", {}),
    "hqq int4": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "hqq int8": ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}),
    "fp8": ("fp8", {}),
}
"""transformers' QuantizedCache: backend and settings."""

LIBRARIES = {"quanto": "optimum", "hqq": "hqq"}
"""What a backend needs besides."""


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--contexts", nargs="+", type=int, choices=CONTEXTS, default=CONTEXTS, help="to decode at")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    report = Report("transformers")
    report.note("threads", torch.get_num_threads())
    for name, (backend, _) in list(QUANTIZED.items()):
        if backend in LIBRARIES and importlib.util.find_spec(LIBRARIES[backend]) is None:
            del QUANTIZED[name]
            report.note(name, f"left out: {LIBRARIES[backend]} is not installed (requirements-transformers.txt)")
    model = Model.load()
    net = model.net
    with workspace(options.dir) as folder:
        if "perplexity" in options.only:
            perplexities(report, model)
        if set(options.only) - {"perplexity"}:
            ids = torch.tensor([model.encode(read_text("source")[1])[: max(CONTEXTS)]])
            full = DynamicCache(config=net.config)
            net(ids, **{CACHE_ARGUMENT: full}, logits_to_keep=1)
            saved = save(net, ids, full, folder / "prompt.kvm")
        if "first" in options.only:
            time_to_first_token(report, net, ids, saved)
            reopening(report, net, full, saved)
        if "decode" in options.only:
            for length in options.contexts:
                decoding(report, net, full, length, folder, options.rounds)
        if "resident" in options.only:
            for length in RESIDENT:
                resident(report, net, full, length, folder, options.rounds)
        if "batch" in options.only:
            batches(report, net, full, options.rounds)
        if "memory" in options.only:
            memory(report, saved)
    report.finish(options.json)


def save(net: Any, ids: torch.Tensor, full: DynamicCache, path: Path) -> Path:
    """Save a prefilled prompt."""
    with KvmmapCache.create(path, net.config, fingerprint=weights_fingerprint(net)) as cache:
        fill(cache, full, ids.shape[1])
        cache.record_token_ids(ids)
    return path


def fill(cache: Any, full: DynamicCache, length: int, dtype: torch.dtype = torch.float32) -> None:
    """Copy the first positions of one cache into another."""
    for number, layer in enumerate(full.layers):
        cache.update(layer.keys[:, :, :length].to(dtype), layer.values[:, :, :length].to(dtype), number)


# Perplexity


class RoundTrip(DynamicCache):
    """A cache whose keys and values were quantised and dequantised, layer by layer."""

    def __init__(self, config: Any, codec: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        super().__init__(config=config)
        self.codec = codec

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(*self.codec(key_states, value_states), layer_idx)


def quantized(config: Any, backend: str, settings: dict[str, Any], keys: Any, values: Any) -> tuple[Any, Any]:
    """Return a layer's keys and values as transformers' QuantizedCache stores them."""
    layer = QuantizedCache(backend, config, **settings).layers[0]
    layer.update(keys.contiguous(), values.contiguous())
    return layer._dequantize(layer._quantized_keys), layer._dequantize(layer._quantized_values)


def perplexities(report: Report, model: Model) -> None:
    """Perplexities of two texts, with every token attending to keys and values from the cache."""
    config = model.config
    caches: dict[str, tuple[str, Callable[[], Any]]] = {
        "f32": ("sdpa", lambda: DynamicCache(config=config)),
        "kvmmap int8, in place": ("kvmmap", lambda: KvmmapCache(config, preset="int8")),
        "kvmmap fidelity, in place": ("kvmmap", lambda: KvmmapCache(config)),
        "bf16": ("sdpa", lambda: RoundTrip(config, lambda k, v: (k.bfloat16().float(), v.bfloat16().float()))),
    }
    for name, (backend, settings) in QUANTIZED.items():
        caches[name] = ("sdpa", partial(RoundTrip, config, partial(quantized, config, backend, settings)))
    rows: dict[str, dict[str, float]] = {name: {} for name in caches}
    for text in TEXTS:
        ids = model.encode(read_text(text)[1])[: SCORED + 1]
        for name, (attention, make) in caches.items():
            model.net.set_attn_implementation(attention)
            losses, _ = model.score(ids, make())
            rows[name][text] = perplexity(losses)
    for name, found in rows.items():
        changes = (f"{text} {value:.4f} ({value / rows['f32'][text] - 1:+.2%})" for text, value in found.items())
        report.note(f"perplexity, {name}", ", ".join(changes))
    for text in TEXTS:
        change = abs(rows["kvmmap fidelity, in place"][text] / rows["f32"][text] - 1)
        report.bars.append(Bar(f"perplexity of {text}, {SCORED} tokens, off f32's", 0.5, 100 * change, "%"))


# Saved prompts


def time_to_first_token(report: Report, net: Any, ids: torch.Tensor, saved: Path) -> None:
    """From a prompt's ids to its first new token: prefilled, and from a saved cache."""
    prompt = ids[:, :PROMPT]
    weights_fingerprint(net)  # once a process, with the loading of the model

    def prefill() -> None:
        net.set_attn_implementation("sdpa")
        first_token(net, prompt, DynamicCache(config=net.config))

    def reopen() -> None:
        net.set_attn_implementation("kvmmap")
        with KvmmapCache.open(saved, net) as cache:
            reuse(cache, prompt)
            first_token(net, prompt, cache)

    tasks = [
        Task(name=f"prefill {PROMPT} tokens", run=prefill),
        Task(name="open the saved cache", run=reopen),
        Task(name="one token without any context", run=lambda: first_token(net, prompt[:, :1], None)),
    ]
    measured = measure(tasks, 3)
    report.show("time to the first token", measured, [tasks[0].name])
    ratio = measured.ratio(tasks[1].name, tasks[0].name).median
    report.bars.append(
        Bar(f"first token of a saved prompt of {PROMPT} tokens, to prefilling", 50, ratio, "x", beside=BESIDE)
    )


def first_token(net: Any, ids: torch.Tensor, cache: Any) -> None:
    net.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, max_new_tokens=1, do_sample=False)


def reopening(report: Report, net: Any, full: DynamicCache, saved: Path) -> None:
    """Opening alone, which takes constant time."""
    state = saved.with_suffix(".pt")
    torch.save([(layer.keys.half(), layer.values.half()) for layer in full.layers], state)
    tasks = [
        Task(name="KvmmapCache.open, identity checked", run=lambda: KvmmapCache.open(saved, net).close()),
        Task(name="KvmmapCache.open, without the model", run=lambda: KvmmapCache.open(saved).close()),
        Task(name="torch.load, f16", run=lambda: torch.load(state)),
        Task(name="torch.load, f16, mapped", run=lambda: torch.load(state, mmap=True)),
    ]
    measured = measure(tasks, 9)
    report.show(f"reopening {max(CONTEXTS)} tokens", measured, ["torch.load, f16"])
    ratio = LLAMA_CPP_LOAD_S / measured.time(tasks[0].name).median
    report.bars.append(Bar(f"reopen {max(CONTEXTS)} tokens, to llama.cpp's {LLAMA_CPP_LOAD_S} s", 100, ratio, "x"))


# Decoding


def decoding(report: Report, net: Any, full: DynamicCache, length: int, folder: Path, rounds: int) -> None:
    """A token at a time at a context of `length`, all caches in turn.

    A token of the model without any cache, which attends to itself alone, takes what no cache can undercut: so the
    ceilings of the ratios are known from the same rounds.
    """
    half = copy.deepcopy(net).to(torch.bfloat16)
    files = []
    tasks = []

    def add(name: str, model: Any, attention: str, cache: Any, before: Callable[[], object] = nothing) -> None:
        def prepare() -> None:
            model.set_attn_implementation(attention)
            before()

        tasks.append(Task(name=name, run=partial(one_token, model, cache), before=prepare))

    for dtype, model in (("f32", net), ("bf16", half)):
        files.append(KvmmapCache.create(folder / f"{dtype}.kvm", model.config, overwrite=True))
        dynamic = DynamicCache(config=model.config)
        for cache in (files[-1], dynamic):
            fill(cache, full, length, model.dtype)
        add(f"kvmmap, {dtype}", model, "kvmmap", files[-1])
        files.append(KvmmapCache.create(folder / f"{dtype}-int8.kvm", model.config, preset="int8", overwrite=True))
        fill(files[-1], full, length, model.dtype)
        add(f"kvmmap int8, {dtype}", model, "kvmmap", files[-1])
        add(f"DynamicCache, {dtype}", model, "sdpa", dynamic)
        add(f"no cache at all, {dtype}", model, "sdpa", None)
        for name, (backend, settings) in QUANTIZED.items():
            cache = QuantizedCache(backend, model.config, **settings)
            fill(cache, full, length, model.dtype)
            add(f"{name}, {dtype}", model, "sdpa", cache, partial(pack_every, cache, PACKED))
            if "int" in name:
                add(f"{name}, {dtype}{PACKING}", model, "sdpa", cache, partial(pack_every, cache, 1))
    measured = measure(tasks, rounds)
    spread_packing(measured)
    report.show(f"decoding, {length} tokens of context", measured, ["DynamicCache, f32", "DynamicCache, bf16"])
    for dtype in ("f32", "bf16"):
        own = f"kvmmap, {dtype}"
        rivals = [(name, 3.0) for name in QUANTIZED if "int" in name]
        for name, required in [("DynamicCache", DECODE[dtype]), ("kvmmap int8", AS_INT8), *rivals]:
            ratio, ceiling = (
                measured.ratio(way, f"{name}, {dtype}").median for way in (own, f"no cache at all, {dtype}")
            )
            what = f"decode at {length}, {dtype}: kvmmap, to {name}"
            beside = "the preset int8" if name == "kvmmap int8" else BESIDE
            report.bars.append(Bar(what, required, ratio, "x", ceiling, beside))
    for file in files:
        file.close()


def resident(report: Report, net: Any, full: DynamicCache, length: int, folder: Path, rounds: int) -> None:
    """Several tokens at a time with keys and values as tensors; new rows go to a file behind the model."""
    half = copy.deepcopy(net).to(torch.bfloat16)
    tasks, files = [], []
    for dtype, model in (("f32", net), ("bf16", half)):
        model.set_attn_implementation("sdpa")
        path = folder / f"resident-{dtype}.kvm"
        files.append(KvmmapCache.create(path, model.config, resident="device", overwrite=True))
        dynamic = DynamicCache(config=model.config)
        for name, cache in ((f"device-resident, {dtype}", files[-1]), (f"DynamicCache, {dtype}", dynamic)):
            fill(cache, full, length, model.dtype)
            tasks.append(Task(name=name, run=partial(tokens, model, cache, STEPS)))
    with torch.inference_mode():
        measured = measure(tasks, rounds)
    report.show(f"{STEPS} tokens, device-resident, at {length}", measured, ["DynamicCache, f32", "DynamicCache, bf16"])
    for dtype in ("f32", "bf16"):
        ratio = measured.ratio(f"device-resident, {dtype}", f"DynamicCache, {dtype}").median
        report.bars.append(
            Bar(f"decode at {length}, {dtype}: device-resident, to DynamicCache", 0.97, ratio, "x", beside=BESIDE)
        )
    for file in files:
        file.close()


def tokens(net: Any, cache: Any, count: int) -> None:
    for _ in range(count):
        one_token(net, cache)


def batches(report: Report, net: Any, full: DynamicCache, rounds: int) -> None:
    """A token for each of several sequences at once."""
    kept, rows = BATCH
    dynamic = DynamicCache(config=net.config)
    caches = [KvmmapCache(net.config, capacity=kept + 1000) for _ in range(rows)]
    for number, layer in enumerate(full.layers):
        own = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        dynamic.update(*(states.repeat(rows, 1, 1, 1) for states in own), number)
        for cache in caches:
            cache.update(*own, number)
    batch = KvmmapBatch([KvmmapBatch.branches(cache, 1, room=1000).caches[0] for cache in caches])
    KvmmapCache(net)  # hooks on the model
    ids = torch.full((rows, 1), 5)

    def step(cache: Any, attention: str) -> Task:
        return Task(
            name=f"{type(cache).__name__}, {rows} x {kept}",
            run=lambda: net(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1),
            before=lambda: net.set_attn_implementation(attention),
        )

    tasks = [step(batch, "kvmmap"), step(dynamic, "sdpa")]
    measured = measure(tasks, rounds)
    report.show(f"a token for each of {rows} sequences of {kept} tokens", measured, [tasks[1].name])
    ratio = measured.ratio(tasks[0].name, tasks[1].name).median
    report.bars.append(
        Bar(f"batch of {rows} at {kept}, f32, in place: to DynamicCache", 1.0, ratio, "x", beside=BESIDE)
    )


def pack_every(cache: QuantizedCache, tokens: int) -> None:
    """The number of tokens that transformers' quantised caches collect before they quantise everything again."""
    for layer in cache.layers:
        layer.residual_length = tokens


def spread_packing(measured: Measured) -> None:
    """Spread a quantised cache's packing over the tokens between two packings."""
    for name in [name for name in measured.tasks if name.endswith(PACKING)]:
        packing, plain = measured.seconds.pop(name), name.removesuffix(PACKING)
        del measured.tasks[name]
        steps = zip(measured.seconds[plain], packing, strict=True)
        measured.seconds[plain] = [((PACKED - 1) * step + pack) / PACKED for step, pack in steps]


def one_token(net: Any, cache: Any) -> None:
    net(torch.tensor([[5]]), **{CACHE_ARGUMENT: cache}, use_cache=cache is not None, logits_to_keep=1)


# Memory

WATCH = """
import json, sys
sys.path[:0] = {paths!r}
import torch
from bench_transformers import high_water_mark
torch.set_num_threads(2)
print(json.dumps(high_water_mark(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
"""


def high_water_mark(kind: str, saved: str, length: int) -> int:
    """The most bytes that a process holds while it decodes at a context of `length`."""
    torch.set_grad_enabled(False)
    net = Model.load().net
    with KvmmapCache.open(saved, net) as cache:
        cache.truncate(length)
        if kind == "kvmmap":
            return most_bytes(net, "kvmmap", cache)
        full = DynamicCache(config=net.config)
        if length:
            for number, layer in enumerate(cache.layers):
                full.update(*layer.read(torch.float32), number)
    return most_bytes(net, "sdpa", full)


def most_bytes(net: Any, attention: str, cache: Any) -> int:
    net.set_attn_implementation(attention)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    for _ in range(4):
        one_token(net, cache)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def memory(report: Report, saved: Path) -> None:
    """The cache's share of the peak memory of decoding, each in a separate process."""
    code = WATCH.format(paths=[str(HERE), str(HERE.parent / "demo")])
    shares = {}
    for kind in ("kvmmap", "DynamicCache"):
        marks = {}
        for length in (0, max(CONTEXTS)):
            done = subprocess.run(
                [sys.executable, "-c", code, kind, saved, str(length)], check=True, stdout=subprocess.PIPE, text=True
            )
            marks[length] = json.loads(done.stdout)
        shares[kind] = marks[max(CONTEXTS)] - marks[0]
        report.note(
            f"most memory while decoding, {kind}",
            f"{marks[max(CONTEXTS)] / 1e6:.0f} MB, {shares[kind] / 1e6:.0f} of them for {max(CONTEXTS)} tokens",
        )
    ratio = shares["DynamicCache"] / shares["kvmmap"]
    report.bars.append(
        Bar(
            f"the cache's share of memory at {max(CONTEXTS)} tokens, below DynamicCache f32's",
            3,
            ratio,
            "x",
            beside=BESIDE,
        )
    )


if __name__ == "__main__":
    main()
