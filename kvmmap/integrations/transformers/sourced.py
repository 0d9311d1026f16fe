"""A sequence whose model's decoder attends to a source: whether a pass or a prompt has the one that rows belong to.

The source's own rows are computed in each process (`cross`); what is recorded of it is a digest (`source_record`).
"""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UnsupportedModelError
from .cross import CrossLayer, become_encoder_decoder, clear_cross_attention
from .illustrated import IllustratedSequence
from .opening import NOTES, note_source
from .source_record import SourceRecord
from .sources import Parts, digest_of_inputs, digest_of_output, digests_by_token, has_source, parted


@dataclass(slots=True)
class _Seen:
    """What the pass that runs was given of a source."""

    inputs: dict[str, Any] | None = None
    """As `Parts.inputs`, of the outermost part of the model that has some."""

    outer: torch.Tensor | None = None
    """The encoder's output as the outermost part of the model got it."""

    inner: torch.Tensor | None = None
    """The same as the innermost part did: a projection may lie between."""

    mask: torch.Tensor | None = None
    by_token: torch.Tensor | None = None
    checked: bool = False


class SourcedSequence(IllustratedSequence):
    """What a cache of an encoder-decoder, or of a model with cross-attention layers, can do besides."""

    _source_record: SourceRecord | None = None
    """None: the model has no source."""

    _model: Callable[[], Any]

    def _make_media(self, config: Any, metadata: Mapping[str, Any], length: int) -> None:
        """Read what is recorded of the first `length` positions."""
        if config is None or not has_source(config):
            super()._make_media(config, metadata, length)
            return
        # Placeholders of images are the encoder's tokens, or say nothing: the source is compared as a whole.
        super()._make_media(None, metadata, length)
        self._source_record = SourceRecord.of((metadata.get(NOTES) or {}).get("source"), length)
        self._announced_source: str | None = None
        self._returns_output = getattr(config, "model_type", None) == "idefics"
        self._seen = _Seen()
        self._trusted: tuple[Any, Any, str] | None = None  # an output, its version and mask, and their digest
        if not any(isinstance(layer, CrossLayer) for layer in self._layers):
            become_encoder_decoder(self)

    def _cut_notes(self, length: int) -> None:
        """Forget what is not about the first `length` positions."""
        self._media.cut(length)
        if self._source_record is not None:
            self._source_record.cut(length)
            if not length:
                clear_cross_attention(self)

    def _copy_notes(self, target: Any, length: int) -> None:
        """Record with a copy of the first positions what they were computed from."""
        super()._copy_notes(target, length)
        if self._source_record is not None and self._source_record.known:
            note_source(target, SourceRecord.of(self._source_record.notes(), length).notes())

    @property
    def has_source(self) -> bool:
        """True if the model is an encoder-decoder, or has cross-attention layers."""
        return self._source_record is not None

    # What passes are given

    def _own_part(self, model: torch.nn.Module, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments of a pass that are about the decoder's tokens, and take note of the others."""
        if self._source_record is None:
            if isinstance(given.get("encoder_hidden_states"), torch.Tensor):
                raise UnsupportedModelError(
                    f"{type(model).__name__} is given encoder_hidden_states, and its config has no cross-attention: "
                    "set add_cross_attention=True in the config before the cache is made",
                    actual="encoder_hidden_states",
                )
            return given
        part = parted(given, encodes(model))
        if self._pass.begins(model):
            self._seen = _Seen()
            if not self._length:
                clear_cross_attention(self)
        seen = self._seen
        if part.inputs and seen.inputs is None and seen.outer is None:
            seen.inputs = part.inputs
        if part.output is not None:
            seen.outer = part.output if seen.outer is None else seen.outer
            seen.inner, seen.mask = part.output, part.mask
        if part.by_token is not None and seen.by_token is None:
            seen.by_token = part.by_token
        return part.own

    def _check_announced(self) -> None:
        """Refuse a pass of another model, or with another source; raises as `_check_source`."""
        super()._check_announced()
        if self._source_record is not None and not self._seen.checked:
            self._check_source(self._source_record)

    def _check_source(self, record: SourceRecord) -> None:
        """Compare the source of the pass that runs, and record it.

        Raises:
            UnsupportedModelError: rows were computed with another one, or it is not known with which.
        """
        seen, changed = self._seen, not self._length
        seen.checked = True
        inputs = digest_of_inputs(seen.inputs or {})
        output = self._digest_of_output(seen)
        if output is not None and inputs is None:
            inputs, self._announced_source = self._announced_source, None
        if not self._length:
            record.become(inputs, output)
        elif inputs is None and output is None and self._has_cross_rows():
            pass  # the rows that this process has are those of the recorded source
        elif not record.same(inputs, output):
            self._refuse_source(record, inputs is None and output is None)
        elif output is not None and output not in record.outputs:
            record.outputs.append(output)
            changed = True
        by_token = digests_by_token(seen.by_token, max(self._pass.count, 1), self._length)
        if record.extend(self._length, by_token) or changed:
            self._note_source(record)

    def _note_source(self, record: SourceRecord) -> None:
        """Keep what is known of the source with the rows.

        Rows of a file outlive a process that is killed, and notes only if they are committed: so they are, before rows
        are appended that belong to them.
        """
        note_source(self._own, record.notes())
        if self._own.path is not None and os.path.isfile(self._own.path):
            self._settle()
            self._own.flush()

    def _digest_of_output(self, seen: _Seen) -> str | None:
        if seen.outer is None or seen.inner is None:
            return None
        state = None if seen.outer.is_inference() else (seen.outer._version, digest_of_inputs({"mask": seen.mask}))
        if self._trusted is not None and self._trusted[0]() is seen.outer and self._trusted[1] == state is not None:
            return self._trusted[2]
        found = digest_of_output(seen.inner, seen.mask)
        self._trusted = weakref.ref(seen.outer), state, found
        return found

    def _has_cross_rows(self) -> bool:
        """Whether the model takes the source's rows from the cache, and they are there."""
        found = [layer.is_initialized for layer in self._layers if isinstance(layer, CrossLayer)]
        return bool(found) and all(found)

    def _refuse_source(self, record: SourceRecord, absent: bool) -> None:
        if absent:
            what = "the pass has no source, and the stored positions were computed with one"
        elif not record.known:
            what = "it is not known which source the stored positions were computed with"
        else:
            what = "the model is given another source than the stored positions were computed with"
        raise UnsupportedModelError(
            f"{self!r}: {what} (an encoder's output, an image, a protein). Keys and values depend on it: give the same "
            "again; or call reuse(cache, **inputs) with all inputs of generate, which drops the positions",
            expected=record.notes(),
        )

    def note_output(self, output: Any) -> None:
        """Take note of what a pass returned: IDEFICS returns its encoder's output, and is given it in the next pass."""
        record = self._source_record
        if record is None or not self._returns_output or self._seen.inputs is None or output is None:
            return
        images = getattr(output, "image_outputs", None)  # since transformers 5.24
        names = ("image_hidden_states",) if images is None else ("last_hidden_state", "pooler_output")
        tensors = [getattr(output if images is None else images, name, None) for name in names]
        found = {digest_of_output(tensor, None) for tensor in tensors if isinstance(tensor, torch.Tensor)}
        if not found <= {*record.outputs}:
            record.outputs += sorted(found - {*record.outputs})
            self._note_source(record)

    # What prompts are given

    def announce_source(self, encoding: bool, inputs: Mapping[str, Any]) -> None:
        """Take note of what `generate` was called with, before it encodes that; hooks call it.

        Args:
            encoding: True if they are arguments of a whole encoder-decoder.
            inputs: arguments by name.
        """
        if self._source_record is not None:
            self._announced_source = digest_of_inputs(parted(inputs, encoding).inputs)

    def own_ids(self, input_ids: Any, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the ids of the decoder's tokens among the arguments of `reuse`, and all others by name."""
        others, model = dict(inputs), self._model()
        if self._source_record is None:
            return input_ids, others
        if encodes(model) and others.get("decoder_input_ids") is not None:
            ids = others.pop("decoder_input_ids")
            return ids, others | ({} if input_ids is None else {"input_ids": input_ids})
        if getattr(getattr(model, "config", None), "model_type", None) == "blip" and input_ids is not None:
            # Its `generate` replaces the first token, and leaves the last one, [SEP], out.
            ids = np.array(torch.as_tensor(input_ids)).reshape(-1)
            return np.concatenate([[model.config.text_config.bos_token_id], ids[1:-1]]).astype(ids.dtype), others
        return input_ids, others

    def same_source(self, inputs: Mapping[str, Any]) -> bool | None:
        """Return whether a prompt has the source that rows were computed with; None: that can't be told.

        Args:
            inputs: what `generate` will be given besides the decoder's token ids, by name.
        """
        record = self._source_record
        if record is None or not self._length:
            return True
        part = self._prompt_part(inputs)
        output = None if part.output is None else digest_of_output(part.output, part.mask)
        found = digest_of_inputs(part.inputs)
        optional = record.empty or any(isinstance(layer, CrossLayer) for layer in self._layers)
        if found is None and output is None and not optional:
            return None  # there is one always, and it is not given
        return record.same(found, output)

    def agreeing(self, count: int, ids: NDArray[Any], inputs: Mapping[str, Any]) -> int:
        """As of `IllustratedSequence`; none, with another source."""
        if self._source_record is None:
            return super().agreeing(count, ids, inputs)
        if not self.same_source(inputs):
            return 0
        return self._source_record.agreeing(digests_by_token(self._prompt_part(inputs).by_token, count))

    def _prompt_part(self, inputs: Mapping[str, Any]) -> Parts:
        return parted(inputs, encodes(self._model()))


def refuse_sources(caches: Iterable[SourcedSequence]) -> None:
    """Refuse caches of encoder-decoders, and of models with cross-attention layers, as a batch."""
    if any(cache.has_source for cache in caches):
        raise UnsupportedModelError(
            "a KvmmapBatch keeps no cross-attention: generate each sequence of an encoder-decoder, or of a model with "
            "cross-attention layers, with its own KvmmapCache"
        )


def encodes(model: Any) -> bool:
    """Return whether a model is a whole encoder-decoder: its `input_ids` are the encoder's."""
    if hasattr(model, "get_base_model"):  # peft's
        model = model.get_base_model()
    cls: Any = type(model)
    return isinstance(model, torch.nn.Module) and _encodes(cls)


@cache
def _encodes(cls: Any) -> bool:
    return "decoder_input_ids" in inspect.signature(cls.forward).parameters
