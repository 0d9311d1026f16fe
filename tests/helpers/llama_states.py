"""States of llama.cpp written with struct and the gguf package alone, as its source says, and GGUF files to go with
them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type

TYPES = {
    "f32": Type.F32,
    "f16": Type.F16,
    "bf16": Type.BF16,
    "q8_0": Type.Q8_0,
    "q4_0": Type.Q4_0,
    "q4_1": Type.Q4_1,
    "q5_0": Type.Q5_0,
    "q5_1": Type.Q5_1,
}


@dataclass(kw_only=True)
class TinyModel:
    """A GGUF file's facts."""

    architecture: str = "llama"
    layers: int = 2
    heads: int = 4
    kv_heads: int | list[int] = 2
    head_dim: int | None = None
    """None leaves key_length out: it is embedding / heads then."""
    embedding: int = 256
    value_dim: int | None = None
    more: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    weights: bool = True
    """False leaves all tensors out, as a file of a vocabulary alone does."""

    @property
    def dims(self) -> tuple[int, int]:
        key = self.head_dim or self.embedding // self.heads
        return key, self.value_dim or key

    def kv(self, layer: int) -> int:
        return self.kv_heads if isinstance(self.kv_heads, int) else self.kv_heads[layer]

    def write(self, path: Path, *, split: int = 0) -> Path:
        """Write the file; `split` tensors a part, if not 0, of which the first part is returned."""
        writer = gguf.GGUFWriter(path, self.architecture, split_max_tensors=split)
        writer.add_name("tiny")
        writer.add_block_count(self.layers)
        writer.add_embedding_length(self.embedding)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_rope_freq_base(10000.0)
        if self.head_dim is not None:
            writer.add_key_length(self.head_dim)
        if self.dims[1] != self.embedding // self.heads:
            writer.add_value_length(self.dims[1])
        for name, value in self.more.items():
            if isinstance(value, list):
                writer.add_array(f"{self.architecture}.{name}", value)
            else:
                writer.add_uint32(f"{self.architecture}.{name}", value)
        random = np.random.default_rng(self.seed)
        for layer in range(self.layers if self.weights else 0):
            writer.add_tensor(
                f"blk.{layer}.attn_norm.weight", random.standard_normal(self.embedding).astype(np.float32)
            )
            writer.add_tensor(f"blk.{layer}.attn_k.weight", random.standard_normal((8, 32)).astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if split else path


@dataclass(kw_only=True)
class TinyState:
    """A state, and what it is made of."""

    model: TinyModel
    count: int = 7
    kind: str = "slot"
    version: int = 3
    key_type: str = "f16"
    value_type: str = "f16"
    transposed: bool = False
    streams: int = 1
    """0: an old build's, which does not write their number."""
    stream: int = 0
    sequence: int = 0
    extension: int = 0
    tokens: list[int] | None = None
    """None: one a position."""
    outputs: bool = False
    """An old session's outputs, logits and embeddings, all empty."""
    order: list[int] | None = None
    """The order in which cells lie: positions."""
    seed: int = 1

    def rows(self, layer: int, *, keys: bool) -> np.ndarray[Any, Any]:
        """Raw rows of a layer, [n, row_bytes], by position."""
        dim = self.model.dims[0 if keys else 1]
        random = np.random.default_rng([self.seed, layer, keys])
        numbers = random.standard_normal((self.count, self.model.kv(layer) * dim)).astype(np.float32)
        return pack(numbers, self.key_type if keys else self.value_type)

    def numbers(self, layer: int, *, keys: bool) -> np.ndarray[Any, Any]:
        """The same as stored numbers, f32 [n, heads, dim]."""
        name = self.key_type if keys else self.value_type
        return unpack(self.rows(layer, keys=keys), name).reshape(self.count, self.model.kv(layer), -1)

    def build(self) -> bytes:
        tokens = list(range(100, 100 + self.count)) if self.tokens is None else self.tokens
        name = self.model.architecture.encode()
        named = struct.pack("<I", len(name)) + name
        head = {
            "slot": struct.pack(f"<III{len(tokens)}i", 0x67677371, self.version, len(tokens), *tokens),
            "session": struct.pack(f"<III{len(tokens)}i", 0x6767736E, self.version, len(tokens), *tokens) + named,
            "sequence": struct.pack("<Ii", 0xAF143CD8, self.sequence),
            "context": named,
        }[self.kind]
        if self.outputs:
            head += struct.pack("<IQQ", 0, 0, 0)
        streams = struct.pack("<I", self.streams) if self.streams else b""
        before, behind = b"\0\0\0\0" * self.stream, b"\0\0\0\0" * (self.streams - self.stream - 1)
        return head + streams + before + self.memory() + behind

    def memory(self) -> bytes:
        order = list(range(self.count)) if self.order is None else self.order
        parts = [struct.pack("<I", self.count)]
        if not self.count:
            return parts[0]
        for position in order:
            more = [position, position, 100 + position][: self.extension]
            parts.append(struct.pack(f"<iI{self.extension}ii", position, 1, *more, self.sequence))
        parts.append(struct.pack("<II", self.transposed, self.model.layers))
        for layer in range(self.model.layers):
            rows = self.rows(layer, keys=True)[order]
            parts.append(struct.pack("<iQ", TYPES[self.key_type], rows.shape[1]) + rows.tobytes())
        for layer in range(self.model.layers):
            rows = self.rows(layer, keys=False)[order]
            if self.transposed:
                size = {"f32": 4}.get(self.value_type, 2)
                numbers = rows.reshape(self.count, -1, size).transpose(1, 0, 2)
                parts.append(struct.pack("<iII", TYPES[self.value_type], size, len(numbers)) + numbers.tobytes())
            else:
                parts.append(struct.pack("<iQ", TYPES[self.value_type], rows.shape[1]) + rows.tobytes())
        return b"".join(parts)


def pack(numbers: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Rows of numbers as ggml has them, uint8."""
    if name == "f16":
        return numbers.astype("<f2").view(np.uint8)
    if name == "bf16":
        return numbers.astype(ml_dtypes.bfloat16).view(np.uint8)
    if name == "f32":
        return numbers.view(np.uint8)
    return gguf.quants.quantize(numbers, TYPES[name])


def unpack(rows: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Rows of bytes as f32 numbers."""
    rows = np.ascontiguousarray(rows)
    if name == "f16":
        return rows.view("<f2").astype(np.float32)
    if name == "bf16":
        return rows.view(ml_dtypes.bfloat16).astype(np.float32)
    if name == "f32":
        return rows.view("<f4")
    return gguf.quants.dequantize(rows, TYPES[name])


def hadamard(numbers: np.ndarray[Any, Any], group: int) -> np.ndarray[Any, Any]:
    """Rotate groups of the last axis, by Sylvester's matrix."""
    matrix = np.ones((1, 1))
    while len(matrix) < group:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (numbers.reshape(*numbers.shape[:-1], -1, group) @ (matrix / np.sqrt(group))).reshape(numbers.shape)


def halves(keys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The checkpoint's order of keys whose pairs lie side by side."""
    return np.concatenate([keys[..., ::2], keys[..., 1::2]], axis=-1)
