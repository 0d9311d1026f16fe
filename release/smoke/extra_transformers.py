"""kvmmap[transformers]: a small random model generates, and continues from what was saved."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvmmap.integrations.transformers import KvmmapCache, reuse

config = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
model.set_attn_implementation("kvmmap")
ids = torch.randint(0, 96, (1, 20))


def generate(cache: KvmmapCache, prompt: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, **cache.argument, max_new_tokens=count, do_sample=False)


expected = generate(KvmmapCache(model), ids, 8)
with KvmmapCache.create("m.kvm", model) as cache:
    half = generate(cache, ids, 4)
with KvmmapCache.open("m.kvm", model, "a") as cache:
    assert reuse(cache, half) > 20
    assert generate(cache, half, 4).tolist() == expected.tolist()
