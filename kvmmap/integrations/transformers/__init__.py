"""transformers: generate from, and into, a saved cache.

from kvmmap.integrations.transformers import KvmmapCache, reuse

model.set_attn_implementation("kvmmap")                    # attend over the stored rows in place
cache = KvmmapCache.open("prompt.kvm", model)              # refused if another model made it
reuse(cache, input_ids)                                    # as many tokens as agree
model.generate(input_ids, cache=cache)                     # prefills only the rest

transformers before 5.24 calls the argument past_key_values; `**cache.argument` is right in all releases.

The only importer of torch and transformers (`pip install kvmmap[transformers]`). Importing it registers the attention
implementation "kvmmap".
"""

from ...errors import MissingLibraryError as _MissingLibraryError

try:
    import torch as _torch  # noqa: F401
    from transformers.cache_utils import CacheLayerMixin as _CacheLayerMixin  # noqa: F401
except ImportError as error:
    raise _MissingLibraryError(
        f"this needs torch, and transformers 5.20 or later ({error}): pip install 'kvmmap[transformers]'",
        expected="transformers",
    ) from error

from .attention import NAME as ATTENTION
from .batch import KvmmapBatch
from .cache import KvmmapCache
from .from_library import Attachment, LibraryCache, Use, attach, namespace_of, open_session
from .layer import KvmmapLayer
from .portable import adopt, mark_portable
from .prefix import reuse
from .versions import CACHE_ARGUMENT
from .versions import check_version as _check_version
from .weights import weights_fingerprint

_check_version()

__all__ = [
    "ATTENTION",
    "CACHE_ARGUMENT",
    "Attachment",
    "KvmmapBatch",
    "KvmmapCache",
    "KvmmapLayer",
    "LibraryCache",
    "Use",
    "adopt",
    "attach",
    "mark_portable",
    "namespace_of",
    "open_session",
    "reuse",
    "weights_fingerprint",
]
