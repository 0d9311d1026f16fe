"""SmolLM2's weights, which are installed as a GGUF file, as a checkpoint that mlx-lm and vLLM read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_checkpoint(net: Any, folder: Path) -> Path:
    """Write a transformers model as safetensors, f32, with a config that older readers of configs understand."""
    from safetensors.torch import save_file

    folder.mkdir()
    tied = net.config.tie_word_embeddings
    weights = {name: value for name, value in net.state_dict().items() if not (tied and name == "lm_head.weight")}
    tensors = {name: value.contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in net.config.to_dict().items() if name != "quantization_config"}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder
