"""Writing a cache as a prompt cache of mlx-lm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ..cache import QuantizedKvCache
from ..errors import EmptyCacheError, KvmmapError
from ..format import NO_TOKEN
from ..paths import PathLike, place_text
from ..row_arrays import output_array
from ..storage.protocols import Progress
from ..transfer.copying import opened
from .mlx import PLAIN, Layout
from .new_file import new_file, resolved
from .safetensors_states import DTYPES


def export_mlx(
    source: PathLike | QuantizedKvCache,
    path: PathLike,
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    layout: Layout = "scalars",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a cache as a file that mlx-lm's `load_prompt_cache` and `generate --prompt-cache-file` read.

    Every layer becomes a `KVCache`. Token ids come along in the metadata, where `import_mlx` finds them; mlx-lm does
    not look at them.

    Args:
        source: path or URL of a cache in the portable form, or an open one.
        path: where; the file appears when it is whole, with mode 0600. mlx wants a name that ends with ".safetensors".
        dtype: what the model computes in: "float32", "float16" or "bfloat16".
        layout: "scalars" for mlx-lm 0.32 and later, "meta_state" for those before.
        overwrite: replace a file that is there.
        storage_options: the source's.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        EmptyCacheError: the cache holds nothing, which mlx-lm has no file for.
        KvmmapError: there is no such layout.
        DtypeError: there is no such dtype.
        CacheExistsError: there is something at `path`.
        CorruptCacheError: a block does not match its checksum; nothing was written.
        CacheNotFoundError, FormatError, OSError: as in `open`.
    """
    if layout not in ("scalars", "meta_state"):
        raise KvmmapError(f'layout must be "scalars" or "meta_state", not {layout!r}')
    kind = output_array((0,), dtype).dtype
    path = resolved(place_text(path), overwrite=overwrite)
    with opened(source, storage_options) as cache:
        count = cache.seq_len
        if not count:
            raise EmptyCacheError(f"{cache.path or 'the cache'} holds no positions, so there is nothing to export")
        cache.storage.verify_rows(0, count)
        head, total = _header(cache, count, kind, layout)
        with new_file(path, overwrite=overwrite) as file:
            file.write((0,), (head,))
            offset = len(head)
            for layer in cache.layers:
                for read in (layer.read_keys, layer.read_values):
                    # As bits, because the buffer protocol knows no bfloat16.
                    rows = np.ascontiguousarray(
                        read(0, count, dtype=dtype).view(f"u{kind.itemsize}").transpose(1, 0, 2)
                    )
                    file.write((offset,), (rows,))
                    offset += rows.nbytes
                if layout == "scalars":
                    file.write((offset,), (np.array([count], "<i4"),))
                    offset += 4
                if progress:
                    progress(offset, len(head) + total)


def _header(cache: QuantizedKvCache, count: int, kind: np.dtype[Any], layout: Layout) -> tuple[bytes, int]:
    """Return the file's header, and the bytes that follow it."""
    ids = cache.token_ids
    notes = {} if (ids == NO_TOKEN).any() else {"token_ids": ids.tolist()}
    user, classes = ("0", "1") if layout == "scalars" else ("1", "2")
    metadata = {f"{user}.kvmmap": json.dumps(notes)}
    header: dict[str, Any] = {}
    end, scalars = 0, 1

    def place(name: str, dtype: str, shape: list[int], size: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size

    for number, layer in enumerate(cache.geometry.layers):
        heads = layer.num_kv_heads
        for part, dim in (("0", layer.head_dim), ("1", layer.value_head_dim)):
            place(f"{number}.{part}", DTYPES[kind.name], [1, heads, count, dim], heads * count * dim * kind.itemsize)
        metadata[f"{classes}.{number}"] = PLAIN
        if layout == "scalars":
            place(f"{number}.2", "I32", [], 4)
            metadata |= {f"2.{scalars}.0": f"{number}.2", f"2.{scalars}.1": "scalar"}
            scalars += 1
        else:
            metadata[f"0.{number}"] = ""
    if layout == "scalars":
        metadata["2.0"] = ""
    data = json.dumps({"__metadata__": metadata, **header}).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data, end
