"""kvmmap, the SQLite of KV caches: an embedded, crash-safe, memory-mapped int8 store for keys and values.

import kvmmap

with kvmmap.create("prompt.kvm", num_layers=30, capacity=8192, num_kv_heads=3, head_dim=64) as cache:
    cache.extend(keys, values, token_ids)      # [num_layers, n, num_kv_heads, head_dim]

cache = kvmmap.open("prompt.kvm")              # in constant time, from any process
cache.layers[0].read_keys(0, 16)               # f32 [16, num_kv_heads, head_dim]
"""

from typing import TYPE_CHECKING

from . import _core, report
from .cache import QuantizedKvCache
from .errors import (
    AccessDeniedError,
    CacheChangedError,
    CacheExistsError,
    CacheLockedError,
    CacheNotFoundError,
    CapacityExceededError,
    ClosedError,
    CorruptCacheError,
    DtypeError,
    EmptyCacheError,
    FormatError,
    HeadOutOfRangeError,
    KvmmapError,
    LayerOutOfRangeError,
    LibraryFullError,
    MetadataError,
    MissingLibraryError,
    ModelMismatchError,
    NoCheckpointError,
    NonFiniteError,
    NoRowsError,
    NotACacheError,
    ParentError,
    PoisonedError,
    PositionOutOfRangeError,
    ReadOnlyError,
    ShapeMismatchError,
    StoreError,
    UnknownTokensError,
    UnsupportedModelError,
    VersionMismatchError,
)
from .geometry import CacheGeometry, LayerGeometry
from .layer import QuantizedKvLayer
from .lazy import lazy_names
from .metadata import ModelInfo
from .opening import create, remove
from .opening import open_cache as open
from .state_spec import StateSpec
from .storage.checkpoints import Checkpoint
from .storage.protocols import Damage, VerifyReport

if TYPE_CHECKING:
    from .attention.merge import merge_attention
    from .files import compact, fork, repair, resize
    from .finding import find, find_temporary, remove_temporary
    from .formats.llama_cpp.exporting import export_llama_cpp
    from .formats.llama_cpp.importing import import_llama_cpp
    from .formats.mlx_export import export_mlx
    from .formats.mlx_import import import_mlx
    from .formats.safetensors import export_tensors
    from .formats.safetensors_import import import_tensors
    from .fp8 import Fp8KvCache, Fp8KvLayer
    from .library import Library, Namespace
    from .quantize import dequantize_rows, quantization_error, quantize_rows
    from .sizing import Size, bytes_per_token, sizes
    from .storage.file.repair import RepairReport
    from .transfer.copying import CopyReport, copy, fetch
    from .transfer.transcoding import CodecLoss, LayerLoss

__version__ = "0.1.0"

# What few programs use, and takes long to load (hashlib and the like), is loaded when it is first used.
_LATER = {
    "Fp8KvCache": "fp8",
    "Fp8KvLayer": "fp8",
    "CodecLoss": "transfer.transcoding",
    "CopyReport": "transfer.copying",
    "Library": "library",
    "Namespace": "library",
    "LayerLoss": "transfer.transcoding",
    "RepairReport": "storage.file.repair",
    "Size": "sizing",
    "bytes_per_token": "sizing",
    "compact": "files",
    "copy": "transfer.copying",
    "dequantize_rows": "quantize",
    "fetch": "transfer.copying",
    "find": "finding",
    "find_temporary": "finding",
    "fork": "files",
    "merge_attention": "attention.merge",
    "quantization_error": "quantize",
    "quantize_rows": "quantize",
    "remove_temporary": "finding",
    "export_llama_cpp": "formats.llama_cpp.exporting",
    "export_mlx": "formats.mlx_export",
    "export_tensors": "formats.safetensors",
    "import_llama_cpp": "formats.llama_cpp.importing",
    "import_mlx": "formats.mlx_import",
    "import_tensors": "formats.safetensors_import",
    "repair": "files",
    "resize": "files",
    "sizes": "sizing",
}

if not TYPE_CHECKING:  # type checkers would take every misspelt name for one of these
    __getattr__, __dir__ = lazy_names(globals(), _LATER)


def kernel() -> str:
    """Return the name of the compiled code in use on this processor, such as "avx512" or "portable"."""
    return _core.current_kernel()


__all__ = [
    "AccessDeniedError",
    "CacheChangedError",
    "CacheExistsError",
    "CacheGeometry",
    "CacheLockedError",
    "CacheNotFoundError",
    "CapacityExceededError",
    "Checkpoint",
    "ClosedError",
    "CodecLoss",
    "CopyReport",
    "CorruptCacheError",
    "Damage",
    "DtypeError",
    "EmptyCacheError",
    "FormatError",
    "Fp8KvCache",
    "Fp8KvLayer",
    "HeadOutOfRangeError",
    "KvmmapError",
    "LayerGeometry",
    "LayerLoss",
    "LayerOutOfRangeError",
    "Library",
    "LibraryFullError",
    "MetadataError",
    "MissingLibraryError",
    "ModelInfo",
    "ModelMismatchError",
    "Namespace",
    "NoCheckpointError",
    "NoRowsError",
    "NonFiniteError",
    "NotACacheError",
    "ParentError",
    "PoisonedError",
    "PositionOutOfRangeError",
    "QuantizedKvCache",
    "QuantizedKvLayer",
    "ReadOnlyError",
    "RepairReport",
    "ShapeMismatchError",
    "Size",
    "StateSpec",
    "StoreError",
    "UnknownTokensError",
    "UnsupportedModelError",
    "VerifyReport",
    "VersionMismatchError",
    "bytes_per_token",
    "compact",
    "copy",
    "create",
    "dequantize_rows",
    "export_llama_cpp",
    "export_mlx",
    "export_tensors",
    "fetch",
    "find",
    "find_temporary",
    "fork",
    "import_llama_cpp",
    "import_mlx",
    "import_tensors",
    "kernel",
    "merge_attention",
    "open",
    "quantization_error",
    "quantize_rows",
    "remove",
    "remove_temporary",
    "repair",
    "report",
    "resize",
    "sizes",
]
