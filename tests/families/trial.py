"""One family's trial: what its small model does through a KvmmapCache, beside transformers' cache of the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.tiny_models import RoundedCache
from transformers import DynamicCache, EncoderDecoderCache

from families.batches import check_batch
from families.configs import TEXT, VOCABULARY, config, model
from families.patches import PREFIXED, WITH_IMAGE, WITHOUT, inputs_besides, with_image
from families.resident import check_resident
from families.sources import arguments, pass_arguments
from kvmmap.errors import UnsupportedModelError
from kvmmap.integrations.transformers import ATTENTION, KvmmapBatch, KvmmapCache, KvmmapLayer, reuse
from kvmmap.integrations.transformers.behavior import changed_settings
from kvmmap.integrations.transformers.dispatch import attends
from kvmmap.integrations.transformers.models import text_config
from kvmmap.integrations.transformers.own_caches import become_own
from kvmmap.integrations.transformers.sources import has_source
from kvmmap.integrations.transformers.states import SINGLE_TOKENS
from kvmmap.integrations.transformers.versions import argument_of
from kvmmap.integrations.transformers.weights import body_of

BOUND = 0.02
"""How far logits may be off, in standard deviations of them: sums in another order push numbers over a code's edge."""

ALIVE = 5 * BOUND
"""How far they must be off at least with other tokens in the cache; else the model says nothing of the cache."""

_NEVER = [0, *range(TEXT, VOCABULARY)]


@dataclass
class Outcome:
    """What a trial showed."""

    supported: bool = False
    """A cache can be made for the family, and everything through it is right."""

    in_place: bool = False
    """It attends over the coded rows in place."""

    why: str = ""
    """Why it is not supported, or not in place; without the type's name."""

    left_out: dict[str, str] = field(default_factory=dict)
    """Stages in which transformers fails with its own cache, and its error."""

    def plain(self) -> dict[str, Any]:
        """As JSON has it: no empty fields."""
        return {name: value for name, value in vars(self).items() if value or isinstance(value, bool)}


class WrongError(AssertionError):
    """A result that is not the reference's, or an error that is not kvmmap's own."""


def trial(kind: str, folder: Path) -> Outcome:
    """Try a type.

    Args:
        kind: as AutoModelForCausalLM or AutoModelForImageTextToText has it.
        folder: an empty one.

    Raises:
        WrongError: something is not as it must be.
    """
    try:
        made = config(kind)
        net = model(made, kind)
    except Exception as error:
        return Outcome(why=f"not built: {WITHOUT.get(kind) or _first_line(error)}")
    try:
        KvmmapCache(net)
    except UnsupportedModelError as error:
        _check_refusals(kind, net, folder)
        return Outcome(why=_first_line(error))
    references = _references(net)
    outcome = Outcome(left_out={stage: _first_line(ref) for stage, ref in references.items() if _failed(ref)})
    if _failed(references["generation"]):
        outcome.why = f"not tested: {WITHOUT.get(kind) or outcome.left_out['generation']}"
        outcome.left_out.clear()
        return outcome
    _check_alive(kind, net, references["generation"])
    outcome.supported = True
    _check_stages(kind, net, references, folder / "native")
    if changed := changed_settings(body_of(net)):
        raise WrongError(f"{kind}: passes changed the model: {changed}")
    if has_states(net):
        check_states_refusals(kind, net)
    if has_source(net.config):
        check_source(kind, net, references["prefix"], folder / "source")
    with _own_errors(kind, "device-resident"):
        if wrong := check_resident(net, prompt(30), folder, BOUND):
            raise WrongError(f"{kind}: device-resident: {wrong}")
    _check_batch(kind, net)
    net.set_attn_implementation(ATTENTION)
    if net.config.get_text_config(decoder=True)._attn_implementation != ATTENTION:
        try:  # transformers says no to a change, and may say yes at first
            net = model(made, kind, attention=ATTENTION)
        except Exception:
            outcome.why = "its layers compute attention themselves"
            return outcome
    with _reads() as count:
        _check_stages(kind, net, references, folder / "kvmmap")
        outcome.in_place = not next(count) and not _states_alone(net)
    _check_batch(kind, net)
    outcome.why = "" if outcome.in_place else _why_tensors(net)
    return outcome


def _first_line(error: Any) -> str:
    """An error without what differs from one machine to the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = lines[-1] if len(lines) > 1 and lines[-1].startswith("ValueError:") else lines[0] if lines else ""
    return shown if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {shown}"[:160]


def _failed(reference: Any) -> bool:
    return isinstance(reference, Exception)


def _states_alone(net: Any) -> bool:
    return has_states(net) and not any(isinstance(layer, KvmmapLayer) for layer in KvmmapCache(net, 8).layers)


def _why_tensors(net: Any) -> str:
    if _states_alone(net):
        return "it keeps states alone, and no rows to attend over"
    if any(isinstance(layer, KvmmapLayer) and layer.kind.latent for layer in KvmmapCache(net).layers):
        return "its rows are latents, which become keys and values after the cache"
    how = attends(net.config.get_text_config(decoder=True))
    if how == "own":
        return "its layers compute attention themselves"
    if how == "tensors":
        return "its layers use keys and values besides attending over them"
    return "its masks are made by a function of its own"


# Ways of generating


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Random ids of text, [1, length]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, TEXT, (1, length)))


BRANCH = torch.cat([prompt(30)[:, :20], prompt(9, seed=1)], 1)
"""A prompt that goes another way after 20 tokens."""


def past(net: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument, by the name that a model has for it."""
    return {argument_of(net): cache}


def generate(
    net: Any, ids: torch.Tensor, cache: Any, count: int, seed: int = 0, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and every step's logits: [1, n + count], [count, vocabulary]; `seed` chooses a source."""
    ids = with_image(net.config, ids)
    given = arguments(net.config, ids, seed) | inputs_besides(net.config.model_type, ids)
    mask = {} if net.config.is_encoder_decoder else {"attention_mask": torch.ones_like(given["input_ids"])}
    result = net.generate(
        **given,
        **mask,
        **past(net, cache),
        max_new_tokens=count,
        do_sample=False,
        suppress_tokens=_NEVER,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
        **more,
    )
    return result.sequences, torch.cat([step.reshape(1, -1) for step in result.logits])


WITHOUT_STATES = ("prompt lookup",)
"""What is refused for models with states."""


def has_states(net: Any) -> bool:
    """Whether a model keeps states besides rows, or in place of them."""
    return bool(KvmmapCache(net, 8).checkpoint_bytes)


def takes_one(net: Any) -> bool:
    """Whether a model drops its states when a pass of several tokens continues a sequence."""
    return net.config.get_text_config(decoder=True).model_type in SINGLE_TOKENS


def check_states_refusals(kind: str, net: Any) -> None:
    """What can't be done with states is refused by kvmmap's own error."""
    cache = KvmmapCache(net)
    net(input_ids=prompt(5), use_cache=True, **past(net, cache))
    refused: dict[str, Callable[[], Any]] = {
        "crop": lambda: cache.crop(-1),
        "config": lambda: KvmmapCache(net.config),
    }
    if takes_one(net):
        refused["several tokens"] = lambda: net(input_ids=prompt(2), use_cache=True, **past(net, cache))
    for what, act in refused.items():
        try:
            act()
        except UnsupportedModelError:
            continue
        raise WrongError(f"{kind}: {what} is not refused")


def check_source(kind: str, net: Any, prefix: Any, folder: Path) -> None:
    """What is stored belongs to one source: another one reuses nothing, and is refused where it would be served."""
    path = folder.with_suffix(".kvm")
    with KvmmapCache.create(path, net) as cache:
        generate(net, prompt(30), cache, 2)
    other = arguments(net.config, BRANCH, seed=1)
    with KvmmapCache.open(path, net) as cache:
        try:
            generate(net, torch.cat([prompt(30), BRANCH[:, -3:]], 1), cache, 2, seed=1)
        except UnsupportedModelError:
            pass
        else:
            raise WrongError(f"{kind}: rows of one source are served with another")
        if cache.seq_len != 31:
            raise WrongError(f"{kind}: a refusal leaves {cache.seq_len} positions of 31")
        expected = generate(net, BRANCH, _reference(net), 3, seed=1)
        if (off := gap(expected, prefix)) <= ALIVE:
            raise WrongError(f"{kind}: another source changes logits by {off:.3f} standard deviations only")
        with _own_errors(kind, "another source"):
            if reuse(cache, **other) != 0:
                raise WrongError(f"{kind}: positions of one source are reused with another")
            _check(kind, "another source", generate(net, BRANCH, cache, 3, seed=1), expected)
    with KvmmapCache.open(path, net, "a") as cache, _own_errors(kind, "the same source"):
        kept = reuse(cache, **arguments(net.config, BRANCH))
        if kept != (20 if net.config.model_type not in PREFIXED else 0):
            raise WrongError(f"{kind}: {kept} positions of the same source are reused")
        _check(kind, "the same source", generate(net, BRANCH, cache, 3), prefix)
    for make in (
        lambda: KvmmapCache(net.config),
        lambda: KvmmapCache.open(path),
        lambda: KvmmapCache.open(path, net.config),
    ):
        try:
            make()
        except UnsupportedModelError:
            continue
        raise WrongError(f"{kind}: a cache without its model, which sees the source, is not refused")


STAGES: dict[str, Callable[[Any, Any], Any]] = {
    "generation": lambda net, cache: generate(net, prompt(30), cache, 8),
    "chunked prefill": lambda net, cache: generate(net, prompt(30), cache, 4, prefill_chunk_size=7),
    "prompt lookup": lambda net, cache: generate(net, prompt(14).repeat(1, 2), cache, 8, prompt_lookup_num_tokens=3),
    "prefix": lambda net, cache: generate(net, BRANCH, cache, 3),
    "coded rows": lambda net, cache: generate(net, prompt(30), cache, 4),
    "recent window": lambda net, cache: one_by_one(net, prompt(24), cache, 8),
}
"""What is done alike with transformers' cache and with ours."""

RECENT: dict[str, dict[str, int]] = {
    "coded rows": {"recent_window": 0, "sinks": 0},
    "recent window": {"recent_window": 8, "sinks": 2},
}
"""What is kept in 16 bits in which stage: in others, the default, which is more than these sequences are long."""


def one_by_one(net: Any, ids: torch.Tensor, cache: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pass of the first tokens and one of each of the others: ids and the logits of all passes' last tokens."""
    logits = []
    for start, stop in ((0, first), *((at, at + 1) for at in range(first, ids.shape[1]))):
        with torch.no_grad():
            given = pass_arguments(net.config, ids, start, stop)
            found = net(**given, use_cache=True, **past(net, cache)).logits
        logits.append(found[:, -1:].reshape(1, -1))
    return ids, torch.cat(logits)


def _reference(net: Any, **recent: int) -> Any:
    """transformers' own cache over what a KvmmapCache serves."""
    cache = RoundedCache(config=net.config, **recent)
    become_own(cache, text_config(net.config))
    return EncoderDecoderCache(cache, DynamicCache()) if net.config.is_encoder_decoder else cache


def _references(net: Any) -> dict[str, Any]:
    """Results of the stages with transformers' own cache, or its errors."""
    found: dict[str, Any] = {}
    for stage, run in STAGES.items():
        try:
            found[stage] = run(net, _reference(net, **RECENT.get(stage, {})))
        except Exception as error:
            found[stage] = error
    return found


def _check_stages(kind: str, net: Any, references: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    left_out = WITHOUT_STATES if has_states(net) else ()
    if net.config.model_type in WITH_IMAGE:  # positions of its passes do not follow those that are stored
        left_out = (*left_out, "prompt lookup")
        try:
            STAGES["prompt lookup"](net, KvmmapCache(net))
        except UnsupportedModelError:
            pass
        else:
            raise WrongError(f"{kind}: prompt lookup over embeddings is not refused")
    for stage in ("generation", "chunked prefill", "prompt lookup", *RECENT):
        if not _failed(references[stage]) and stage not in left_out and not (stage[0] == "c" and takes_one(net)):
            with _own_errors(kind, stage):
                _check(kind, stage, STAGES[stage](net, KvmmapCache(net, **RECENT.get(stage, {}))), references[stage])
    path = folder / "cache.kvm"
    with _own_errors(kind, "reopening"):
        _check(kind, "reopening", _reopened(net, path), references["generation"])
    if has_states(net):
        with _own_errors(kind, "prefix"):
            _check(kind, "prefix", from_a_checkpoint(kind, net, path), references["prefix"])
    elif not _failed(references["chunked prefill"]) and net.config.model_type not in PREFIXED:
        # A model that takes one token a pass can't continue a prefix.
        with _own_errors(kind, "prefix"), KvmmapCache.open(path, net) as cache:
            if reuse(cache, **arguments(net.config, BRANCH)) != 20:
                raise WrongError(f"{kind}: 20 tokens agree, and reuse does not say so")
            _check(kind, "prefix", generate(net, BRANCH, cache, 3), references["prefix"])


def _check_batch(kind: str, net: Any) -> None:
    if inputs_besides(net.config.model_type, prompt(5)):
        return
    if has_source(net.config):
        try:
            KvmmapBatch([KvmmapCache(net)])
        except UnsupportedModelError:
            return
        raise WrongError(f"{kind}: a batch is not refused")
    with _own_errors(kind, "batch"):
        if wrong := check_batch(net, kind, lambda: _reference(net), argument_of(net), BOUND):
            raise WrongError(f"{kind}: batch: {wrong}")


def _reopened(net: Any, path: Path) -> Any:
    """Generate as the first stage does, through three handles."""
    with KvmmapCache.create(path, net) as cache:
        tokens, first = generate(net, prompt(30), cache, 3)
    with KvmmapCache.open(path, net, "a") as cache:
        tokens, second = generate(net, tokens, cache, 3)
    with KvmmapCache.open(path, net) as cache:
        tokens, third = generate(net, tokens, cache, 2)
    return tokens, torch.cat([first, second, third])


def from_a_checkpoint(kind: str, net: Any, path: Path) -> Any:
    """Continue with another prompt from where the states were kept, or from the start."""
    with KvmmapCache.open(path, net) as cache:
        positions = [one.position for one in cache.checkpoints]
        if 30 not in positions or cache.seq_len not in positions:
            raise WrongError(f"{kind}: checkpoints at {positions}, and not at the prompt's end and where it was closed")
        if reuse(cache, BRANCH) != 0:
            raise WrongError(f"{kind}: positions are reused whose states are not kept")
        if takes_one(net):
            return generate(net, BRANCH, cache, 3)
    with KvmmapCache(net) as cache:
        net(input_ids=prompt(30)[:, :20], use_cache=True, **past(net, cache))
        cache.checkpoint()
        net(input_ids=prompt(30)[:, 20:], use_cache=True, **past(net, cache))
        if reuse(cache, BRANCH) != 20 or cache.seq_len != 20:
            raise WrongError(f"{kind}: 20 tokens agree, there is a checkpoint, and reuse does not say so")
        return generate(net, BRANCH, cache, 3)


# What must hold


def gap(found: Any, expected: Any) -> float:
    """How far logits are off at most, in standard deviations of the right ones."""
    if found[1].shape != expected[1].shape:
        raise WrongError(f"logits {list(found[1].shape)} in place of {list(expected[1].shape)}")
    return float((found[1] - expected[1]).abs().max() / expected[1].std())


def _check(kind: str, stage: str, found: Any, expected: Any) -> None:
    off = gap(found, expected)
    if not off <= BOUND:  # NaN, too
        raise WrongError(f"{kind}: {stage} is off by {off:.3f} standard deviations")
    if found[0].tolist() != expected[0].tolist():
        raise WrongError(f"{kind}: {stage} gives other tokens")


def _check_alive(kind: str, net: Any, expected: Any) -> None:
    """Other tokens early in the prompt must show: else nothing in this trial could fail."""
    other = torch.cat([prompt(15, seed=2), prompt(30)[:, 15:]], 1)
    off = gap(generate(net, other, _reference(net), 8), expected)
    if not off > ALIVE:
        raise WrongError(f"{kind}: other tokens in the cache change logits by {off:.3f} standard deviations only")


def _check_refusals(kind: str, net: Any, folder: Path) -> None:
    """A refusal is the same everywhere, names the type, and leaves no file."""
    for make in (lambda: KvmmapCache(net.config), lambda: KvmmapCache.create(folder / "refused.kvm", net)):
        try:
            make()
        except UnsupportedModelError as error:
            if len(str(error)) < 30:
                raise WrongError(f"{kind}: refused without a reason: {error}") from error
        else:
            raise WrongError(f"{kind}: refused once, and then not")
    if any(folder.iterdir()):
        raise WrongError(f"{kind}: a refusal left a file")


@contextmanager
def _own_errors(kind: str, stage: str) -> Iterator[None]:
    """Nothing may be raised where transformers' own cache works."""
    try:
        yield
    except WrongError:
        raise
    except Exception as error:
        raise WrongError(f"{kind}: {stage}: {type(error).__name__}: {error}") from error


@contextmanager
def _reads() -> Iterator[Iterator[int]]:
    """Count how often layers are dequantised: `next` gives the number so far."""
    read, calls = KvmmapLayer.read, []

    def counted(self: KvmmapLayer, *args: Any) -> Any:
        calls.append(1)
        return read(self, *args)

    KvmmapLayer.read = counted  # type: ignore[method-assign]
    try:
        yield (len(calls) for _ in itertools.count())
    finally:
        KvmmapLayer.read = read  # type: ignore[method-assign]
