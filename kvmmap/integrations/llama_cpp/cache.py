"""`LlamaKvmmapCache`: many conversations of a `Llama`, in a library on the disk."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp.llama_cache import BaseLlamaCache
from numpy.typing import NDArray

from ...errors import CacheNotFoundError, KvmmapError
from ...formats.llama_cpp.importing import window_of
from ...library import Library, Match, Namespace
from ...paths import PathLike
from .context import Context

log = logging.getLogger("kvmmap.llama_cpp")

AUTO = "int8-rotated:int6-rotated"
"""Codecs of keys and of values that a context has in 16 or 32 bits. A recent window would be written each turn."""


class Stored:
    """What the cache has of a prompt: takes the place of a `LlamaState`, and is loaded when it is asked for."""

    def __init__(self, match: Match, ids: NDArray[np.int32]) -> None:
        self.match, self.input_ids = match, ids
        self.n_tokens = len(ids)


class Live:
    """What the context holds now, in place of a `LlamaState`: it copies nothing."""

    def __init__(self, context: Context) -> None:
        self.context = context


class LlamaKvmmapCache(BaseLlamaCache):  # type: ignore[misc]
    """A drop-in for llama-cpp-python's `LlamaRAMCache` and `LlamaDiskCache`: `llama.set_cache(LlamaKvmmapCache(path))`.

    Each completion begins at the longest prefix that any conversation has had, and appends its own positions, which
    then survive power loss. Conversations share what they have in common; any number of processes use one directory.
    The directory is a `kvmmap.Library`, whose segments are ordinary `.kvm` files. What another model, other types of
    keys and values, other RoPE parameters or adapters have made never matches.

    A completion is not broken by a cache that fails (a full disk): that is logged, by "kvmmap.llama_cpp".

    Args:
        path: of the directory; made if it is not there.
        max_bytes: bytes on the disk to keep at most; what is worth least goes first. None: no limit.
        codec: a preset of `kvmmap.create`; or "native", which keeps keys and values bit by bit as the context has them;
            or codecs of keys and of values, as "int8-rotated:int6-rotated"; or "auto": "native" where the context has
            quantised ones, else these.
        ttl: seconds after their last use for which conversations are kept.
        salt: a tenant's secret: equal prompts of other tenants don't match.

    Raises:
        NotACacheError, OSError: as `Library`.
    """

    def __init__(
        self,
        path: PathLike,
        max_bytes: int | None = None,
        *,
        codec: str = "auto",
        ttl: float | None = None,
        salt: str | None = None,
    ) -> None:
        super().__init__(max_bytes if max_bytes is not None else 2**63 - 1)
        self.library = Library(path, max_bytes=max_bytes, ttl=ttl)
        """Where conversations are kept."""
        self._codec, self._salt = codec, salt
        self._context: Context | None = None
        self._namespace: Namespace | None = None

    def attach(self, llama: llama_cpp.Llama) -> None:
        """Serve a `Llama`: what `llama.set_cache` does.

        Raises:
            KvmmapError: another `Llama` has this cache. Give each one of its own; they may have one directory.
            UnsupportedModelError: a model whose states are not read.
            KvmmapError: types of keys and values that are not read.
        """
        served = None if self._context is None else self._context.llama
        if served is not None and served is not llama and served.cache is self and served.ctx is not None:
            raise KvmmapError(
                f"the cache serves another Llama ({served.model_path}) already: make a LlamaKvmmapCache of the same "
                "directory for each"
            )
        context = Context(llama)
        facts = context.facts
        quantized = facts.key_type.quantized or facts.value_type.quantized
        codec = ("native" if quantized else AUTO) if self._codec == "auto" else self._codec
        recent_window, sinks = window_of(codec)
        self._context = context
        self._namespace = Namespace(
            layers=facts.layers(codec),
            model=facts.info,
            facts=facts.facts,
            salt=self._salt,
            recent_window=recent_window,
            sinks=sinks,
        )
        _wrap(llama)
        llama.cache = self

    # What llama-cpp-python calls

    @property
    def cache_size(self) -> int:
        """Bytes on the disk."""
        return self.library.stats().bytes

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._find(key).length > 0

    def __getitem__(self, key: Sequence[int]) -> Stored:
        """Find the longest stored prefix of a prompt.

        Raises:
            KeyError: there is none.
        """
        try:
            match = self._find(key)
        except (KvmmapError, OSError) as error:
            log.warning("the cache can't be searched: %s", error)
            raise KeyError("the cache can't be searched") from error
        if not match.length:
            raise KeyError("no prefix of the prompt is stored")
        return Stored(match, np.asarray(key, np.int32)[: match.length])

    def __setitem__(self, key: Sequence[int], value: Any) -> None:
        """Store what was computed: a `LlamaState`, or what the context holds."""
        self._served()
        try:
            self._store(value)
        except (KvmmapError, OSError) as error:
            log.warning("the conversation is not stored: %s", error)

    # What it does

    def _find(self, key: Sequence[int]) -> Match:
        _, namespace = self._served()
        return self.library.match(namespace, np.asarray(key, np.int32))

    def _store(self, value: Any) -> None:
        context, namespace = self._served()
        ids = context.token_ids if isinstance(value, Live) else np.array(value.input_ids[: value.n_tokens], np.int32)
        if not len(ids):
            return
        with self.library.session(namespace, ids, capacity=max(len(ids), context.llama.n_ctx())) as session:
            start = session.seq_len
            if start == len(ids):
                return
            if isinstance(value, Live):
                context.store(session, len(ids))
            else:
                context.append_state(session, value.llama_state, len(ids))
            session.push_token_ids(ids[start:])

    def load(self, stored: Stored) -> bool:
        """Load what was found into the context; False if it can't be had any more."""
        context, _ = self._served()
        if context.scoring:
            return False
        try:
            with self.library.open(stored.match) as cache:
                context.restore(cache, stored.n_tokens)
        except CacheNotFoundError:
            return False  # evicted since: the prompt is computed
        except (KvmmapError, OSError) as error:
            log.warning("a stored conversation can't be loaded: %s", error)
            return False
        context.computed(stored.input_ids)
        return True

    def serves(self, llama: llama_cpp.Llama) -> bool:
        """Whether it was given to this `Llama` by `set_cache`."""
        return self._context is not None and self._context.llama is llama

    def begin(self, *, scored: bool) -> None:
        """Prepare for a completion.

        Args:
            scored: whether the log-probabilities of the prompt are asked for. Those of restored positions are not
                there, so all of it is computed.
        """
        self._served()[0].begin(scored=scored)

    def live(self) -> Live:
        """What the context holds now, to be stored."""
        return Live(self._served()[0])

    def _served(self) -> tuple[Context, Namespace]:
        if self._context is None or self._namespace is None:
            raise KvmmapError("the cache does not know its model: give it to llama.set_cache(cache)")
        return self._context, self._namespace

    def close(self) -> None:
        """Close the library. The cache can't be used afterwards."""
        self.library.close()


def _hook() -> None:
    """Let `Llama.set_cache` tell a cache of this kind which model it serves. Others are set as before."""
    original = llama_cpp.Llama.set_cache

    @functools.wraps(original)
    def set_cache(self: llama_cpp.Llama, cache: Any) -> None:
        if isinstance(cache, LlamaKvmmapCache):
            cache.attach(self)
        else:
            original(self, cache)

    llama_cpp.Llama.set_cache = set_cache


def _wrap(llama: llama_cpp.Llama) -> None:
    """Let a model's completions pass what the context holds to the cache, without `save_state`'s copies."""
    if hasattr(llama, "_kvmmap_completing"):
        return
    llama._kvmmap_completing = False
    create, save_state, load_state = llama._create_completion, llama.save_state, llama.load_state

    def serving() -> LlamaKvmmapCache | None:
        cache = llama.cache
        return cache if isinstance(cache, LlamaKvmmapCache) and cache.serves(llama) else None

    def _create_completion(*args: Any, **options: Any) -> Iterator[Any]:
        if (cache := serving()) is not None:
            cache.begin(scored=bool(options.get("echo")) and options.get("logprobs") is not None)
        generator = create(*args, **options)
        try:
            while True:
                llama._kvmmap_completing = True
                try:
                    found = next(generator)
                except StopIteration:
                    return
                finally:
                    llama._kvmmap_completing = False
                yield found
        finally:
            generator.close()

    def save() -> Any:
        if llama._kvmmap_completing and (cache := serving()) is not None:
            return cache.live()
        return save_state()

    def load(state: Any) -> None:
        if not isinstance(state, Stored):
            load_state(state)
        elif (cache := serving()) is not None:
            cache.load(state)

    llama._create_completion, llama.save_state, llama.load_state = _create_completion, save, load


_hook()  # when this module is imported: in `llama.set_cache(LlamaKvmmapCache(path))` the method is looked up first
