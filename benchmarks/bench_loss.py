"""What each codec loses: KL divergence of SmolLM2-135M's next token from that of an f32 cache, over real texts.

    python benchmarks/bench_loss.py [--tokens 1024] [--texts FILE ...] [--window 0 128] [--sinks 4]

Attention goes over what a cache would store: every position through the codec and, with a window, the positions of each
query's window and the first ones as they are kept in 16 bits (`recent_window` and `sinks` of `kvmmap.create`). Needs
what the demo needs (demo/requirements*.txt). Unless others are given, the texts are a licence, a page and code of
Python's standard library.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvmmap import codecs
from kvmmap.codecs.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))
from model import Model  # noqa: E402
from transformers import AttentionInterface  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each codec loses.")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each text")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="*",
        default=[ROOT / "LICENSE", ROOT / "docs/design.md", Path(argparse.__file__), Path(statistics.__file__)],
    )
    parser.add_argument("--window", type=int, nargs="*", default=[0, 128], help="recent windows to try")
    parser.add_argument("--sinks", type=int, default=4, help="sinks that go with a window")
    args = parser.parse_args()
    model = Model.load()
    pairs = {codec.name: (codec.name, codec.name) for codec in codecs.COMPILED}
    pairs |= {f"{preset} (preset)": names for preset, names in PRESETS.items() if names not in pairs.values()}
    AttentionInterface.register("stored", attend_stored)
    cases = {(name, window): (*names, window) for name, names in pairs.items() for window in args.window}
    found: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for path in args.texts:
        ids = model.encode(path.read_text(encoding="utf-8"))[: args.tokens]
        model.net.set_attn_implementation("sdpa")
        expected = read(model, ids)
        model.net.set_attn_implementation("stored")
        for case, (keys, values, window) in cases.items():
            STORED.update(keys=keys, values=values, window=window, sinks=args.sinks if window else 0)
            found[case].append(divergence(expected, read(model, ids)))
    dim = model.config.head_dim
    print(
        f"{'codec':22} {'window':>6} {'bits':>6} {'median':>9} {'worst':>9}   KL divergence from f32, "
        f"{len(args.texts)} texts"
    )
    for (name, window), losses in found.items():
        bits = statistics.mean(codecs.by_name(part).bits_per_number(dim) for part in pairs[name])
        print(f"{name:22} {window:6} {bits:6.2f} {statistics.median(losses):9.2g} {max(losses):9.2g}")


STORED: dict[str, Any] = {}
"""What `attend_stored` attends over: codecs of keys and values, window and sinks."""


def attend_stored(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Attention over rows as a cache stores them, each query seeing its own window in 16 bits."""
    heads, length = key.shape[1], key.shape[2]
    group = query.shape[1] // heads
    at = torch.arange(length)
    seen = at[None] <= at[:, None]
    kept = (at[None] > at[:, None] - STORED["window"]) | (at[None] < STORED["sinks"])
    coded_keys, coded_values = (
        through(STORED[name], rows[0].transpose(0, 1)).transpose(0, 1).repeat_interleave(group, 0)
        for name, rows in (("keys", key), ("values", value))
    )
    exact_keys, exact_values = (rows[0].half().float().repeat_interleave(group, 0) for rows in (key, value))
    queries = query[0] * more["scaling"]
    scores = torch.where(kept, queries @ exact_keys.mT, queries @ coded_keys.mT)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = (weights * kept) @ exact_values + (weights * ~kept) @ coded_values
    return out.transpose(0, 1)[None], None


def through(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Encode rows [n, heads, dim] and decode them."""
    codec, numbers = codecs.by_name(name), np.ascontiguousarray(rows.numpy())
    arrays = [np.empty((*numbers.shape[:2], *one.shape), one.dtype) for one in codec.arrays(numbers.shape[2])]
    assert codec.encode(numbers, 0, arrays, 1) == -1
    return torch.from_numpy(codec.decoded(arrays, numbers.shape[2]))


@torch.inference_mode()
def read(model: Model, ids: list[int]) -> torch.Tensor:
    """Log probabilities of every next token."""
    logits: torch.Tensor = model.net(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence, in nats."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


if __name__ == "__main__":
    main()
