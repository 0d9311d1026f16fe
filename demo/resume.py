"""The second process: open each saved cache, load it into the model, and continue where the first one stopped.

python resume.py FOLDER TEXT...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from facts import GREEDY_TOKENS, LOAD_RUNS, PROMPT_TOKENS, drop_from_page_cache, perplexity, timed
from model import Model, cache_of
from store import load

import kvmmap


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    model, load_s = timed(Model.load)
    for name in names:
        saved = json.loads((folder / f"{Path(name).stem}-saved.json").read_text())
        facts = measure(model, Path(saved["path"]), saved["ids"]) | {"load_s": load_s}
        (folder / f"{Path(name).stem}-resumed.json").write_text(json.dumps(facts))


def measure(model: Model, path: Path, ids: list[int]) -> dict[str, Any]:
    last = PROMPT_TOKENS - 1  # the prompt's last token is fed again, for its logits
    cold: dict[str, float] = {}
    warm: dict[str, list[float]] = {"open_s": [], "read_s": [], "step_s": []}
    for run in range(LOAD_RUNS + 1):
        if run == 0:
            drop_from_page_cache(path)
        stored, open_s = timed(lambda: kvmmap.open(path))
        with stored:
            if stored.token_ids.tolist() != ids[:PROMPT_TOKENS]:
                raise SystemExit(f"{path} is another prompt's cache")
            cache, read_s = timed(lambda: cache_of(load(stored, model.fingerprint, last), model.config))  # noqa: B023
        _, step_s = timed(lambda: model.feed([ids[last]], cache))  # noqa: B023
        cache.crop(-1)
        if run == 0:
            cold = {"open_s": open_s, "read_s": read_s, "step_s": step_s}
        else:
            for name, seconds in (("open_s", open_s), ("read_s", read_s), ("step_s", step_s)):
                warm[name].append(seconds)

    losses, guesses = model.score(ids[last:], cache)
    greedy, _ = model.greedy(ids[last], cache, GREEDY_TOKENS)
    return {
        "cold": cold,
        "warm": warm,
        "disk_bytes": os.stat(path).st_blocks * 512,
        "perplexity": perplexity(losses),
        "guesses": guesses,
        "greedy": greedy,
        "greedy_text": model.decode(greedy),
    }


if __name__ == "__main__":
    main()
