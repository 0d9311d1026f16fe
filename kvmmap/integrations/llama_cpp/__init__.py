"""kvmmap with llama-cpp-python: conversations that outlive the process, in files that other programs can read.

    from kvmmap.integrations.llama_cpp import LlamaKvmmapCache

    llama = Llama("model.gguf", n_ctx=8192)
    llama.set_cache(LlamaKvmmapCache("conversations", max_bytes=10 << 30))

Needs llama-cpp-python, and kvmmap[gguf]. Importing it lets `Llama.set_cache` tell a `LlamaKvmmapCache` its model.
"""

from ...errors import MissingLibraryError

try:
    import llama_cpp  # noqa: F401
except ImportError as error:
    raise MissingLibraryError(
        f"this needs llama-cpp-python, which can't be imported ({error}): pip install llama-cpp-python",
        expected="llama_cpp",
    ) from error

from .cache import LlamaKvmmapCache
from .context import spare_sequence
from .conversation import append, load, save

__all__ = ["LlamaKvmmapCache", "append", "load", "save", "spare_sequence"]
