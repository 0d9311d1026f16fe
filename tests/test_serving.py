"""The chat server of the examples, as a real process, asked by OpenAI's client and looked at in a real browser."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.browser import CONTRAST, Browser
from helpers.serving import EXAMPLES, ChatServer, wait_for
from helpers.tiny_models import save_llama
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache

pytestmark = [pytest.mark.torch, pytest.mark.long, pytest.mark.xdist_group("browser")]

NAME = "tiny"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 12}
CONTEXT = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def started(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ChatServer]]:
    """The server that runs at present, if any; it is killed in the end."""
    running: list[ChatServer] = []
    yield running
    for server in running:
        server.kill()


@pytest.fixture
def server(started: list[ChatServer], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatServer:
    """A server of two processes, one for all tests; a test that has ended it gets the next one another."""
    if not started or started[0].process.poll() is not None:
        place = tmp_path_factory.mktemp("server")
        options = ("--model", folder, "--name", NAME, "--workers", 2, "--waiting", 2, "--show-text")
        limits = ("--max-body", 100_000, "--grace", 60)
        started[:] = [ChatServer(place / "library", place / "log", *options, *limits)]
    return started[0]


def ask(server: ChatServer, *contents: str, **options: Any) -> ChatCompletion:
    """Have a conversation, on a connection of its own."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(contents)]
    with server.client() as client:
        return client.chat.completions.create(messages=messages, **GREEDY | options)


def cached(answer: ChatCompletion | Completion) -> int:
    """Return the tokens of the prompt that were not computed."""
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def template(text: str) -> str:
    """What the model is given for a message; each byte is a token."""
    return f"user:{text}\nassistant:"


def check_library(server: ChatServer) -> None:
    """Assert that nothing is being written, and that everything that is stored is sound."""
    with kvmmap.Library(server.library) as library:
        report = library.check()
        assert not report.broken
        assert not report.busy
        assert all(report.sound for report in library.verify())


# Answers


def test_models_are_listed(server: ChatServer) -> None:
    with server.client() as client:
        assert [one.id for one in client.models.list()] == [NAME]
        assert client.models.retrieve(NAME).owned_by == "kvmmap"
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.models.retrieve("other/model")
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model="other", prompt="a")
    assert caught.value.code == "model_not_found"


def test_a_prompt_is_computed_once_and_answered_alike(server: ChatServer) -> None:
    text = "Tell me of caches. " * 30
    first = ask(server, text)
    second = ask(server, text)
    length = len(template(text))
    assert [(one.usage.prompt_tokens, cached(one)) for one in (first, second) if one.usage] == [
        (length, 0),
        (length, length - 1),
    ]
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].finish_reason == "length"
    assert first.id != second.id
    longer = ask(server, text[:300] + " And now to something else.")
    assert cached(longer) == len("user:") + 300
    with kvmmap.Library(server.library) as library:
        stats = library.stats()
        (namespace,) = library.namespaces()
        ids = kvmmap_ids(template(text))
        assert library.match(namespace.digest, ids).length == length
    shown = server.status()["stats"]
    assert (shown["tokens_reused"], shown["hits"]) == (stats.tokens_reused, stats.hits)
    assert stats.tokens_reused >= length - 1 + 305


def kvmmap_ids(text: str) -> list[int]:
    """Token ids of plain English text: bytes in the order of the letters that byte-level tokenizers write for them."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {" ": "Ġ", "\n": "Ċ"}
    return [alphabet.index(letters.get(letter, letter)) for letter in text]


def test_the_answers_are_those_of_the_model(server: ChatServer, folder: Path) -> None:
    import torch
    import transformers as tf

    text = "What does the model itself say? " * 10
    net = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="kvmmap").eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([kvmmap_ids(template(text))])
    assert ids.tolist() == [tokenizer(template(text)).input_ids]
    cache = KvmmapCache(net)
    told = net.generate(ids, **cache.argument, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    whole = tokenizer.decode(told)
    for _ in range(2):  # computed, and reused
        found = ask(server, text).choices[0].message.content
        assert found is not None
        assert whole.replace("\ufffd", "") == found.replace("\ufffd", "")
    with server.client() as client:
        ends = client.completions.create(prompt=ids[0].tolist(), **GREEDY)
        one_of = client.completions.create(prompt=[template(text)], **GREEDY)
    assert ends.choices[0].text == one_of.choices[0].text == found
    assert cached(ends) == ids.shape[1] - 1


def test_streams_say_the_same(server: ChatServer) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "Stream this. " * 5}]}]
    whole = ask(server, "Stream this. " * 5)
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
            )
        )
        texts = list(client.completions.create(prompt=template("Stream this. " * 5), stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert said == whole.choices[0].message.content == "".join(chunk.choices[0].text for chunk in texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(template("Stream this. " * 5)) - 1
    for chunk in chunks:  # the client does not check what it gets
        ChatCompletionChunk.model_validate(chunk.model_dump())
    for kind, answer in ((ChatCompletion, whole), (Completion, texts[-1])):
        kind.model_validate(answer.model_dump())


def test_a_conversation_goes_on(server: ChatServer) -> None:
    talk = ["How are you? " * 20]
    before = 0
    for turn in range(3):
        answer = ask(server, *talk, temperature=1, seed=turn)
        assert cached(answer) >= before
        assert answer.usage is not None
        before = answer.usage.prompt_tokens
        talk += [answer.choices[0].message.content or "?", f"And {turn}?"]


def test_seeds_and_stops(server: ChatServer) -> None:
    def told(**options: Any) -> Any:
        return ask(server, "Say something odd.", **{"temperature": 2} | options).choices[0]

    assert told(seed=1).message == told(seed=1).message
    assert len({told(seed=seed).message.content for seed in range(4)}) > 1
    # The bias leaves the model two letters to write.
    a, b = kvmmap_ids("ab")
    only = {str(a): 100, str(b): 99.5}
    text = told(seed=3, logit_bias=only, max_tokens=40).message.content
    assert set(text) == {"a", "b"}
    assert len(text) == 40
    place = text.index("ba")
    stopped = told(seed=3, logit_bias=only, max_tokens=40, stop=["zz", "ba"])
    assert (stopped.message.content, stopped.finish_reason) == (text[:place], "stop")
    assert told(logit_bias={str(a): 100}, frequency_penalty=2, presence_penalty=2).message.content == "a" * 12


# Several at a time


def test_all_processes_share_the_library(server: ChatServer) -> None:
    text = "Who has computed this? " * 20
    workers = set()

    def answered() -> bool:
        _, answer, headers = server.call(
            "v1/chat/completions", GREEDY | {"messages": [{"role": "user", "content": text}]}
        )
        details = answer["usage"]["prompt_tokens_details"]
        assert (details["cached_tokens"] == len(template(text)) - 1) == bool(workers)
        workers.add(headers["x-worker"])
        return len(workers) == 2

    wait_for(answered)
    assert {str(one["worker"]) for one in server.status()["requests"]} >= workers


def test_many_requests_of_one_conversation(server: ChatServer) -> None:
    texts = ["One conversation. " * 15 + f"Branch {number % 3}." for number in range(9)]
    with ThreadPoolExecutor(4) as threads, server.client(max_retries=20) as client:
        found = list(
            threads.map(
                lambda text: client.chat.completions.create(messages=[{"role": "user", "content": text}], **GREEDY),
                texts,
            )
        )
    assert len({(number % 3, one.choices[0].message.content) for number, one in enumerate(found)}) == 3
    assert sum(cached(one) for one in found) > 0
    check_library(server)


def test_whoever_goes_away_stops_the_answer(server: ChatServer) -> None:
    text = "Never mind. " * 40
    messages: Any = [{"role": "user", "content": text}]
    with server.client() as client:
        stream = client.chat.completions.create(messages=messages, stream=True, **GREEDY | {"max_tokens": 1500})
        id = [next(stream).id for _ in range(3)][-1]
        stream.close()
    ended = wait_for(lambda: (one := server.request(id))["state"] == "aborted" and one)
    assert 0 < ended["generated"] < 1500
    hasty = openai.Timeout(60, read=0.3)
    with server.client(timeout=hasty) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(prompt="Never", **GREEDY | {"max_tokens": 2000, "seed": 1})
    wait_for(lambda: [one["state"] for one in server.status()["requests"]][:2] == ["aborted"] * 2)
    again = ask(server, text)
    assert cached(again) == len(template(text)) - 1  # what was computed is there
    check_library(server)


def test_more_than_can_wait_is_refused(server: ChatServer) -> None:
    with server.client() as client, contextlib.ExitStack() as streams:

        def one_more(number: int) -> None:
            prompt = f"{number}: wait for me"
            answer = client.completions.create(prompt=prompt, stream=True, **GREEDY | {"max_tokens": 1900})
            streams.enter_context(answer)

        with pytest.raises(openai.RateLimitError) as caught:
            list(map(one_more, range(7)))  # each of two processes answers one, and lets two wait
        assert caught.value.code == "overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
    wait_for(lambda: {one["state"] for one in server.status()["requests"]} <= {"done", "aborted"})
    check_library(server)


# What can't be answered

MESSAGES = [{"role": "user", "content": "a"}]
CHAT = "v1/chat/completions"
BAD: list[tuple[str, Any, int, str | None, str | None]] = [
    (CHAT, b"{", 400, "invalid_json", None),
    (CHAT, {"model": NAME}, 400, "missing_required_parameter", "messages"),
    (CHAT, {"messages": MESSAGES}, 400, "missing_required_parameter", "model"),
    (CHAT, {"model": NAME, "messages": []}, 400, "invalid_value", "messages"),
    (CHAT, {"model": NAME, "messages": [{"role": "king", "content": "a"}]}, 400, "invalid_value", "messages.0.role"),
    (CHAT, {"model": NAME, "messages": [{"role": "user", "content": 3}]}, 400, "invalid_value", "messages.0.content"),
    (
        CHAT,
        {"model": NAME, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "invalid_value",
        "messages.0.content",
    ),
    (CHAT, {"model": NAME, "messages": MESSAGES, "temperature": 3}, 400, "invalid_value", "temperature"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "n": 2}, 400, "invalid_value", "n"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "logprobs": True}, 400, "invalid_value", "logprobs"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "tools": [{}]}, 400, "invalid_value", "tools"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "stop": [""]}, 400, "invalid_value", "stop.0"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "top_kk": 1}, 400, "unknown_parameter", "top_kk"),
    (CHAT, {"model": NAME, "messages": MESSAGES, "logit_bias": {"256": 1}}, 400, None, "messages"),
    (CHAT, {"model": "other", "messages": MESSAGES}, 404, "model_not_found", "model"),
    (
        CHAT,
        {"model": NAME, "messages": MESSAGES, "max_tokens": CONTEXT},
        400,
        "context_length_exceeded",
        "messages",
    ),
    ("v1/completions", {"model": NAME, "prompt": ""}, 400, None, "prompt"),
    ("v1/completions", {"model": NAME, "prompt": []}, 400, None, "prompt"),
    ("v1/completions", {"model": NAME, "prompt": ["a", "b"]}, 400, None, "prompt"),
    ("v1/completions", {"model": NAME, "prompt": [1, 256]}, 400, None, "prompt"),
    ("v1/completions", {"model": NAME, "prompt": [-1]}, 400, "invalid_value", None),
    ("v1/completions", {"model": NAME, "prompt": "a" * CONTEXT}, 400, "context_length_exceeded", "prompt"),
    ("v1/completions", {"model": NAME, "prompt": "a" * 100_000}, 413, "request_too_large", None),
    ("v1/embeddings", {"model": NAME, "input": "a"}, 404, "unknown_url", None),
    ("v1/completions", None, 404, "unknown_url", None),
]


def test_errors_are_in_openais_form(server: ChatServer) -> None:
    before = server.status()["requests"]
    for path, body, status, code, param in BAD:
        found, answer, _ = server.call(path, body)
        error = answer["error"]
        assert (found, error["code"]) == (status, code), (body, answer)
        assert error["type"] == "invalid_request_error"
        assert error["message"]
        assert param is None or (error["param"] or "").startswith(param), (body, answer)
    status, answer, _ = server.call(
        CHAT, json.dumps(GREEDY | {"messages": MESSAGES}).encode(), **{"content-type": "text/plain"}
    )
    assert (status, answer["error"]["code"]) == (415, "invalid_content_type")
    assert server.status()["requests"] == before  # nothing was computed


def test_what_changes_nothing_is_ignored(server: ChatServer) -> None:
    with server.client() as client:
        client.chat.completions.create(
            messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "a", "name": "b"}],
            model=NAME,
            max_completion_tokens=2,
            user="me",
            store=False,
            metadata={"a": "b"},
            tools=[],
            response_format={"type": "text"},
            n=1,
        )


# The page

LIVE = "document.getElementById('state').textContent == 'live'"
SEGMENTS = "document.querySelectorAll('.tree li').length"
REQUESTS = "document.querySelectorAll('#requests tr').length"


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_the_page_shows_the_library_live(
    server: ChatServer, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    text = f"{width} pixels are shown. " * 20
    ask(server, text)
    browser.load(f"{server.url}/", width, dark=dark, phone=width < 600)
    wait_for(lambda: browser.ask(LIVE))
    status = server.status()
    assert browser.ask(SEGMENTS) == len(status["segments"]) > 0
    shown = browser.ask("document.body.innerText")
    for words in (f"{status['stats']['tokens_reused']:,}", "hits", "pixels are", "no budget", "done"):
        assert words in shown, words
    reused = status["stats"]["tokens_reused"]
    ask(server, text + "More.")  # a child of the segment, which the page shows without being loaded again
    now = f"{reused + len('user:') + len(text):,}"
    wait_for(lambda: now in browser.ask("document.getElementById('tiles').innerText"))
    wait_for(lambda: browser.ask(SEGMENTS) == len(status["segments"]) + 1)
    assert browser.ask("document.querySelectorAll('.tree li li').length") > 0
    assert browser.ask("document.documentElement.scrollWidth") <= width
    contrast = browser.ask(CONTRAST)
    assert contrast["poor"] == []
    assert contrast["seen"] > 40
    assert browser.complaints == []
    assert {url for url in browser.requests if not url.startswith(("data:", server.url))} == set()
    browser.picture(tmp_path / "page.png")
    browser.load("about:blank")


# The end of processes


def test_a_process_that_dies_and_the_end(server: ChatServer) -> None:
    text = "Nothing is lost. " * 30
    ask(server, text)
    messages: Any = [{"role": "user", "content": text}]
    with server.client() as client:
        stream = client.chat.completions.create(messages=messages, stream=True, **GREEDY | {"max_tokens": 1400})
        id = next(stream).id
        wait_for(lambda: server.request(id)["state"] == "answering")
        os.kill(server.request(id)["worker"], signal.SIGKILL)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    wait_for(lambda: server.request(id)["state"] == "failed")
    assert cached(ask(server, text)) == len(template(text)) - 1  # the other one answers

    with server.client() as client:
        stream = client.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY | {"max_tokens": 60}
        )
        next(stream)
        server.process.terminate()
        last = list(stream)[-1]  # what has begun is finished
    assert last.usage is not None
    assert last.usage.completion_tokens == 60
    assert server.process.wait(60) == 0
    check_library(server)
    with kvmmap.Library(server.library) as library:
        (namespace,) = library.namespaces()
        assert library.match(namespace.digest, kvmmap_ids(template(text))).length == len(template(text))
    assert "Traceback" not in server.log.read_text()


def test_a_folder_that_is_no_library_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no library")
    command = [sys.executable, "-W", "error", "-m", "serving", str(tmp_path)]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is not a kvmmap library" in done.stderr
    assert done.stderr.count("\n") == 1
