"""Whose keys and values an engine computes: its weights, its config, and the shapes of its layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig

from ...codecs import by_name
from ...codecs.presets import preset_codecs
from ...errors import UnsupportedModelError
from ...geometry import LayerGeometry
from ...library import Namespace
from ...metadata import ModelInfo
from ..weight_files import VOLATILE, files_digest, portable_id_of, weight_files
from .settings import Settings

NATIVE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""Codecs that keep a dtype's numbers bit by bit."""

LENGTH_FREE = frozenset({None, "default", "linear", "llama3", "yarn", "proportional"})
"""Kinds of RoPE whose keys do not depend on the longest context that an engine allows."""

Shape = tuple[int, int, int]
"""KV heads, head_dim, and head_dim of values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the keys and values of an engine depend on."""

    model: ModelInfo
    layers: tuple[LayerGeometry, ...]
    facts: dict[str, Any]
    portable_id: str | None
    weights: str
    """The type of the weights, such as "bfloat16"."""
    salt: str | None

    def namespace(self, request_salt: str | None = None) -> Namespace:
        """Return where prompts of an engine are kept; apart from others for each `cache_salt` of a request."""
        salts = (self.salt, request_salt)
        salt = None if salts == (None, None) else json.dumps(salts)
        return Namespace(layers=self.layers, model=self.model, facts=self.facts, salt=salt)


def engine_facts(config: VllmConfig, settings: Settings, shapes: Sequence[Shape]) -> EngineFacts:
    """Look at an engine's config and the files of its weights.

    Args:
        config: the engine's.
        settings: the connector's.
        shapes: of each layer that keeps keys and values, in the model's order.

    Raises:
        UnsupportedModelError: what the engine computes is not covered; or its weights can't be identified.
        DtypeError: there is no such codec.
    """
    check_engine(config)
    model = config.model_config
    files = weight_files(model.model, model.revision) if settings.fingerprint is None else ()
    if settings.fingerprint is None and (not files or config.load_config.load_format == "dummy"):
        raise UnsupportedModelError(
            f"the files of the weights of {model.model} can't be found, so nothing tells them from others: give "
            "kv_connector_extra_config a 'fingerprint' that changes whenever the weights do"
        )
    fingerprint = settings.fingerprint or f"files:{files_digest(files)}"
    hf = model.hf_text_config.to_dict()
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta", hf.get("rope_theta"))
    plain = {name: value for name, value in hf.items() if name not in VOLATILE}
    facts: dict[str, Any] = {
        "config": hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest(),
        "quantization": None if model.quantization is None else str(model.quantization),
    }
    if rope.get("rope_type", rope.get("type")) not in LENGTH_FREE:
        facts["max_model_len"] = model.max_model_len
    keys = values = NATIVE[model.dtype]
    if settings.codec != "native":
        keys, values = preset_codecs(settings.codec)
    layers = tuple(LayerGeometry(*shape, by_name(keys), by_name(values)) for shape in shapes)
    dtype = str(model.dtype).removeprefix("torch.")
    return EngineFacts(
        model=ModelInfo(
            name=os.path.basename(model.model.rstrip("/")) if os.path.exists(model.model) else model.model,
            revision=model.revision,
            fingerprint=fingerprint,
            source_dtype=dtype,
            rope=json.loads(json.dumps({**rope, "rope_theta": theta}, default=str)),
        ),
        layers=layers,
        facts={"vllm": facts},
        portable_id=portable_id_of(layers, theta, files),
        weights=dtype if model.quantization is None else str(model.quantization),
        salt=settings.salt,
    )


def check_engine(config: VllmConfig) -> None:
    """Refuse engines of which not every worker holds all keys and values as they are computed.

    Raises:
        UnsupportedModelError: such an engine.
    """
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    refused = {
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "an encoder": model.is_encoder_decoder,
        f"a KV cache of {cache.cache_dtype}": cache.cache_dtype
        not in ("auto", str(model.dtype).removeprefix("torch.")),
        f"a dtype of {model.dtype}": model.dtype not in NATIVE,
    }
    found = [what for what, is_so in refused.items() if is_so]
    if found:
        raise UnsupportedModelError(f"kvmmap's connector does not support {found[0]}: run vLLM without it")
