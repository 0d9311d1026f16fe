"""What each codec and preset loses, beside other programs' recipes: SmolLM2-135M over real texts of many kinds.

    python benchmarks/bench_fidelity.py [--tasks loss passkey greedy small] [--recipes NAME ...] [--texts NAME ...]

For each text and recipe: KL divergence of the next token's distribution from that of an f32 cache (mean and 99th
percentile), how often the most probable token is the same, and what perplexity gains. The prompt is prefilled in f32
and then stored; the last tokens of the text are read through it. Needs what the demo needs (demo/requirements*.txt);
quanto and HQQ are left out unless they are installed. Other tasks: `passkey` asks for a number that is hidden in 7,000
tokens; `greedy` counts how many of 256 greedily generated tokens agree with f32's before the first that does not;
`small` measures the same losses with a model of another architecture, which it trains on the texts first, in minutes.

Each result is a file of its own, and what is there is not computed again: interrupted, it continues. `--report` prints
tables of what there is, and writes the JSON that docs/fidelity.md is made of.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))
from corpus import Text, texts  # noqa: E402
from fidelity_report import show, show_tasks  # noqa: E402
from fidelity_tasks import greedy_task, passkey_task  # noqa: E402
from model import Model  # noqa: E402
from reading import OTHERS, Reader, losses  # noqa: E402
from recipes import CACHES, F32, RECIPES  # noqa: E402
from results import Store, bits_of, key_of, tried  # noqa: E402
from small_model import small_model  # noqa: E402

TASKS = ("loss", "passkey", "greedy", "small")
LIBRARIES = {"quanto": "optimum", "hqq": "hqq", "fp8": "torch"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each codec and preset loses.")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=["loss"], help="what is measured")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of each text")
    parser.add_argument("--read", type=int, default=256, help="how many of them are read through the stored others")
    parser.add_argument("--texts", nargs="*", help="these texts only")
    parser.add_argument("--recipes", nargs="*", help="these recipes only")
    parser.add_argument("--root", type=Path, default=Path("/"), help="where packages of Debian were unpacked")
    parser.add_argument("--results", type=Path, default=ROOT / "bench-out" / "fidelity", help="where results are kept")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print tables of the results, and write this file")
    args = parser.parse_args()
    if args.report:
        store = Store(args.results)
        show(store, args.report)
        show_tasks(store)
        return
    names = [recipe.name for recipe in (*CACHES, *RECIPES)] + [name for name in OTHERS if _installed(OTHERS[name][0])]
    chosen = [name for name in names if not args.recipes or name in args.recipes]
    found = list(texts(args.root, lambda name, what: print(f"no text {name!r}: {what} is not there")))
    found = [text for text in found if not args.texts or text.name in args.texts]
    store = Store(args.results)
    if {"loss", "passkey", "greedy"} & set(args.tasks):
        model = Model.load()
        reader = Reader(model.net)
        if "loss" in args.tasks:
            measure(store, "loss", reader, model.encode, found, chosen, args.tokens, args.read)
        if "passkey" in args.tasks:
            passkey_task(store, reader, model, found, chosen)
        if "greedy" in args.tasks:
            greedy_task(store, reader, model, found, chosen)
    if "small" in args.tasks:
        net = small_model(args.results, found)
        measure(store, "small", Reader(net), lambda text: list(text.encode()), found, chosen, args.tokens, args.read)


def _installed(backend: str) -> bool:
    return importlib.util.find_spec(LIBRARIES[backend]) is not None


def measure(
    store: Store,
    task: str,
    reader: Reader,
    encode: Callable[[str], list[int]],
    found: Sequence[Text],
    recipes: Sequence[str],
    tokens: int,
    read: int,
) -> None:
    """Measure what each recipe loses in the last `read` of `tokens` tokens of each text."""
    for text in found:
        ids = encode(text.text)[: tokens + 1]
        keys = {name: key_of(name, ids, read, reader.net.config) for name in (F32.name, *recipes)}
        missing = [name for name, key in keys.items() if not store.has(task, text.name, name, key)]
        if not missing:
            continue
        prompt, rest, following = reader.prompt(ids[: -read - 1]), ids[-read - 1 : -1], ids[-read:]
        expected = reader.read_on(prompt, rest, F32)
        for name in missing:
            start = time.process_time()
            logits = tried(reader, prompt, rest, name)
            if logits is None:
                continue
            result = losses(logits, expected, following)
            facts = {"bits": bits_of(name, reader.net.config.head_dim), "tokens": tokens, "read": read}
            store.put(task, text, name, keys[name], result | facts)
            print(f"{task}: {text.name}: {name}: {result['kl']:.3g}, {time.process_time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
