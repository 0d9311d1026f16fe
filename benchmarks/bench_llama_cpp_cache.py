"""llama-cpp-python's conversations kept by `LlamaKvmmapCache`, beside its own `LlamaDiskCache`: SmolLM2-135M, ten
turns.

    make bench-llama-cpp
    python benchmarks/bench_llama_cpp_cache.py [--json FILE]

Each turn adds 200 tokens, and is stored as a completion stores it; `LlamaDiskCache` looks up the turn before first,
as a completion does, which removes it. Positions are computed once, untimed. Processor time is that of the calling
thread, which does all the work. Both write to the same disk; `LlamaDiskCache` does not sync.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import llama_cpp
from harness import Report, arguments, workspace
from llama_cpp.llama_cache import LlamaDiskCache

import kvmmap
from kvmmap.integrations.llama_cpp import LlamaKvmmapCache, append, load, save, spare_sequence
from kvmmap.integrations.llama_cpp.context import Context

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from weights import weights

TURNS, TOKENS = 10, 200
TYPES = {"f16": 1, "q8_0": 8}


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=1)
    parser.add_argument("--prompt", type=Path, help="the computed prompt: taken if it is there, else made")
    args = parser.parse_args()
    report = Report("llama_cpp_cache")
    with workspace(args.dir) as folder:
        prompt = args.prompt or folder / "prompt.kvm"
        for kind in TYPES:
            turns(report, folder / kind, kind, prompt)
    report.finish(args.json)


def turns(report: Report, folder: Path, kind: str, prompt: Path) -> None:
    folder.mkdir()
    with spare_sequence():
        model = llama_cpp.Llama(
            str(weights()), n_ctx=2560, n_batch=512, n_threads=2, verbose=False,
            type_k=TYPES[kind], type_v=TYPES[kind], flash_attn=True,
        )  # fmt: skip
    context = Context(model)
    if not prompt.exists():
        text = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
        model.eval(model.tokenize(text.encode())[: TURNS * TOKENS])
        save(model, prompt)
    load(context, prompt)
    ids = model.input_ids[: model.n_tokens].tolist()
    stores = {
        "kvmmap, native": LlamaKvmmapCache(folder / "native"),
        "kvmmap, fidelity": LlamaKvmmapCache(folder / "fidelity", codec="fidelity"),
        "kvmmap, compact": LlamaKvmmapCache(folder / "compact", codec="compact"),
        "LlamaDiskCache": LlamaDiskCache(str(folder / "disk")),
    }
    for name, cache in stores.items():
        spent = []
        model.set_cache(cache)
        for turn in range(1, TURNS + 1):
            load(context, prompt)
            keep(model, turn * TOKENS)
            time.sleep(0.05)  # llama.cpp's threads spin for a while
            start = time.thread_time()
            store(model, cache, ids[: turn * TOKENS])
            spent.append(time.thread_time() - start)
        size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if inside(path, cache, folder))
        start, wall = time.thread_time(), time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            model.load_state(cache[ids])
        first, wall = time.thread_time() - start, time.perf_counter() - wall
        report.note(
            f"{kind}, {name}",
            f"a turn's store {median(spent) * 1e3:.1f} ms of processor time, {sum(spent) * 1e3:.0f} ms in all; "
            f"{size / 1e6:.1f} MB on the disk; restoring 2,000 positions {first * 1e3:.0f} ms ({wall * 1e3:.0f} ms)",
        )
    appended(report, context, folder, ids, kind, prompt)
    model.close()


def keep(model: Any, count: int) -> None:
    """Drop what a context has computed beyond so many positions."""
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(model.ctx), 0, count, -1)
    model.n_tokens = count


def store(model: Any, cache: Any, ids: list[int]) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(KeyError):
            cache[ids]
        if isinstance(cache, LlamaKvmmapCache):
            cache[ids] = cache.live()
        else:
            cache[ids] = model.save_state()


def inside(path: Path, cache: Any, folder: Path) -> bool:
    root = Path(cache.library.path if isinstance(cache, LlamaKvmmapCache) else folder / "disk")
    return path.is_file() and path.is_relative_to(root)


def appended(report: Report, context: Context, folder: Path, ids: list[int], kind: str, prompt: Path) -> None:
    """Append 64 tokens at 1,936 to an open file, with its sync."""
    spent = []
    load(context, prompt)
    save(context.llama, folder / "all.kvm")
    with kvmmap.open(folder / "all.kvm", "a") as cache:
        for _ in range(9):
            cache.truncate(len(ids) - 64)
            time.sleep(0.02)
            start = time.thread_time()
            append(context, cache)
            spent.append(time.thread_time() - start)
    report.note(f"{kind}, append 64 positions at {len(ids) - 64:,} and sync", f"{median(spent) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
