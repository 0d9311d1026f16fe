"""Baselines: keys and values in a file of np.memmap, safetensors or torch.

Each stands for one layer's (or a whole cache's) keys and values as f16, half their f32 size and the narrowest type that
these formats' users keep them in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

F16 = np.dtype(np.float16)


def new_memmap(path: Path, shape: tuple[int, ...], dtype: np.dtype = F16) -> np.memmap:
    """Create a sparse file for rows, mapped for writing."""
    path.unlink(missing_ok=True)
    return np.memmap(path, dtype, "w+", shape=shape)


def save_safetensors(path: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Convert to f16 and write a fresh file."""
    path.unlink(missing_ok=True)
    safetensors.numpy.save_file({"keys": keys.astype(F16), "values": values.astype(F16)}, path)


def save_torch(path: Path, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Convert to f16 and write a fresh file."""
    path.unlink(missing_ok=True)
    torch.save({"keys": keys.half(), "values": values.half()}, path)


def load_torch(path: Path, *, mmap: bool = False) -> dict[str, torch.Tensor]:
    """Read a file of torch.save, or map it."""
    tensors: dict[str, torch.Tensor] = torch.load(path, mmap=mmap, weights_only=True)
    return tensors
