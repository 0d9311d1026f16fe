"""What a GGUF file says about the rows of its model: their shapes, the order of a key's numbers, and whose they are.

A state holds neither. The file is read with the `gguf` package.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from ...errors import CacheNotFoundError, MissingLibraryError, NotACacheError, UnsupportedModelError
from ...geometry import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, LayerGeometry
from ...metadata import ModelInfo
from ...paths import PathLike, place_text
from ..portable import MemberFacts
from .architectures import (
    CACHELESS,
    ENCODED,
    EXTENDED,
    HYBRID,
    INDEXED,
    LATENT,
    PAIRS,
    RECURRENT,
    SAME,
    WINDOWED,
    Order,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """The facts of a model that its states depend on."""

    path: str
    architecture: str
    name: str | None
    layers: tuple[LayerGeometry, ...]
    """Of each layer that keeps keys and values."""

    order: Order
    """In which order a key's numbers lie."""

    extension: bool
    """Whether cells have an extension."""

    weights: str
    """The type of most weights, such as "Q4_1" or "float16"."""

    rope: Mapping[str, Any]
    """RoPE facts, plain JSON."""

    fingerprint: str
    """XXH3 with 128 bits of everything that the file holds, in hex."""

    member: MemberFacts
    """What identifies the model across programs."""

    def info(self) -> ModelInfo:
        """Return what a cache records of its model."""
        return ModelInfo(name=self.name, fingerprint=f"gguf:{self.fingerprint}", rope=dict(self.rope))


def read_model(path: PathLike, *, order: Order | None = None) -> GgufModel:
    """Read a GGUF file. Of a split model give the first part.

    Args:
        path: the model that made the state.
        order: the order of its keys' numbers, for an architecture that this kvmmap does not know.

    Raises:
        MissingLibraryError: the `gguf` package is not installed.
        CacheNotFoundError, NotACacheError: there is no such file, or it is no GGUF file of a model.
        UnsupportedModelError: a model whose states hold something else than keys and values of each position.
    """
    path = os.path.abspath(place_text(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise CacheNotFoundError(f"{path}: there is no such file", path=path) from None
    return _read(path, order, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, _part_times(path)))


_FIRST_PART = re.compile(r"(.*)-00001-of-(\d{5})\.gguf", re.DOTALL)


def _named_parts(path: str) -> list[str]:
    """Return what the other parts are called of a split model whose first part has this name."""
    split = _FIRST_PART.fullmatch(path)
    if split is None:
        return []
    return [f"{split[1]}-{part:05d}-of-{split[2]}.gguf" for part in range(2, int(split[2]) + 1)]


def _part_times(path: str) -> tuple[int, ...]:
    """Return when the other parts of a split model were modified last."""
    return tuple(os.stat(part).st_mtime_ns if os.path.exists(part) else 0 for part in _named_parts(path))


@functools.lru_cache(maxsize=8)
def _read(path: str, order: Order | None, _version: tuple[Any, ...]) -> GgufModel:
    with _errors_of(path):
        fields, tensors = _contents(path)
        tensors += [tensor for part in _other_parts(path, fields) for tensor in _contents(part)[1]]
        architecture = str(fields.get("general.architecture", ""))
        if not architecture:
            raise ValueError("it names no architecture")
        facts = _Facts(architecture, fields)
        _check_kind(facts, path)
        if not tensors:
            raise ValueError("it has no weights, such as a file of a vocabulary alone")
        layers = facts.layers()
        rope = facts.rope()
        if order is None:
            order = _order(architecture, path)
        rotated = facts.number("rope.dimension_count", None)
        if order == "pairs" and rotated not in (None, layers[0].head_dim):
            raise UnsupportedModelError(
                f"{path}: RoPE rotates {rotated} of {layers[0].head_dim} numbers of a key, in pairs; only whole keys "
                "are "
                "reordered"
            )
        return GgufModel(
            path=path,
            architecture=architecture,
            name=str(fields["general.name"]) if "general.name" in fields else None,
            layers=tuple(layers),
            order=order,
            extension=architecture in EXTENDED or facts.get("rope.dimension_sections") is not None,
            weights=_weights(tensors),
            rope=rope,
            fingerprint=_fingerprint(fields, tensors),
            member=MemberFacts(
                layers=tuple(layers),
                rope_theta=float(rope["theta"]),
                norms=_norms(tensors, len(layers)),
            ),
        )


class _Facts:
    """The keys of a file below its architecture's name."""

    def __init__(self, architecture: str, fields: Mapping[str, Any]) -> None:
        self.architecture, self._fields = architecture, fields

    def get(self, name: str) -> Any:
        return self._fields.get(f"{self.architecture}.{name}")

    def number(self, name: str, default: int | None, most: int = 2**31) -> int | None:
        found = self.get(name)
        if found is None:
            return default
        if not 0 <= int(found) <= most:
            raise ValueError(f"{name} is {found}")
        return int(found)

    def needed(self, name: str, most: int) -> int:
        found = self.number(name, None, most)
        if found is None:
            raise ValueError(f"it has no {self.architecture}.{name}")
        return found

    def layers(self) -> list[LayerGeometry]:
        """The layers that keep keys and values: not those of draft heads, which stand behind them."""
        count = self.needed("block_count", MAX_LAYERS) - (self.number("nextn_predict_layers", 0, MAX_LAYERS) or 0)
        heads = self._each("attention.head_count", count)
        kv_heads = (
            self._each("attention.head_count_kv", count) if self.get("attention.head_count_kv") is not None else heads
        )
        if not heads or not heads[0]:
            raise ValueError("it has no attention heads")
        usual = self.needed("embedding_length", 2**24) // max(heads)
        key_dim = self.number("attention.key_length", usual, MAX_HEAD_DIM)
        value_dim = self.number("attention.value_length", usual, MAX_HEAD_DIM)
        if min(kv_heads) < 1:
            raise UnsupportedModelError(
                f"layer {kv_heads.index(min(kv_heads))} has no keys and values of its own: such states are not read"
            )
        return [LayerGeometry(number, key_dim or 0, value_dim or 0) for number in kv_heads]

    def _each(self, name: str, count: int) -> list[int]:
        found = self.get(name)
        if found is None:
            raise ValueError(f"it has no {self.architecture}.{name}")
        numbers = [int(number) for number in found] if isinstance(found, list) else [int(found)] * count
        if not 1 <= count <= len(numbers) or not all(0 <= number <= MAX_HEADS for number in numbers):
            raise ValueError(f"{name} has {len(numbers)} numbers for {count} layers, or one that is out of range")
        return numbers[:count]

    def rope(self) -> dict[str, Any]:
        """RoPE's facts under their GGUF names, and the base as "theta"."""
        found: dict[str, Any] = {"theta": float(self.get("rope.freq_base") or 10000.0)}
        for name in (
            "rope.dimension_count",
            "rope.scaling.type",
            "rope.scaling.factor",
            "rope.scaling.original_context_length",
        ):
            value = self.get(name)
            if isinstance(value, int | float | str):
                found[name.removeprefix("rope.")] = value
        return found


def _check_kind(facts: _Facts, path: str) -> None:
    """Refuse models whose states have other parts than keys and values of each position."""
    architecture, reason = facts.architecture, None
    if architecture in CACHELESS:
        reason = "attends to positions before and after: llama.cpp keeps no keys and values of it"
    elif architecture in ENCODED:
        reason = "has an encoder, of which its states hold nothing"
    elif architecture in RECURRENT:
        reason = "is recurrent: its states hold no keys and values"
    elif architecture in HYBRID:
        reason = "is a hybrid: its states hold recurrent states behind the keys and values"
    elif architecture in INDEXED or facts.get("attention.indexer.head_count") is not None:
        reason = "has an indexer, whose keys its states hold besides"
    elif architecture in LATENT or facts.get("attention.kv_lora_rank") is not None:
        reason = "has latent attention, whose states hold no values"
    elif architecture in WINDOWED and facts.number("attention.sliding_window", 0):
        reason = "has sliding windows: its states hold the last positions alone of some layers"
    if reason is not None:
        raise UnsupportedModelError(
            f"{path}: the architecture {architecture!r} {reason}; this kvmmap does not read them"
        )


def _order(architecture: str, path: str) -> Order:
    if architecture in PAIRS:
        return "pairs"
    if architecture in SAME:
        return "halves"
    raise UnsupportedModelError(
        f"{path}: this kvmmap does not know in which order {architecture!r} has the numbers of its keys: give order="
        '"pairs" if converting its checkpoint permutes them, else "halves"'
    )


def _other_parts(path: str, fields: Mapping[str, Any]) -> list[str]:
    """Return the paths of the other parts of a split model, whose first part the path names.

    Raises:
        NotACacheError: it is not the first part, or not named as one.
        CacheNotFoundError: another part is missing.
    """
    count, number = int(fields.get("split.count", 0)), int(fields.get("split.no", 0))
    if count < 2:
        return []
    parts = _named_parts(path)
    if number or len(parts) != count - 1:
        raise NotACacheError(
            f"{path}: is part {number + 1} of a model of {count} parts: give the one whose name ends with "
            f"-00001-of-{count:05d}.gguf",
            path=path,
        )
    for part in parts:
        if not os.path.exists(part):
            raise CacheNotFoundError(
                f"{part}: there is no such file, and {path} is split into {count} parts", path=part
            )
    return parts


def _contents(path: str) -> tuple[dict[str, Any], list[Any]]:
    """Return a file's fields, as far as they are not about the tokenizer, and its tensors."""
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise MissingLibraryError(
            f"this needs gguf, which can't be imported ({error}): pip install 'kvmmap[gguf]'", expected="gguf"
        ) from error
    reader = _reader_of(gguf)(path)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if not name.startswith(("tokenizer.", "GGUF."))
    }
    return fields, list(reader.tensors)


@functools.cache
def _reader_of(gguf: Any) -> Any:
    """Return the library's reader, which skips lists of strings: a vocabulary takes it seconds, and is not needed."""
    array, string = int(gguf.GGUFValueType.ARRAY), int(gguf.GGUFValueType.STRING)

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type == array:
                kind, count = struct.unpack_from("<IQ", self.data, orig_offs)
                if kind == string:
                    offset = orig_offs + 12
                    for _ in range(count):
                        offset += 8 + struct.unpack_from("<Q", self.data, offset)[0]
                    return offset - orig_offs, [], [], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
            found: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return found

    return Reader


def _weights(tensors: list[Any]) -> str:
    """The type of most numbers of the layers' weights."""
    count: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            count[tensor.tensor_type.name] += int(tensor.n_elements)
    found = count.most_common(1)[0][0] if count else "unknown"
    return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(found, found)


def _norms(tensors: list[Any], count: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], ...]:
    """The weights of the layers' first norms, which no quantisation touches; none if they are not all there."""
    found = {tensor.name: tensor for tensor in tensors if tensor.name.endswith(".attn_norm.weight")}
    names = [f"blk.{number}.attn_norm.weight" for number in range(count)]
    if not all(name in found and found[name].tensor_type.name == "F32" for name in names):
        return ()
    return tuple(np.array(found[name].data, np.float32).reshape(-1) for name in names)


def _fingerprint(fields: Mapping[str, Any], tensors: list[Any]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(fields):
        if not name.startswith(("general.", "split.")):
            digest.update(f"{name} {fields[name]!r}\n".encode())
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.tensor_type.name} {list(map(int, tensor.shape))}\n".encode())
        digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


@contextlib.contextmanager
def _errors_of(path: str) -> Iterator[None]:
    """Turn whatever a damaged file makes the library raise into a NotACacheError."""
    try:
        yield
    except (UnsupportedModelError, MissingLibraryError, NotACacheError, CacheNotFoundError, MemoryError, OSError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
        raise NotACacheError(f"{path}: not a GGUF file of a model that can be read: {reason}", path=path) from error
