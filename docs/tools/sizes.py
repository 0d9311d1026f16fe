"""The table of what a token takes in real models, by preset: computed, and not measured."""

from __future__ import annotations

import kvmmap

MODELS = {
    "Llama 3 8B": (32, 8, 128),
    "Llama 3 70B": (80, 8, 128),
    "Qwen3 8B": (36, 8, 128),
    "Gemma 3 12B": (48, 8, 256),
    "SmolLM2 135M": (30, 3, 64),
}
"""Layers, KV heads and head_dim."""


def table() -> str:
    """Return the table in Markdown: bytes a token, and bits a number, of each preset."""
    found = {
        name: kvmmap.sizes(num_layers=layers, num_kv_heads=heads, head_dim=dim)
        for name, (layers, heads, dim) in MODELS.items()
    }
    presets = [size.preset for size in next(iter(found.values()))]
    lines = ["| model | " + " | ".join(f"`{preset}`" for preset in presets) + " |", "|---|" + "---:|" * len(presets)]
    for name, sizes in found.items():
        cells = [f"{size.bytes_per_token / 1024:,.1f} KiB ({size.bits_per_number:.2f} bits)" for size in sizes]
        layers, heads, dim = MODELS[name]
        lines.append(f"| {name}: {layers} layers, {heads} KV heads x {dim} | {' | '.join(cells)} |")
    once = [[size.recent_bytes for size in sizes] for sizes in found.values()]
    cells = [f"{_mib(min(each))} to {_mib(max(each))}" if max(each) else "0" for each in zip(*once, strict=True)]
    lines.append(f"| window and sinks, once | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
