"""Hostile Zarr groups: a root with changed facts and a recomputed checksum, and any other object damaged.

What lies here makes them; what is done with them is in `execute`, as for files.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import kvmmap
from kvmmap.geometry import CacheGeometry
from kvmmap.metadata import Document, ModelInfo
from kvmmap.storage.objects.local import FolderObjects
from kvmmap.storage.zarr.placement import create_group
from kvmmap.storage.zarr.root import _digest

from .image import Recipe
from .mutate import DOCUMENTS, number

SHAPES = ([2, 300, 2, 8, 290, None], [1, 40, 1, 4, 40, "zstd"], [3, 0, 1, 8, 0, None])
"""Layers, capacity, heads, head_dim, positions, compressor."""

TEXTS = ("", "null", "{}", "[" * 2000, '{"zarr_format":3,"node_type":"array"}', "/etc/passwd", "\x00" * 40, "9" * 5000)
VALUES: tuple[Any, ...] = (
    *(None, True, "", "../../../etc/passwd", "s3://elsewhere/x", [], {}, [[]], -1, 1.5, 2**63, 2**200, "zstd", "gzip"),
    *([[65535, 65535, 65535]], [[1, 1, 1]] * 66_000, ["0" * 16] * 5, ["x"], [None], [[1, -1, 1]], [[2, 8]], [1, 2]),
)
LARGEST = 1 << 22


def recipes() -> list[Recipe]:
    """Recipes without a change."""
    return [{"group": shape, "changes": []} for shape in SHAPES]


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    changes = [list(change) for change in recipe["changes"]]
    while changes and random.random() < 0.3:
        del changes[random.randrange(len(changes))]
    changes += [_change(random) for _ in range(random.choice((1, 1, 2, 3)))]
    return recipe | {"changes": changes[-6:]}


def _change(random: Random) -> list[Any]:
    kind = random.randrange(8)
    if kind < 4:
        value = random.choice(VALUES) if random.random() < 0.5 else number(random, 290)
        return ["fact", random.randrange(30), value]
    if kind == 4:
        return ["document", random.choice(DOCUMENTS)]
    if kind == 5:
        return ["text", random.randrange(60), random.choice(TEXTS)]
    if kind == 6:
        return ["cut", random.randrange(60), number(random, 100) % LARGEST]
    return ["bytes", random.randrange(60), random.randrange(3000), random.randbytes(4).hex()]


def place(recipe: Recipe, folder: str) -> str:
    """Put a recipe's group into a folder."""
    path = os.path.join(folder, "hostile.zarr")
    shutil.rmtree(path, ignore_errors=True)
    objects = dict(_sound(json.dumps(recipe["group"])))
    names = sorted(objects)
    root = json.loads(objects["zarr.json"])
    facts = root["attributes"]["kvmmap"]
    for kind, *what in recipe["changes"]:
        if kind == "fact":
            facts[sorted(facts)[what[0] % len(facts)]] = what[1]
        elif kind == "document":
            try:
                facts["document"] = json.loads(what[0].encode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError):
                facts["document"] = what[0]
    facts.pop("checksum", None)
    facts["checksum"] = _digest(facts)
    objects["zarr.json"] = json.dumps(root).encode()
    for kind, *what in recipe["changes"]:
        name = names[what[0] % len(names)] if kind in ("text", "cut", "bytes") else ""
        if kind == "text":
            objects[name] = what[1].encode()
        elif kind == "cut":
            objects[name] = objects[name][: what[1]] + bytes(max(0, what[1] - len(objects[name])))
        elif kind == "bytes":
            data = bytearray(objects[name])
            data[what[1] : what[1] + 4] = bytes.fromhex(what[2])
            objects[name] = bytes(data)
    for name, data in objects.items():
        file = Path(path, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


@functools.cache
def _sound(shape: str) -> dict[str, bytes]:
    """The objects of a sound group."""
    layers, capacity, heads, dim, length, compressor = json.loads(shape)
    geometry = CacheGeometry.build(num_layers=layers, capacity=capacity, num_kv_heads=heads, head_dim=dim)
    notes = Document(ModelInfo(name="some/model"), {"note": 1})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sound.zarr")
        writer = create_group(FolderObjects(path, durable=False), geometry, notes, compressor=compressor)
        with kvmmap.QuantizedKvCache.of_storage(writer) as cache:
            keys = np.random.default_rng(1).standard_normal((layers, length, heads, dim), dtype=np.float32)
            cache.extend(keys, -keys, np.arange(length))
        return {str(file.relative_to(path)): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
