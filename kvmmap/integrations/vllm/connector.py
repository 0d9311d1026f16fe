"""`KvmmapConnector`: vLLM's side of it, which hands everything to a `Scheduler` or a `Worker`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec, UniformTypeKVCacheSpecs
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from ...errors import UnsupportedModelError
from .identity import Shape, engine_facts
from .jobs import Jobs
from .scheduler import Scheduler
from .settings import Settings
from .worker import Worker

log = logging.getLogger("kvmmap.vllm")


class KvmmapConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Keeps the keys and values of vLLM's requests in a `kvmmap.Library`, where any later process finds them.

    A prompt begins at the longest prefix that any request of any process has had; what a request computes, prompt and
    answer, is saved when it ends. Segments are ordinary `.kvm` files. Requests with an adapter, images or embeddings
    are neither saved nor served; a `cache_salt` keeps those that have it apart.

    vLLM makes it, from `KVTransferConfig(kv_connector="KvmmapConnector", kv_role="kv_both",
    kv_connector_module_path="kvmmap.integrations.vllm", kv_load_failure_policy="recompute",
    kv_connector_extra_config={...})`. The keys of the last:

    - `path`: of the library's directory.
    - `max_bytes`, `ttl`: as in `kvmmap.Library`.
    - `codec`: "native" (the default) keeps rows bit by bit; else a preset, such as "fidelity".
    - `salt`: a secret that keeps engines apart.
    - `fingerprint`: what identifies the weights, where vLLM does not read them from files.

    `kv_role` may be "kv_producer", which only saves, or "kv_consumer", which only loads. With
    `kv_load_failure_policy="recompute"` vLLM computes what can't be loaded; by default it lets the request fail.

    Raises:
        UnsupportedModelError: an engine whose keys and values are not kept: more than one worker, sliding windows,
            states, quantised KV caches, speculative decoding; or weights that can't be identified.
        KvmmapError: a key is unknown, or `path` is missing.
        NotACacheError, OSError: as `kvmmap.Library`.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        settings = Settings.of(transfer.kv_connector_extra_config)
        group = _only_group(kv_cache_config)
        self._names = sorted(group.layer_names, key=extract_layer_index)
        facts = engine_facts(vllm_config, settings, _shapes(group, self._names))
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        if role == KVConnectorRole.SCHEDULER:
            loads, saves = transfer.is_kv_consumer, transfer.is_kv_producer
            self._scheduler = Scheduler(transfer.engine_id, facts, settings.library(), loads=loads, saves=saves)
            if transfer.kv_load_failure_policy != "recompute":
                log.warning(
                    'a request whose stored tokens can\'t be loaded will fail: kv_load_failure_policy="recompute" '
                    "computes them"
                )
        else:
            capacity = vllm_config.model_config.max_model_len
            self._worker = Worker(
                transfer.engine_id, facts, settings.library(), capacity, group.kv_cache_spec.block_size
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A prompt that is not saved is computed again; nothing waits for it."""
        return False

    # Beside the scheduler

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many more tokens can be loaded; they are loaded within the step."""
        return self._beside.stored(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which blocks tokens are to be loaded into."""
        self._beside.allocated(request, tuple(blocks.get_block_ids()[0]), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        """Return what the worker is to do in this step."""
        return self._beside.take_jobs()

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """Have a request saved; True if its blocks must stay until then."""
        return self._beside.finished(request, tuple(block_ids)), None

    # Where the KV cache is

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Find out where rows lie."""
        context = self._vllm_config.compilation_config.static_forward_context
        layers = {name: context[name] for name in self._names}
        self._there.learn(layers, kv_caches, self._kv_cache_config.num_blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load what the step needs."""
        self._there.load(self._jobs())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is left to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved before a request ends."""

    def wait_for_save(self) -> None:
        """Save the requests that have finished."""
        self._there.save_all(self._jobs())

    def get_finished(self, finished_req_ids: Iterable[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests whose blocks may go."""
        return self._there.take_saved() or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that could not be loaded."""
        return self._there.take_failed()

    def shutdown(self) -> None:
        """Close the library."""
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()

    def _jobs(self) -> Jobs:
        found = self._get_connector_metadata()
        assert isinstance(found, Jobs)
        return found

    @property
    def _beside(self) -> Scheduler:
        assert self._scheduler is not None, "vLLM calls the scheduler's methods where it made that half"
        return self._scheduler

    @property
    def _there(self) -> Worker:
        assert self._worker is not None, "vLLM calls the worker's methods where it made that half"
        return self._worker


def _only_group(config: Any) -> Any:
    """Return the one group of layers that vLLM keeps blocks for.

    Raises:
        UnsupportedModelError: there are several, or one whose layers don't keep all positions.
    """
    if len(config.kv_cache_groups) != 1:
        raise UnsupportedModelError(
            f"kvmmap's connector wants models whose layers all keep all positions; this one has "
            f"{len(config.kv_cache_groups)} groups of layers: run vLLM without it"
        )
    return config.kv_cache_groups[0]


def _shapes(group: Any, names: Sequence[str]) -> list[Shape]:
    shapes = []
    for name in names:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.kv_cache_specs[name]
        if type(spec) is not FullAttentionSpec:
            raise UnsupportedModelError(
                f"kvmmap's connector does not support layers of vLLM's {type(spec).__name__}: run vLLM without it"
            )
        shapes.append((spec.num_kv_heads, spec.head_size, spec.head_size_v))
    return shapes
