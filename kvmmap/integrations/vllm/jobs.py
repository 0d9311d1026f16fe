"""What the scheduler's half of the connector tells the worker's, in each step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from ...library import Namespace


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Positions of a request, and the blocks that they lie in."""

    request: str
    namespace: Namespace
    token_ids: NDArray[np.int32]
    """From position 0 to `stop`, [stop]."""
    blocks: tuple[int, ...]
    """The request's, from position 0 on, as vLLM's scheduler counts them."""
    start: int = 0
    """First position that is to be loaded."""

    @property
    def stop(self) -> int:
        """The position behind the last."""
        return len(self.token_ids)


@dataclass
class Jobs(KVConnectorMetadata):  # type: ignore[misc]
    """All jobs of a step."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)


def ids_of(request: Any, count: int) -> NDArray[np.int32]:
    """Return a request's first token ids, [count]."""
    return np.array(request.all_token_ids[:count], np.int32)
