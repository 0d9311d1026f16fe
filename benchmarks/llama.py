"""llama.cpp by its C API: a model, contexts whose keys and values are of a type of one's own choice, and their files.

This module knows neither kvmmap nor what is measured.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Quantised keys and values are rotated by default. Without that, rows of one context can be put into another. Rotating
# costs the same at every length, so it does not affect any comparison here. Read when a context is made.
os.environ["LLAMA_ATTN_ROT_DISABLE"] = "1"

try:
    import llama_cpp as api
except ImportError as error:
    raise SystemExit("llama-cpp-python is not installed: make bench-llama-cpp installs it, in five minutes") from error

VERSION: str = api.__version__
KINDS = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}
"""Types of keys and values, by their names in llama.cpp."""

BATCH = 512
"""Tokens of a prompt that are computed at once: llama.cpp's default."""

Q8_0 = np.dtype([("scale", "<f2"), ("codes", "i1", 32)])
"""A block of q8_0: 32 numbers."""

ERROR = 4
"""GGML_LOG_LEVEL_ERROR: what is below that is not shown."""


@api.llama_log_callback
def log(level: int, text: bytes, _: object) -> None:
    if level == ERROR:
        sys.stderr.write(text.decode())


api.llama_log_set(log, None)


class Model:
    """A model's weights, and its tokenizer."""

    def __init__(self, path: Path) -> None:
        api.llama_backend_init()
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = False  # weights repacked for instructions that some virtual machines lack
        self.handle = api.llama_model_load_from_file(str(path).encode(), options)
        if not self.handle:
            raise SystemExit(f"llama.cpp can't load {path}")

    def encode(self, text: str) -> list[int]:
        """Return a text's token ids."""
        raw = text.encode()
        ids = (api.llama_token * (len(raw) + 1))()
        vocab = api.llama_model_get_vocab(self.handle)
        count = api.llama_tokenize(vocab, raw, len(raw), ids, len(ids), True, False)
        return list(ids[:count])


class Context:
    """One sequence of a model: its tokens, and their keys and values, with flash attention."""

    def __init__(self, model: Model, kind: str, *, capacity: int) -> None:
        options = api.llama_context_default_params()
        options.n_ctx = capacity
        options.n_batch = options.n_ubatch = BATCH
        options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        options.type_k = options.type_v = KINDS[kind]
        self._handle = api.llama_init_from_model(model.handle, options)
        if not self._handle:
            raise SystemExit(f"llama.cpp can't make a context with keys and values of {kind}")
        self._memory = api.llama_get_memory(self._handle)
        self._vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model.handle))
        self.ids: list[int] = []

    def use(self, threads: int) -> None:
        """Set the number of threads."""
        api.llama_set_n_threads(self._handle, threads, threads)

    def feed(self, ids: Sequence[int]) -> None:
        """Compute tokens after the present ones, with the logits after the last."""
        for start in range(0, len(ids), BATCH):
            self._decode(ids[start : start + BATCH])
        self.ids += ids

    def step(self, token: int) -> None:
        """Compute one token and remove it, so that the context keeps its length."""
        self._decode([token])
        api.llama_memory_seq_rm(self._memory, 0, len(self.ids), -1)

    def _decode(self, ids: Sequence[int]) -> None:
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(self._handle, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama.cpp can't decode after {len(self.ids)} tokens")
        api.llama_synchronize(self._handle)

    def logits(self) -> np.ndarray:
        """f32 [vocabulary], of the token computed last."""
        pointer = api.llama_get_logits_ith(self._handle, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,)).copy()

    def save(self, path: Path) -> None:
        """Write the sequence to a file, as llama-server does with a slot's."""
        ids = (api.llama_token * len(self.ids))(*self.ids)
        if not api.llama_state_seq_save_file(self._handle, str(path).encode(), 0, ids, len(ids)):
            raise RuntimeError(f"llama.cpp can't save to {path}")

    def load(self, path: Path) -> None:
        """Replace the sequence by that of a file."""
        ids = (api.llama_token * api.llama_n_ctx(self._handle))()
        count = ctypes.c_size_t()
        if not api.llama_state_seq_load_file(self._handle, str(path).encode(), 0, ids, len(ids), ctypes.byref(count)):
            raise RuntimeError(f"llama.cpp can't load {path}")
        self.ids = list(ids[: count.value])


class Saved:
    """A saved sequence with keys and values in f16, as arrays.

    At the end of the file (llama_kv_cache::state_write_data) are the keys of every layer, then the values, each with
    the number of their type and the bytes of a row.
    """

    def __init__(self, path: Path, *, layers: int, length: int, row: int) -> None:
        raw = path.read_bytes()
        slab = np.dtype([("type", "<i4"), ("row_bytes", "<u8"), ("rows", "<f2", (length, row))])
        start = len(raw) - 2 * layers * slab.itemsize
        slabs = np.frombuffer(raw, slab, offset=max(start, 0))
        if set(slabs["type"]) != {KINDS["f16"]} or set(slabs["row_bytes"]) != {2 * row}:
            raise SystemExit(f"llama-cpp-python {VERSION} lays saved sequences out otherwise than 0.3.36 does")
        self._head = raw[:start]
        self.rows: np.ndarray = slabs["rows"]
        """f16 [2 * layers, length, row]: keys, then values."""

    def write_q8_0(self, path: Path) -> None:
        """Write the same sequence with q8_0, rounded as llama.cpp rounds it (quantize_row_q8_0_ref)."""
        length, row = self.rows.shape[1:]
        slab = np.dtype([("type", "<i4"), ("row_bytes", "<u8"), ("blocks", Q8_0, (length, row // 32))])
        with path.open("wb") as file:
            file.write(self._head)
            for rows in self.rows:
                numbers = rows.astype(np.float32).reshape(length, row // 32, 32)
                scales = np.abs(numbers).max(axis=-1) / 127
                slabs = np.zeros(1, slab)
                slabs["type"], slabs["row_bytes"] = KINDS["q8_0"], Q8_0.itemsize * row // 32
                slabs["blocks"]["scale"] = scales
                slabs["blocks"]["codes"] = np.rint(numbers / np.where(scales, scales, 1)[..., None])
                file.write(slabs.tobytes())
