"""Hostile states of llama.cpp: sound ones of every kind with bytes changed, moved and cut; and importing them.

A recipe is {"state": arguments of `TinyState`, "architecture": the model's, "edits": [[where, hex]], "moves": [[from,
to, size]], "cut": bytes or null}.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from random import Random

import gguf  # noqa: F401  # here, where no audit hook takes its loading for a file's doing
from helpers.llama_states import TYPES, TinyModel, TinyState

import kvmmap
from kvmmap.formats.llama_cpp.importing import import_llama_cpp

from .execute import ForbiddenError, _attempt, _template
from .image import Recipe
from .mutate import number

KINDS = (("slot", 2), ("slot", 3), ("session", 9), ("session", 10), ("sequence", 0), ("context", 0))
FIELDS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("count", (0, 1, 2, 5)),
    ("extension", (0, 2, 3)),
    ("version", (0, 1, 2, 3, 4, 9, 10, 11)),
    ("streams", (0, 1, 2, 4)),
    ("stream", (0, 1, 5)),
    ("sequence", (0, 1, -1, 2**31 - 1)),
    ("outputs", (0, 1)),
)
ARCHITECTURES = ("llama", "qwen2", "qwen2vl")
WORDS = (
    *("00000000", "01000000", "ffffffff", "ffffff7f", "00000080", "71736767", "6e736767", "d83c14af", "08000000"),
    "1e000000",
)


def model_of(recipe: Recipe) -> TinyModel:
    return TinyModel(architecture=recipe["architecture"], embedding=128, kv_heads=1)


def recipes() -> list[Recipe]:
    """Return a sound state of each kind; load what importing them loads."""
    found: list[Recipe] = []
    for kind, version in KINDS:
        for architecture in ARCHITECTURES:
            state = {"kind": kind, "version": version, "count": 3, "extension": 3 if architecture == "qwen2vl" else 0}
            for more in ({}, {"key_type": "q8_0", "value_type": "q4_1"}, {"transposed": True, "streams": 2}):
                made = {"state": state | more, "architecture": architecture, "edits": [], "moves": [], "cut": None}
                found.append(made)
    return found


def mutate(random: Random, recipe: Recipe) -> Recipe:
    """Return a recipe that differs a little."""
    made: Recipe = json.loads(json.dumps(recipe))
    kind = random.randrange(8)
    size = 2200
    if kind < 3:  # among what is not rows, mostly
        where = random.choice((4 * random.randrange(40), random.randrange(size), size - random.randrange(800)))
        made["edits"] = [*made["edits"][-3:], [where, random.choice((*WORDS, random.randbytes(4).hex()))]]
    elif kind == 3:
        move = [random.randrange(size), random.randrange(size), random.choice((4, 8, 12, 64))]
        made["moves"] = [*made["moves"][-1:], move]
    elif kind == 4:
        made["cut"] = number(random, 400) % 4000
    elif kind == 5:
        made["state"][random.choice(("key_type", "value_type"))] = random.choice(list(TYPES))
    elif kind == 6:
        name, values = random.choice(FIELDS)
        made["state"][name] = random.choice(values)
    else:
        made["architecture"] = random.choice(ARCHITECTURES)
    return made


def place(recipe: Recipe, folder: str) -> str:
    """Write a recipe's state into a folder, and the model beside it."""
    for name in ("made.kvm", "again.bin"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{folder}/{name}")
    model = model_of(recipe)
    path = f"{folder}/{model.architecture}.gguf"
    if not os.path.exists(path):
        model.write(path)  # type: ignore[arg-type]
    state = dict(recipe["state"])
    if state.get("transposed") and state.get("value_type", "f16") not in ("f32", "f16", "bf16"):
        state["value_type"] = "f16"
    whole = bytearray(TinyState(model=model, **state).build())
    for start, to, size in recipe["moves"]:
        whole[to : to + size] = whole[start : start + size]
    for where, data in recipe["edits"]:
        whole[where : where + 4] = bytes.fromhex(data)
    name = f"{folder}/{model.architecture}.state"
    with open(name, "wb") as file:
        file.write(whole if recipe["cut"] is None else whole[: recipe["cut"]])
    return name


def execute(path: str) -> str:
    """Import the state, and export what comes of it; return the outcome in words.

    Raises:
        Exception: anything but a KvmmapError or an OSError; or something is left behind by an import that failed.
    """
    return _attempt("state", lambda: _import(path, os.path.dirname(path)))


def _import(path: str, folder: str) -> str:
    model = path.replace(".state", ".gguf")
    try:
        import_llama_cpp(path, f"{folder}/made.kvm", gguf=model)
    except OSError as error:
        if not isinstance(error, kvmmap.KvmmapError) and error.errno not in (errno.EFBIG, errno.ENOSPC, errno.ENOMEM):
            raise
        _refuse_left_overs(folder)
        return _template(error)
    except kvmmap.KvmmapError:
        _refuse_left_overs(folder)
        raise
    with kvmmap.open(f"{folder}/made.kvm", record_use=False) as cache:
        if not cache.verify().sound:
            raise ForbiddenError("an import that is not sound")
        kvmmap.export_llama_cpp(cache, f"{folder}/again.bin", gguf=model)
        return f"{cache.num_layers} layers, {min(cache.seq_len, 1)}, {min(cache.token_len, 1)} ids"


def _refuse_left_overs(folder: str) -> None:
    left = [name for name in os.listdir(folder) if "made.kvm" in name]
    if left:
        raise ForbiddenError(f"a failed import left {left}")
