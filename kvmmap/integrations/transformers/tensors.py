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

_BF16 = np.dtype(ml_dtypes.bfloat16)


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """Return a CPU tensor's numbers as an array that shares its memory; bf16 as `ml_dtypes.bfloat16`.

    Raises:
        KvmmapError: it is part of a graph that gradients shall go through.
        DtypeError: not f32, f16 or bf16.
    """
    if tensor.requires_grad:
        raise KvmmapError(
            "a KvmmapCache keeps numbers and passes no gradients on: run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
    dtype = tensor.dtype
    if dtype is torch.float32 or dtype is torch.float16:
        return tensor.numpy()
    if dtype is torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.uint16).numpy().view(_BF16)
    raise DtypeError(
        f"queries, keys and values must be float32, float16 or bfloat16, not {dtype}",
        expected=("float32", "float16", "bfloat16"),
        actual=str(dtype),
    )


def to_host(keys: torch.Tensor, values: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a layer's new keys and values as arrays: views of CPU tensors; else copied, both in one transfer.

    Raises:
        KvmmapError, DtypeError: as `as_array`.
    """
    if keys.is_cpu:
        return as_array(keys), as_array(values)
    both = as_array(torch.cat([keys.reshape(-1), values.reshape(-1)]).cpu())
    return both[: keys.numel()].reshape(keys.shape), both[keys.numel() :].reshape(values.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as numpy and ModelInfo have it: "float32"."""
    return str(dtype).removeprefix("torch.")


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """Return the dtype that autocast has operations on a tensor's device compute in, None where it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def from_array(array: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    """Return an f32 array as a tensor of another one's dtype, on its device; a view where that can be."""
    tensor = torch.from_numpy(array)
    # `to` would find that out as well, in twice the time that all else here takes.
    return tensor if like.is_cpu and like.dtype is torch.float32 else tensor.to(like.device, like.dtype)
