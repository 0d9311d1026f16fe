"""Encoder-decoders and cross-attention: rows belong to what the decoder attends to besides its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.tiny_models import RoundedCache, past
from transformers import DynamicCache, EncoderDecoderCache

import kvmmap
from kvmmap.errors import UnknownTokensError, UnsupportedModelError
from kvmmap.integrations.transformers import ATTENTION, KvmmapBatch, KvmmapCache, reuse
from kvmmap.integrations.transformers.models import text_config
from kvmmap.integrations.transformers.source_record import SourceRecord
from kvmmap.integrations.transformers.sources import digest_of_output, digests_by_token, parted

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
NO_END: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None}


def bart() -> Any:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    config = tf.BartConfig(**SIZES, **NO_END, **heads, **layers, max_position_embeddings=128, forced_eos_token_id=None)
    return tf.BartForConditionalGeneration(config)


def t5() -> Any:
    config = tf.T5Config(**SIZES, **NO_END, d_kv=12, d_ff=48, num_heads=4, num_layers=1, num_decoder_layers=2)
    return tf.T5ForConditionalGeneration(config)


def small(net: Any) -> Any:
    """A random model whose decoder depends on its tokens, and on its source."""
    torch.manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.1 if "encoder_attn.out_proj" in name else 0.3)
    net.generation_config = tf.GenerationConfig(pad_token_id=0, decoder_start_token_id=0)
    return net.eval().requires_grad_(False)


NETS = {"bart": bart, "t5": t5}


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> Any:
    return small(NETS[request.param]())


@pytest.fixture(scope="module")
def only_bart() -> Any:
    return small(bart())


def text(length: int, seed: int) -> torch.Tensor:
    return torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed))


SOURCE, OTHER = text(9, 1), text(9, 2)
PROMPT = torch.cat([torch.zeros(1, 1, dtype=torch.long), text(11, 3)], 1)


def generate(net: Any, cache: Any, ids: torch.Tensor, count: int, **source: torch.Tensor) -> Any:
    made = net.generate(
        decoder_input_ids=ids,
        **past(cache),
        **(source or {"input_ids": SOURCE}),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return made.sequences, torch.cat(made.logits)


def reference(net: Any) -> Any:
    return EncoderDecoderCache(RoundedCache(config=text_config(net.config)), DynamicCache())


def filled(net: Any, path: Path, **source: torch.Tensor) -> torch.Tensor:
    """Make a file of a prompt and three new tokens, and return these."""
    with KvmmapCache.create(path, net) as cache:
        return generate(net, cache, PROMPT, 3, **source)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_generation_goes_on_in_a_reopened_file(net: Any, tmp_path: Path, attention: str) -> None:
    expected = generate(net, reference(net), PROMPT, 8)
    net.set_attn_implementation(attention)
    try:
        with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
            assert isinstance(cache, EncoderDecoderCache)
            assert cache.self_attention_cache is cache
            ids, first = generate(net, cache, PROMPT, 3)
        with KvmmapCache.open(tmp_path / "a.kvm", net, "a") as cache:
            ids, second = generate(net, cache, ids, 3)
        with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
            assert cache.token_ids.tolist() == ids[0, :-1].tolist()
            ids, third = generate(net, cache, ids, 2)
    finally:
        net.set_attn_implementation("sdpa")
    assert ids.tolist() == expected[0].tolist()
    off = (torch.cat([first, second, third]) - expected[1]).abs().max()
    assert off < 1e-3 if attention == ATTENTION else off == 0  # in place, sums have another order


def test_passes_without_generate_give_the_same(net: Any) -> None:
    cache, logits = KvmmapCache(net), []
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        logits.append(net(input_ids=SOURCE, decoder_input_ids=PROMPT[:, start:stop], **past(cache)).logits[0])
    own = reference(net)
    expected = [
        net(input_ids=SOURCE, decoder_input_ids=PROMPT[:, a:b], **past(own)).logits[0] for a, b in ((0, 5), (5, 12))
    ]
    assert torch.allclose(torch.cat(logits), torch.cat(expected), atol=1e-4)
    assert cache.token_ids.tolist() == PROMPT[0].tolist()


def test_another_source_reuses_nothing_and_the_same_one_does(net: Any, tmp_path: Path) -> None:
    longer = torch.cat([filled(net, tmp_path / "a.kvm"), text(2, 4)], 1)
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        assert reuse(cache, input_ids=SOURCE, decoder_input_ids=longer) == 14
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        assert reuse(cache, input_ids=OTHER, decoder_input_ids=longer) == 0
        found = generate(net, cache, longer, 4, input_ids=OTHER)
        expected = generate(net, reference(net), longer, 4, input_ids=OTHER)
        assert found[0].tolist() == expected[0].tolist()
        assert torch.allclose(found[1], expected[1], atol=1e-4)
        assert reuse(cache, input_ids=OTHER, decoder_input_ids=longer) == len(longer[0]) - 1
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:  # the file has its own source still
        assert reuse(cache, input_ids=SOURCE, decoder_input_ids=longer) == 14


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION])
def test_another_source_is_refused_where_rows_would_be_served(net: Any, tmp_path: Path, attention: str) -> None:
    net.set_attn_implementation(attention)
    ids = filled(net, tmp_path / "a.kvm")
    with KvmmapCache.open(tmp_path / "a.kvm", net, "a") as cache:
        with pytest.raises(UnsupportedModelError, match="another source than the stored positions"):
            generate(net, cache, ids, 2, input_ids=OTHER)
        with pytest.raises(UnsupportedModelError, match="another source than the stored positions"):
            net(input_ids=OTHER, decoder_input_ids=ids[:, -1:], **past(cache))
        assert cache.seq_len == 14
        generate(net, cache, ids, 2)
        with pytest.raises(UnsupportedModelError, match="another source than the stored positions"):
            net(input_ids=OTHER, decoder_input_ids=ids[:, -1:], **past(cache))
    net.set_attn_implementation("sdpa")


def test_a_decoder_that_gets_no_source_is_refused(only_bart: Any, tmp_path: Path) -> None:
    ids = filled(only_bart, tmp_path / "a.kvm")
    with (
        KvmmapCache.open(tmp_path / "a.kvm", only_bart) as cache,
        pytest.raises(UnsupportedModelError, match="the pass has no source"),
    ):
        only_bart.model.decoder(input_ids=ids[:, -1:], **past(cache))


def test_hidden_positions_of_a_source_make_it_another_one(only_bart: Any, tmp_path: Path) -> None:
    ids = filled(only_bart, tmp_path / "a.kvm", input_ids=SOURCE, attention_mask=torch.ones_like(SOURCE))
    mask = torch.ones_like(SOURCE)
    mask[:, -2:] = 0
    with KvmmapCache.open(tmp_path / "a.kvm", only_bart) as cache:
        assert reuse(cache, input_ids=SOURCE, decoder_input_ids=ids) == 14  # a mask that hides nothing
        with pytest.raises(UnsupportedModelError, match="another source"):
            generate(only_bart, cache, ids, 1, input_ids=SOURCE, attention_mask=mask)
        assert reuse(cache, input_ids=SOURCE, attention_mask=mask, decoder_input_ids=ids) == 0


def test_an_output_of_the_encoder_is_a_source_as_well(only_bart: Any, tmp_path: Path) -> None:
    path, output = tmp_path / "a.kvm", only_bart.get_encoder()(SOURCE)
    expected = generate(only_bart, reference(only_bart), PROMPT, 5)
    ids = filled(only_bart, path, encoder_outputs=output)
    with KvmmapCache.open(path, only_bart) as cache:
        assert reuse(cache, encoder_outputs=output, decoder_input_ids=ids) == 14
        assert generate(only_bart, cache, ids, 2, encoder_outputs=output)[0].tolist() == expected[0].tolist()
    with KvmmapCache.open(path, only_bart) as cache:  # what it was computed from gives the same
        assert generate(only_bart, cache, ids, 2)[0].tolist() == expected[0].tolist()
    other = only_bart.get_encoder()(OTHER)
    with KvmmapCache.open(path, only_bart, "a") as cache:
        with pytest.raises(UnsupportedModelError, match="another source"):
            generate(only_bart, cache, ids, 1, encoder_outputs=other)
        output[0][0, 0, 0] += 1e-3  # the same tensor, edited
        with pytest.raises(UnsupportedModelError, match="another source"):
            generate(only_bart, cache, ids, 1, encoder_outputs=output)
        for inputs in ({}, {"input_ids": SOURCE}):  # its inputs are not known
            with pytest.raises(UnknownTokensError, match="depend on a source"):
                reuse(cache, decoder_input_ids=ids, **inputs)
        assert cache.seq_len == 14
        assert reuse(cache, encoder_outputs=other, decoder_input_ids=ids) == 0


def test_an_output_that_differs_by_rounding_is_taken_if_its_inputs_are_the_same(only_bart: Any, tmp_path: Path) -> None:
    ids = filled(only_bart, tmp_path / "a.kvm")
    encoder, rounded = only_bart.get_encoder(), []

    def nudge(module: Any, given: Any, output: Any) -> None:
        output.last_hidden_state += 1e-6
        rounded.append(1)

    handle = encoder.register_forward_hook(nudge)
    try:
        with KvmmapCache.open(tmp_path / "a.kvm", only_bart) as cache:
            generate(only_bart, cache, ids, 2)
            assert rounded
            with pytest.raises(UnsupportedModelError, match="another source"):
                generate(only_bart, cache, ids, 3, input_ids=OTHER)
    finally:
        handle.remove()


def test_the_source_is_recorded_before_the_rows_and_goes_with_copies(only_bart: Any, tmp_path: Path) -> None:
    ids = filled(only_bart, tmp_path / "a.kvm")
    with KvmmapCache.create(tmp_path / "b.kvm", only_bart) as cache:
        only_bart(input_ids=SOURCE, decoder_input_ids=PROMPT, **past(cache))
        with kvmmap.open(tmp_path / "b.kvm") as seen:  # what is left if the process is killed now
            assert seen.seq_len == 12
            assert seen.metadata["transformers"]["source"]["outputs"]
    with KvmmapCache.open(tmp_path / "a.kvm", only_bart) as cache:
        cache.save(tmp_path / "c.kvm")
        cache.fork(tmp_path / "d.kvm", 7).close()
        cache.truncate(0)
        generate(only_bart, cache, PROMPT, 3, input_ids=OTHER)
        cache.save(tmp_path / "e.kvm")
    for name, source, kept in (
        ("c", SOURCE, 14),
        ("d", SOURCE, 7),
        ("e", OTHER, 12),
        ("e", SOURCE, 0),
        ("d", OTHER, 0),
    ):
        with KvmmapCache.open(tmp_path / f"{name}.kvm", only_bart) as cache:
            assert reuse(cache, input_ids=source, decoder_input_ids=ids) == kept, name


def test_a_failed_first_pass_leaves_no_rows_of_its_source(only_bart: Any) -> None:
    cache = KvmmapCache(only_bart)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = only_bart.model.decoder.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        generate(only_bart, cache, PROMPT, 2, input_ids=OTHER)
    handle.remove()
    found, expected = generate(only_bart, cache, PROMPT, 4), generate(only_bart, reference(only_bart), PROMPT, 4)
    assert torch.allclose(found[1], expected[1], atol=1e-4)


def test_what_needs_several_sequences_or_a_library_is_refused_by_name(only_bart: Any, tmp_path: Path) -> None:
    cache = KvmmapCache(only_bart)
    for options in ({"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(UnsupportedModelError, match="holds one sequence"):
            only_bart.generate(SOURCE, **past(cache), max_new_tokens=3, **options)
    with pytest.raises(UnsupportedModelError, match="keeps no cross-attention"):
        KvmmapBatch([cache])
    with pytest.raises(UnsupportedModelError, match="keeps no cross-attention"):
        KvmmapBatch.branches(cache, 2)
    with (
        kvmmap.Library(tmp_path / "library") as library,
        pytest.raises(UnsupportedModelError, match="is an encoder-decoder: prompts that begin alike"),
    ):
        library.session(only_bart, PROMPT)


def test_caches_need_the_model_that_sees_the_source(only_bart: Any, tmp_path: Path) -> None:
    filled(only_bart, tmp_path / "a.kvm")
    for make in (
        lambda: KvmmapCache(only_bart.config),
        lambda: KvmmapCache.open(tmp_path / "a.kvm"),
        lambda: KvmmapCache.open(tmp_path / "a.kvm", only_bart.config),
    ):
        with pytest.raises(UnsupportedModelError, match="hooks on the model"):
            make()


def test_a_decoder_without_cross_attention_in_its_config_takes_no_source() -> None:
    config = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 96, "bos_token_id": None, "eos_token_id": None}
    with_source = tf.GPT2LMHeadModel(tf.GPT2Config(**config, add_cross_attention=True)).eval().requires_grad_(False)
    states = torch.randn(1, 5, 32)
    cache = KvmmapCache(with_source)
    found = [
        with_source(PROMPT[:, a:b], encoder_hidden_states=states, **past(cache)).logits for a, b in ((0, 7), (7, 12))
    ]
    own = EncoderDecoderCache(RoundedCache(config=with_source.config), DynamicCache())
    expected = with_source(PROMPT, encoder_hidden_states=states, **past(own)).logits
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="another source"):
        with_source(PROMPT[:, :1], encoder_hidden_states=states + 1, **past(cache))

    plain = tf.GPT2LMHeadModel(tf.GPT2Config(**config)).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="its config has no cross-attention"):
        plain(PROMPT, encoder_hidden_states=states, **past(KvmmapCache(plain)))


# Layers that attend to an image alone


def mllama() -> Any:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = tf.models.mllama.configuration_mllama.MllamaTextConfig(
        **sizes, **rope, num_key_value_heads=2, vocab_size=96, cross_attention_layers=[1], max_position_embeddings=64,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = tf.MllamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in made.named_parameters():
        if weight.ndim > 1 or "gate" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return made


def test_rows_of_an_image_are_kept_once_and_not_stored(tmp_path: Path) -> None:
    net = mllama()
    states, other = torch.randn(2, 1, 6, 32)
    own = RoundedCache(config=net.config)
    parts = [({"cross_attention_states": states}, 0, 4), ({}, 4, 8), ({}, 8, 12)]
    expected = [net(PROMPT[:, start:stop], **given, **past(own)).logits for given, start, stop in parts]
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        first = net(PROMPT[:, :4], cross_attention_states=states, **past(cache)).logits
        second = net(PROMPT[:, 4:8], **past(cache)).logits  # from the rows that the cache has
        assert cache.layers[1].keys.shape[2] == 6
    with KvmmapCache.open(tmp_path / "a.kvm", net, "a") as cache:
        with pytest.raises(UnsupportedModelError, match="the pass has no source"):
            net(PROMPT[:, 8:], **past(cache))
        with pytest.raises(UnsupportedModelError, match="another source"):
            net(PROMPT[:, 8:], cross_attention_states=other, **past(cache))
        third = net(PROMPT[:, 8:], cross_attention_states=states, **past(cache)).logits
        again = net(PROMPT[:, :1], cross_attention_states=states, **past(cache))
        assert cache.layers[1].keys.shape[2] == 6
        assert again.logits.isfinite().all()
        assert torch.equal(torch.cat([first, second, third], 1), torch.cat(expected, 1))
        assert reuse(cache, PROMPT) == 0  # without the image


def test_a_prompt_without_an_image_has_no_source(tmp_path: Path) -> None:
    net = mllama()
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        net(PROMPT, **past(cache))
        with pytest.raises(UnsupportedModelError, match="another source"):
            net(PROMPT[:, :1], cross_attention_states=torch.randn(1, 6, 32), **past(cache))
        assert reuse(cache, PROMPT) == 11
        assert reuse(cache, PROMPT, cross_attention_states=torch.randn(1, 6, 32)) == 0


def test_tokens_that_see_other_parts_of_an_image_end_a_prefix() -> None:
    net, states = mllama(), torch.randn(1, 6, 32)
    mask = torch.zeros(1, 1, 12, 6)
    mask[:, :, 5:, 3:] = torch.finfo(torch.float32).min
    cache = KvmmapCache(net)
    net(PROMPT[:, :8], cross_attention_states=states, cross_attention_mask=mask[:, :, :8], **past(cache))
    net(PROMPT[:, 8:], cross_attention_mask=mask[:, :, 8:], **past(cache))
    other = mask.clone()
    other[:, :, 9:] = 0
    assert reuse(cache, PROMPT, cross_attention_states=states, cross_attention_mask=other) == 9
    assert reuse(cache, PROMPT, cross_attention_states=states, cross_attention_mask=mask) == 9
    assert reuse(cache, PROMPT, cross_attention_states=states) == 0


# Pure parts


def test_arguments_are_divided() -> None:
    ids, states = torch.ones(1, 3, dtype=torch.long), torch.randn(1, 5, 4)
    whole = parted({"input_ids": ids, "decoder_input_ids": ids + 1, "attention_mask": ids, "use_cache": True}, True)
    assert whole.own["input_ids"] is not ids
    assert set(whole.inputs) == {"input_ids"}
    encoded = parted({"encoder_outputs": (states,), "attention_mask": ids * 0, "decoder_input_ids": ids}, True)
    assert encoded.output is states
    assert encoded.mask is not None
    assert not encoded.inputs
    decoder = parted({"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": ids}, False)
    assert set(decoder.own) == {"input_ids"}
    assert decoder.mask is None
    assert digest_of_output(states, None) != digest_of_output(states, torch.tensor([[1, 1, 1, 1, 0]]))


def test_a_record_keeps_what_its_positions_see() -> None:
    record = SourceRecord()
    assert record.same("a", None) is None
    record.become("a", "b")
    assert record.extend(0, ["x", "x", "y", "y"])
    assert not record.extend(4, ["y"])
    assert record.runs == [(0, "x"), (2, "y")]
    assert record.agreeing(["x", "x", "y", "y", "z"]) == 4
    assert record.agreeing(["x", "y"]) == 1
    assert [record.same("a", "c"), record.same("c", "b"), record.same("c", "d"), record.same(None, None)] == [
        True,
        True,
        False,
        False,
    ]
    copy = SourceRecord.of(record.notes(), 2)
    assert copy.runs == [(0, "x")]
    assert SourceRecord.of(record.notes(), 0).same("a", "b") is None
    record.become(None, "b")
    assert record.same("a", None) is None
    record.become(None, None)
    assert record.empty
    assert record.same("a", None) is False


def test_masks_by_token_are_digested_alike_in_any_form() -> None:
    mask = torch.ones(1, 6, 2, 3, dtype=torch.long)
    mask[:, 4:] = 0
    whole = digests_by_token(mask, 6)
    assert whole == digests_by_token(mask[:, :3].bool(), 3) + digests_by_token(mask, 3, 3)
    assert digests_by_token(mask, 8)[6:] == [whole[-1]] * 2
    assert digests_by_token(None, 2) == ["", ""]
