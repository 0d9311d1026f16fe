"""Random recipes: one more change, one less, or another value; most often numbers that are known to hurt."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from kvmmap.format import HEADER, LIVE, PAGE, Section
from kvmmap.format.records import LAYER_ENTRY, SECTION_ENTRY, SLOT

from .image import Recipe

GEOMETRIES: tuple[tuple[list[Any], int], ...] = (
    ([40, 16, [[1, 4, 4], [1, 4, 4]]], 37),
    ([300, 256, [[2, 4, 4]]], 290),
    ([64, 8, [[1, 3, 5], [2, 16, 2], [1, 1, 1]]], 64),
    ([0, 256, [[1, 8, 8]]], 0),
    ([7, 1, [[3, 64, 64]]], 6),
    ([60, 16, [[1, 4, 4], [2, 6, 2]], 12, 3], 41),
    ([20, 8, [[1, 8, 8]], 64, 0], 20),
    ([20, 8, [[1, 2, 3]], 0, 5], 9),
)
_LIVE_NAMES = [field.name for field in LIVE.fields]
DOCUMENTS = (
    '{"model":null,"metadata":{}}',
    '{"model":{"name":"/etc/passwd","revision":"../../x"},"metadata":{"tokenizer":"/etc/passwd","path":"file:///etc"}}',
    '{"model":{"name":1,"revision":[],"fingerprint":{},"source_dtype":2.5,"rope":[1,2]},"metadata":{}}',
    '{"model":{"name":"[red]\\u001b[31m\\u0000\\ud800","rope":{"\\ud800":"\\udfff"}},"metadata":{"\\ud800":"\\u202e"}}',
    '{"model":[],"metadata":[]}',
    '{"model":{},"metadata":{"a":1e999,"b":-1e999,"c":NaN}}',
    '{"model":{"rope":{}},"metadata":{"a":' + "9" * 5000 + "}}",
    "[" * 3000,
    '{"model":null,"metadata":' + '{"a":' * 900 + "1" + "}" * 901,
    '{"model":null,"metadata":{"x":"' + "\\u2028" * 600 + '"}}',
    "\udcff\udcfe",
    "null",
    "",
    '{"metadata":{},"model":{"name":true,"__class__":"x","revision":null}}',
)


def number(random: Random, near: int = 0) -> int:
    """A number that may hurt."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice((0, 1, 2, 3, 255, 256, 257, 65535, 65536, PAGE, PAGE - 1, PAGE + 1))
    if kind == 1:
        return max(0, 2 ** random.randrange(64) + random.choice((-1, 0, 1)))
    if kind == 2:
        return max(0, near + random.choice((-1, 1, -PAGE, PAGE, 8, -8)))
    if kind == 3:
        return near * random.choice((2, 3)) + random.choice((0, 1))
    if kind == 4:
        return random.randrange(64) * PAGE
    return random.getrandbits(random.randrange(1, 65))


def seeds() -> list[Recipe]:
    """Recipes without a change."""
    return [
        {"geometry": geometry, "length": length, "open": open_, "changes": []}
        for geometry, length in GEOMETRIES
        for open_ in (False, True)
    ]


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    recipe = recipe | {"changes": [list(change) for change in recipe["changes"]]}
    changes = recipe["changes"]
    while changes and random.random() < 0.3:
        del changes[random.randrange(len(changes))]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if changes and random.random() < 0.3:
            change = random.choice(changes)
            if isinstance(change[-1], int) and change[0] != "drop":
                change[-1] = number(random, change[-1])
                continue
        changes.insert(random.randint(0, len(changes)), _change(random))
    del changes[8:]
    return recipe


def _change(random: Random) -> list[Any]:
    make = random.choice(_MAKERS)
    return make(random)


def _field(random: Random, record: Any) -> str:
    name: str = random.choice(record.fields).name
    return name


def _of_header(random: Random) -> list[Any]:
    field = _field(random, HEADER)
    if field in ("magic", "file_id"):
        return ["header", field, random.randbytes(8 if field == "magic" else 16).hex()]
    return ["header", field, number(random, 4)]


def _of_layer(random: Random) -> list[Any]:
    return ["layer", random.randrange(4), _field(random, LAYER_ENTRY), number(random, 8)]


def _of_section(random: Random) -> list[Any]:
    field = _field(random, SECTION_ENTRY)
    value = number(random, 16 * PAGE)
    if field == "kind" and random.random() < 0.5:
        value = int(random.choice(list(Section)))
    return ["section", random.randrange(24), field, value]


def _of_sections(random: Random) -> list[Any]:
    kind = random.randrange(3)
    if kind == 0:
        return ["swap", random.randrange(24), random.randrange(24)]
    if kind == 1:
        return ["drop", random.randrange(24), random.random() < 0.8]
    known = random.random() < 0.5
    what = int(random.choice(list(Section))) if known else random.randrange(2**16)
    layer = random.choice((0, 1, 0xFFFFFFFF, number(random)))
    return ["add", what, random.randrange(4), layer, random.choice((0, 30 * PAGE, number(random))), number(random, 8)]


def _of_plan(random: Random) -> list[Any]:
    """A consistent file of a geometry that no one would make."""
    capacity = random.choice((0, 0, 1, 2, 16, 255, 256, 257, 1000))
    block = random.choice((1, 2, 16, 256, 2**20, random.randint(1, 2**20)))
    count = 300 if random.random() < 0.003 else random.choice((1, 1, 1, 2, 2, 3, 3, 12))
    largest = 65535 if capacity == 0 else max(2, 2**18 // capacity // count)
    layers = []
    for _ in range(min(count, 3)):
        heads, dim = random.choice((1, 2, random.randint(1, min(65535, largest)))), random.choice((1, 8, 65))
        if random.random() < 0.2:
            heads, dim = (65535, 65535) if capacity == 0 else (1, min(65535, largest))
        layers.append([heads, dim, random.choice((dim, 1, min(65535, largest)))])
    repeat = 1
    if count > 3:
        layers, repeat = layers[:1], count
    return ["plan", capacity, block, layers, repeat, random.choice((1, 1, PAGE, 2 * PAGE + 1))]


def _of_slot(random: Random) -> list[Any]:
    field = _field(random, SLOT)
    if field == "file_id":
        return ["slot", random.randrange(2), field, random.randbytes(16).hex()]
    return ["slot", random.randrange(2), field, number(random, 37)]


def _of_tail(random: Random) -> list[Any]:
    return ["tail", random.randrange(2), random.randrange(5), random.getrandbits(64)]


def _of_live(random: Random) -> list[Any]:
    if random.random() < 0.5:
        return ["length", random.randrange(4), number(random, 37)]
    return ["live", random.choice(_LIVE_NAMES), number(random, 2)]


def _of_lengths(random: Random) -> list[Any]:
    return ["lengths", random.choice((number(random, 37), 40, 300, 64, 16, 256, 0))]


def _of_metadata(random: Random) -> list[Any]:
    text = random.choice(DOCUMENTS)
    if random.random() < 0.5:
        at = random.randrange(len(text) + 1)
        text = text[:at] + random.choice(('"', "}", "{", "[", "0", "\\ud800", "\udc80", ",")) + text[at + 1 :]
    return ["metadata", random.randrange(2), text]


def _of_bytes(random: Random) -> list[Any]:
    data = random.choice((b"\x80" * 8, b"\x00\x00\xc0\x7f" * 2, b"\xff" * 8, b"\x00\x00\x80\xff", random.randbytes(8)))
    layer = random.choice((0, 1, 0xFFFFFFFF))
    kinds = [kind for kind in Section if (kind >= 16) == (layer != 0xFFFFFFFF)]
    return ["bytes", int(random.choice(kinds)), layer, random.randrange(600), data.hex()]


def _of_record(random: Random) -> list[Any]:
    tag = random.randrange(64) | random.choice((1, 2, 3, 0)) << 40 | random.choice((1, 2, 0, 255)) << 48
    word = random.choice((0, 0, 1, random.randrange(40)))
    return [
        "record",
        random.randrange(2),
        random.randrange(2),
        random.randrange(64),
        word,
        random.choice((tag, number(random, 9))),
    ]


def _of_raw(random: Random) -> list[Any]:
    return ["raw", random.choice((random.randrange(600), random.randrange(40 * PAGE))), random.randbytes(1).hex()]


def _of_size(random: Random) -> list[Any]:
    return ["size", min(2**40, random.choice((number(random), random.randrange(80) * PAGE)))]


_MAKERS = (
    *(_of_header, _of_layer, _of_section, _of_section, _of_sections, _of_plan, _of_plan, _of_slot, _of_slot, _of_tail),
    *(_of_live, _of_live, _of_lengths, _of_metadata, _of_metadata, _of_bytes, _of_raw, _of_size),
    *(_of_record, _of_record),
)


def key(recipe: Recipe) -> str:
    """The recipe as text."""
    return json.dumps(recipe, sort_keys=True)
