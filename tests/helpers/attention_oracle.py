"""Attention in plain numpy, f64 throughout, over dequantised rows: the reference for every kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import kvmmap
from kvmmap import codecs

F64 = np.float64


def sees(layer: kvmmap.QuantizedKvLayer, n: int, **more: object) -> NDArray[np.bool_]:
    """Which positions each query sees: [n, len]."""
    start = more.get("query_start")
    query = (max(0, len(layer) - n) if start is None else start) + np.arange(n)[:, None]
    key = np.arange(len(layer))[None]
    seen = np.ones((n, len(layer)), bool)
    if more.get("window") is not None:
        seen &= (key > query - more["window"]) | (key < more.get("sinks", 0))
    if more.get("causal", True):
        seen &= key <= query
    return seen


def attend(
    layer: kvmmap.QuantizedKvLayer,
    queries: NDArray,
    *,
    keep: NDArray[np.bool_] | None = None,
    sizes: bool = False,
    **more: object,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (out [n, num_q_heads, value_head_dim], lse [n, num_q_heads]); `keep` [num_kv_heads, len] selects more.

    With `sizes`, out is that of the absolute values: what rounding is in proportion to where values cancel out.
    """
    n, q_heads, dim = queries.shape
    keys, values = layer.read_keys().astype(F64), layer.read_values().astype(F64)
    stored = layer.read_quantized()
    if layer.geometry.key_codec is codecs.INT8:  # products in f64, which f32 would round
        keys = stored.key_codes.astype(F64) * stored.key_scales[..., None].astype(F64)
    if layer.geometry.value_codec is codecs.INT8:
        values = stored.value_codes.astype(F64) * stored.value_scales[..., None].astype(F64)
    if sizes:
        values = np.abs(values)
    scale = dim**-0.5 if more.get("scale") is None else more["scale"]
    seen = sees(layer, n, **more)
    out = np.zeros((n, q_heads, values.shape[-1]))
    lse = np.full((n, q_heads), -np.inf)
    for q in range(q_heads):
        head = q // (q_heads // layer.num_kv_heads)
        scores = np.asarray(queries[:, q]).astype(F64) @ keys[:, head].T * scale
        if more.get("softcap") is not None:
            scores = more["softcap"] * np.tanh(scores / more["softcap"])
        mine = seen if keep is None else seen & keep[head]
        for i in range(n):
            if mine[i].any():
                x = scores[i, mine[i]]
                weights = np.exp(x - x.max())
                lse[i, q] = x.max() + np.log(weights.sum())
                out[i, q] = weights @ values[mine[i], head] / weights.sum()
    return out, lse
