"""The compiled core: row codec, attention, and the file's few machine-level operations.

Private. Bindings take plain buffers and numbers and check only that sizes fit; shapes, dtypes and errors in words
are the business of the modules that call them (`quantize`, `layer`, `storage`).
"""

from ._kernels import (
    attend,
    available_kernels,
    bound_blocks,
    current_kernel,
    decode_ggml,
    decode_rows,
    dequantize_rows,
    encode_ggml,
    encode_rows,
    import_dlpack,
    load_sealed,
    load_word,
    merge_end,
    merge_part,
    publish,
    quantize_rows,
    seal,
    sketch_blocks,
    start_sync,
    store_word,
    use_kernel,
    write_all,
)

__all__ = [
    "attend",
    "available_kernels",
    "bound_blocks",
    "current_kernel",
    "decode_ggml",
    "decode_rows",
    "dequantize_rows",
    "encode_ggml",
    "encode_rows",
    "import_dlpack",
    "load_sealed",
    "load_word",
    "merge_end",
    "merge_part",
    "publish",
    "quantize_rows",
    "seal",
    "sketch_blocks",
    "start_sync",
    "store_word",
    "use_kernel",
    "write_all",
]
