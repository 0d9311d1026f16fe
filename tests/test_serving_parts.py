"""The parts of the chat server of the examples: what an answer does with a library, and its text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from helpers.tiny_models import model, save_llama

import kvmmap

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from serving.answer import Answer, Choice
from serving.text import Text

pytestmark = pytest.mark.torch


def steps(answer: Answer, most: int | None = None) -> list[int]:
    """Return the tokens of an answer; stop wanting it after so many."""
    return list(answer.steps(lambda: most is None or len(answer.tokens) < most))


def test_a_library_without_room_costs_no_answer(tmp_path: Path) -> None:
    net = model("llama", "kvmmap", max_position_embeddings=2048)
    prompt = [1 + number % 90 for number in range(700)]
    options: dict[str, Any] = {"most": 9, "ends": frozenset(), "choice": Choice(temperature=0)}
    with kvmmap.Library(tmp_path / "roomy") as library:
        whole = Answer(library, net, prompt, **options)
        wanted = steps(whole)
        (segment,) = library.entries()
        assert (whole.reused, whole.stored, segment.stop) == (0, True, 708)
        aborted = Answer(library, net, prompt, **options)
        assert steps(aborted, 3) == wanted[:3]
        assert (aborted.reused, aborted.complete) == (699, False)
    for room in (50_000, segment.bytes // 2, segment.bytes - 1000):  # none, for a part of the prompt, for most
        with kvmmap.Library(tmp_path / f"{room}", room) as library:
            answer = Answer(library, net, prompt, **options)
            assert steps(answer) == wanted
            assert (answer.reused, answer.stored) == (0, False)
            assert library.stats().bytes <= room
            assert not library.check().broken


def test_ends_and_choices(tmp_path: Path) -> None:
    net = model("llama", "kvmmap")
    prompt = list(range(1, 40))
    with kvmmap.Library(tmp_path / "library") as library:

        def told(ends: frozenset[int] = frozenset(), most: int = 12, **choice: Any) -> Answer:
            answer = Answer(library, net, prompt, most=most, ends=ends, choice=Choice(**choice))
            steps(answer)
            return answer

        greedy = told(temperature=0).tokens
        ended = told(frozenset(greedy[3:4]), temperature=0)
        assert (ended.tokens, ended.ended) == (greedy[: greedy.index(greedy[3]) + 1], True)
        assert told(top_p=1e-6, seed=1).tokens == greedy  # only the most likely one is left
        assert told(seed=1).tokens == told(seed=1).tokens
        assert told(seed=1).tokens != told(seed=2).tokens
        assert told(seed=-1).tokens
        # Each token that was chosen is out of the question afterwards.
        assert len(set(told(temperature=0, presence_penalty=1e6).tokens)) == 12


def test_text_is_held_back_where_a_stop_may_begin(tmp_path: Path) -> None:
    save_llama(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path)

    def pieces(text: str, *stops: str) -> tuple[list[str], bool]:
        made = Text(tokenizer, stops)
        found = [made.add(token) for token in tokenizer(text).input_ids]
        return [*found, made.end()], made.stopped

    assert pieces("abc") == (["a", "b", "c", ""], False)
    assert pieces("aé") == (["a", "", "é", ""], False)  # two bytes, one character
    assert pieces("ab STOP cd", " STOP") == (["a", "b", "", "", "", "", "", "", "", "", ""], True)
    assert pieces("ab STO", " STOP") == (["a", "b", "", "", "", "", " STO"], False)
    assert pieces("aab", "ab", "aa") == (["", "", "", ""], True)
    assert pieces("xaxb", "xb") == (["", "xa", "", "", ""], True)
