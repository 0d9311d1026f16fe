"""Caches of other programs into an engine's library, and its prompts out of it, in the portable form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...cache import QuantizedKvCache
from ...errors import CacheNotFoundError, ModelMismatchError, ShapeMismatchError
from ...formats.portable import KEY, portable_notes
from ...library import Namespace
from ...metadata import document
from ...opening import making, open_cache
from ...paths import PathLike
from .identity import EngineFacts, engine_facts
from .settings import Settings

CHUNK = 512
"""Positions that are copied at a time."""


def import_cache(
    engine: Any,
    cache: PathLike | QuantizedKvCache,
    *,
    accept_weights: str | None = None,
    portable_id: str | None = None,
    cache_salt: str | None = None,
) -> int:
    """Put a cache in the portable form into an engine's library: requests that begin with its tokens go on from it.

    Rows are decoded, and stored by the codec of the connector.

    Args:
        engine: an `LLM` that has the connector, or its `VllmConfig`.
        cache: path or URL of a cache, or an open one, of which every position has a token id.
        accept_weights: the type of the weights that made it, such as "Q4_1", if they are not of the engine's type.
        portable_id: the model's, where it can't be computed.
        cache_salt: that of the requests which are to find it.

    Returns:
        How many positions the library has of it now.

    Raises:
        ModelMismatchError: another model made it, or weights of another type, which are not accepted.
        ShapeMismatchError: its layers are not those of the model.
        UnknownTokensError, LibraryFullError, FormatError, CacheNotFoundError, OSError: as `kvmmap.Library.put`.
    """
    settings, facts = _engine(engine)
    if not isinstance(cache, QuantizedKvCache):
        with open_cache(cache) as opened:
            return import_cache(
                engine, opened, accept_weights=accept_weights, portable_id=portable_id, cache_salt=cache_salt
            )
    _check(cache, facts, accept_weights, portable_id)
    ids = cache.token_ids
    cache.storage.verify_rows(0, len(ids))
    notes = {key: value for key, value in cache.metadata.items() if key != "library"}
    with (
        settings.library() as library,
        library.session(facts.namespace(cache_salt), ids, capacity=len(ids), metadata=notes) as session,
    ):
        for start in range(session.reused, len(ids), CHUNK):
            stop = min(start + CHUNK, len(ids))
            keys = [layer.read_keys(start, stop) for layer in cache.layers]
            values = [layer.read_values(start, stop) for layer in cache.layers]
            session.extend(keys, values, ids[start:stop])
        return session.seq_len


def export_cache(
    engine: Any, token_ids: Any, path: PathLike, *, cache_salt: str | None = None, overwrite: bool = False
) -> int:
    """Write what an engine's library has of a prompt as a cache of its own, in the portable form.

    Args:
        engine: as in `import_cache`.
        token_ids: the prompt, [n].
        path: of the cache to make; it appears when it is whole.
        cache_salt: the request's.
        overwrite: replace a cache that is there.

    Returns:
        How many positions it has: those of the longest prefix that the library has.

    Raises:
        CacheNotFoundError: the library has nothing of the prompt.
        CacheExistsError, FormatError, OSError: as in `kvmmap.create` and `kvmmap.open`.
    """
    settings, facts = _engine(engine)
    namespace = facts.namespace(cache_salt)
    with settings.library() as library:
        match = library.match(namespace, token_ids)
        if not match.length:
            raise CacheNotFoundError(f"{settings.path}: nothing of the prompt is stored", path=settings.path)
        notes: Mapping[str, Any] = {KEY: portable_notes("vLLM", facts.portable_id, facts.weights)}
        with (
            library.open(match) as source,
            making(
                path, namespace.shape(match.length), document(dict(notes), facts.model), overwrite=overwrite
            ) as made,
        ):
            for start in range(0, match.length, CHUNK):
                stop = min(start + CHUNK, match.length)
                for layer, old in zip(made.layers, source.layers, strict=True):
                    layer.extend_from(old, start, stop)
                made.push_token_ids(source.token_ids[start:stop])
    return match.length


def namespace_of(engine: Any, cache_salt: str | None = None) -> Namespace:
    """Return the namespace of the library in which an engine's prompts are."""
    return _engine(engine)[1].namespace(cache_salt)


def _engine(engine: Any) -> tuple[Settings, EngineFacts]:
    config = getattr(getattr(engine, "llm_engine", None), "vllm_config", engine)
    model, parallel = config.model_config, config.parallel_config
    shape = model.get_num_kv_heads(parallel), model.get_head_size(), model.get_head_size()
    settings = Settings.of(config.kv_transfer_config.kv_connector_extra_config)
    return settings, engine_facts(config, settings, [shape] * model.get_num_layers(parallel))


def _check(cache: QuantizedKvCache, facts: EngineFacts, accept_weights: str | None, portable_id: str | None) -> None:
    where = cache.path or "the cache"
    found = cache.metadata.get(KEY)
    notes = found if isinstance(found, Mapping) else {}
    here = portable_id or facts.portable_id
    if notes.get("id") is None or notes["id"] != here:
        raise ModelMismatchError(
            f"{where} was made by another model, or does not say by which: its portable id is {notes.get('id')}, and "
            f"the engine's {here}",
            expected={"portable_id": notes.get("id")},
            actual={"portable_id": here},
            path=cache.path,
        )
    if notes.get("weights") not in (facts.weights, accept_weights):
        raise ModelMismatchError(
            f"{where} was made with weights of {notes.get('weights')}, and the engine's are {facts.weights}, which "
            f"give somewhat other keys and values: accept_weights={notes.get('weights')!r} goes on all the same",
            expected={"weights": notes.get("weights")},
            actual={"weights": facts.weights},
            path=cache.path,
        )
    dims = [layer.dims for layer in cache.geometry.layers]
    if dims != [layer.dims for layer in facts.layers]:
        raise ShapeMismatchError(
            f"{where} has other layers than the engine's model",
            expected=[layer.dims for layer in facts.layers],
            actual=dims,
            path=cache.path,
        )
