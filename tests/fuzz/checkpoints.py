"""Hostile checkpoints: files with states whose table, slots, words or entries in commits are changed.

A recipe is {"checkpoints": number of the sound file, "open": whether its writer has died, "changes": as in `image`,
"edits": a list of lists: what, which, value}. Whatever a file says, states that are read must be those that some slot
holds under the right checksums; and where no checksum was made right after a change, those that were written.
"""

from __future__ import annotations

import functools
import json
import os
import struct
import tempfile
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import xxhash

import kvmmap
from kvmmap import StateSpec
from kvmmap.format import LIVE_LENGTHS, Section
from kvmmap.format.records import CHECKPOINT_HEADER, CHECKSUM, STATE_ENTRY
from kvmmap.format.states import CheckpointLayout

from . import mutate as single
from .files import LONGEST
from .image import Image, Recipe, apply, bytes_of, memory_folder

SOUND: tuple[tuple[dict[str, Any], tuple[StateSpec, ...], tuple[int, ...]], ...] = (
    (
        {"num_layers": 2, "num_kv_heads": [0, 1], "checkpoint_slots": 2},
        (StateSpec(0, "conv", "float32", (3, 7)), StateSpec(0, "recurrent", "float32", (40, 13))),
        (5, 20, 31),
    ),
    (
        {"num_layers": 3, "num_kv_heads": [1, 0, 2], "checkpoint_slots": 4},
        (StateSpec(1, "ssm", "int64", (9, 11)), StateSpec(2, "x", "bfloat16", (600,))),
        (1, 2, 40),
    ),
    ({"num_layers": 1, "num_kv_heads": [2], "checkpoint_slots": 1}, (StateSpec(0, "x", "uint8", (700,)),), (17,)),
    ({"num_layers": 2, "num_kv_heads": [0, 1]}, (), (9, 20)),
)
"""What a sound file is created with, its states, and the positions of its checkpoints. The last has layers without rows
and no states."""

DAMAGED, FORGED = "damaged.kvm", "forged.kvm"
"""Names of files: no checksum was made right after a change, or some was."""

DAMAGE = frozenset({"bytes", "size"})
"""Edits after which no checksum is made right."""


def states_at(specs: tuple[StateSpec, ...], position: int) -> list[np.ndarray]:
    """The states that are written after `position` positions."""
    bits = np.random.default_rng(position)
    return [bits.integers(0, 256, spec.nbytes, np.uint8).view(spec.numpy_dtype).reshape(spec.shape) for spec in specs]


def recipes() -> list[Recipe]:
    """Return the sound files."""
    return [
        {"checkpoints": number, "open": open_, "changes": [], "edits": []}
        for number in range(len(SOUND))
        for open_ in (False, True)
    ]


# Random changes


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    made: Recipe = json.loads(json.dumps(recipe))
    if random.random() < 0.1:
        made["open"] = not made["open"]
    elif random.random() < 0.15:
        made["changes"] = single.mutate(random, {"changes": made["changes"]})["changes"]
    else:
        edits = made["edits"][-4:]
        if edits and random.random() < 0.3:
            del edits[random.randrange(len(edits))]
        made["edits"] = [*edits, random.choice(_MAKERS)(random)]
    return made


def _of_header(random: Random) -> list[Any]:
    field = random.choice(CHECKPOINT_HEADER.fields).name
    value = random.randbytes(16).hex() if field == "file_id" else _position(random)
    return ["header", random.randrange(6), field, value, random.random() < 0.5]


def _of_digest(random: Random) -> list[Any]:
    return ["digest", random.randrange(6), random.randrange(2), random.getrandbits(64), random.random() < 0.5]


def _of_tensor(random: Random) -> list[Any]:
    return [
        *("tensor", random.randrange(6), random.randrange(2), random.randrange(2500), random.randbytes(4).hex()),
        random.random() < 0.7,
    ]


def _of_bytes(random: Random) -> list[Any]:
    at = random.choice((random.randrange(80), 4096 + random.randrange(2500), random.randrange(8192)))
    return ["bytes", random.randrange(6), at, random.randbytes(random.choice((1, 8))).hex()]


def _of_entry(random: Random) -> list[Any]:
    word = random.choice((0, 1 + 2 * _position(random) + random.randrange(2), single.number(random, 41)))
    return ["entry", random.randrange(2), random.randrange(6), word, random.choice((None, 0, random.getrandbits(64)))]


def _of_word(random: Random) -> list[Any]:
    word = random.choice((0, 1 + 2 * _position(random) + random.randrange(2), single.number(random, 41)))
    return ["word", random.randrange(6), word]


def _of_state(random: Random) -> list[Any]:
    field = random.choice(STATE_ENTRY.fields).name
    value: int | str = random.choice((0, 1, 2, 3, 8, 9, 255, single.number(random, 4)))
    if field == "shape":
        axes = [random.choice((0, 1, 2, 40, 520, 2**20, 2**40, 2**63)) for _ in range(random.randint(1, 8))]
        value = struct.pack("<8Q", *axes, *[0] * (8 - len(axes))).hex()
    elif field == "name":
        value = random.choice((b"", b"conv", b"x", b"\xff", b"a/b", b"..", b"y" * 48)).hex()
    return ["state", random.randrange(3), field, value]


def _of_table(random: Random) -> list[Any]:
    return random.choice((["repeat", random.randrange(3)], ["forget", random.randrange(3)]))


def _of_slots(random: Random) -> list[Any]:
    return ["copy", random.randrange(6), random.randrange(6), random.random() < 0.5]


def _of_size(random: Random) -> list[Any]:
    return ["size", single.number(random, 90_000) % 2**31]


def _position(random: Random) -> int:
    return random.choice((0, 1, 2, 5, 17, 20, 31, 40, 41, random.randrange(64), single.number(random, 31)))


_MAKERS = (
    *(_of_header, _of_digest, _of_tensor, _of_tensor, _of_bytes, _of_bytes, _of_entry, _of_entry, _of_word, _of_word),
    *(_of_state, _of_table, _of_slots, _of_size),
)


# The file


def place(recipe: Recipe, folder: str) -> str:
    """Write a recipe's file into a folder; its name says whether a checksum was made right after a change."""
    specs = SOUND[recipe["checkpoints"]][1]
    image = Image(_sound(recipe["checkpoints"], recipe["open"]))
    apply(image, recipe["changes"])
    slots = [entry["layer"] for entry in image.sections if entry["kind"] == Section.CHECKPOINT] or [0]
    for what, *arguments in recipe["edits"]:
        _EDITS[what](image, slots, CheckpointLayout.of(specs) if specs else None, *arguments)
    data = image.encode()
    forged = bool(recipe["changes"]) or any(edit[0] not in DAMAGE for edit in recipe["edits"])
    for name in os.listdir(folder):  # with what a failed copy keeps to be resumed: all files here have one file id
        os.unlink(os.path.join(folder, name))
    path = os.path.join(folder, FORGED if forged else DAMAGED)
    with open(path, "wb") as file:
        file.write(data[: image.size])
        file.truncate(min(image.size, LONGEST))
    return path


@functools.cache
def _sound(number: int, open_: bool) -> bytes:
    """A sound file, made by kvmmap itself."""
    options, specs, positions = SOUND[number]
    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        path = os.path.join(folder, "sound.kvm")
        cache = kvmmap.create(path, capacity=64, head_dim=4, states=specs, metadata={"n": number}, **options)
        for position in positions:
            _append(cache, position - cache.seq_len)
            if specs:
                cache.write_states(states_at(specs, position))
                cache.checkpoint(pin=position == positions[0] and len(positions) > 1)
            if position != positions[-1]:
                cache.flush()  # the last one is published, and not committed
        return bytes_of(cache, path, open_)


def _append(cache: kvmmap.QuantizedKvCache, count: int) -> None:
    rows = np.random.default_rng(cache.seq_len).standard_normal((count, 2, 4), np.float32)
    parts = [rows[:, : layer.num_kv_heads] if layer.num_kv_heads else None for layer in cache.geometry.layers]
    cache.extend(parts, parts, np.arange(count))


# Edits. `slots` are the numbers of the checkpoint slots, of which one is chosen by its remainder.


def _start(image: Image, slots: list[int], slot: int) -> tuple[int, int]:
    number = slots[slot % len(slots)]
    return number, image.places.get((Section.CHECKPOINT, number), 0)


def _correct_checksums(image: Image, number: int, at: int, count: int, named: bool) -> None:
    """Make the checksum of a slot's header right, and that which commits have of it."""
    size = CHECKPOINT_HEADER.size + 8 * count
    digest = xxhash.xxh3_64_intdigest(bytes(image.data[at : at + size]))
    image.put(at + size, CHECKSUM.pack(digest))
    for entries in image.entries if named else ():
        if number < len(entries) and entries[number][0]:
            entries[number][1] = digest


def _header(image: Image, slots: list[int], layout: Any, slot: int, field: str, value: Any, named: bool) -> None:
    number, at = _start(image, slots, slot)
    if at:
        fields = CHECKPOINT_HEADER.unpack(bytes(image.data), at)
        fields[field] = bytes.fromhex(value) if isinstance(value, str) else value % 2**64
        fields["magic"] %= 2**32
        fields["num_states"] %= 2**32
        image.put(at, CHECKPOINT_HEADER.pack(fields))
        _correct_checksums(image, number, at, len(layout.sizes) if layout else 0, named)


def _digest(image: Image, slots: list[int], layout: Any, slot: int, tensor: int, value: int, named: bool) -> None:
    number, at = _start(image, slots, slot)
    if at and layout:
        image.put(at + CHECKPOINT_HEADER.size + 8 * (tensor % len(layout.sizes)), CHECKSUM.pack(value))
        _correct_checksums(image, number, at, len(layout.sizes), named)


def _tensor(
    image: Image, slots: list[int], layout: Any, slot: int, tensor: int, offset: int, data: str, named: bool
) -> None:
    """Other states, with the right checksums."""
    number, at = _start(image, slots, slot)
    if at and layout:
        tensor %= len(layout.sizes)
        start, size = at + layout.offsets[tensor], layout.sizes[tensor]
        image.put(start + offset % max(1, size - 4), bytes.fromhex(data))
        digest = xxhash.xxh3_64_intdigest(bytes(image.data[start : start + size]))
        image.put(at + CHECKPOINT_HEADER.size + 8 * tensor, CHECKSUM.pack(digest))
        _correct_checksums(image, number, at, len(layout.sizes), named)


def _bytes(image: Image, slots: list[int], layout: Any, slot: int, offset: int, data: str) -> None:
    _, at = _start(image, slots, slot)
    if at:
        image.raw.append((at + offset, bytes.fromhex(data)))


def _entry(image: Image, slots: list[int], layout: Any, which: int, slot: int, word: int, digest: int | None) -> None:
    entries = image.entries[which]
    if entries:
        entry = entries[slot % len(entries)]
        entry[:] = [word % 2**64, entry[1] if digest is None else digest]


def _word(image: Image, slots: list[int], layout: Any, slot: int, value: int) -> None:
    image.live[LIVE_LENGTHS + 8 * (len(image.layers) + slot % len(slots))] = value


def _state(image: Image, slots: list[int], layout: Any, number: int, field: str, value: Any) -> None:
    if image.states:
        image.states[number % len(image.states)][field] = bytes.fromhex(value) if isinstance(value, str) else value


def _repeat(image: Image, slots: list[int], layout: Any, number: int) -> None:
    if image.states:
        image.states.append(dict(image.states[number % len(image.states)]))
        image.count()


def _forget(image: Image, slots: list[int], layout: Any, number: int) -> None:
    if image.states:
        del image.states[number % len(image.states)]
        image.count()


def _copy_slot(image: Image, slots: list[int], layout: Any, source: int, target: int, named: bool) -> None:
    (_, start), (number, at) = _start(image, slots, source), _start(image, slots, target)
    if start and at and layout:
        image.put(at, bytes(image.data[start : start + layout.size]))
        _correct_checksums(image, number, at, len(layout.sizes), named)


def _size(image: Image, slots: list[int], layout: Any, value: int) -> None:
    image.size = value


_EDITS: dict[str, Callable[..., None]] = {
    "header": _header,
    "digest": _digest,
    "tensor": _tensor,
    "bytes": _bytes,
    "entry": _entry,
    "word": _word,
    "state": _state,
    "repeat": _repeat,
    "forget": _forget,
    "copy": _copy_slot,
    "size": _size,
}
