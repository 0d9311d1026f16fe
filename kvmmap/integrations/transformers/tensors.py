"""torch tensors as numpy arrays and back: views on the CPU, one transfer from anywhere else.

Knows dtypes and devices; nothing of caches or models.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import DtypeError, KvmmapError


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a CPU tensor's numbers as an array that shares its memory; bf16 as `ml_dtypes.bfloat16`."""
    if tensor.dtype is torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_host(keys: torch.Tensor, values: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a layer's new keys and values as arrays: views of CPU tensors; else copied, both in one transfer.

    Raises:
        KvmmapError: they are part of a graph that gradients shall go through.
        DtypeError: not f32, f16 or bf16.
    """
    if keys.requires_grad or values.requires_grad:
        raise KvmmapError(
            "a KvmmapCache keeps numbers and passes no gradients on: run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    if keys.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DtypeError(
            f"keys and values must be float32, float16 or bfloat16, not {keys.dtype}",
            expected=("float32", "float16", "bfloat16"),
            actual=str(keys.dtype),
        )
    if keys.device.type == "cpu":
        return as_array(keys), as_array(values)
    both = as_array(torch.cat([keys.reshape(-1), values.reshape(-1)]).cpu())
    return both[: keys.numel()].reshape(keys.shape), both[keys.numel() :].reshape(values.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as numpy and ModelInfo have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def from_array(array: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    """Return an f32 array as a tensor of another one's dtype, on its device; a view where that can be."""
    return torch.from_numpy(array).to(device=like.device, dtype=like.dtype)
