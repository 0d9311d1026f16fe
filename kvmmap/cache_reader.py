"""A whole cache, read: dimensions, metadata, token ids, rows by layer; and whether it is sound and current.

Which kind of storage it has is not known here: `opening` decides that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import PositionOutOfRangeError
from .format import NO_TOKEN
from .geometry import CacheGeometry
from .inputs import check_quantized
from .layer import QuantizedKvLayer
from .layers import Layers
from .metadata import ModelInfo, copied, document
from .ranges import compression_ratio, index
from .states import StateReader
from .storage.protocols import Progress, Storage, VerifyReport


class CacheReader(StateReader):
    """The reading half of `QuantizedKvCache`."""

    def _attach(self, storage: Storage) -> None:
        self._storage = storage
        self._layers = Layers(storage)

    # Dimensions

    @property
    def layers(self) -> Layers:
        """The layers, by index from 0."""
        return self._layers

    @property
    def geometry(self) -> CacheGeometry:
        """The shape of everything."""
        return self._storage.geometry

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return len(self._layers)

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of every layer that has rows.

        Raises:
            ShapeMismatchError: layers differ; names them. `layers[i].num_kv_heads` is one layer's.
        """
        return self._storage.geometry.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Numbers in a key row of every layer. Raises as `num_kv_heads`."""
        return self._storage.geometry.head_dim

    @property
    def value_head_dim(self) -> int:
        """Numbers in a value row of every layer. Raises as `num_kv_heads`."""
        return self._storage.geometry.value_head_dim

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer, as of the last `refresh` where another process writes."""
        return self._storage.seq_len

    def __len__(self) -> int:
        """`seq_len`."""
        return self.seq_len

    @property
    def capacity(self) -> int:
        """Positions reserved."""
        return self._storage.geometry.capacity

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes and scales over the whole capacity, all layers."""
        return self._storage.geometry.memory_bytes

    @property
    def fp32_memory_bytes(self) -> int:
        """Bytes that the same capacity takes as f32."""
        return self._storage.geometry.fp32_memory_bytes

    @property
    def compression_ratio(self) -> float:
        """`fp32_memory_bytes` over `memory_bytes`; 1.0 at capacity 0."""
        return compression_ratio(self.fp32_memory_bytes, self.memory_bytes)

    @property
    def storage(self) -> Storage:
        """The storage of the rows: for this package and its extensions."""
        return self._storage

    @property
    def path(self) -> str | None:
        """Absolute path of its file; None in memory."""
        return self._storage.path

    @property
    def writable(self) -> bool:
        """True if this handle may append."""
        return self._storage.writable

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._storage.closed

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(self.path)
        if self.closed:
            return f"<QuantizedKvCache {where}, closed>"
        return f"<QuantizedKvCache {where}: {self.num_layers} layers, {self.seq_len}/{self.capacity} positions>"

    # Metadata and token ids

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of your own notes; assign to replace them (saved with the next commit).

        Raises (on assignment):
            MetadataError: not plain JSON, or more than there is room for; the old notes stay.
        """
        self._storage.check()
        notes: dict[str, Any] = copied(self._storage.document.metadata)
        return notes

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any]) -> None:
        self._storage.set_document(document(metadata, self._storage.document.model))

    @property
    def model(self) -> ModelInfo | None:
        """What made the cache, if that was recorded; assign to replace it (saved with the next commit)."""
        self._storage.check()
        return self._storage.document.model

    @model.setter
    def model(self, model: ModelInfo | None) -> None:
        self._storage.set_document(document(self._storage.document.metadata, model))

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len], a copy; -1 where none was given."""
        storage = self._storage
        storage.check()
        version = storage.version()
        length = self.seq_len
        recorded = min(storage.token_len, length)
        found = storage.read_tokens(recorded)
        storage.validate(version)
        if recorded == length:
            return found
        ids = np.full(length, NO_TOKEN, np.int32)
        ids[:recorded] = found
        return ids

    @property
    def token_len(self) -> int:
        """Positions, from 0, whose token ids are recorded (as -1, where they were skipped); at most `seq_len`."""
        return min(self._storage.token_len, self.seq_len)

    # State

    def refresh(self) -> bool:
        """Load what other processes have published since; True if anything changed.

        Raises:
            CacheChangedError: the file was replaced by another (resized): open it again.
            ClosedError: the cache is closed.
        """
        return self._storage.refresh()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Compare every committed block with its checksum.

        Args:
            progress: called with (bytes done, bytes in all) now and then.

        Returns:
            What was checked, and what is damaged. Damage raises nothing.

        Raises:
            CacheChangedError: the writer truncated meanwhile: refresh, and verify again.
            ClosedError: the cache is closed.
        """
        return self._storage.verify(progress)

    # Reading

    def get_key(self, layer: int, position: int, head: int) -> NDArray[np.float32]:
        """Return one decoded key row, f32 [head_dim].

        Raises:
            LayerOutOfRangeError, PositionOutOfRangeError, HeadOutOfRangeError: there is none.
        """
        return self._row_layer(layer, position).get_key(position, head)

    def get_value(self, layer: int, position: int, head: int) -> NDArray[np.float32]:
        """Return one decoded value row, f32 [value_head_dim]; raises as `get_key`."""
        return self._row_layer(layer, position).get_value(position, head)

    def _row_layer(self, layer: int, position: int) -> QuantizedKvLayer:
        found = self._layers[self._layers.check(layer)]
        length = self.seq_len
        if index(position, "position") >= length:
            # A position that only some layers have is not part of the cache.
            raise PositionOutOfRangeError(
                f"position {position} is not stored: {length} are complete in every layer",
                position=position,
                actual=length,
                layer=layer,
            )
        return found

    def facts(self) -> dict[str, Any]:
        """Return the storage's description: kind, sizes on disk, commit state. For `inspect`."""
        self._storage.check()
        return self._storage.facts()

    def _check(self) -> None:
        """Assert what always holds."""
        lengths = [store.length for store in self._storage.layers]
        assert self.seq_len == min(lengths)
        assert 0 <= min(lengths) <= max(lengths) <= self.capacity
        assert 0 <= self._storage.token_len <= self.capacity
        if not self.writable:
            assert min(lengths) == max(lengths)
        for found in self.checkpoints:
            assert 0 <= found.position <= self.seq_len
        assert len(self.checkpoints) <= max(self.checkpoint_slots, 0)
        if self.states and not self.writable:
            assert self.seq_len == self.restorable()
        for layer in self._layers:
            if not layer.geometry.has_rows:
                continue
            check_quantized(layer.read_quantized(), layer.geometry, None)
