"""llama-cpp-python's conversations kept by `LlamaKvmmapCache`, beside its own `LlamaDiskCache`: SmolLM2-135M, ten
turns.

    make bench-llama-cpp
    python benchmarks/bench_llama_cpp_cache.py [--json FILE]

Each turn adds 200 tokens, and is stored as a completion stores it; `LlamaDiskCache` looks up the turn before first,
as a completion does, which removes it. Positions are computed once, untimed. Processor time is that of the calling
thread, which does all the work. Both write to the same disk; `LlamaDiskCache` does not sync.

What a codec loses: of each of 16 pieces of the documentation 512 tokens are computed, stored and restored, and the 512
that follow are scored; beside it the same without leaving the context. Log-probabilities of the same token are
subtracted, so that texts, which differ much more, do not count.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from harness import Report, arguments, workspace

try:
    import llama_cpp
    from llama_cpp.llama_cache import LlamaDiskCache
except ImportError as error:
    raise SystemExit("llama-cpp-python is not installed: make bench-llama-cpp installs it, in five minutes") from error

import kvmmap
from kvmmap.integrations.llama_cpp import LlamaKvmmapCache, append, load, save, spare_sequence
from kvmmap.integrations.llama_cpp.context import Context

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
from weights import weights

TURNS, TOKENS = 10, 200
PREFIX = 512
"""Positions that are stored and restored before as many are scored."""

ROUNDED = "native, 64 tokens at once"
"""What llama.cpp rounds depends on how many tokens it computes at once: how much that is."""

CODECS = ("native", "int8-rotated:int6-rotated", "fidelity", "compact")
TYPES = {"f16": 1, "q8_0": 8}


def main() -> None:
    parser = arguments(__doc__.partition("\n")[0], rounds=1)
    parser.add_argument("--prompt", type=Path, help="the computed prompt: taken if it is there, else made")
    parser.add_argument("--texts", type=int, default=16, help="pieces of the documentation that are scored")
    args = parser.parse_args()
    report = Report("llama_cpp_cache")
    with workspace(args.dir) as folder:
        prompt = args.prompt or folder / "prompt.kvm"
        for kind in TYPES:
            turns(report, folder / kind, kind, prompt)
            quality(report, folder / kind, kind, args.texts)
    report.finish(args.json)


def turns(report: Report, folder: Path, kind: str, prompt: Path) -> None:
    folder.mkdir()
    with spare_sequence():
        model = made(kind, n_ctx=2560)
    context = Context(model)
    if not prompt.exists():
        text = (Path(__file__).parents[1] / "docs" / "design.md").read_text()
        model.eval(model.tokenize(text.encode())[: TURNS * TOKENS])
        save(model, prompt)
    load(context, prompt)
    ids = model.input_ids[: model.n_tokens].tolist()
    stores = {f"kvmmap, {codec}": LlamaKvmmapCache(folder / codec, codec=codec) for codec in CODECS}
    stores["LlamaDiskCache"] = LlamaDiskCache(str(folder / "disk"))
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


def made(kind: str, **options: Any) -> Any:
    """A `Llama` whose keys and values are of a type.

    Repacked weights are left out: some virtual machines lack the instructions they promise.
    """
    original = llama_cpp.llama_cpp.llama_model_default_params

    def parameters() -> Any:
        found = original()
        found.use_extra_bufts = False
        return found

    types = {"type_k": TYPES[kind], "type_v": TYPES[kind], "flash_attn": True}
    llama_cpp.llama_cpp.llama_model_default_params = parameters
    try:
        return llama_cpp.Llama(str(weights()), n_batch=512, n_threads=2, verbose=False, **types, **options)
    finally:
        llama_cpp.llama_cpp.llama_model_default_params = original


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


def quality(report: Report, folder: Path, kind: str, texts: int) -> None:
    """Score what follows a restored prompt, for each codec, over several texts."""
    model = made(kind, n_ctx=2 * PREFIX + 8, logits_all=True)
    differences: dict[str, list[Any]] = {name: [] for name in (*CODECS, ROUNDED)}
    divergences: dict[str, list[float]] = {name: [] for name in differences}
    for ids in pieces_of_pages(model, texts):
        model.reset()
        model.eval(ids[:PREFIX])
        for codec in CODECS:
            save(model, folder / f"{codec}-quality.kvm", preset=codec, overwrite=True)
        own = scored(model, ids, PREFIX)
        following = np.arange(len(own) - 1), ids[PREFIX + 1 :]
        for name in differences:
            load(model, folder / f"{'native' if name == ROUNDED else name}-quality.kvm")
            found = scored(model, ids, 64 if name == ROUNDED else PREFIX)
            differences[name].append(own[following] - found[following])
            divergences[name].append(float((np.exp(own) * (own - found)).sum(-1).mean()))
    for name, found in differences.items():
        # Errors of neighbours are related, so what is averaged are pieces of 32 tokens.
        pieces = np.concatenate([text[: len(text) // 32 * 32].reshape(-1, 32).mean(1) for text in found])
        mean, error = float(pieces.mean()), float(pieces.std(ddof=1) / np.sqrt(len(pieces)))
        low, high = (float(np.expm1(mean + side * 1.96 * error)) for side in (-1, 1))
        report.note(
            f"{kind}, {name}, {32 * len(pieces):,} tokens after {PREFIX:,} restored ones, {len(found)} texts",
            f"perplexity {np.expm1(mean):+.3%}, 95 % of {low:+.3%} to {high:+.3%}; KL {np.mean(divergences[name]):.2e}",
        )
    model.close()


def pieces_of_pages(model: Any, count: int) -> list[list[int]]:
    """Pieces of 2 * PREFIX tokens, from all pages of the documentation."""
    pieces = []
    for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md")):
        ids = model.tokenize(path.read_text().encode())
        pieces += [ids[start : start + 2 * PREFIX] for start in range(0, len(ids) - 2 * PREFIX + 1, 2 * PREFIX)]
    return pieces[:: max(1, len(pieces) // count)][:count]


def scored(model: Any, ids: list[int], batch: int) -> Any:
    """Logarithms of the next token's probabilities after each token but the stored ones."""
    for start in range(PREFIX, len(ids), batch):
        model.eval(ids[start : start + batch])
    found = np.array(model.scores[PREFIX : len(ids)], np.float64)
    keep(model, PREFIX)
    return found - np.logaddexp.reduce(found, axis=-1)[:, None]


if __name__ == "__main__":
    main()
