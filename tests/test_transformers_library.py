"""Models that generate over a library: what is reused, what comes out, and who sees whose prompts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.support import run_python
from helpers.tiny_models import generate, model, past, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, LibraryCache, attach, namespace_of, open_session


@pytest.fixture
def library(tmp_path: Path) -> Iterator[kvmmap.Library]:
    with kvmmap.Library(tmp_path / "library") as library:
        yield library


def expected(net: Any, ids: torch.Tensor, count: int = 8) -> torch.Tensor:
    """What a fresh cache in memory gives."""
    return generate(net, ids, KvmmapCache(net), count)[0]


def join(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("attention", [None, "kvmmap"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_prompt_is_computed_once(library: kvmmap.Library, family: str, attention: str | None) -> None:
    net = model(family, attention)
    ids = prompt(60)
    with library.session(net, ids) as cache:
        assert isinstance(cache, LibraryCache)
        assert cache.reused == 0
        first, logits = generate(net, ids, cache, 8)
    with open_session(library, net, ids) as cache:
        assert cache.reused == 59
        again, same = generate(net, ids, cache, 8)
    assert torch.equal(first, again)
    torch.testing.assert_close(logits, same, rtol=2e-4, atol=2e-4)
    with library.session(net, first) as cache:  # the next turn begins with the answer: its last token was never fed
        assert cache.reused == 67
    assert torch.equal(first, expected(net, ids))


def test_turns_of_a_chat_and_answers_generated_again(library: kvmmap.Library) -> None:
    net = model("llama", "kvmmap")
    talk = prompt(40)
    for turn in range(3):
        talk = join(talk, prompt(10, turn + 1))
        with library.session(net, talk) as cache:
            assert cache.reused == (0 if turn == 0 else 57 + 18 * (turn - 1))
            told, _ = generate(net, talk, cache, 8)
        assert torch.equal(told, expected(net, talk))
        before, talk = talk, told
    other = join(before[:, :-3], prompt(3, 9))  # the last question is edited: a branch
    with library.session(net, other) as cache:
        assert cache.reused == before.shape[1] - 3
        assert torch.equal(generate(net, other, cache, 8)[0], expected(net, other))
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.truncate(cache.reused - 1)
    with library.session(net, before) as cache:  # the answer is generated again
        assert cache.reused == before.shape[1] - 1
        assert torch.equal(generate(net, before, cache, 8)[0], talk)
    # The answer that was generated again is the same, so it is there once.
    assert sorted(entry.depth for entry in library.entries()) == [1, 2]


def test_another_model_or_tenant_never_matches(library: kvmmap.Library) -> None:
    net, ids = model("llama"), prompt(50)
    with library.session(net, ids) as cache:
        generate(net, ids, cache, 2)
    for other, options in (
        (model("llama", seed=1), {}),
        (model("llama", hidden_act="gelu"), {}),
        (model("llama").to(torch.bfloat16), {}),
        (net, {"salt": "tenant"}),
        (net, {"recent_window": 16}),
        (net, {"preset": "compact"}),
    ):
        with open_session(library, other, ids, **options) as cache:
            assert cache.reused == 0
            generate(other, ids, cache, 2)
        with open_session(library, other, ids, **options) as cache:
            assert cache.reused == 49
    assert len(library.namespaces()) == 7
    assert namespace_of(net).digest == namespace_of(model("llama")).digest


def test_every_generate_of_an_attached_model_has_a_session(library: kvmmap.Library) -> None:
    net, ids = model("llama", "kvmmap"), prompt(50)
    wanted = expected(net, ids)
    with attach(library, net) as attached:
        for reused in (0, 49):
            assert torch.equal(net.generate(ids, max_new_tokens=8, do_sample=False), wanted)
            assert attached.reused == reused
        longer = join(ids, prompt(20, 3))
        net.generate(input_ids=longer, max_new_tokens=2, do_sample=False)
        assert (attached.reused, attached.use.generations) == (50, 3)
        assert (attached.use.reused, attached.use.computed) == (99, 50 + 1 + 20)
        with KvmmapCache(net) as own:  # left as they are
            net.generate(ids, max_new_tokens=2, do_sample=False, **past(own))
        net.generate(ids.repeat(2, 1), max_new_tokens=2, do_sample=False)
        net.generate(ids, max_new_tokens=2, do_sample=False, num_beams=2)
        assert (attached.reused, attached.use.generations) == (0, 3)
        with pytest.raises(kvmmap.KvmmapError, match="detach"):
            attach(library, net)
    assert "generate" not in vars(net)
    attached.detach()
    with attach(library, net) as attached:
        net.generate(ids, max_new_tokens=2, do_sample=False)
        assert attached.reused == 49


def test_a_generation_that_fails_leaves_what_was_computed(library: kvmmap.Library) -> None:
    net, ids = model("llama"), prompt(50)

    def stop(*_: Any) -> Any:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError), library.session(net, ids) as cache:
        net.generate(ids, **past(cache), max_new_tokens=9, do_sample=False, logits_processor=[stop])
    with library.session(net, ids) as cache:
        assert cache.reused == 49
        assert torch.equal(generate(net, ids, cache, 8)[0], expected(net, ids))


def test_what_can_not_be_shared(library: kvmmap.Library) -> None:
    dynamic = model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(kvmmap.UnsupportedModelError, match="depends on the length"):
        library.session(dynamic, prompt(20))
    with pytest.raises(kvmmap.UnsupportedModelError):
        attach(library, dynamic)
    with pytest.raises(kvmmap.KvmmapError, match="Namespace"):
        library.session("no model", prompt(20))
    for wrong in (prompt(20).repeat(2, 1), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(kvmmap.ShapeMismatchError):
            library.session(model("llama"), wrong)
    with open_session(library, model("llama"), prompt(20), limit=5, metadata={"a": 1}) as cache:
        assert cache.metadata == {"library": cache._own.metadata["library"], "a": 1}


def test_many_threads_ask_about_one_document(library: kvmmap.Library) -> None:
    net, document = model("llama", "kvmmap"), prompt(100)
    with library.session(net, document) as cache:
        generate(net, document, cache, 1)
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def ask(number: int) -> None:
        ids = join(document, prompt(12, number + 1))
        with library.session(net, ids) as cache:
            found[number] = cache.reused, generate(net, ids, cache, 6)[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, (reused, sequence) in found.items():
        assert reused == 100
        assert torch.equal(sequence, expected(net, join(document, prompt(12, number + 1)), 6))
    assert len(found) == 4


def test_another_process_goes_on_from_it(library: kvmmap.Library) -> None:
    net, ids = model("llama"), prompt(80)
    with library.session(net, ids) as cache:
        told, _ = generate(net, ids, cache, 8)
    code = """
import sys, kvmmap
from helpers.tiny_models import generate, model, prompt
import kvmmap.integrations.transformers
net, ids = model("llama"), prompt(80)
with kvmmap.Library(sys.argv[1]) as library, library.session(net, ids) as cache:
    assert cache.reused == 79, cache.reused
    print(generate(net, ids, cache, 8)[0].tolist())
"""
    assert run_python(code, library.path).stdout.strip() == str(told.tolist())
