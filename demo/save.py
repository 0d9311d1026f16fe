"""The first process: prefill each text, save its KV cache, and record what the model generates with the original one.

python save.py FOLDER TEXT...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from facts import FOLLOWING_TOKENS, GREEDY_TOKENS, PREFILL_RUNS, PROMPT_TOKENS, perplexity, timed
from model import Model, cache_of, pairs_of
from store import save
from texts import read_text


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    model, load_s = timed(Model.load)
    for name in names:
        facts = measure(model, folder, name) | {"load_s": load_s}
        (folder / f"{Path(name).stem}-saved.json").write_text(json.dumps(facts))


def measure(model: Model, folder: Path, name: str) -> dict[str, Any]:
    title, text = read_text(name)
    ids = model.encode(text)[: PROMPT_TOKENS + FOLLOWING_TOKENS]
    if len(ids) < PROMPT_TOKENS + FOLLOWING_TOKENS:
        raise SystemExit(f"{name} is too short: {len(ids)} tokens, and {PROMPT_TOKENS + FOLLOWING_TOKENS} are needed")
    prompt = ids[:PROMPT_TOKENS]

    prefill_s = []
    for _ in range(PREFILL_RUNS):
        cache, seconds = timed(lambda: model.prefill(prompt))
        prefill_s.append(seconds)

    f32_bytes = sum(tensor.nbytes for pair in pairs_of(cache) for tensor in pair)
    path = folder / f"{Path(name).stem}.kvm"
    start = time.perf_counter()
    save(path, pairs_of(cache), prompt, model, title)
    save_s = time.perf_counter() - start

    # A saved cache has no logits, so continuing from it feeds the prompt's last token again, as here.
    cache.crop(-1)
    losses, guesses = model.score(ids[PROMPT_TOKENS - 1 :], cache)
    half = cache_of([(k.half().float(), v.half().float()) for k, v in pairs_of(cache)], model.config)
    half_losses, half_guesses = model.score(ids[PROMPT_TOKENS - 1 :], half)
    greedy, chances = model.greedy(prompt[-1], cache, GREEDY_TOKENS)
    half_greedy, _ = model.greedy(prompt[-1], half, GREEDY_TOKENS)
    return {
        "title": title,
        "ids": ids,
        "path": str(path),
        "f32_bytes": f32_bytes,
        "prefill_s": prefill_s,
        "save_s": save_s,
        "perplexity": perplexity(losses),
        "guesses": guesses,
        "half_perplexity": perplexity(half_losses),
        "half_guesses": half_guesses,
        "greedy": greedy,
        "greedy_chances": chances,
        "half_greedy": half_greedy,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
