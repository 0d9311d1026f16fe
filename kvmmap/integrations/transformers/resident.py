"""One layer of a cache that keeps its keys and values as tensors on the model's device, as transformers' own caches do.

What is stored is decoded there when the layer is first used; what a model adds is appended to the tensors, and written
to the cache behind it (`write_behind`). Attention is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from ...errors import CapacityExceededError, KvmmapError, UnsupportedModelError
from ...layer import QuantizedKvLayer
from .device_codecs import can_decode, decode, to_device
from .kinds import LayerKind
from .layer import KvmmapLayer, Pattern
from .team import model_threads
from .tensors import as_array

Resident = Literal["host", "device"]
"""Where keys and values are while a model uses a cache."""

_STEP = 256  # positions by which tensors grow at least
_AT_ONCE = 4096  # positions that are decoded at a time


def check_resident(resident: str, kinds: Sequence[LayerKind] = ()) -> None:
    """Refuse what layers can't be: resident on a device, or anywhere but there and on the host.

    Raises:
        KvmmapError: it is neither "host" nor "device".
        UnsupportedModelError: some layers have index keys, or latents of which no part is rotated.
    """
    if resident not in ("host", "device"):
        raise KvmmapError(
            f'resident must be "host" or "device", not {resident!r}', expected=("host", "device"), actual=resident
        )
    if resident == "device" and any(kind.index is not None or kind.valueless for kind in kinds):
        raise UnsupportedModelError(
            "the model has layers with index keys, or latents without a rotated part, which a cache with "
            'resident="device" can\'t keep: leave resident= out',
            expected="host",
            actual=resident,
        )


class ResidentLayer(KvmmapLayer):
    """A layer whose keys and values are tensors on the device that the model runs on.

    The tensors hold what the model has computed; after reopening, what is stored of it. They are views of a larger
    buffer: what lies behind a truncation is written over by what comes next.
    """

    def __init__(
        self, kind: LayerKind, pattern: Pattern, saved: QuantizedKvLayer | None, own: QuantizedKvLayer, kept: int
    ) -> None:
        super().__init__(kind, pattern, saved, own, kept)
        self._length = kept + len(own)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # [num_kv_heads, room, dim]

    def __len__(self) -> int:
        return self._length

    @property
    def is_initialized(self) -> bool:
        """True from the first pass on: there are tensors."""
        return self._buffers is not None

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """Ignored: it follows from the tensors."""

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys, [1, num_kv_heads, n, head_dim], valid until positions are truncated; None before the first pass."""
        return None if self._buffers is None else self._buffers[0][None, :, : self._length]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values, [1, num_kv_heads, n, value_head_dim]; as `keys`."""
        return None if self._buffers is None else self._buffers[1][None, :, : self._length]

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [start, stop): views, [num_kv_heads, n, dim]."""
        assert self._buffers is not None
        return self._buffers[0][:, start:stop], self._buffers[1][:, start:stop]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return the keys and values that the new positions may see: views, on the device they came in.

        These are all that there are, or those that are in the window of a layer that has one.

        Args:
            key_states: [1, num_kv_heads, n, head_dim].
            value_states: [1, num_kv_heads, n, value_head_dim].

        Raises:
            UnsupportedModelError: a batch of several sequences.
            CapacityExceededError: more than fits.
            KvmmapError: gradients are asked for.
        """
        first = self.first_seen(self._length)
        self.append(key_states, value_states)
        keys, values = self.rows(first, self._length)
        return keys[None], values[None]

    def first_seen(self, position: int) -> int:
        """Return the first position that a query at a position sees."""
        return 0 if self.kind.window is None else max(position - self.kind.window + 1, 0)

    def append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Append to the tensors, all positions or none."""
        self._check_batch(key_states)
        if key_states.requires_grad and torch.is_grad_enabled():
            raise KvmmapError(
                "a KvmmapCache keeps numbers and passes no gradients on: run the model under torch.no_grad() or "
                "torch.inference_mode()"
            )
        length = self._length + key_states.shape[2]
        if length > self.get_max_length():
            raise CapacityExceededError(
                f"{length:,} positions are more than the {self.get_max_length():,} that the cache has room for: make "
                "it with a larger capacity",
                expected=self.get_max_length(),
                actual=length,
            )
        self._dtype = key_states.dtype
        keys, values = self._room(length, key_states)
        keys[:, self._length : length] = key_states[0]
        values[:, self._length : length] = value_states[0]
        self._length = length

    def read(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Return all positions: two tensors [1, num_kv_heads, n, dim]; from the cache before the first pass."""
        if self._buffers is None:
            return super().read(dtype, device)
        return tuple(tensor[None].to(device, dtype) for tensor in self.rows(0, self._length))  # type: ignore[return-value]

    def cut(self, length: int, kept: int) -> None:
        super().cut(length, kept)
        self._length = min(self._length, length)

    def _room(self, length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return buffers of room for `length` positions, with what the layer holds."""
        held = self._buffers
        if held is not None and held[0].shape[1] >= length:
            if held[0].dtype != like.dtype or held[0].device != like.device:
                raise UnsupportedModelError(
                    f"a layer is resident on {held[0].device} in {held[0].dtype}, and these keys are {like.dtype} on "
                    f"{like.device}: open the cache again where the model was moved or converted",
                    expected=str(held[0].dtype),
                    actual=str(like.dtype),
                )
            return held
        room = min(max(length + _STEP, length * 5 // 4), self.get_max_length())
        shape = self.own.geometry
        # No inference tensors: these could not be written to in a later pass outside torch.inference_mode().
        with torch.inference_mode(False):
            made = tuple(
                torch.empty(shape.num_kv_heads, room, dim, dtype=like.dtype, device=like.device)
                for dim in (shape.head_dim, shape.value_head_dim)
            )
        if held is None:
            self._load(made)
        else:
            for old, new in zip(held, made, strict=True):
                new[:, : self._length] = old[:, : self._length]
        self._buffers = made  # type: ignore[assignment]
        return made  # type: ignore[return-value]

    def _load(self, into: tuple[torch.Tensor, ...]) -> None:
        """Decode what is stored."""
        done = 0
        for part, first, stop in self.parts(0, self._length):
            for start in range(first, stop, _AT_ONCE):
                end = min(start + _AT_ONCE, stop)
                for tensor, rows in zip(into, _decoded(part, start, end, into[0]), strict=True):
                    tensor[:, done : done + end - start] = rows.transpose(0, 1)
                done += end - start


def _decoded(part: QuantizedKvLayer, start: int, stop: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of positions [start, stop), [n, num_kv_heads, dim], on a device."""
    shape = part.geometry
    if like.device.type == "cpu" or not all(map(can_decode, (shape.key_codec, shape.value_codec))):
        return read_on_host(part, start, stop, like)  # on a CPU the compiled core decodes faster
    return decode_on_device(part, start, stop, like)


def decode_on_device(part: QuantizedKvLayer, start: int, stop: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Return keys and values of positions [start, stop) as `read_on_host` does, transferred as they are stored.

    Args:
        part: a layer whose codecs are known here.
        start, stop: positions.
        like: a tensor of the dtype and on the device that the result shall have.
    """
    shape, rows = part.geometry, part.read_quantized(start, stop)
    split = len(shape.key_codec.arrays(shape.head_dim))
    found = [
        decode(codec, [to_device(array, like.device) for array in arrays], dim, like.dtype)
        for codec, arrays, dim in (
            (shape.key_codec, rows[:split], shape.head_dim),
            (shape.value_codec, rows[split:], shape.value_head_dim),
        )
    ]
    kept = part.recent_rows()
    if kept is not None:  # few positions, in 16 bits besides
        length = len(part)
        for first, last in ((0, kept.sinks), (length - kept.window, length)):
            first, last = max(first, start), min(last, stop)
            if first < last:
                for tensor, exact in zip(found, read_on_host(part, first, last, like), strict=True):
                    tensor[first - start : last - start] = exact
    return found


def read_on_host(part: QuantizedKvLayer, start: int, stop: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Return keys and values of positions [start, stop), decoded by the compiled core: [n, num_kv_heads, dim] each."""
    shape, found = part.geometry, []
    for read, dim in ((part.read_keys, shape.head_dim), (part.read_values, shape.value_head_dim)):
        host = torch.empty(stop - start, shape.num_kv_heads, dim, dtype=like.dtype)
        rows = as_array(host)
        read(start, stop, dtype=rows.dtype, out=rows, threads=model_threads())
        found.append(host.to(like.device))
    return found
