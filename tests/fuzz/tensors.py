"""Hostile safetensors files: tensors, offsets, metadata and bytes of sound ones changed; and importing them.

A recipe is {"tensors": [[name, dtype, shape, fill]], "text": metadata or null, "edits": [[where, hex]], "offsets":
[[tensor, begin, end]], "cut": bytes or null, "notes": metadata of a prompt cache of mlx-lm}. A fill may be a number.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import struct
import tempfile
import warnings
from random import Random
from typing import Any

import numpy as np
import safetensors  # noqa: F401  # here, where no audit hook takes its loading for a file's doing
from ml_dtypes import bfloat16

import kvmmap

from .execute import ForbiddenError, _attempt, _template
from .image import Recipe
from .mutate import DOCUMENTS, number

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "I32": 4, "I64": 8, "F64": 8, "U8": 1, "BOOL": 1, "I16": 2, "U64": 8}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8, "U32": 4, "U16": 2}
DTYPES = (*SIZES, "F4", "F6_E2M3", "F128", "", "f32", "é")
NAMES = (
    *("keys", "values", "key_codes", "key_scales", "value_codes", "value_scales", "k", "v", "key", "value", "weights"),
    *("key_cache", "value_cache", "key_states", "token_ids", "", "_", "é", "layers", "x" * 3000, "\x1b[2J"),
)
NUMBERS = ("0", "1", "2", "00", "65534", "65535", "9" * 5000, "-1", "1e3", "", "٣", "²", "1" * 9)
JOINS = (".", "/", "_", "..", "._/", "._" * 300)
FILLS = ("small", "ones", "nan", "big", "negative")
FACTS = (
    *('{"version":1,"capacity":9,"document":{"model":null,"metadata":{}}}', "null", "[]", "{}", '"x"', "{", "9" * 5000),
    '{"version":1,"capacity":1e400,"document":{"model":null,"metadata":{}}}',
    '{"version":99,"capacity":9,"document":{"model":null,"metadata":{}}}',
    '{"version":true,"capacity":9,"document":{"model":null,"metadata":{}}}',
    '{"version":1,"capacity":-1,"document":{"model":null,"metadata":{}}}',
    '{"version":1,"capacity":true,"document":{"model":null,"metadata":{}}}',
    '{"version":1,"capacity":1099511627776,"document":{"model":null,"metadata":{}}}',
    '{"version":1,"capacity":' + "9" * 5000 + ',"document":{"model":null,"metadata":{}}}',
    '{"version":1,"capacity":9,"document":' + "[" * 3000 + "]" * 3000 + "}",
    '{"version":1,"capacity":9,"document":' + '{"a":' * 500 + "1" + "}" * 500 + "}",
    "[" * 100_000,
)
SEEDS: tuple[tuple[tuple[str, str, list[int]], ...], ...] = (
    tuple((f"layers.{n}.{kind}", "F32", [5, 2, 8]) for n in (0, 1) for kind in ("keys", "values")),
    tuple((f"{kind}_cache.{n}", "BF16", [1, 2, 5, 8]) for n in (0, 1) for kind in ("key", "value")),
    tuple(
        (f"layers.0.{part}", "I8" if "codes" in part else "F32", [5, 2, 8] if "codes" in part else [5, 2])
        for part in ("key_codes", "key_scales", "value_codes", "value_scales")
    ),
    (("0.k", "F16", [0, 1, 4]), ("0.v", "F16", [0, 1, 4])),
)
PROMPTS: tuple[tuple[tuple[tuple[str, str, list[int], Any], ...], dict[str, str]], ...] = (
    (
        tuple((f"{n}.{part}", "F16", [1, 2, 8, 8], "small") for n in (0, 1) for part in (0, 1))
        + tuple((f"{n}.2", "I32", [], 5) for n in (0, 1)),
        {"1.0": "KVCache", "1.1": "KVCache", "2.0": "", "2.1.0": "0.2", "2.1.1": "scalar"},
    ),
    (
        tuple((f"0.{part}", "BF16", [1, 2, 5, 8], "small") for part in (0, 1)),
        {"0.0": "", "2.0": "KVCache", "1.kvmmap": '{"token_ids":[1,2,3,4,5]}'},
    ),
    (
        (
            *((f"0.{part}", "F32", [1, 2, 8, 8], "small") for part in (0, 1)),
            *((f"0.{place}", "I32", [], value) for place, value in ((2, 8), (3, 2), (4, 8), (5, 4))),
        ),
        {"1.0": "RotatingKVCache", "2.0": ""},
    ),
    (
        (
            *(
                (f"0.{part}.{index}", "F16" if index else "U32", [1, 2, 8, 1 if index else 8], "small")
                for part in (0, 1)
                for index in (0, 1, 2)
            ),
            *((f"0.{place}", "I32", [], value) for place, value in ((2, 7), (3, 64), (4, 4))),
        ),
        {"1.0": "QuantizedKVCache", "2.0": ""},
    ),
)
"""Prompt caches of mlx-lm: tensors, and their metadata."""

STORED = (
    *(("layers.0.key_codes", "I8", [5, 1, 8], "ones"), ("layers.0.key_scales", "F32", [5, 1], "ones")),
    *(("layers.0.value_codes", "U8", [5, 1, 4], "ones"), ("layers.0.value_scales", "F16", [5, 1], "ones")),
    *(("recent.0.positions", "I64", [1], 4), ("recent.0.dtypes", "U8", [1, 2], 1)),
    *(("recent.0.keys", "U16", [1, 1, 8], 1), ("recent.0.values", "U16", [1, 1, 8], 1)),
)
ROWS = (
    '{"layers":[[1,8,8,"int8-rotated","int4-rotated"]],"recent_window":2,"sinks":1}',
    '{"layers":[[1,8,8,"int8","int8"]],"recent_window":2,"sinks":1}',
    '{"layers":[[1,8,8,"int8-rotated","int4-rotated"],[1,8,8,"bf16","f16"]],"recent_window":65536,"sinks":65536}',
    '{"layers":[[65535,65535,65535,"int8","q4_0"]],"recent_window":0,"sinks":0}',
    '{"layers":[[0,8,8,"int8-rotated","int4-rotated"]],"recent_window":1,"sinks":0}',
    '{"layers":[[1,8,8,"","int4-rotated"]],"recent_window":2,"sinks":1}',
    '{"layers":[[1,8]],"recent_window":2,"sinks":1}',
    '{"layers":[],"recent_window":1e9,"sinks":1}',
    '{"layers":[[1,8,8,"int8-rotated","int4-rotated"]],"recent_window":-2,"sinks":true}',
    "[]",
    "null",
)
"""Rows as they were stored: tensors, and what the header says of them."""

NOTES = (
    *("", "KVCache", "RotatingKVCache", "QuantizedKVCache", "ArraysCache", "CacheList", "XCacheX", "Cache", "x" * 5000),
    *("0", "5", "-1", "9" * 5000, "1e3", "٣", "null", '{"token_ids":[]}', '{"token_ids":[-1,1,2,3,4]}', "[" * 9000),
    '{"token_ids":' + "9" * 5000 + "}",
)


def recipes() -> list[Recipe]:
    """Return sound files, with and without token ids and metadata; load what importing them loads."""
    with tempfile.TemporaryDirectory() as folder:
        kvmmap.create(f"{folder}/a.zarr", num_layers=1, capacity=1, num_kv_heads=1, head_dim=1).close()
    found: list[Recipe] = []
    for seed in SEEDS:
        tensors = [[name, dtype, shape, "small"] for name, dtype, shape in seed]
        for ids, text in ((False, None), (True, FACTS[0])):
            more = [["token_ids", "I32", [seed[0][2][0 if len(seed[0][2]) == 3 else 2]], "ones"]] if ids else []
            found.append({"tensors": [*tensors, *more], "text": text, "edits": [], "offsets": [], "cut": None})
    tensors = [list(tensor) for tensor in STORED]
    found.append({"tensors": tensors, "text": _stored_text(ROWS[0]), "edits": [], "offsets": [], "cut": None})
    for prompt, notes in PROMPTS:
        sound = {"tensors": [list(tensor) for tensor in prompt], "text": None, "edits": [], "offsets": [], "cut": None}
        found.append(sound | {"notes": notes})
    return found


def _stored_text(rows: str) -> str:
    return '{"version":3,"capacity":9,"document":{"model":null,"metadata":{}},"rows":' + rows + "}"


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    made: Recipe = json.loads(json.dumps(recipe))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        _MAKERS[random.randrange(len(_MAKERS))](random, made)
    return made


def _tensor(random: Random, recipe: Recipe) -> list[Any]:
    found: list[Any] = random.choice(recipe["tensors"] or [["0.k", "F32", [5, 2, 8], "small"]])
    return found


def _rename(random: Random, recipe: Recipe) -> None:
    parts = [random.choice(random.choice((NAMES, NUMBERS))) for _ in range(random.randrange(1, 5))]
    join = random.choice(JOINS)
    _tensor(random, recipe)[0] = join.join(parts) + random.choice(("", "!", join))


def _renumber(random: Random, recipe: Recipe) -> None:
    tensor = _tensor(random, recipe)
    tensor[0] = tensor[0].replace(random.choice("01"), random.choice(NUMBERS))


def _redtype(random: Random, recipe: Recipe) -> None:
    dtype = random.choice(DTYPES)
    for tensor in recipe["tensors"] if random.random() < 0.5 else [_tensor(random, recipe)]:
        tensor[1] = dtype


def _reshape(random: Random, recipe: Recipe) -> None:
    for tensor in recipe["tensors"] if random.random() < 0.5 else [_tensor(random, recipe)]:
        kind = random.randrange(4)
        if kind == 0:
            tensor[2] = [number(random, 5) % 2**63 for _ in range(random.randrange(6))]
        elif kind == 1 and tensor[2]:
            tensor[2][random.randrange(len(tensor[2]))] = random.choice((0, 1, 2, 5, 6, 300, 65_536, 2**40))
        elif kind == 2:
            tensor[2].insert(0, random.choice((0, 1, 2)))
        elif tensor[2]:
            del tensor[2][0]


def _refill(random: Random, recipe: Recipe) -> None:
    _tensor(random, recipe)[3] = random.choice((*FILLS, number(random, 8) % 2**63 - 2))


def _drop(random: Random, recipe: Recipe) -> None:
    if recipe["tensors"]:
        del recipe["tensors"][random.randrange(len(recipe["tensors"]))]


def _add(random: Random, recipe: Recipe) -> None:
    if len(recipe["tensors"]) < 12:
        dtype, length = (
            random.choice(("I32", "I64", "F32", "U64", "I8")),
            random.choice(([], [5], [4], [6], [0], [5, 1])),
        )
        recipe["tensors"].append(["token_ids", dtype, length, random.choice(FILLS)])


def _text(random: Random, recipe: Recipe) -> None:
    recipe["text"] = random.choice(
        (
            *FACTS,
            *map(_stored_text, ROWS),
            *(f'{{"version":1,"capacity":9,"document":{document}}}' for document in DOCUMENTS),
        )
    )


def _note(random: Random, recipe: Recipe) -> None:
    notes: dict[str, str] = recipe.setdefault("notes", {})
    name = random.choice([*notes, ".".join(random.choice(NUMBERS[:4]) for _ in range(random.randrange(1, 4)))])
    if random.random() < 0.2:
        notes.pop(name, None)
    elif len(notes) < 40:
        notes[name] = random.choice(NOTES)


def _edit(random: Random, recipe: Recipe) -> None:
    recipe["edits"] = [*recipe["edits"][-3:], [number(random, 300) % 4000, random.randbytes(4).hex()]]


def _offset(random: Random, recipe: Recipe) -> None:
    change = [random.randrange(12), number(random, 100) % 2**65 - 2, number(random, 100) % 2**65]
    recipe["offsets"] = [*recipe["offsets"][-2:], change]


def _cut(random: Random, recipe: Recipe) -> None:
    recipe["cut"] = number(random, 400) % 100_000


_MAKERS = (_rename, _renumber, _redtype, _reshape, _refill, _drop, _add, _text, _note, _edit, _offset, _cut)


def place(recipe: Recipe, folder: str) -> str:
    """Write a recipe's file into a folder."""
    header: dict[str, Any] = {}
    if recipe["text"] is not None:
        header["__metadata__"] = {"kvmmap": recipe["text"].encode("utf-8", "replace").decode()}
    if recipe.get("notes"):
        header["__metadata__"] = header.get("__metadata__", {}) | recipe["notes"]
    parts, end = [], 0
    for name, dtype, shape, fill in recipe["tensors"]:
        data = _data(dtype, shape, fill)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    names = [name for name in header if name != "__metadata__"]
    for tensor, begin, stop in recipe["offsets"]:
        if names:
            header[names[tensor % len(names)]]["data_offsets"] = [begin, stop]
    text = json.dumps(header).encode()
    whole = bytearray(struct.pack("<Q", len(text)) + text + b"".join(parts))
    for where, data in recipe["edits"]:
        whole[where : where + 4] = bytes.fromhex(data)
    shutil.rmtree(f"{folder}/made.zarr", ignore_errors=True)
    for name in ("made.kvm", "made.mlx.kvm"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{name}")
    path = os.path.join(folder, "hostile.safetensors")
    with open(path, "wb") as file:
        file.write(whole if recipe["cut"] is None else whole[: recipe["cut"]])
    return path


def _data(dtype: str, shape: list[int], fill: str | int) -> bytes:
    """Return a tensor's bytes, as far as it has a size that a file can have."""
    count = 1
    for size in shape:
        count *= size
    if not 0 < count <= 1 << 16:
        return b""
    numbers = (
        np.full(count, float(fill))
        if isinstance(fill, int)
        else {
            "small": np.arange(count) % 100 / 50 - 1,
            "ones": np.ones(count),
            "nan": np.where(np.arange(count) == count - 1, np.nan, 0.5),
            "big": np.full(count, 3e38),
            "negative": -np.ones(count) * 2,
        }[fill]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if dtype in ("U8", "U16"):
            return numbers.astype(np.int64).astype(f"<u{SIZES[dtype]}").tobytes()
        kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I32": "<i4", "I64": "<i8"}.get(dtype)
        if dtype == "BF16":
            return numbers.astype(bfloat16).tobytes()
        return numbers.astype(kind).tobytes() if kind else bytes(count * SIZES.get(dtype, 1))


def execute(path: str) -> str:
    """Import the file into a `.kvm` file and a Zarr group, and as a prompt cache; return the outcome in words.

    Raises:
        Exception: anything but a KvmmapError or an OSError; or something is left behind by an import that failed.
    """
    folder = os.path.dirname(path)
    return " | ".join(
        _attempt(ending, lambda how=how, ending=ending: _import(how, path, f"{folder}/made.{ending}"))
        for how, ending in (
            (kvmmap.import_tensors, "kvm"),
            (kvmmap.import_tensors, "zarr"),
            (kvmmap.import_mlx, "mlx.kvm"),
        )
    )


def _import(how: Any, path: str, target: str) -> str:
    try:
        how(path, target)
    except OSError as error:
        if not isinstance(error, kvmmap.KvmmapError) and error.errno not in (errno.EFBIG, errno.ENOSPC, errno.ENOMEM):
            raise
        _refuse_left_overs(target)
        return _template(error)
    except kvmmap.KvmmapError:
        _refuse_left_overs(target)
        raise
    with kvmmap.open(target, record_use=False) as cache:
        if not cache.verify().sound:
            raise ForbiddenError("an import that is not sound")
        known = int((cache.token_ids >= 0).sum())
        return f"{cache.num_layers} layers, {min(cache.seq_len, 1)}, {min(known, 1)} ids, {len(cache.metadata)}"


def _refuse_left_overs(target: str) -> None:
    left = [name for name in os.listdir(os.path.dirname(target)) if os.path.basename(target) in name]
    if left:
        raise ForbiddenError(f"a failed import left {left}")
