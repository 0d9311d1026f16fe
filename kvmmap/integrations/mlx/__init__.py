"""kvmmap with mlx-lm's server: prompts that outlive the process.

    python -m kvmmap.integrations.mlx conversations/ --model MODEL --port 8080

runs `mlx_lm.server` with its options, and a prompt cache that keeps what it computes in a library on the disk. Needs
mlx-lm, and kvmmap[safetensors]. For mlx-lm's prompt-cache files there are `kvmmap.import_mlx` and `export_mlx`, which
don't need it.
"""

from ...errors import MissingLibraryError

try:
    import mlx_lm  # noqa: F401
except ImportError as error:
    raise MissingLibraryError(
        f"this needs mlx-lm, which can't be imported ({error}): pip install mlx-lm", expected="mlx_lm"
    ) from error

from .prompt_cache import KvmmapPromptCache
from .server import serving

__all__ = ["KvmmapPromptCache", "serving"]
