"""The half of the connector that runs beside vLLM's scheduler: what is stored of a prompt, and what is to be saved."""

from __future__ import annotations

import logging
from typing import Any

from vllm.v1.request import RequestStatus

from ...errors import KvmmapError
from ...library import Library
from .identity import EngineFacts
from .jobs import Job, Jobs, ids_of
from .worker import worker_here

log = logging.getLogger("kvmmap.vllm")

LEAST_TOKENS = 16
"""Tokens from which on loading them is worth while, and saving a request."""


class Scheduler:
    """Answers what is stored of a prompt, and makes the jobs of each step.

    Args:
        engine: the engine's id, which a worker in this process has as well.
        facts: whose keys and values they are.
        library: where they are kept.
        loads: whether stored prompts are used.
        saves: whether requests are saved.
    """

    def __init__(self, engine: str, facts: EngineFacts, library: Library, *, loads: bool, saves: bool) -> None:
        self._engine, self._facts, self._library = engine, facts, library
        self._loads, self._saves = loads, saves
        self._starts: dict[str, int] = {}
        """First position that a request does not have in vLLM's own memory."""
        self._jobs = Jobs()

    def stored(self, request: Any, computed: int) -> int:
        """Return how many tokens of a request can be loaded beyond those that vLLM holds itself."""
        if not self._loads or not _plain(request):
            return 0
        self._starts[request.request_id] = computed
        try:
            # One token is left to be computed, for its logits.
            match = self._library.match(
                self._facts.namespace(request.cache_salt), ids_of(request, request.num_tokens - 1)
            )
        except (KvmmapError, OSError) as error:
            log.warning("the library can't be searched: %s", error)
            return 0
        more = match.length - computed
        return more if more >= LEAST_TOKENS else 0

    def allocated(self, request: Any, blocks: tuple[int, ...], count: int) -> None:
        """Note that a request has got blocks, and that `count` positions are to be loaded into them."""
        start = self._starts.pop(request.request_id, 0)
        if count:
            self._jobs.loads.append(self._job(request, start + count, blocks, start=start))

    def finished(self, request: Any, blocks: tuple[int, ...]) -> bool:
        """Save what a request has computed; return whether its blocks must stay until the worker has done so."""
        self._starts.pop(request.request_id, None)
        # Steps under way don't count, nor does the last token, which was never fed.
        stop = min(request.num_computed_tokens - request.num_in_flight_tokens, request.num_tokens - 1)
        kept = self._saves and _plain(request) and request.status != RequestStatus.FINISHED_ERROR
        if not kept or stop < LEAST_TOKENS:
            return False
        job = self._job(request, stop, blocks)
        worker = worker_here(self._engine)
        if worker is not None:  # then nothing is left to be done should there be no further step
            worker.save(job)
            return False
        self._jobs.saves.append(job)
        return True

    def take_jobs(self) -> Jobs:
        """Return the jobs of a step, and begin anew."""
        jobs, self._jobs = self._jobs, Jobs()
        return jobs

    def _job(self, request: Any, stop: int, blocks: tuple[int, ...], start: int = 0) -> Job:
        return Job(
            request=request.request_id,
            namespace=self._facts.namespace(request.cache_salt),
            token_ids=ids_of(request, stop),
            blocks=blocks,
            start=start,
        )

    def close(self) -> None:
        """Close the library."""
        self._library.close()


def _plain(request: Any) -> bool:
    """Whether the token ids alone tell what a request computes: no adapter, no image, no embeddings."""
    return request.lora_request is None and not request.mm_features and request.prompt_embeds is None
