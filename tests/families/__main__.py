"""Try every family, and record the outcome: `python -m families` from tests/, in a few minutes.

Outcomes go to outcomes.json, by release of transformers, and the table in docs/transformers.md is written from it. With
types as arguments only those are tried.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

from families.configs import types
from families.outcomes import RELEASE, load, save, write_table
from families.trial import WrongError, trial

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def main(chosen: list[str]) -> int:
    """Try types; 1 if a result was wrong."""
    wrong, found, started = 0, {}, time.perf_counter()
    for kind in [kind for kind in types() if not chosen or kind in chosen]:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            try:
                found[kind] = trial(kind, Path(folder)).plain()
                print(f"{kind}: {found[kind]}", flush=True)
            except WrongError as error:
                wrong += 1
                print(f"WRONG {error}", flush=True)
    record = load()
    save(record | {RELEASE: (record.get(RELEASE, {}) if chosen else {}) | found})
    write_table()
    supported = sum(outcome["supported"] for outcome in found.values())
    in_place = sum(outcome["in_place"] for outcome in found.values())
    print(
        f"transformers {transformers.__version__}: {len(found) + wrong} types, {supported} supported, {in_place} of "
        f"them in place, {wrong} wrong; {time.perf_counter() - started:.0f} s"
    )
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
