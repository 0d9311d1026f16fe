"""Several sequences in one forward pass: a batch of caches, one file a sequence, on transformers' interface.

Prompts of a batch are padded on the left. A sequence stores its own tokens and no padding: its rows belong to the last
columns of its line of the attention mask that are not hidden, in order. So sequences may have lengths of their own, and
stored prefixes too. What one sequence stores, and how it is attended over, is its own cache's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from ...closing import Closing
from ...errors import KvmmapError, ModelMismatchError, ShapeMismatchError, UnsupportedModelError
from .announced import AnnouncedStates
from .batch_index import BatchIndexLayer, keeps_index
from .batch_layer import BatchLayer, Members
from .batch_masks import aligned, line_lengths, own_part
from .batch_states import BatchStates, check_fed, feed_beginnings
from .branches import branch, copy_branch
from .cache import KvmmapCache
from .graphs import outside_graph
from .models import text_config
from .own_caches import become_own
from .prefix import reuse
from .sequence import MaskLength
from .sourced import refuse_sources
from .versions import CACHE_ARGUMENT

NO_PADDING = frozenset({"git"})
"""Models whose passes over padded prompts are wrong in transformers: their mask counts an absent image."""


class KvmmapBatch(AnnouncedStates, Closing):
    """A batch of `KvmmapCache`s, to be passed to a model or its `generate` as `cache`.

    Give `generate` the prompts padded on the left, with their attention mask. A sequence that ends before the others is
    fed padding by `generate` until all have ended, and stores that as tokens: `cache.truncate` drops it.

    Args:
        caches: one for each sequence, opened or made with the model that generates. They stay the caller's: `close`
            closes them all.

    Raises:
        KvmmapError: none, the same one twice, or caches of different models.
        UnsupportedModelError: the model is an encoder-decoder, or has cross-attention layers.
    """

    leaves_padding_out = True
    """Yes: rows lie where the mask says."""

    def __init__(self, caches: Sequence[KvmmapCache]) -> None:
        caches = list(caches)
        if not caches or len({id(cache) for cache in caches}) < len(caches):
            raise KvmmapError("a batch takes one cache a sequence, at least one, and none twice", actual=len(caches))
        refuse_sources(caches)
        layers: list[list[Any]] = [cache.layers for cache in caches]
        shapes = {tuple(getattr(layer, "kind", None) for layer in found) for found in layers}
        if len(shapes) > 1:
            raise KvmmapError("the caches of a batch must be made for one model: their layers differ")
        self._members = Members(caches, [0] * len(caches))
        self._columns = max(cache.seq_len for cache in caches)
        self._width = 0  # columns that the pass that runs feeds
        self._before = [0] * len(caches)  # positions of each sequence before it
        self._parts: list[int] = []  # ids of the parts of the model that are in their forward pass
        self._shared: KvmmapCache | None = None
        model = caches[0]._model()
        config = getattr(model, "config", model)
        self._kind = "" if config is None else text_config(config).model_type
        numbers = {number: kind.states for number, kind in enumerate(caches[0]._kinds) if kind.states}
        self._states = BatchStates(self._members, numbers)
        self._layers = [
            self._states.layers[number]
            if number in numbers
            else (BatchIndexLayer if keeps_index(own) else BatchLayer)(self._members, number)
            for number, own in enumerate(layers[0])
        ]
        super().__init__(layers=list(self._layers))
        if config is not None:
            become_own(self, text_config(config))

    @classmethod
    def branches(cls, cache: KvmmapCache, count: int, room: int | None = None) -> Self:
        """Return a batch of sequences that all begin with what a cache holds, which is shared and not copied.

        For `num_return_sequences` and beam search, and for several continuations of one prompt. What they add is kept
        in memory. The cache must stay open, and must not be appended to meanwhile.

        Args:
            cache: the beginning.
            count: sequences, or beams of all sequences together.
            room: positions to reserve for each; as many as a cache that is only read has by default.

        Raises:
            KvmmapError: no sequences, or the cache has positions in memory beside those of its file.
        """
        if count < 1:
            raise KvmmapError(f"a batch has at least one sequence, not {count}", actual=count)
        made = cls([branch(cache, room) for _ in range(count)])
        made._shared = cache
        return made

    @property
    def caches(self) -> tuple[KvmmapCache, ...]:
        """The sequences' caches, in the order of the batch."""
        return tuple(self._members.caches)

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return len(self._members.caches)

    @property
    def argument(self) -> dict[str, Self]:
        """The batch as a keyword argument of `generate` or a model, as `KvmmapCache.argument`."""
        return {CACHE_ARGUMENT: self}

    def __repr__(self) -> str:
        lengths = [cache.seq_len for cache in self._members.caches]
        return f"<KvmmapBatch: {len(lengths)} sequences of {lengths} positions>"

    def reuse(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, discard: bool | None = None
    ) -> list[int]:
        """Cut each cache back to the longest prefix that it shares with its prompt, as `reuse` does for one.

        Call it before `generate`, which then feeds from the first column on that some sequence lacks. Of a model with
        states, what a sequence has left to feed beyond the others is fed here, sequence by sequence.

        Args:
            input_ids: the prompts, [batch, n], padded on the left.
            attention_mask: 1 where there is a token, 0 where there is padding, [batch, n]; all tokens by default.
            discard: as in `reuse`.

        Returns:
            How many tokens of each prompt are reused.

        Raises:
            ShapeMismatchError: not the prompts of this batch.
            DtypeError, UnknownTokensError: as in `reuse`.
            UnsupportedModelError: an image is among what would be fed here.
        """
        lengths = line_lengths(attention_mask, input_ids.shape, self.batch_size)
        width = input_ids.shape[1]
        found = [
            reuse(cache, input_ids[number, width - length :], discard=discard)
            for number, (cache, length) in enumerate(zip(self._members.caches, lengths, strict=True))
        ]
        if self._states.layers:
            own = [input_ids[number, width - length :] for number, length in enumerate(lengths)]
            feed_beginnings(self._members.caches, own, self._kind)
        stored = [cache.seq_len for cache in self._members.caches]
        self._columns = min(width - length + count for length, count in zip(lengths, stored, strict=True))
        return found

    def flush(self) -> None:
        """Flush every cache."""
        for cache in self._members.caches:
            cache.flush()

    def close(self) -> None:
        """Close every cache; that of `branches` stays open."""
        for cache in self._members.caches:
            if self._shared is not None:
                cache._own.close()
            else:
                cache.close()

    # Forward passes

    @property
    def _states_alone(self) -> bool:
        return self._members.caches[0]._states_alone

    def _check_announced(self) -> None:
        if not self._parts:
            raise ModelMismatchError(
                f"{self!r}: its caches were opened for another model object than the one that runs: its forward pass "
                "was not announced. Open them with the model that generates"
            )

    def begin_pass(self, model: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Note which tokens of each sequence a forward pass is about to feed.

        Raises:
            ShapeMismatchError: another number of sequences, or a mask that does not fit what is stored.
            UnsupportedModelError: padding that is not on the left, or without positions that leave it out.
        """
        if id(model) in self._parts:  # an earlier pass ended without its hooks
            self._parts.clear()
        tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
        if not self._parts:
            if tokens is None:
                raise UnsupportedModelError("a batch of caches needs the tokens of a pass, or their embeddings")
            self._count(tokens.shape, given)
        self._parts.append(id(model))
        outermost = len(self._parts) == 1
        for number, cache in enumerate(self._members.caches):
            if self._members.fed[number]:
                cache.begin_pass(model, self._own_part(given, number))
        if outermost:
            self._states.gather()

    def own_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Leave the mask out where states are continued: it is that of padding long past, and Mamba would apply it."""
        if self._states_alone and any(self._before) and given.get("attention_mask") is not None:
            return given | {"attention_mask": None}
        return given

    def _count(self, shape: Sequence[int], given: Mapping[str, Any]) -> None:
        """Find how many of the last columns are new to each sequence."""
        width = shape[1]
        if self._states_alone and self._columns and width > self._columns:
            raise UnsupportedModelError(
                f"{width} tokens are fed, and {self._columns} of them are stored: this release of transformers feeds "
                "prompts from their start to models that keep states alone. transformers 5.24 continues them",
                expected=width - self._columns,
                actual=width,
            )
        if given.get("attention_mask") is None and self._states_alone:  # which `generate` gives in the first pass alone
            lengths = [cache.seq_len + width for cache in self._members.caches]
        else:
            lengths = line_lengths(given.get("attention_mask"), (shape[0], self._columns + width), self.batch_size)
        fed = [length - cache.seq_len for length, cache in zip(lengths, self._members.caches, strict=True)]
        for number, (count, cache) in enumerate(zip(fed, self._members.caches, strict=True)):
            if not 0 <= count <= width:
                raise ShapeMismatchError(
                    f"sequence {number} has {lengths[number]} tokens by the attention mask, {cache.seq_len} are "
                    f"stored, and {width} are fed: call batch.reuse(input_ids, attention_mask) before generate, "
                    "and give it the same prompts",
                    expected=(cache.seq_len, cache.seq_len + width),
                    actual=lengths[number],
                )
        padded = any(
            count < width or length < self._columns + width for count, length in zip(fed, lengths, strict=True)
        )
        if padded and self._kind in NO_PADDING:
            raise UnsupportedModelError(
                f"{self._kind} computes other things in transformers where prompts are padded: generate prompts of "
                "other lengths one by one"
            )
        if padded and given.get("position_ids") is None and not self._states_alone:
            raise UnsupportedModelError(
                "sequences of a batch have other lengths, and no position_ids are given, so the model would count "
                "padding as positions: give position_ids, as generate does"
            )
        if self._states.layers:
            check_fed(self._members.caches, fed, width, self._kind)
        self._members.fed, self._members.columns, self._width = fed, self._columns + width, width
        self._before = [cache.seq_len for cache in self._members.caches]

    def _own_part(self, given: Mapping[str, Any], number: int) -> dict[str, Any]:
        """A pass's arguments as they would be for one sequence."""
        count, found = self._members.fed[number], {}
        for name in ("input_ids", "inputs_embeds"):
            if isinstance(tensor := given.get(name), torch.Tensor):
                found[name] = tensor[number : number + 1, -count:]
        if isinstance(positions := given.get("position_ids"), torch.Tensor):
            own = positions if positions.shape[-2] == 1 else positions[..., number : number + 1, :]
            found["position_ids"] = own[..., -count:]
        return found

    def end_pass(self, model: torch.nn.Module, failed: bool = False) -> None:
        """Record token ids; roll back a pass that failed, or did not reach all layers of all sequences."""
        if id(model) not in self._parts:
            return
        del self._parts[self._parts.index(id(model)) :]
        if not self._parts:
            self._states.bind()
        for cache, fed in zip(self._members.caches, self._members.fed, strict=True):
            if fed:
                cache.end_pass(model, failed)
        if self._parts:
            return
        members = list(zip(self._members.caches, self._before, self._members.fed, strict=True))
        if all(cache.seq_len == before + fed for cache, before, fed in members):
            self._columns += self._width
            return
        for cache, before, _ in members:
            cache.truncate(min(before, cache.seq_len))

    def check_mask(self, module: Any, mask: Any) -> None:
        """Look at the part of an attention module's mask that is each sequence's own."""
        for number, (cache, fed) in enumerate(zip(self._members.caches, self._members.fed, strict=True)):
            if fed:
                cache.check_mask(module, own_part(mask, number, fed, self._before[number] + fed))

    def check_config(self, config: Any) -> None:
        """Refuse to go on if another config made a cache."""
        for cache in self._members.caches:
            cache.check_config(config)

    def attend_in_place(self, reach: int | None, plain: bool) -> bool:
        """As `KvmmapCache.attend_in_place`, for all sequences."""
        found = [cache.attend_in_place(reach, plain) for cache in self._members.caches]  # told to each of them
        return all(found)

    @outside_graph
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append a layer's new keys and values to the sequences that they belong to; padding is left out.

        Returns:
            Both dequantised, [batch, num_kv_heads, n, head_dim], with zeros in hidden columns; or, for attention in
            place, the layer in place of both.
        """
        if len(key_states) != len(self._members.caches) or not self._parts:
            raise ShapeMismatchError(
                f"{len(key_states)} sequences came in for a batch of {len(self._members.caches)} caches, or outside of "
                "a forward pass of the model that these were opened with",
                expected=len(self._members.caches),
                actual=len(key_states),
            )
        found: dict[int, tuple[Any, Any]] = {}
        for number, (cache, fed) in enumerate(zip(self._members.caches, self._members.fed, strict=True)):
            if fed:
                first = key_states.shape[2] - fed
                keys, values = (states[number : number + 1, :, first:] for states in (key_states, value_states))
                found[number] = cache.update(keys, values, layer_idx, *args, **kwargs)
        if not all(isinstance(keys, torch.Tensor) for keys, _ in found.values()):
            return self._layers[layer_idx], self._layers[layer_idx]
        for number, cache in enumerate(self._members.caches):
            if number not in found:
                layer: Any = cache.layers[layer_idx]
                found[number] = layer.read(key_states.dtype, key_states.device)
        columns, tensors = self._members.columns, [found[number] for number in range(len(found))]
        return aligned([keys for keys, _ in tensors], columns), aligned([values for _, values in tensors], columns)

    @outside_graph
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns that a mask is for."""
        for cache in self._members.caches:
            cache.get_mask_sizes(query_length, layer_idx)
        return MaskLength.of(self._columns + query_length, self), 0

    @outside_graph
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the padded prompts that need not be fed again."""
        return self._columns

    # Sequences that fork

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sequence i continue what sequence beam_idx[i] holds, for batches that `branches` has made.

        Raises:
            UnsupportedModelError: the batch has files of its own, and would have to copy them.
        """
        sources: list[int] = beam_idx.tolist()
        if sources == list(range(len(self._members.caches))):
            return
        if self._shared is None or len(sources) != len(self._members.caches):
            raise UnsupportedModelError(
                "beam search and other ways of generating that copy sequences need a batch whose sequences share their "
                "beginning: KvmmapBatch.branches(cache, count), with as many as there are beams"
            )
        left = {
            number: self._members.caches[number]
            for number in range(len(self._members.caches))
            if number not in set(sources)
        }
        free, taken, ordered = list(left.values()), set(), []
        for source in sources:
            if source in taken:
                ordered.append(copy_branch(self._members.caches[source], free.pop()))
            else:
                taken.add(source)
                ordered.append(self._members.caches[source])
        self._members.caches = ordered
        self._states.reorder(sources)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to grow: the batch is made with as many sequences as are generated."""
        if repeats != 1:
            self._refuse(f"{repeats} copies of it are")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refuse to shrink."""
        if indices.tolist() != list(range(len(self._members.caches))):
            self._refuse("a selection of it is")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse assisted generation, which transformers has for one sequence only."""
        if tokens_to_remove:
            self._refuse("fewer positions of all of it are")

    def reset(self) -> None:
        """Truncate every cache to nothing."""
        for cache in self._members.caches:
            cache.reset()
        self._columns = 0

    def _refuse(self, what: str) -> None:
        raise UnsupportedModelError(
            f"a KvmmapBatch has the sequences that it was made with, and {what} asked for: generate with "
            "KvmmapBatch.branches(cache, count), or with each sequence's own cache"
        )
