"""The positions of one sequence: in a file that is only read and after them, what was appended; and forward passes.

What lives here: their length, token ids, truncation, and what a model does with a cache in a forward pass. Where they
come from and are saved to is `cache`'s business; what a layer does with keys and values, `layer`'s.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from ...errors import UnsupportedModelError
from ...ranges import check_range
from . import rope
from .checked_weights import checked_weights, whole_of
from .graphs import check_graphs, outside_graph
from .kinds import LayerKind
from .layers import made_layers
from .models import counting, text_config
from .opening import NOTES, check_dtype, check_stored, note_regimes, own_notes
from .own_caches import become_own
from .passes import watch
from .recording import PassRecord
from .resident import Resident, ResidentLayer
from .rows import StoredRows
from .sequence import MaskLength
from .shared import SharedLayer
from .sourced import SourcedSequence
from .steps import Steps
from .tensors import autocast_dtype
from .versions import argument_of
from .weights import Weights, compared_weights, weights_of
from .write_behind import WriteBehind


class StoredSequence(SourcedSequence):
    """Keys and values of one sequence as transformers' models use them."""

    def _attach(
        self,
        saved: QuantizedKvCache | None,
        own: QuantizedKvCache,
        kinds: Sequence[LayerKind],
        model: Any,
        resident: Resident,
        *,
        digested: bool = False,
    ) -> None:
        """Take a cache in: its layers, and whose it is.

        Args:
            saved: what is only read, if there is anything.
            own: what is appended to.
            kinds: what each layer of the model keeps.
            model: the model, its config, or None.
            resident: where keys and values are while the model uses them.
            digested: the model's digest was computed, and compared or recorded, right before.
        """
        kept = saved.seq_len if saved is not None else 0
        self._kinds = list(kinds)
        complete = weakref.WeakMethod(self._note_complete)  # no circle: a cache's file closes with its last reference
        self._layers, self._rows, self._patterns = made_layers(
            kinds, saved, own, kept, resident, lambda rows: note(rows) if (note := complete()) is not None else None
        )
        super().__init__(layers=list(self._layers))
        config = getattr(model, "config", model)
        if config is not None:
            become_own(self, text_config(config))
        self._saved = saved
        self._own = own
        self._source = own if saved is None else saved
        self._behind: WriteBehind | None = None
        if held := [rows for rows in self._rows if isinstance(rows, ResidentLayer)]:
            self._behind = WriteBehind(own, held, kept)
            # A cache that nobody closes is written to its end all the same, also at the end of the program.
            self._end_of_life = weakref.finalize(self, WriteBehind.stop, self._behind)
        self._kept = kept
        self._length = kept + own.seq_len  # complete in every layer; during a pass, as it was before
        self._states = self._make_states(saved, own, model) if own.states else None
        self._config_checked = model is not None
        self._dtype: tuple[Any, ...] = ()  # that keys have been checked to have, and autocast's beside
        self._masks_asked = False
        self._steps = Steps()
        self._make_media(config, self._source.metadata, self._length)
        self._rope = rope.length_dependence(config) if config is not None else None
        notes = (self._source.metadata.get(NOTES) or {}) if self._rope is not None else {}
        self._regimes: list[list[int]] = notes.get("rope", [])
        if self._rope is not None and not self._regimes and self._length > self._rope.original:
            self._regimes = [[0, rope.MIXED]]
        self._told = np.empty(0, np.int32)  # ids given by record_token_ids
        self._model: Callable[[], Any] = weakref.ref(model) if isinstance(model, torch.nn.Module) else lambda: model
        self._pass = PassRecord(self._media_tokens, self._media, self._both_ways, counting(config))
        self._watched = isinstance(model, torch.nn.Module)
        self._weights: Weights | None = None  # those that are known to be the cache's
        if self._watched:
            check_graphs(model)
            self._weights = compared_weights(model) if digested else weights_of(model)
            watch(model)

    # What it holds

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer."""
        return self._length

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._kept + self._own.capacity

    @property
    def path(self) -> str | None:
        """The file's absolute path; None in memory."""
        return self._source.path

    @property
    def writable(self) -> bool:
        """True if what is appended goes to where the cache came from: a file, or memory."""
        return self._saved is None

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of your own notes; assign to replace them (saved with the next commit; not with mode="r")."""
        notes = self._source.metadata
        notes.pop(NOTES, None)
        return notes

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any]) -> None:
        notes = self._source.metadata.get(NOTES)
        self._source.metadata = own_notes(metadata) | ({} if notes is None else {NOTES: notes})

    @property
    def argument(self) -> dict[str, Self]:
        """The cache as a keyword argument of `generate` or a model, by the name that these have for it."""
        return {argument_of(self._model()): self}

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len], a copy; -1 where they are not known."""
        self._settle()
        ids = self._own.token_ids[: self._length - self._kept]
        if self._saved is not None:
            ids = np.concatenate([self._saved.token_ids[: self._kept], ids])
        told = self._told[: len(ids)]
        return (
            np.where((ids < 0) & (np.arange(len(ids)) < len(told)), np.resize(told, len(ids)), ids)
            if len(told)
            else ids
        )

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(self.path)
        return f"<KvmmapCache {where}: {len(self)} layers, {self._length}/{self.capacity} positions>"

    # Forward passes

    @outside_graph
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Append a layer's new keys and values; see `KvmmapLayer.update`.

        Raises:
            UnsupportedModelError: a batch of several sequences.
            ModelMismatchError: keys of another dtype than those that are stored.
            ShapeMismatchError, DtypeError, NonFiniteError, CapacityExceededError, OSError: nothing was appended.
        """
        layer: Any = self._layers[layer_idx]
        if self._steps.checked and self._steps.push(layer_idx, self._length, key_states, value_states):
            if self._steps.newest > self._length:
                self._note_complete(layer)
            return layer, layer
        if isinstance(layer, SharedLayer):
            return layer.update(key_states, value_states)  # type: ignore[no-any-return]
        self._masks_asked = False
        if self._behind is not None:
            self._behind.check()
        if len(layer) != self._length:
            self._take_back(self._complete())  # an earlier pass stopped half way
        dtype = key_states.dtype, autocast_dtype(key_states)
        if dtype != self._dtype:
            check_dtype(self._own, *dtype)
            self._dtype = dtype
        if len(self._patterns) > 1 and len({pattern.in_place for pattern in self._patterns}) > 1:
            raise UnsupportedModelError(
                "this model attends with one mask in layers whose windows differ by its config, so it can't attend in "
                'place: model.set_attn_implementation("sdpa")'
            )
        self._check_announced()
        result: tuple[Any, Any] = layer.update(key_states, value_states, *args, **kwargs)
        if result[0] is layer and key_states.shape[2] == 1:
            self._steps.check(self._layers, self._rows, key_states)
        self._note_complete(layer)
        return result

    @outside_graph
    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Append a layer's new index keys [1, n, index_head_dim], and return all of them."""
        layer: Any = self._layers[layer_idx]
        found: torch.Tensor = layer.update_indexer(indexer_key_states)
        return found

    def _note_complete(self, appended: StoredRows) -> None:
        """Count the positions of a store that was appended to if all others have them: loops may end in any layer."""
        if all(len(rows) == len(appended) for rows in reversed(self._rows)):
            self._length = len(appended)
            self._end_patterns()
            if self._behind is not None:
                self._behind.advance(self._length)

    def _complete(self) -> int:
        """Positions complete in every layer, as the layers have it."""
        return self._kept + self._own.seq_len if self._behind is None else min(map(len, self._rows))

    def _settle(self) -> None:
        """Wait until everything that the layers hold is written."""
        if self._behind is not None:
            self._behind.settle()

    def _end_patterns(self) -> None:
        self._steps.checked = False
        for pattern in self._patterns:
            pattern.in_place = False

    @outside_graph
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Positions that a mask is for, and the first of them: all that are stored and the new ones, unless `update`
        returns fewer."""
        if not self._masks_asked:  # the first one of a pass; an earlier pass may have failed
            self._end_patterns()
            self._masks_asked = True
        layer = self._layers[layer_idx]
        if isinstance(layer, ResidentLayer):
            first = layer.first_seen(self._length)
            return self._length + query_length - first, first
        return MaskLength.of(self._length + query_length, self), 0

    def attend_in_place(self, reach: int | None, plain: bool) -> bool:
        """Note that a mask is made for the layers of one reach; return whether these can be attended over in place.

        Models may ask for masks that none of their layers uses, and in any order: what one mask says holds for the
        layers of its own reach only.

        Args:
            reach: positions in a window or chunk of the mask; None: a query sees all.
            plain: True if the mask is causal within the window or chunks and hides nothing else.
        """
        found = [pattern for pattern in self._patterns if pattern.reach == reach]
        for pattern in found:
            pattern.in_place = plain and not pattern.latent and self._behind is None
        return bool(found) and all(pattern.in_place for pattern in found)

    @outside_graph
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions complete in every layer: during a pass, as it was before."""
        return self._length

    def begin_pass(self, model: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Note what a forward pass is about to feed; hooks call it before each pass of a model that was opened with.

        Args:
            model: the model, or a part of it.
            given: the pass's arguments by name.

        Raises:
            UnsupportedModelError: the tokens are not those that come next (padding, packed sequences, or a prompt that
                is fed again from its start).
        """
        if not self._pass.active and (self._dirty or any(len(rows) != self._length for rows in self._rows)):
            self._take_back(self._complete())
        if self._pass.begin(model, self._own_part(model, given), self._length, self._has_placeholder):
            self._weights = checked_weights(whole_of(model, self._model()), self._weights, self._source)
            self._begin_states(model, given)

    def check_mask(self, module: Any, mask: Any) -> None:
        """Look at the mask that an attention module gets: token ids are not recorded if it is not plainly causal."""
        kind = self._kinds[module.layer_idx]
        if kind.geometry is not None or not (kind.states or kind.crosses):
            for one in mask.values() if isinstance(mask, Mapping) else (mask,):  # Zaya's layers get two, by name
                self._pass.check_mask(module, one, kind)

    def end_pass(self, model: torch.nn.Module, failed: bool = False) -> None:
        """Record the token ids of a pass that reached all layers; roll back one that did not, or that failed later."""
        if not self._pass.end(model):
            return
        self._end_patterns()
        if failed and (self._dirty or self._length > self._pass.start):
            self._take_back(self._pass.start)
            return
        self._count_positions()
        if any(len(rows) != self._length for rows in self._rows):
            self._take_back(self._complete())
            return
        if self._states is not None:
            self._states.end(self._length, self._kept)
        if self._pass.note_media(self._length):
            self._note_media()
        start, ids = self._pass.recordable(self._length)
        if start < self._length:
            self._record_regime(start)
        if len(ids) and self._behind is not None:
            self._behind.record(start, ids)
        elif len(ids):
            self._own.push_token_ids(ids, start - self._kept)

    def record_token_ids(self, token_ids: Any) -> None:
        """Record token ids of positions whose ids are not known: those that hooks on the model did not see.

        Ids that are beyond all that are recorded are kept with the cache. Others, and those of a file that is only
        read, are known to this object alone.

        Args:
            token_ids: those of the whole sequence from its start, [n] or [1, n]; what is recorded already is not
                looked at, and what is beyond `seq_len` not recorded.
        """
        self._settle()
        ids = np.asarray(token_ids).reshape(-1)[: self._length]
        self._told = ids.astype(np.int32)
        recorded = self._kept + self._own.token_len
        if len(ids) > recorded:
            self._own.push_token_ids(ids[recorded:], recorded - self._kept)

    def check_config(self, config: Any) -> None:
        """Refuse to go on if another config made the cache; called in every forward pass that attends in place."""
        if not self._config_checked:
            if config is not None:
                check_stored(self._source, config, None)
            self._config_checked = True

    # Taking back

    def truncate(self, length: int) -> int:
        """Keep the first `length` positions. With mode="r" this is only noted, and the file stays as it is.

        The states of a model that has some go to the last checkpoint that is not beyond `length`, and positions with
        them.

        Returns:
            The positions kept: `restorable(length)`.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            OSError, ReadOnlyError, ClosedError, CorruptCacheError: as in `kvmmap.QuantizedKvCache.truncate`.
        """
        _, length = check_range(0, length, self._length)
        self._take_back(length)
        self._end_patterns()
        return self._length

    def _take_back(self, length: int) -> None:
        length = self._restore_states(length)
        kept = max(length - self._kept, 0)
        if self._behind is not None:
            self._behind.drop(length)
        if self._behind is None or self._own.seq_len > kept:  # fewer are there while rows wait to be written
            self._own.truncate(kept)
        self._kept = min(self._kept, length)
        for rows in self._rows:
            rows.cut(length, self._kept)
        self._length = length
        self._told = self._told[:length]
        self._regimes = rope.cut(self._regimes, length)
        self._cut_notes(length)

    def valid_prefix(self, length: int) -> int:
        """Return how many of the stored positions are valid in a prompt of `length` tokens.

        All, unless the model's RoPE depends on the length ("dynamic", "longrope"): see `rope`.
        """
        if self._rope is None:
            return self._length
        return rope.valid(self._regimes, self._length, self._rope.regime(length, rope.longest_of(self._model())))

    def _record_regime(self, start: int) -> None:
        """Note by which frequencies the keys from `start` on were rotated."""
        if self._rope is None:
            return
        longest = rope.longest_of(self._model())
        regimes = rope.extended(self._regimes, start, self._rope.regime(longest or self._length, longest))
        if not self._rope.dynamic:
            regimes = rope.extended(self._regimes, start, self._rope.regime(self._length))
        if regimes != self._regimes:
            self._regimes = regimes
            note_regimes(self._own, regimes)
