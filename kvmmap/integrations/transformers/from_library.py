"""Generation over a library: a cache that begins with what the library has of a prompt, and that it has afterwards.

What lives here: which namespace a model's caches belong to, sessions, and models whose every `generate` has one. What
does not: matching and files, which are the library's, and how a model uses a cache.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import KvmmapError, UnsupportedModelError
from ...library import Library, Namespace
from ...library.models import register
from . import rope
from .cache import KvmmapCache
from .media import media_tokens
from .models import text_config
from .opening import NOTES, Storing, own_notes, settings
from .prefix import one_sequence
from .sources import has_source, why_source
from .states import SINGLE_TOKENS
from .tensors import autocast_dtype, dtype_name
from .versions import CACHE_ARGUMENT


class LibraryCache(KvmmapCache):
    """A `KvmmapCache` over a session of a library; `open_session` makes one.

    That of a model with states begins at the last checkpoint within the prompt that the library has. It becomes part of
    the library when it is flushed or closed. Positions below `reused` can't be truncated.
    """

    reused: int = 0
    """Tokens of the prompt that the library had: they are not computed again."""

    def _note_media(self) -> None:
        """Nothing to do: matches end before the first image."""


def namespace_of(
    model: Any,
    *,
    preset: str | None = None,
    recent_window: int | None = None,
    sinks: int | None = None,
    salt: str | None = None,
    fingerprint: str | None = None,
) -> Namespace:
    """Return the namespace that a model's caches belong to: its weights and adapters, config, dtype and layers.

    Args:
        model: a model of transformers.
        preset, recent_window, sinks, fingerprint: as in `KvmmapCache`.
        salt: a tenant's secret: equal prompts of other tenants don't match.

    Raises:
        UnsupportedModelError: the model keeps something that can't be stored; or its RoPE depends on the length of a
            prompt ("dynamic", "longrope"), so that a prefix is not the same in all prompts; or it takes one token a
            pass behind a prefix (Jamba, Zamba); or it is an encoder-decoder, or has cross-attention layers.
    """
    storing = Storing(preset=preset, recent_window=recent_window, sinks=sinks)
    return _namespace(model, settings(model, None, None, fingerprint, storing)[1], salt)


def _namespace(model: Any, shapes: Mapping[str, Any], salt: str | None) -> Namespace:
    if rope.length_dependence(model.config) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its RoPE depends on the length of the prompt, so prompts that begin alike don't "
            "have the same keys: keep a KvmmapCache for each"
        )
    kind = text_config(model.config).model_type
    if has_source(model.config):
        raise UnsupportedModelError(
            f"{kind} {why_source(model.config)}: prompts that begin alike don't have the same keys where the model "
            "attends to something else besides; keep a KvmmapCache for each",
            actual=kind,
        )
    if kind in SINGLE_TOKENS:
        raise UnsupportedModelError(
            f"{kind} drops its recurrent state in transformers when several tokens continue a sequence, so it can't "
            "compute the rest of a prompt: keep a KvmmapCache for each, and feed one token at a time",
            actual=kind,
        )
    name = dtype_name(model.dtype)
    autocast = autocast_dtype(next(model.parameters()))
    if autocast is not None:
        name += f" under autocast to {dtype_name(autocast)}"
    info = replace(shapes["model"], source_dtype=name)
    rows = {key: value for key, value in shapes.items() if key not in ("capacity", "metadata", "model")}
    return Namespace.build(**rows, model=info, facts={NOTES: shapes["metadata"][NOTES]}, salt=salt)


def open_session(
    library: Library,
    model: Any,
    input_ids: Any,
    *,
    limit: int | None = None,
    capacity: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    preset: str | None = None,
    recent_window: int | None = None,
    sinks: int | None = None,
    salt: str | None = None,
    fingerprint: str | None = None,
) -> LibraryCache:
    """Open a cache that begins with what a library has of a prompt; `generate` computes only the rest.

        with open_session(library, model, input_ids) as cache:
            model.generate(input_ids, **cache.argument)

    `library.session(model, input_ids)` is the same.

    Args:
        library: the library.
        model: the model that will use it, on any device.
        input_ids: the whole prompt, [n] or [1, n]. All but the last token may match, since its logits are not stored;
            a placeholder, such as for an image, ends what may match.
        limit: match at most so many.
        capacity: positions that there is to be room for; by default what the model is made for. Room costs no disk.
        metadata: plain JSON of your own, kept with a new segment.
        preset, recent_window, sinks, fingerprint: as in `KvmmapCache`; other codecs or another window are another
            namespace.
        salt: as in `namespace_of`.

    Raises:
        UnsupportedModelError: as in `namespace_of`.
        ShapeMismatchError, DtypeError: not such ids.
        LibraryFullError, ClosedError, OSError: as in `Library.session`.
    """
    ids = one_sequence(input_ids)
    storing = Storing(preset=preset, recent_window=recent_window, sinks=sinks)
    kinds, shapes = settings(model, None, None, fingerprint, storing)
    placeholders = frozenset().union(*media_tokens(model.config).values())
    found = np.flatnonzero(np.isin(ids, list(placeholders)))
    most = min([len(ids) - 1, *found[:1].tolist(), *([] if limit is None else [limit])])
    stored: QuantizedKvCache = library.session(
        _namespace(model, shapes, salt),
        ids,
        limit=most,
        capacity=max(shapes["capacity"], len(ids) + 1) if capacity is None else capacity,
        metadata=own_notes(metadata or {}) | {NOTES: shapes["metadata"][NOTES]},
    )
    try:
        cache = LibraryCache._of(None, stored, kinds, model, digested=fingerprint is None)
        cache.reused = stored.seq_len
    except BaseException:
        stored.close()
        raise
    return cache


def _open(library: Library, model: Any, token_ids: Any, **options: Any) -> LibraryCache | None:
    return open_session(library, model, token_ids, **options) if isinstance(model, torch.nn.Module) else None


register(_open)


@dataclass(frozen=True, slots=True)
class Use:
    """What generations through a library did."""

    generations: int = 0
    """Calls of `generate` that had a session."""

    reused: int = 0
    """Tokens of their prompts that were not computed."""

    computed: int = 0
    """Tokens of their prompts that were."""


class Attachment:
    """A model whose every `generate` goes through a library: see `attach`. It is a context manager that detaches."""

    def __init__(self, library: Library, model: Any, options: Mapping[str, Any]) -> None:
        self._library = library
        self._model = model
        self._options = options
        self._generate = model.generate
        self._lock = threading.Lock()
        self._local = threading.local()
        self.use = Use()
        """What all generations did so far, in all threads."""
        model.generate = self._call

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the last generation of this thread did not compute; 0 if it had no session."""
        return int(getattr(self._local, "reused", 0))

    def detach(self) -> None:
        """Give the model its own `generate` back. Doing so twice is allowed."""
        if self._model.__dict__.get("generate") == self._call:
            del self._model.generate

    def _call(self, inputs: Any = None, *arguments: Any, **options: Any) -> Any:
        self._local.reused = 0
        ids = self._ids(inputs, options)
        if ids is None or arguments:
            return self._generate(inputs, *arguments, **options)
        with open_session(self._library, self._model, ids, **self._options) as cache:
            result = self._generate(inputs, **options, **cache.argument)
            with self._lock:
                done = self.use
                self.use = Use(
                    done.generations + 1, done.reused + cache.reused, done.computed + len(ids) - cache.reused
                )
            self._local.reused = cache.reused
        return result

    def _ids(self, inputs: Any, options: Mapping[str, Any]) -> NDArray[Any] | None:
        """Return the prompt of a call that a session can serve; None if it has a cache, several sequences, or beams."""
        ids = options.get("input_ids") if inputs is None else inputs
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
            return None
        if any(options.get(name) is not None for name in ("cache", "past_key_values", "inputs_embeds", CACHE_ARGUMENT)):
            return None
        config = options.get("generation_config") or self._model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name) or getattr(config, name, None) or 1) > 1:
                return None
        if options.get("use_cache") is False:
            return None
        return ids[0].detach().cpu().numpy()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(library: Library, model: Any, **options: Any) -> Attachment:
    """Have every `generate` of a model go through a library: prompts that begin alike are computed once.

    Calls with a cache of their own, several sequences, beams or embeddings are left as they are.

    Args:
        library: the library; it stays open as long as the model is attached.
        model: a model of transformers.
        options: keyword arguments of `open_session`: `capacity`, `metadata`, `preset`, `recent_window`, `sinks`,
            `salt`, `fingerprint`.

    Raises:
        UnsupportedModelError: as in `namespace_of`.
        KvmmapError: the model is attached already.
    """
    if "generate" in vars(model):
        raise KvmmapError("the model's generate is replaced already: detach the library that it is attached to first")
    namespace_of(model, **{name: value for name, value in options.items() if name not in ("capacity", "metadata")})
    return Attachment(library, model, options)
