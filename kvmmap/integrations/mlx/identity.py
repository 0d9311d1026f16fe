"""Whose keys and values mlx-lm's server computes: its weights, its adapter and its config."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...geometry import LayerGeometry
from ...metadata import ModelInfo
from ..weight_files import VOLATILE, files_digest, portable_id_of, weight_files


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What keys and values depend on besides the shapes of layers."""

    name: str
    fingerprint: str
    facts: dict[str, Any]
    rope: dict[str, Any]
    weights: str | None
    """What the weights are quantised to; None if they are not."""
    files: tuple[Path, ...]

    def info(self, dtype: str) -> ModelInfo:
        """Return what a cache records of the model, which computes in a dtype."""
        return ModelInfo(name=self.name, fingerprint=self.fingerprint, source_dtype=dtype, rope=self.rope)

    def portable_id(self, layers: Sequence[LayerGeometry]) -> str | None:
        """Return the model's identity across programs; None where it can't be computed."""
        return portable_id_of(layers, self.rope.get("rope_theta"), self.files)


def model_facts(key: tuple[str | None, str | None, str | None]) -> ModelFacts | None:
    """Look at the files of a model.

    Args:
        key: of the server: path or name of the model, path of its adapter, and the draft model's.

    Returns:
        None for a model with a draft model, and where the files are not found.

    Raises:
        OSError: a file can't be read.
    """
    model, adapter, draft = key
    if model is None or draft is not None:
        return None
    files = weight_files(model, None)
    if not files:
        return None
    try:
        config = json.loads((files[0].parent / "config.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta", text.get("rope_theta", 10000.0))
    plain = {name: value for name, value in config.items() if name not in VOLATILE}
    facts: dict[str, Any] = {"config": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}
    if adapter is not None:
        facts["adapter"] = files_digest(sorted(path for path in Path(adapter).iterdir() if path.is_file()))
    quantized = config.get("quantization")
    bits = quantized.get("bits") if isinstance(quantized, dict) else None
    return ModelFacts(
        name=os.path.basename(model.rstrip("/")) if os.path.exists(model) else model,
        fingerprint=f"files:{files_digest(files)}",
        facts={"mlx": facts},
        rope={**rope, "rope_theta": theta},
        weights=None if quantized is None else f"mlx {bits or 'quantised'}",
        files=files,
    )
