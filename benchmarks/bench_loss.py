"""What each codec loses: KL divergence of SmolLM2-135M's next token from that of an f32 cache, over real texts.

    python benchmarks/bench_loss.py [--tokens 1024] [--texts FILE ...]

The first half of a text goes through the codec as the cache of a prompt does; the model then reads the second half with
it. Needs what the demo needs (demo/requirements*.txt). Unless others are given, the texts are a licence, a page and
code of Python's standard library.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

from kvmmap import codecs
from kvmmap.codecs.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "demo"))
from model import Model, Pair, cache_of, pairs_of  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each codec loses.")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each text")
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="*",
        default=[ROOT / "LICENSE", ROOT / "docs/design.md", Path(argparse.__file__), Path(statistics.__file__)],
    )
    args = parser.parse_args()
    model = Model.load()
    pairs = {codec.name: (codec.name, codec.name) for codec in codecs.COMPILED}
    pairs |= {f"{preset} (preset)": names for preset, names in PRESETS.items() if names not in pairs.values()}
    found: dict[str, list[float]] = {name: [] for name in pairs}
    for path in args.texts:
        ids = model.encode(path.read_text(encoding="utf-8"))[: args.tokens]
        half = len(ids) // 2
        exact = pairs_of(model.prefill(ids[:half]))
        expected = read_on(model, ids[half:], exact)
        for name, (keys, values) in pairs.items():
            stored = [(through(keys, k), through(values, v)) for k, v in exact]
            found[name].append(divergence(expected, read_on(model, ids[half:], stored)))
    dim = model.config.head_dim
    print(f"{'codec':22} {'bits':>6} {'median':>9} {'worst':>9}   KL divergence from f32, {len(args.texts)} texts")
    for name, losses in found.items():
        bits = statistics.mean(codecs.by_name(part).bits_per_number(dim) for part in pairs[name])
        print(f"{name:22} {bits:6.2f} {statistics.median(losses):9.2g} {max(losses):9.2g}")


def through(name: str, rows: torch.Tensor) -> torch.Tensor:
    """Encode rows [n, heads, dim] and decode them."""
    codec, numbers = codecs.by_name(name), np.ascontiguousarray(rows.numpy())
    arrays = [np.empty((*numbers.shape[:2], *one.shape), one.dtype) for one in codec.arrays(numbers.shape[2])]
    assert codec.encode(numbers, 0, arrays, 1) == -1
    return torch.from_numpy(codec.decoded(arrays, numbers.shape[2]))


def read_on(model: Model, ids: list[int], pairs: list[Pair]) -> torch.Tensor:
    """Log probabilities of every next token."""
    return model.feed(ids, cache_of(pairs, model.config), keep=0).double().log_softmax(-1)


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL divergence, in nats."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


if __name__ == "__main__":
    main()
