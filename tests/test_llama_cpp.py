"""kvmmap with the real llama.cpp: states of every type, one conversation in a file, and the cache of many."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.llama import GGUF, TEXT, greedy, llama_cpp, make, token_ids

import kvmmap
from kvmmap.formats.llama_cpp.importing import window_of
from kvmmap.integrations.llama_cpp import LlamaKvmmapCache, append, load, save, spare_sequence
from kvmmap.integrations.llama_cpp.cache import Stored

pytestmark = pytest.mark.xdist_group("llama_cpp")

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
PROMPT, MORE = 40, 12


@pytest.fixture
def model() -> Iterator[Any]:
    with spare_sequence():
        made = make(type_k=8, type_v=8, flash_attn=True)
    yield made
    made.close()


def last_logits(model: Any) -> Any:
    """Logarithms of the next token's probabilities."""
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),)).astype(np.float64)
    return found - np.logaddexp.reduce(found)


@pytest.mark.parametrize(
    ("keys", "values", "flash"),
    [
        ("f16", "f16", False),
        ("q8_0", "q8_0", True),
        ("q4_0", "q5_1", True),
        ("bf16", "bf16", True),
        ("f32", "f32", False),
    ],
)
def test_its_own_files_come_back_byte_by_byte_and_load(keys: str, values: str, flash: bool, tmp_path: Path) -> None:
    model = make(type_k=TYPES[keys], type_v=TYPES[values], flash_attn=flash)
    ids = token_ids(PROMPT)
    model.eval(ids)
    tokens = (llama_cpp.llama_token * PROMPT)(*ids)
    slot, session = tmp_path / "slot.bin", tmp_path / "session.bin"
    assert llama_cpp.llama_state_seq_save_file(model.ctx, str(slot).encode(), 0, tokens, PROMPT)
    assert llama_cpp.llama_state_save_file(model.ctx, str(session).encode(), tokens, PROMPT)
    for path in (slot, session):
        kvmmap.import_llama_cpp(path, tmp_path / "made.kvm", gguf=GGUF, overwrite=True)
        kvmmap.export_llama_cpp(tmp_path / "made.kvm", tmp_path / "again.bin", gguf=GGUF, overwrite=True)
        assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()
        with kvmmap.open(tmp_path / "made.kvm") as cache:
            assert cache.token_ids.tolist() == ids
    expected = last_logits(model)
    # What is exported after a detour over int8 rows loads, too, and continues nearly the same.
    kvmmap.import_llama_cpp(slot, tmp_path / "int8.kvm", gguf=GGUF, preset="fidelity")
    kvmmap.export_llama_cpp(tmp_path / "int8.kvm", tmp_path / "int8.bin", gguf=GGUF)
    found, out = (llama_cpp.llama_token * 512)(), (ctypes.c_size_t * 1)()
    model.reset()
    assert llama_cpp.llama_state_seq_load_file(model.ctx, str(tmp_path / "int8.bin").encode(), 0, found, 512, out)
    model._ctx.kv_cache_seq_rm(-1, PROMPT - 1, -1)
    model.n_tokens = PROMPT - 1
    model.eval(ids[-1:])
    assert np.sum(np.exp(expected) * (expected - last_logits(model))) < 0.05  # Kullback-Leibler divergence
    model.close()


def test_rows_of_rotated_types_are_those_of_plain_ones(tmp_path: Path) -> None:
    """Rotation and order are undone: what q8_0 and f16 hold of a prompt differs by q8_0's rounding."""
    rows = {}
    for name, options in (("f16", {"type_k": 1, "type_v": 1}), ("q8_0", {"type_k": 8, "type_v": 8})):
        model = make(flash_attn=True, **options)
        model.eval(token_ids(PROMPT))
        save(model, tmp_path / f"{name}.kvm")
        model.close()
        with kvmmap.open(tmp_path / f"{name}.kvm") as cache:
            rows[name] = np.stack([cache.layers[0].read_keys(0, PROMPT), cache.layers[0].read_values(0, PROMPT)])
    error = np.linalg.norm(rows["q8_0"] - rows["f16"]) / np.linalg.norm(rows["f16"])
    assert error < 0.01


def test_a_conversation_is_saved_appended_to_and_loaded(model: Any, tmp_path: Path) -> None:
    ids = token_ids(PROMPT + 2 * MORE)
    path = tmp_path / "chat.kvm"
    model.eval(ids[:PROMPT])
    assert save(model, path) == PROMPT
    for turn in (1, 2):
        model.eval(ids[PROMPT + (turn - 1) * MORE : PROMPT + turn * MORE])
        assert append(model, path) == MORE
    expected = greedy(model, ids, 4)
    with kvmmap.open(path) as cache:
        assert cache.token_ids.tolist() == ids
        assert cache.verify().sound
    plain = make(type_k=8, type_v=8, flash_attn=True)
    assert load(plain, path) == len(ids)
    assert greedy(plain, ids, 4) == expected
    # What is stored is the whole state, bit by bit, although it was taken piece by piece.
    whole = tmp_path / "whole.kvm"
    load(plain, path)
    save(plain, whole)
    with kvmmap.open(path) as first, kvmmap.open(whole) as second:
        for one, other in zip(first.layers, second.layers, strict=True):
            for left, right in zip(one.read_quantized(), other.read_quantized(), strict=True):
                np.testing.assert_array_equal(left, right)
    # Another continuation replaces what differs.
    other = [*ids[: PROMPT + MORE], *ids[:5]]
    load(plain, path)
    plain.n_tokens = PROMPT + MORE
    plain._ctx.kv_cache_seq_rm(-1, PROMPT + MORE, -1)
    plain.eval(ids[:5])
    assert append(plain, path) == 5
    with kvmmap.open(path) as cache:
        assert cache.token_ids.tolist() == other
    plain.close()


def test_other_parameters_are_refused(model: Any, tmp_path: Path) -> None:
    model.eval(token_ids(PROMPT))
    save(model, tmp_path / "chat.kvm")
    stretched = make(rope_freq_base=20000.0)
    with pytest.raises(kvmmap.ModelMismatchError, match="rope was"):
        load(stretched, tmp_path / "chat.kvm")
    stretched.close()


def complete(model: Any, ids: list[int], count: int = 6) -> list[int]:
    """A completion, as the server makes one; returns its tokens' ids."""
    text = model.create_completion(ids, max_tokens=count, temperature=0.0)["choices"][0]["text"]
    return list(model.tokenize(text.encode(), add_bos=False))


def test_completions_go_on_from_what_another_process_left(model: Any, tmp_path: Path) -> None:
    ids = token_ids(PROMPT)
    model.set_cache(LlamaKvmmapCache(tmp_path / "all", codec="native"))
    first = complete(model, ids)
    stored = model.n_tokens
    other = make(type_k=8, type_v=8, flash_attn=True)
    cache = LlamaKvmmapCache(tmp_path / "all", max_bytes=1 << 30, codec="native")
    other.set_cache(cache)
    assert ids in cache
    assert cache[ids].n_tokens == PROMPT
    evaluated = []
    original = other.eval
    other.eval = lambda tokens: (evaluated.append(len(tokens)), original(tokens))[1]
    assert complete(other, ids) == first
    assert evaluated[0] == 1  # the prompt's last token, whose logits are not stored
    # A branch shares what it has in common.
    branch = [*ids[:30], *ids[:6]]
    complete(other, branch)
    assert cache.library.match(cache._namespace, branch).length == len(branch)
    assert cache.library.stats().segments == 2
    assert isinstance(cache[ids], Stored)
    assert stored >= PROMPT
    with pytest.raises(KeyError):
        cache[[1, 2, 3]]
    state = other.save_state()  # outside of completions it is what it always was
    assert isinstance(state, llama_cpp.llama.LlamaState)
    cache[list(branch)] = state
    other.load_state(state)
    other.close()


def test_other_types_and_parameters_never_match(model: Any, tmp_path: Path) -> None:
    ids = token_ids(PROMPT)
    model.set_cache(LlamaKvmmapCache(tmp_path / "all"))
    complete(model, ids, 2)
    for options in ({"type_k": 1, "type_v": 1}, {"type_k": 8, "type_v": 8, "flash_attn": True, "rope_freq_base": 9e4}):
        other = make(**options)
        cache = LlamaKvmmapCache(tmp_path / "all")
        other.set_cache(cache)
        assert ids not in cache
        other.close()
    salted = LlamaKvmmapCache(tmp_path / "all", salt="tenant")
    model.set_cache(salted)
    assert ids not in salted


@pytest.mark.parametrize("codec", ["native", "fidelity", "compact", "auto"])
@pytest.mark.parametrize("flash", [True, False])
def test_codecs(codec: str, flash: bool, tmp_path: Path) -> None:
    """With and without flash attention, and whole states where there is no spare sequence."""
    ids = token_ids(PROMPT)
    model = make(flash_attn=flash)
    cache = LlamaKvmmapCache(tmp_path / "all", codec=codec)
    model.set_cache(cache)
    first = complete(model, ids)
    model.reset()
    model._ctx.kv_cache_clear()
    model.input_ids[:] = 0
    assert cache[ids].n_tokens == PROMPT
    again = complete(model, ids)
    assert codec != "native" or again == first
    with kvmmap.open(next((tmp_path / "all").glob("caches/*/*.kvm"))) as stored:
        kept = stored.geometry.layers[0].value_codec.name, stored.geometry.recent_window
    values = {"native": "f16", "fidelity": "int8-rotated", "compact": "int4-rotated", "auto": "int6-rotated"}
    assert kept == (values[codec], window_of(codec)[0] if codec != "auto" else 0)
    model.close()


def test_quantised_rows_are_kept_as_they_are(model: Any, tmp_path: Path) -> None:
    model.set_cache(LlamaKvmmapCache(tmp_path / "all"))
    complete(model, token_ids(PROMPT))
    with kvmmap.open(next((tmp_path / "all").glob("caches/*/*.kvm"))) as stored:
        assert stored.geometry.layers[0].value_codec.name.startswith("q8_0")


def test_a_cache_must_be_set_with_set_cache(tmp_path: Path) -> None:
    cache = LlamaKvmmapCache(tmp_path / "all")
    with pytest.raises(KeyError):
        cache[[1, 2]]
    assert cache.cache_size == 0
    cache.close()


KILLED = """
import os, signal, sys
from helpers.llama import make, token_ids
from kvmmap.integrations.llama_cpp import LlamaKvmmapCache, spare_sequence
from kvmmap.storage.posix import PosixFile

path, moment, count, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
with spare_sequence():
    model = make(type_k=8, type_v=8, flash_attn=True)
cache = LlamaKvmmapCache(path)
model.set_cache(cache)
ids = token_ids(200)

def die_at(kind, name):
    original, left = getattr(kind, name), [count]
    def method(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    setattr(kind, name, method)

for turn in range(first, 9):
    if turn == first + 2:
        if moment == "hit":
            cache[ids[: 20 * turn]]
            os.kill(os.getpid(), signal.SIGKILL)
        if moment in ("write", "sync"):
            die_at(PosixFile, moment)
        if moment == "between":
            os.kill(os.getpid(), signal.SIGKILL)
    model.create_completion(ids[: 20 * turn], max_tokens=1, temperature=0.0)
    print(turn, flush=True)
"""


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("between", 0),
        ("hit", 0),
        *(("write", count) for count in (1, 2, 7, 30, 31, 33)),  # 30 layers, and what names them
        *(("sync", count) for count in (1, 2, 3)),
    ],
)
def test_a_kill_loses_the_turn_in_hand_alone(moment: str, count: int, tmp_path: Path) -> None:
    """Killed between stores, at each kind of moment within one, and right after a hit; twice, one on the other."""
    done = 0
    for first in (1, 4):
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, tmp_path / "all", moment, str(count), str(first)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        turns = [int(line) for line in killed.stdout.split()]
        assert turns[:2] == [first, first + 1]
        done = turns[-1]
        if first == 1:
            assert stored(tmp_path / "all", 20 * done) >= 20 * done
    model = make(type_k=8, type_v=8, flash_attn=True)
    cache = LlamaKvmmapCache(tmp_path / "all")
    model.set_cache(cache)
    assert cache[token_ids(20 * done)].n_tokens == 20 * done
    for segment in cache.library.entries():
        with kvmmap.open(segment.path) as found:
            assert found.verify().sound
    assert len(complete(model, token_ids(20 * done), 2)) >= 1
    model.close()


def stored(path: Path, count: int) -> int:
    """How many of the first tokens a library has, in whatever namespace."""
    with kvmmap.Library(path, create=False) as library:
        return max(library.match(namespace.digest, token_ids(count)).length for namespace in library.namespaces())


def test_a_cache_serves_one_llama(model: Any, tmp_path: Path) -> None:
    """Another one needs a cache of its own, which may have the same directory."""
    cache = LlamaKvmmapCache(tmp_path / "all")
    model.set_cache(cache)
    other = make(type_k=8, type_v=8, flash_attn=True)
    with pytest.raises(kvmmap.KvmmapError, match="serves another Llama"):
        other.set_cache(cache)
    ids = token_ids(PROMPT)
    first = complete(model, ids)
    other.set_cache(LlamaKvmmapCache(tmp_path / "all"))
    assert complete(other, ids) == first
    model.set_cache(None)
    other.set_cache(cache)
    assert complete(other, ids) == first
    other.close()


def test_states_move_between_flash_attention_and_none(tmp_path: Path) -> None:
    ids = token_ids(PROMPT)
    answers = {}
    for flash in (True, False):
        model = make(flash_attn=flash)
        model.set_cache(LlamaKvmmapCache(tmp_path / "all", codec="native"))
        found = model.cache[ids].n_tokens if ids in model.cache else 0
        complete(model, ids, 4)
        answers[flash] = found
        save(model, tmp_path / f"{flash}.kvm")
        model.close()
    assert answers == {True: 0, False: PROMPT}
    last = PROMPT - 1  # is computed again, for its logits
    with kvmmap.open(tmp_path / "True.kvm") as one, kvmmap.open(tmp_path / "False.kvm") as other:
        np.testing.assert_array_equal(one.layers[7].read_values(0, last), other.layers[7].read_values(0, last))


@pytest.mark.parametrize(("keys", "values"), [("q8_0", "f16"), ("q4_0", "bf16"), ("f16", "q5_0")])
def test_keys_or_values_alone_are_quantised(keys: str, values: str, tmp_path: Path) -> None:
    ids = token_ids(PROMPT)
    options = {"type_k": TYPES[keys], "type_v": TYPES[values], "flash_attn": True}
    answers = []
    for reused in (0, PROMPT):
        model = make(**options)
        model.set_cache(LlamaKvmmapCache(tmp_path / "all"))
        assert (model.cache[ids].n_tokens if ids in model.cache else 0) == reused
        answers.append(complete(model, ids, 4))
        model.close()
    assert answers[0] == answers[1]
    with kvmmap.open(next((tmp_path / "all").glob("caches/*/*.kvm"))) as stored:
        codecs = stored.geometry.layers[0]
        assert codecs.key_codec.name.startswith(keys)
        assert codecs.value_codec.name.startswith(values)


def test_a_smaller_context_refuses_a_longer_conversation(model: Any, tmp_path: Path) -> None:
    model.eval(token_ids(300))
    save(model, tmp_path / "chat.kvm")
    small = make(n_ctx=256, type_k=8, type_v=8, flash_attn=True)
    small.eval(token_ids(10))
    with pytest.raises(kvmmap.CapacityExceededError, match="larger n_ctx"):
        load(small, tmp_path / "chat.kvm")
    assert small.n_tokens == 10
    small.close()


def test_what_an_interrupted_evaluation_left_is_not_stored(model: Any, tmp_path: Path) -> None:
    """The context holds positions that the `Llama` does not count, as after an error or Ctrl-C in `eval`."""
    ids = token_ids(PROMPT + MORE)
    model.eval(ids)
    model.n_tokens = PROMPT
    assert save(model, tmp_path / "chat.kvm") == PROMPT
    model.eval(ids[PROMPT:])
    model.n_tokens = PROMPT + 5
    assert append(model, tmp_path / "chat.kvm") == 5
    with kvmmap.open(tmp_path / "chat.kvm") as cache:
        assert cache.token_ids.tolist() == ids[: PROMPT + 5]
    model.reset()
    assert append(model, tmp_path / "chat.kvm") == 0  # nothing is computed, so the file holds nothing either
    with kvmmap.open(tmp_path / "chat.kvm") as cache:
        assert cache.seq_len == 0


def test_log_probabilities_of_a_restored_prompt_are_computed(tmp_path: Path) -> None:
    """`echo` with `logprobs` asks for those of positions whose logits are not stored."""
    text = TEXT[:150]
    asked = {"max_tokens": 2, "temperature": 0.0, "logprobs": 1, "echo": True}
    found = []
    for _ in range(2):
        model = make(logits_all=True, flash_attn=True)
        model.set_cache(LlamaKvmmapCache(tmp_path / "all", codec="native"))
        ids = model.tokenize(text.encode())
        if found:
            assert ids in model.cache
            complete(model, ids, 2)  # the context holds restored positions now
            assert model.n_tokens > len(ids)
        for _ in range(2):
            answer = model.create_completion(text, **asked)["choices"][0]["logprobs"]["token_logprobs"]
            found.append(answer)
        model.close()
    for answer in found[1:]:
        np.testing.assert_allclose(answer[1:], found[0][1:], atol=1e-3)


def test_an_adapter_makes_other_keys(tmp_path: Path) -> None:
    """One that is given to `Llama`, at whatever scale."""
    adapter = write_adapter(tmp_path / "adapter.gguf")
    ids = token_ids(PROMPT)
    plain = make(flash_attn=True)
    plain.set_cache(LlamaKvmmapCache(tmp_path / "all"))
    complete(plain, ids, 2)
    plain.close()
    for scale in (1.0, 0.5):
        model = make(flash_attn=True, lora_path=str(adapter), lora_scale=scale)
        model.set_cache(LlamaKvmmapCache(tmp_path / "all"))
        assert ids not in model.cache
        complete(model, ids, 2)
        assert ids in model.cache
        model.close()


def write_adapter(path: Path) -> Path:
    """A LoRA adapter of rank 2 for the keys of one layer."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    random = np.random.default_rng(1)
    for part, shape in (("a", (2, 576)), ("b", (192, 2))):
        writer.add_tensor(f"blk.3.attn_k.weight.lora_{part}", random.standard_normal(shape).astype(np.float32) * 0.02)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
