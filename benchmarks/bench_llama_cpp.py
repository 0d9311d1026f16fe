"""Attention, saving and reopening compared with llama.cpp, for the same context: SmolLM2-135M, 7,900 tokens.

    make bench-llama-cpp
    python benchmarks/bench_llama_cpp.py [--rounds 40] [--only PART] [--prompt FILE] [--json FILE]

llama.cpp computes the prompt once, with keys and values in f16. Its saved state is loaded into a second
context, as q8_0, and into a kvmmap file: all three hold the same rows, so all measured tasks do the same work.

Attention within llama.cpp can't be timed from outside, but nothing else of a token's work grows with the context. So a
token is computed after 7,900 others and after 32, and removed at once, so that the next step is as long; the difference
of the two, in one round, is the time of attention over the other 7,868 positions. (It includes the mask, which grows,
too. The short step attends over 32.) kvmmap's is `attend` in all 30 layers, over all 7,900 positions of a mapped
file, which has been compared with its checksums before: with queries in f32, and in f16, to which llama.cpp rounds them
where keys are in f16 (it rounds them to 8 bits where keys are in q8_0).

llama.cpp's threads wait for each other in loops, at each of a step's some hundred operations: whatever takes a
processor for a moment holds up both threads, and a median then measures what else runs. So the bars compare 10th
percentiles over many rounds, of kvmmap's time, of the long steps and of the short ones alike. Beside them stands what
reading kvmmap's rows alone would reach, by as many threads.

llama.cpp's files are those of a sequence, as llama-server saves a slot. It leaves them in the page cache; kvmmap's
`flush` and `copy` return when everything is on the disk, so they are compared with its time including an fsync. It
loads into an existing context; kvmmap opens a new one. Files are in the page cache at first, as just after saving, and
then only on the disk, as a day later.

Computing the prompt takes a minute, and several where other processes want the processors too; `--prompt` keeps the
result for the next run. `--only attention`, `saving` or `reopening` measures that part alone, within two minutes once
the prompt is kept.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from bench_streaming import make_cold
from harness import Bar, Measured, Report, Task, arguments, gaussian, measure, nothing, workspace
from llama import VERSION, Context, Model, Saved, api

import kvmmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from texts import read_text
from weights import weights

LENGTH, SHORT, CAPACITY = 7900, 32, 8192
LAYERS, QUERY_HEADS, KV_HEADS, DIM = 30, 9, 3, 64
SHAPE = {"num_layers": LAYERS, "capacity": CAPACITY, "num_kv_heads": KV_HEADS, "head_dim": DIM}
QUERIES = gaussian(LAYERS, 1, QUERY_HEADS, DIM, seed=2)
QUERIES_16_BITS = QUERIES.astype(np.float16)
PARTS = ("attention", "saving", "reopening")
THREADS = (2, 1)
TOKEN = 5
READING = "reading kvmmap's rows"
BARS = {"f16": 5.0, "q8_0": 8.0}
"""Attention, to llama.cpp's with keys and values of that type, two threads each."""

REOPEN = 100.0
"""Opening a file, to llama.cpp's loading of its own."""


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=40)
    parser.add_argument("--prompt", type=Path, help="llama.cpp's file of the prompt: taken if it is there, else made")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS, help="of each program, in attention")
    args = parser.parse_args()
    report = Report("llama_cpp")
    report.note("llama.cpp", f"llama-cpp-python {VERSION}: {api.llama_print_system_info().decode()}")
    with workspace(args.dir) as folder:
        same = fill(report, folder, args.prompt or folder / "f16")
        if args.only in (None, "attention"):
            for threads in args.threads:
                attention(report, same, threads, args.rounds)
        if args.only in (None, "saving"):
            saving(report, same, folder, min(args.rounds, 7))
        if args.only in (None, "reopening"):
            loading(report, same, "in the page cache", settle, min(args.rounds, 15))
            loading(report, same, "on the disk alone", partial(cold, same), min(args.rounds, 7))
    report.finish(args.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Same:
    """The same context in every measured program."""

    long: dict[str, Context]
    """llama.cpp's, by the type of its keys and values."""

    short: dict[str, Context]
    """The first tokens of the same."""

    files: dict[str, Path]
    """What llama.cpp has saved of the long ones."""

    rows: np.ndarray
    """f16 [2, layers, length, KV heads, dim]: the keys and the values."""

    kept: Path
    """kvmmap's file."""


def fill(report: Report, folder: Path, prompt: Path) -> Same:
    """Compute the prompt with llama.cpp, unless it was kept, and load it everywhere."""
    model = Model(weights())
    ids = model.encode(read_text("source")[1])[:LENGTH]
    long = {kind: Context(model, kind, capacity=CAPACITY) for kind in BARS}
    short = {kind: Context(model, kind, capacity=256) for kind in BARS}
    for context in (*long.values(), *short.values()):
        context.use(max(THREADS))
    for context in short.values():
        context.feed(ids[:SHORT])
    if prompt.exists():
        long["f16"].load(prompt)
        if long["f16"].ids != ids:
            raise SystemExit(f"{prompt} is of another prompt: remove it")
    else:
        start = time.perf_counter()
        long["f16"].feed(ids)
        report.note(f"llama.cpp computes {LENGTH:,} tokens in", f"{time.perf_counter() - start:.0f} s")
        long["f16"].save(prompt)
    saved = Saved(prompt, layers=LAYERS, length=LENGTH, row=KV_HEADS * DIM)
    files = {"f16": prompt, "q8_0": folder / "q8_0"}
    saved.write_q8_0(files["q8_0"])
    long["q8_0"].load(files["q8_0"])
    report.note("next token's logits, q8_0 to f16, correlation", f"{agreement(*long.values()):.5f}")
    rows, kept = saved.rows.reshape(2, LAYERS, LENGTH, KV_HEADS, DIM), folder / "kept.kvm"
    with kvmmap.create(kept, **SHAPE) as cache:
        cache.extend(*rows)
    sizes = {path.name: path.stat().st_blocks * 512 / 1e6 for path in (kept, *files.values())}
    report.note("files, MB on disk", {name: round(size) for name, size in sizes.items()})
    return Same(long=long, short=short, files=files, rows=rows, kept=kept)


def agreement(one: Context, other: Context) -> float:
    """How similar two contexts continue: 1 if one was loaded with what the other computed."""
    logits = []
    for context in (one, other):
        context.step(TOKEN)
        logits.append(context.logits())
    found = float(np.corrcoef(*logits)[0, 1])
    if found < 0.99:
        raise SystemExit(f"the contexts do not hold the same: their logits correlate by {found:.3f}")
    return found


# Attention


def attention(report: Report, same: Same, threads: int, rounds: int) -> None:
    """One token's, in all layers."""
    with kvmmap.open(same.kept) as cache:
        layers = list(cache.layers)
        readers = ThreadPoolExecutor(threads)
        tasks = [
            Task(name=READING, run=partial(read_all, readers, shares_of(layers, threads)), before=settle),
            Task(name="kvmmap", run=partial(attend, layers, QUERIES, threads), before=settle),
            Task(name="kvmmap, f16 queries", run=partial(attend, layers, QUERIES_16_BITS, threads), before=settle),
        ]
        for kind in BARS:
            for length, contexts in ((LENGTH, same.long), (SHORT, same.short)):
                context = contexts[kind]
                context.use(threads)
                tasks.append(Task(name=step_name(kind, length), run=partial(context.step, TOKEN)))
        found = measure(tasks, rounds)
        readers.shutdown()
    baselines = [difference(found, kind) for kind in BARS]
    count = f"{threads} thread{'s' * (threads > 1)}"
    report.show(f"attention of a token, {count}, {LENGTH:,} positions, {LAYERS} layers", found, baselines)
    for kind, required in BARS.items():
        rival = found.fast(step_name(kind, LENGTH)) - found.fast(step_name(kind, SHORT))
        for name, queries in (("kvmmap", ""), ("kvmmap, f16 queries", ", f16 queries")):
            own = found.fast(name)
            what = f"attention at {LENGTH:,} tokens{queries}: of llama.cpp's ({kind}), {count}"
            report.note(f"{what}, 10th percentiles", f"{own * 1e3:.2f} ms and {rival * 1e3:.2f} ms")
            report.bars.append(Bar(what, required, rival / own, "x", rival / found.fast(READING)))


def attend(layers: Sequence[kvmmap.QuantizedKvLayer], queries: np.ndarray, threads: int) -> None:
    for layer, of_layer in zip(layers, queries, strict=True):
        layer.attend(of_layer, threads=threads)


def shares_of(layers: Sequence[kvmmap.QuantizedKvLayer], threads: int) -> list[list[np.ndarray]]:
    """Return all rows as words, an even share of each array for each thread."""
    arrays = [
        array.reshape(-1).view(np.uint32)
        for layer in layers
        for array in (layer.key_codes, layer.key_scales, layer.value_codes, layer.value_scales)
    ]
    return [[np.array_split(array, threads)[number] for array in arrays] for number in range(threads)]


def read_all(readers: ThreadPoolExecutor, shares: list[list[np.ndarray]]) -> None:
    list(readers.map(read, shares))


def read(words: list[np.ndarray]) -> None:
    for some in words:
        some.max()


def settle() -> None:
    """Wait until llama.cpp's threads, which spin for more work, sleep."""
    time.sleep(0.02)


def step_name(kind: str, length: int) -> str:
    return f"a step of llama.cpp's after {length:,}, {kind}"


def difference(found: Measured, kind: str) -> str:
    """Add the difference of the long step and the short one, round by round; return its name."""
    name = f"llama.cpp {kind}"
    steps = [found.seconds[step_name(kind, length)] for length in (LENGTH, SHORT)]
    found.seconds[name] = [long - short for long, short in zip(*steps, strict=True)]
    found.tasks[name] = Task(name=name, run=nothing)
    return name


# Files


def saving(report: Report, same: Same, folder: Path, rounds: int) -> None:
    """Save everything to a new file; and append one token."""
    memory = kvmmap.QuantizedKvCache(**SHAPE)
    memory.extend(*same.rows)
    with kvmmap.create(folder / "grown.kvm", **SHAPE) as grown:
        grown.extend(*same.rows)

        def append() -> None:
            grown.push_step(*same.rows[:, :, 0])
            grown.flush()

        def copy() -> None:
            kvmmap.copy(memory, folder / "copy.kvm", overwrite=True, verify=False)

        tasks = [
            Task(name="kvmmap, append a token and flush", run=append, before=os.sync),
            Task(name="kvmmap, copy to a file", run=copy, before=os.sync),
        ]
        for kind, context in same.long.items():
            for name, save in ((f"llama.cpp {kind}", context.save), (synced(kind), partial(save_durably, context))):
                tasks.append(Task(name=name, run=partial(save, folder / "saved"), before=os.sync))
        found = measure(tasks, rounds)
    report.show(f"saving {LENGTH:,} tokens", found, [synced(kind) for kind in BARS])


def synced(kind: str) -> str:
    return f"llama.cpp {kind}, synced"


def save_durably(context: Context, path: Path) -> None:
    context.save(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def loading(report: Report, same: Same, where: str, before: Callable[[], object], rounds: int) -> None:
    """From a file to the point where attention can begin; and with one attention over all positions."""

    def first() -> None:
        with kvmmap.open(same.kept) as cache:
            attend(cache.layers, QUERIES, max(THREADS))

    tasks = [
        Task(name="kvmmap, open", run=lambda: kvmmap.open(same.kept).close(), before=before),
        Task(name="kvmmap, open and attend in all layers", run=first, before=before),
    ]
    for kind, context in same.long.items():
        tasks.append(Task(name=f"llama.cpp {kind}", run=partial(context.load, same.files[kind]), before=before))
    found = measure(tasks, rounds)
    report.show(f"reopening {LENGTH:,} tokens, {where}", found, [f"llama.cpp {kind}" for kind in BARS])
    for kind in BARS:
        ratio = found.ratio("kvmmap, open", f"llama.cpp {kind}").median
        report.bars.append(Bar(f"reopen {LENGTH:,} tokens, {where}: to llama.cpp's load ({kind})", REOPEN, ratio, "x"))


def cold(same: Same) -> None:
    """Evict all files from the page cache."""
    for path in (same.kept, *same.files.values()):
        make_cold(path)


if __name__ == "__main__":
    main()
