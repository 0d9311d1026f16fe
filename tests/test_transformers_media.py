"""Prompts with images: the same image is reused, another one is not, and positions behind it survive reopening."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers import media_prompts
from helpers.media_prompts import generate, net, prompt
from helpers.tiny_models import RoundedCache, past

import kvmmap
from kvmmap.errors import UnsupportedModelError
from kvmmap.integrations.transformers import KvmmapBatch, KvmmapCache, open_session, reuse
from kvmmap.integrations.transformers.media import digested, groups

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
"""Releases that forget behind a prefix that tokens of an image see one another, and images in chunks of a prompt."""

KINDS = ["llava", "qwen2_vl", *([] if OLD else ["gemma3"]), "qwen3_vl"]
"""One row of equal images; M-RoPE; images whose tokens see one another; M-RoPE and features in several layers."""

A, B, C = [5, 6, 7], [8, 9, 10, 11], [3, 4]
FIRST = (A, 1, B, 2, C)

torch.set_num_threads(1)


def expected(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    return generate(model, inputs, RoundedCache(config=model.config), **more)


def check(found: Any, right: Any) -> None:
    assert found[0].tolist() == right[0].tolist()
    assert float((found[1] - right[1]).abs().max() / right[1].std()) < 1e-4


def items(cache: KvmmapCache) -> list[tuple[int, int]]:
    return [(item.start, item.stop) for item in cache._media.items]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_images_are_reused_and_others_are_not(tmp_path: Path, kind: str) -> None:
    path, maker = tmp_path / "a.kvm", net(kind)
    inputs = prompt(maker, *FIRST)
    with KvmmapCache.create(path, maker) as cache:
        assert reuse(cache, **inputs) == 0
        check(generate(maker, inputs, cache), expected(maker, inputs))
        spans = items(cache)
    assert len(spans) == 2
    length = inputs["input_ids"].shape[1]
    asked = [
        ((*FIRST[:4], [3, 4, 12, 13]), length),  # the same up to its end
        ((*FIRST[:4], [12, 13]), spans[1][1]),
        ((A, 1, B, 5, [3, 4, 12]), spans[1][0]),  # another second image
        ((A, 5, B, 2, [3, 4, 12]), spans[0][0]),
        ((A, 1, [8, 12], 2, C), spans[0][1] + 1),  # another text between
        ((A, 1, B, 2, [3, 4], 2, [9, 9]), length),  # the second image once more
    ]
    for parts, kept in asked:
        model = net(kind)  # as in another process: it remembers nothing of the first prompt
        inputs = prompt(model, *parts)
        with KvmmapCache.open(path, model) as cache:
            assert reuse(cache, **inputs) == kept, parts
            check(generate(model, inputs, cache, 2), expected(net(kind), inputs, count=2))


@pytest.mark.parametrize("kind", ["qwen2_vl", *([] if OLD else ["gemma3"])])
def test_a_conversation_is_continued_turn_by_turn(tmp_path: Path, kind: str) -> None:
    path, parts = tmp_path / "a.kvm", [A, 1, B]
    model = net(kind)
    KvmmapCache.create(path, model).close()
    for more in ([12], 1, [13, 14], 2, [15]):  # the same image twice, and another one
        parts = [*parts, more]
        if isinstance(more, int):
            continue
        model, inputs = net(kind), prompt(net(kind), *parts)
        with KvmmapCache.open(path, model, "a") as cache:
            reuse(cache, **inputs, discard=True)
            check(generate(model, inputs, cache, 3), expected(net(kind), inputs, count=3))
    with KvmmapCache.open(path, model) as cache:
        assert len(items(cache)) == 3
        assert cache._media.items[0].digest == cache._media.items[1].digest != cache._media.items[2].digest
        assert reuse(cache, **prompt(model, *parts, [1])) == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
def test_text_goes_on_behind_an_image_without_its_pixels(tmp_path: Path, kind: str) -> None:
    path, model = tmp_path / "a.kvm", net(kind)
    inputs = prompt(model, *FIRST)
    with KvmmapCache.create(path, model) as cache:
        tokens, _ = generate(model, inputs, cache, 3)
    whole = prompt(model, *FIRST, tokens[0, -3:].tolist(), [12, 13])
    right = expected(net(kind), whole)
    model = net(kind)
    generate(model, prompt(model, [1], 3, [1]), KvmmapCache(model))  # another conversation in between
    with KvmmapCache.open(path, model) as cache:
        ids = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
        check(generate(model, ids, cache), right)


@pytest.mark.parametrize("kind", ["qwen2_vl"])
def test_two_conversations_alternate(kind: str) -> None:
    model = net(kind)
    conversations = [(KvmmapCache(model), parts) for parts in (FIRST, (B, 3, C, 1, A))]
    for stop in (3, 5):
        for cache, parts in conversations:
            inputs = prompt(model, *parts[:stop])
            reuse(cache, **inputs)
            check(generate(model, inputs, cache), expected(net(kind), inputs))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_without_the_pixels_reuse_ends_before_the_first_placeholder(kind: str) -> None:
    model = net(kind)
    inputs = prompt(model, *FIRST)
    cache = KvmmapCache(model)
    generate(model, inputs, cache)
    assert reuse(cache, inputs["input_ids"]) == len(A)


@pytest.mark.parametrize("kind", ["qwen2_vl"])
def test_chunks_of_a_prompt_may_end_within_an_image(tmp_path: Path, kind: str) -> None:
    model = net(kind)
    inputs = prompt(model, *FIRST)
    right = expected(model, inputs, prefill_chunk_size=5)
    with KvmmapCache.create(tmp_path / "a.kvm", model) as cache:
        check(generate(model, inputs, cache, prefill_chunk_size=5), right)
        if OLD:  # it drops the images, without a word
            assert reuse(cache, **inputs) <= len(A)
            return
        assert len(items(cache)) == 2
    model, more = net(kind), prompt(net(kind), *FIRST, [12])
    with KvmmapCache.open(tmp_path / "a.kvm", model) as cache:
        assert reuse(cache, **more) == inputs["input_ids"].shape[1]
        check(generate(model, more, cache), expected(net(kind), more))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_another_image_than_the_stored_one_is_refused_by_generate(kind: str) -> None:
    model = net(kind)
    cache = KvmmapCache(model)
    generate(model, prompt(model, *FIRST), cache)
    length = cache.seq_len
    with pytest.raises(UnsupportedModelError, match=r"image at position 3 .* reuse\(cache, \*\*inputs\)"):
        generate(model, prompt(model, A, 5, B, 2, [*C, *[1] * 9]), cache)
    assert cache.seq_len == length


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_images_are_told_apart_in_forward_passes_of_ones_own(kind: str) -> None:
    model = net(kind)
    whole, first = prompt(model, *FIRST), prompt(model, *FIRST[:3])
    cache = KvmmapCache(model)
    model(**first, **past(cache), use_cache=True)
    assert len(items(cache)) == 1
    rest = {"input_ids": whole["input_ids"][:, cache.seq_len :]} | media_prompts.pixels(model, [2])
    if kind == "qwen2_vl":  # transformers counts a second image's tokens like text, unless positions are given
        rest["mm_token_type_ids"] = whole["mm_token_type_ids"][:, cache.seq_len :]
        positions = model.model.get_rope_index(
            whole["input_ids"], whole["mm_token_type_ids"], image_grid_thw=whole["image_grid_thw"]
        )[0]
        rest["position_ids"] = positions[..., cache.seq_len :]
    model(**rest, **past(cache), use_cache=True)
    assert items(cache)[1][1] == whole["input_ids"].shape[1] - len(C)
    more = prompt(model, *FIRST, [9])
    assert reuse(cache, **more) == whole["input_ids"].shape[1]
    check(generate(model, more, cache), expected(net(kind), more))


def test_an_image_whose_positions_are_not_its_grids_is_not_reused() -> None:
    model = net("qwen2_vl")
    whole, first = prompt(model, *FIRST), prompt(model, *FIRST[:3])
    cache = KvmmapCache(model)
    model(**first, **past(cache), use_cache=True)
    at = cache.seq_len
    rest = {name: whole[name][:, at:] for name in ("input_ids", "mm_token_type_ids")} | media_prompts.pixels(model, [2])
    model(**rest, **past(cache), use_cache=True)
    assert reuse(cache, **prompt(model, *FIRST, [9])) == at


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_images_survive_copies_and_truncation(tmp_path: Path, kind: str) -> None:
    model = net(kind)
    inputs = prompt(model, *FIRST)
    with KvmmapCache.create(tmp_path / "a.kvm", model) as cache:
        generate(model, inputs, cache, 2)
        spans = items(cache)
        cache.save(tmp_path / "b.kvm")
        cache.fork(tmp_path / "c.kvm", spans[1][0] + 1).close()  # within the second image
        cache.truncate(spans[1][0])
    with KvmmapCache.open(tmp_path / "a.kvm", model) as one, KvmmapCache.open(tmp_path / "b.kvm", model) as two:
        assert items(one) == spans[:1]
        assert items(two) == spans
        generate(model, inputs, one, 2)  # in memory, behind the file
        one.save(tmp_path / "d.kvm")
    held = KvmmapCache(model)
    generate(model, inputs, held, 2)
    more = prompt(model, *FIRST, [9])
    with KvmmapCache.open(tmp_path / "c.kvm", model) as cache:
        assert reuse(cache, **more) == spans[1][0]
    with KvmmapCache.open(tmp_path / "d.kvm", model) as cache:
        assert items(cache) == spans
        assert reuse(cache, **more) == inputs["input_ids"].shape[1]
    assert reuse(copy.deepcopy(held), **more) == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_library_matches_up_to_the_first_image(tmp_path: Path, kind: str) -> None:
    model = net(kind)
    with kvmmap.Library(tmp_path / "library") as library:
        for seed in (1, 5, 1):
            inputs = prompt(model, [7] * 40, seed, B, 2, C)
            with open_session(library, model, inputs["input_ids"]) as cache:
                assert cache.reused <= 40
                check(generate(model, inputs, cache, 3), expected(net(kind), inputs, count=3))
        assert cache.reused > 0


def test_a_batch_of_one_with_an_image_is_right() -> None:
    model = net("llava")
    inputs = prompt(model, *FIRST)
    with KvmmapBatch([KvmmapCache(model)]) as batch:
        check(generate(model, inputs, batch), expected(model, inputs))
        assert reuse(batch.caches[0], inputs["input_ids"]) == len(A)


@pytest.mark.parametrize("kind", ["qwen2_vl"])
def test_another_process_reuses_the_images(tmp_path: Path, kind: str) -> None:
    model, path = net(kind), tmp_path / "a.kvm"
    inputs = prompt(model, *FIRST)
    with KvmmapCache.create(path, model) as cache:
        generate(model, inputs, cache)
    inputs = prompt(model, *FIRST, [12])
    torch.save({"inputs": inputs, "right": expected(net(kind), inputs)}, tmp_path / "right.pt")
    program = (
        "import sys, torch; from helpers.media_prompts import *; from kvmmap.integrations.transformers import *\n"
        "kind, path, held = sys.argv[1:]; held = torch.load(held); model = net(kind)\n"
        "with KvmmapCache.open(path, model, 'a') as cache:\n"
        "    kept = reuse(cache, **held['inputs']); found = generate(model, held['inputs'], cache)\n"
        "assert kept == held['inputs']['input_ids'].shape[1] - 1, kept\n"
        "assert found[0].tolist() == held['right'][0].tolist()\n"
        "assert (found[1] - held['right'][1]).abs().max() < 1e-4 * held['right'][1].std()\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, kind, str(path), str(tmp_path / "right.pt")]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


# Digests


IMAGE = {"image": frozenset([90])}


def ids(*runs: int) -> np.ndarray:
    """Runs of placeholders of these lengths, between single tokens of text."""
    found = [1]
    for run in runs:
        found += [90] * run + [1]
    return np.array(found)


@pytest.mark.parametrize(
    ("given", "runs", "sizes"),
    [
        ({"pixel_values": torch.rand(2, 3, 4, 4)}, (4, 4), [4, 4]),
        ({"pixel_values": torch.rand(2, 3, 4, 4)}, (8,), [4, 4]),  # side by side
        ({"pixel_values": torch.rand(4, 3, 4, 4)}, (12, 4), [4, 4, 4, 4]),  # an image of three tiles, and one of one
        ({"pixel_values": torch.rand(2, 3, 4, 4)}, (2, 2, 2, 2), [4, 4]),  # rows of images
        ({"pixel_values": torch.rand(2, 3, 4, 4), "image_sizes": torch.tensor([[4, 4], [2, 4]])}, (4, 2), [4, 2]),
        ({"pixel_values": torch.rand(2, 3, 4, 4), "image_sizes": torch.tensor([[4, 4], [2, 4]])}, (6,), [6]),
        ({"pixel_values": torch.rand(1, 2, 3, 4, 4)}, (4, 4), [8]),  # images of a batch of one
        ({"pixel_values": torch.rand(12, 5), "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]])}, (3,), [2, 1]),
        ({"pixel_values": torch.rand(12, 5), "image_grid_thw": torch.tensor([[1, 2, 4], [1, 2, 2]])}, (4,), [4]),
    ],
)
def test_tensors_are_split_by_image_where_that_is_certain(given: Any, runs: Any, sizes: list[int]) -> None:
    found = groups(given, ids(*runs), IMAGE)
    assert [int((ids(*runs)[item.start : item.stop] == 90).sum()) for item in found[0].items] == sizes


def test_a_digest_depends_on_every_byte_dtype_shape_and_kind() -> None:
    image = torch.rand(1, 3, 4, 4)
    other = image.clone()
    other[0, 2, 3, 3] += 1e-6
    given = [
        {"pixel_values": image},
        {"pixel_values": other},
        {"pixel_values": image.bfloat16()},
        {"pixel_values": image.reshape(1, 3, 2, 8)},
        {"pixel_values": image, "image_sizes": torch.tensor([[4, 4]])},
        {"pixel_values": image, "token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0]])},
        {"pixel_values": image, "second_per_grid_ts": [1.0]},
    ]
    found = {digested(one, ids(4), IMAGE)[0].digest for one in given}
    found.add(digested(given[0], ids(4), {"audio": frozenset([90])})[0].digest)
    assert len(found) == len(given) + 1


@pytest.mark.parametrize(
    "given", [{}, {"mm_encoder_outputs": {"image": object()}}, {"attention_mask": torch.ones(1, 6)}]
)
def test_placeholders_without_tensors_have_no_digest(given: Any) -> None:
    assert digested(given, ids(4), IMAGE) == ()
