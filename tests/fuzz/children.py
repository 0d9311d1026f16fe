"""Hostile chains: files that continue others, of which one, or the record that names its parent, is changed.

A recipe is {"chain": positions at which each file after the first departs, "length": positions of the whole chain,
"file": number of the file that is changed, "changes": as in `image`, "record": [[field of the parent record, value]] of
that file, whose checksum is made right, "gone": number of a file that is missing, or null}.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from random import Random

import numpy as np

import kvmmap
from kvmmap.format import Section
from kvmmap.format.records import CHECKSUM, PARENT, checksum

from . import mutate as single
from .image import LARGEST, Image, Recipe, apply, memory_folder

CHAINS: tuple[tuple[tuple[int, ...], int], ...] = (
    ((256,), 300),
    ((300,), 520),
    ((1,), 2),
    ((257, 300), 301),
    ((40, 256, 290, 291), 300),
)
NAMES = ("", ".", "..", "/etc/passwd", "../0.kvm", ".hidden", "0.kvm", "1.kvm", "2.kvm", "3.kvm", "none.kvm", "x" * 255)
SHAPE = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 4, "capacity": 600}


def recipes() -> list[Recipe]:
    """Return the sound chains, and each with a file missing."""
    found: list[Recipe] = []
    for cuts, length in CHAINS:
        for gone in (None, *range(len(cuts))):
            sound = {"chain": list(cuts), "length": length, "file": len(cuts), "changes": [], "record": []}
            found.append(sound | {"gone": gone})
    return found


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    made: Recipe = json.loads(json.dumps(recipe))
    kind = random.randrange(8)
    if kind == 0:
        made["file"] = random.randrange(len(made["chain"]) + 1)
    elif kind == 1:
        made["gone"] = random.choice((None, *range(len(made["chain"]))))
    elif kind < 4:
        made["changes"] = single.mutate(random, {"changes": made["changes"]})["changes"]
    else:
        field = random.choice(
            ("name", "name", "length", "length", "token_len", "generation", "checksum", "file_id", "tail")
        )
        value: int | str = single.number(random, random.choice((*made["chain"], made["length"]))) % 2**64
        if field == "name":
            value = random.choice(NAMES)
        elif field == "file_id":
            value = random.randbytes(16).hex()
        made["record"] = [*made["record"][-2:], [field, value]]
    return made


def place(recipe: Recipe, folder: str) -> str:
    """Write a recipe's files into a folder; return the path of the last one."""
    for name in os.listdir(folder):
        if name.endswith(".kvm"):
            os.unlink(os.path.join(folder, name))
    sound = _sound(tuple(recipe["chain"]), recipe["length"])
    for number, data in enumerate(sound):
        if number == recipe["gone"]:
            continue
        size = len(data)
        if number == recipe["file"]:
            image = Image(data)
            apply(image, recipe["changes"])
            _change_record(image, recipe["record"])
            data, size = image.encode(), image.size
        with open(os.path.join(folder, f"{number}.kvm"), "wb") as file:
            file.write(data[:size])
            file.truncate(min(size, 1 << 28))
    return os.path.join(folder, f"{len(sound) - 1}.kvm")


def _change_record(image: Image, record: list[list[int | str]]) -> None:
    """Change fields of a parent record, and put it in with the right checksum."""
    place = image.places.get((Section.PARENT, 0xFFFFFFFF))
    if place is None or not record:
        return
    tracks = len(image.layers) + 1
    tails = bytearray(image.data[place + PARENT.size : place + PARENT.size + 8 * tracks])
    fields = PARENT.unpack(bytes(image.data[place : place + PARENT.size]))
    for field, value in record:
        if isinstance(value, int):
            if field == "tail":
                tails[8 * (value % tracks) : 8 * (value % tracks) + 8] = value.to_bytes(8, "little")
            else:
                fields[str(field)] = value
        else:
            fields[str(field)] = bytes.fromhex(value) if field == "file_id" else value.encode()
    body = PARENT.pack(fields) + bytes(tails)
    image.raw.insert(0, (image.at(Section.PARENT), body + CHECKSUM.pack(checksum(body))))


@functools.lru_cache(maxsize=16)
def _sound(cuts: tuple[int, ...], length: int) -> list[bytes]:
    """The files of a sound chain, made by kvmmap itself."""
    random = np.random.default_rng(length)
    found = []
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, contextlib.ExitStack() as stack:
        for number, stop in enumerate((*(cut + 3 for cut in cuts), length)):
            path = os.path.join(folder, f"{number}.kvm")
            if number:
                parent = os.path.join(folder, f"{number - 1}.kvm")
                cache = kvmmap.create(path, parent=parent, parent_length=cuts[number - 1], capacity=600)
            else:
                cache = kvmmap.create(path, **SHAPE)  # type: ignore[arg-type]
            stack.enter_context(cache)
            count = stop - cache.seq_len
            rows = random.standard_normal((2, count, 1, 4), dtype=np.float32)
            cache.extend(rows, -rows, np.arange(count))
            cache.close()
            with open(path, "rb") as file:
                found.append(file.read(LARGEST))
    return found
