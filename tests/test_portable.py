"""The portable form: one model's caches in transformers and in llama.cpp, by a GGUF file of the same norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.llama_states import TinyModel, TinyState, halves
from transformers import LlamaConfig, LlamaForCausalLM

import kvmmap
from kvmmap.formats.llama_cpp.model import read_model
from kvmmap.integrations.transformers import KvmmapCache, adopt, mark_portable
from kvmmap.integrations.transformers.portable import portable_id_of

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file."""
    folder = tmp_path_factory.mktemp("portable")
    TinyModel().write(folder / "model.gguf")
    return folder


def checkpoint(gguf_file: Path, **changes: Any) -> Any:
    """A model whose norms are the file's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 200,
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        | changes
    )
    model = LlamaForCausalLM(config).eval()
    norms = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in gguf.GGUFReader(gguf_file).tensors}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.copy_(norms[f"blk.{number}.attn_norm.weight"])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_id_is_the_same_in_both_programs(dtype: torch.dtype, files: Path) -> None:
    model = checkpoint(files / "model.gguf").to(dtype)
    assert portable_id_of(model) == read_model(files / "model.gguf").member.portable_id()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] += 1
    assert portable_id_of(model) != read_model(files / "model.gguf").member.portable_id()


def test_theta_and_shapes_are_part_of_the_id(files: Path) -> None:
    known = portable_id_of(checkpoint(files / "model.gguf"))
    for changes in (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"num_key_value_heads": 4},
    ):
        assert portable_id_of(checkpoint(files / "model.gguf", **changes)) != known


def test_a_state_of_llama_cpp_is_adopted(files: Path, tmp_path: Path) -> None:
    model, path = checkpoint(files / "model.gguf"), tmp_path / "a.kvm"
    state = TinyState(model=TinyModel(), tokens=list(range(7)))
    kvmmap.import_llama_cpp(state.build(), path, gguf=files / "model.gguf")
    with pytest.raises(kvmmap.ModelMismatchError):
        KvmmapCache.open(path, model)
    with pytest.raises(kvmmap.ModelMismatchError, match="accept_weights='float16'"):
        adopt(path, model)
    adopt(path, model, accept_weights="float16")
    adopt(path, model)  # it is the model's own now
    with KvmmapCache.open(path, model) as cache:
        assert cache.seq_len == 7
        assert cache.token_ids.tolist() == list(range(7))
    with kvmmap.open(path) as stored:
        np.testing.assert_array_equal(stored.layers[1].read_keys(0, 7), halves(state.numbers(1, keys=True)))


def test_a_cache_of_transformers_is_exported_by_name(files: Path, tmp_path: Path) -> None:
    model, path = checkpoint(files / "model.gguf"), tmp_path / "a.kvm"
    with torch.inference_mode(), KvmmapCache.create(path, model, capacity=64) as cache:
        model(torch.arange(9)[None], **cache.argument)
    with pytest.raises(kvmmap.ModelMismatchError, match="portable id None"):
        kvmmap.export_llama_cpp(path, tmp_path / "a.bin", gguf=files / "model.gguf", accept_weights="float32")
    mark_portable(path, model)
    with pytest.raises(kvmmap.ModelMismatchError, match="accept_weights='float32'"):
        kvmmap.export_llama_cpp(path, tmp_path / "a.bin", gguf=files / "model.gguf")
    kvmmap.export_llama_cpp(path, tmp_path / "a.bin", gguf=files / "model.gguf", accept_weights="float32")
    kvmmap.import_llama_cpp(tmp_path / "a.bin", tmp_path / "b.kvm", gguf=files / "model.gguf")
    with kvmmap.open(path) as first, kvmmap.open(tmp_path / "b.kvm") as second:
        keys = first.layers[0].read_keys(0, 9)
        np.testing.assert_array_equal(second.layers[0].read_keys(0, 9), keys.astype(np.float16))


def test_other_models_are_refused(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    kvmmap.import_llama_cpp(TinyState(model=TinyModel()).build(), path, gguf=files / "model.gguf")
    model = checkpoint(files / "model.gguf")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = 9
    with pytest.raises(kvmmap.ModelMismatchError, match="another model"):
        adopt(path, model, accept_weights="float16")
    with pytest.raises(kvmmap.ModelMismatchError):
        mark_portable(path, model)
    adopt(path, model, accept_weights="float16", portable_id=read_model(files / "model.gguf").member.portable_id())


def test_models_without_such_norms_need_an_id(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50)).eval()
    with pytest.raises(kvmmap.UnsupportedModelError, match="one of your own"):
        portable_id_of(model)
    with torch.inference_mode(), KvmmapCache.create(tmp_path / "a.kvm", model, capacity=16) as cache:
        model(torch.arange(5)[None], **cache.argument)
    mark_portable(tmp_path / "a.kvm", model, portable_id="gpt2-mine")
    with kvmmap.open(tmp_path / "a.kvm") as cache:
        assert cache.metadata["portable"]["id"] == "gpt2-mine"
