"""A process that runs vLLM and does what it is asked to, a line of JSON each.

    python -m helpers.vllm_engine '{"checkpoint": FOLDER, "library": FOLDER or null, "extra": {...}, "engine": {...}}'

vLLM takes long to start and has packages that others can't live with, so tests start it with the Python of its own
environment and ask it several things. Prompts are lists of token ids.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # threads that wait for one another on a busy machine cost more than they gain
}
ENGINE = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,  # longer prompts are computed in several steps
    "enforce_eager": True,
    "enable_prefix_caching": False,  # so that whatever is reused came from the library
    "max_logprobs": -1,
}


class Engine:
    """An `LLM`, with the connector if there is a library."""

    def __init__(self, checkpoint: str, library: str | None, extra: dict[str, Any], engine: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        transfer = None
        if library is not None:
            transfer = KVTransferConfig(
                kv_connector="KvmmapConnector",
                kv_connector_module_path="kvmmap.integrations.vllm",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config={"path": library, **extra},
            )
        self.llm = LLM(checkpoint, kv_transfer_config=transfer, **(ENGINE | engine))

    def generate(self, prompts: list[list[int]], tokens: int, salt: str | None = None) -> dict[str, Any]:
        """Continue prompts by the likeliest tokens; all at once, so that they share steps."""
        found, seconds, processor = self._run(prompts, tokens, salt, 2)
        return {"outputs": found, "seconds": seconds, "processor": processor}

    def each(self, prompts: list[list[int]], tokens: int, salt: str | None = None) -> dict[str, Any]:
        """The same one after the other."""
        return {"runs": [self.generate([prompt], tokens, salt) for prompt in prompts]}

    def score(self, ids: list[int], prompt: int, target: str, salt: str) -> dict[str, Any]:
        """Save log-probabilities of the next token after each one from `prompt` on, [len(ids) - prompt, vocabulary]."""
        import numpy as np

        rows, cached = [], []
        for stop in range(prompt + 1, len(ids) + 1):
            found, _, _ = self._run([ids[:stop]], 1, salt, -1, full=True)
            rows.append(found[0]["all"])
            cached.append(found[0]["cached"])
        np.save(target, np.array(rows))
        return {"cached": cached}

    def save(self, ids: list[int], path: str, salt: str) -> dict[str, Any]:
        """Compute a prompt, and save it as a cache of its own."""
        from kvmmap.integrations.vllm import export_cache

        self._run([ids], 1, salt, 0)
        return {"positions": export_cache(self.llm, ids, path, cache_salt=salt, overwrite=True)}

    def take(self, path: str, accept: str | None, salt: str) -> dict[str, Any]:
        """Put another program's cache into the library."""
        from kvmmap.integrations.vllm import import_cache

        return {"positions": import_cache(self.llm, path, accept_weights=accept, cache_salt=salt)}

    def namespace(self) -> dict[str, Any]:
        """The library's namespace of the engine."""
        from kvmmap.integrations.vllm.exchange import namespace_of

        return {"digest": namespace_of(self.llm).digest}

    def _run(
        self, prompts: list[list[int]], tokens: int, salt: str | None, logprobs: int, *, full: bool = False
    ) -> tuple[list[dict[str, Any]], float, float]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        asked = [{"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {}) for prompt in prompts]
        began, worked = time.perf_counter(), time.process_time()
        outputs = self.llm.generate(asked, parameters, use_tqdm=False)
        seconds, processor = time.perf_counter() - began, time.process_time() - worked
        found = []
        for output in outputs:
            best = output.outputs[0]
            one: dict[str, Any] = {"tokens": list(best.token_ids), "cached": output.num_cached_tokens}
            if full:
                one["all"] = [best.logprobs[0][token].logprob for token in range(len(best.logprobs[0]))]
            else:
                one["top"] = [
                    sorted(((entry.logprob, token) for token, entry in step.items()), reverse=True)[:2]
                    for step in best.logprobs or ()
                ]
            found.append(one)
        return found, seconds, processor


def main() -> None:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints much
    engine = Engine(**json.loads(sys.argv[1]))
    replies.write(json.dumps({"ready": str(Path(sys.executable))}) + "\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(engine, request.pop("do"))(**request)
        replies.write(json.dumps(answer) + "\n")
        replies.flush()
    engine.llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # taking torch and vLLM apart may last minutes


if __name__ == "__main__":  # vLLM starts processes that import this module again
    main()
