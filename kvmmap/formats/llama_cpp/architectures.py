"""What llama.cpp knows of architectures and writes into no file: in which order keys lie, and what a state consists
of."""

from __future__ import annotations

from typing import Literal

Order = Literal["pairs", "halves"]
"""Which numbers of a key RoPE rotates together. "pairs": 2i and 2i + 1, where transformers' checkpoints of the same
model have i and i + head_dim / 2. "halves": as in those checkpoints, whatever they have."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PAIRS = _names(
    """
    arcee arctic baichuan bailingmoe chameleon deci deepseek granite granitemoe internlm2 llama llama-embed minicpm
    mistral3 nanbeige olmo smollm3 xverse
    """
)
"""Converting a checkpoint to GGUF permutes its query and key weights."""

SAME = _names(
    """
    afmoe apertus bitnet bloom chatglm codeshell cogvlm cohere2 cohere2moe command-r dbrx dots1 ernie4_5
    ernie4_5-moe exaone exaone-moe exaone4 falcon gemma gemma2 gemma3 gemma3n gemma4 glm4 glm4moe gpt-oss gpt2
    gptneox grok grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 jais jais2 laguna llama4 mellum mimo2
    minimax-m2 mpt nemotron olmo2 olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo3 qwen
    qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smallthinker spark2_5 stablelm
    starcoder starcoder2 step35 talkie
    """
)
"""Keys lie as in the checkpoint."""

EXTENDED = _names(
    """
    paddleocr qwen2vl qwen3vl qwen3vlmoe
    """
)
"""M-RoPE: cells have an extension. Others have one if their GGUF file lists `rope.dimension_sections`."""

RECURRENT = _names(
    """
    arwkv7 mamba mamba2 rwkv6 rwkv6qwen2 rwkv7
    """
)
HYBRID = _names(
    """
    bailingmoe3 deepseek4 falcon-h1 glm5-next granitehybrid jamba kimi-k3 kimi-linear lfm2 lfm2moe minimax-01
    nemotron_h nemotron_h_moe plamo2 qwen35 qwen35moe qwen3next qwen4exp
    """
)
INDEXED = _names(
    """
    deepseek32 dots3note glm-dsa hy_v4 minimax-m3
    """
)
WINDOWED = _names(
    """
    afmoe cohere2 cohere2moe exaone-moe exaone4 gemma-embedding gemma2 gemma3 gemma3n gemma4 gemma4-assistant gpt-
    oss granite_swa laguna llama4 maple mellum mimo2 muse-glimmer olmo2 phi3 plamo3 smallthinker spark2_5 step35
    """
)
"""A second cache, of the last positions alone, where their GGUF file names a window."""

CACHELESS = _names(
    """
    bert dream eurobert gemma-embedding jina-bert-v2 jina-bert-v3 llada llada-moe modern-bert neo-bert nomic-bert
    nomic-bert-moe rnd1 wavtokenizer-dec
    """
)
"""Embedding and diffusion models, whose contexts keep nothing."""

ENCODED = _names(
    """
    t5 t5encoder
    """
)
LATENT = _names(
    """
    deepseek2 deepseek2-ocr minicpm3 mistral4 plm
    """
)
"""Multi-head latent attention."""
