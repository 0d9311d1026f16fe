"""Positions and heads that callers name, checked against what a layer holds; errors in words."""

from __future__ import annotations

from .errors import HeadOutOfRangeError, NonFiniteError, PositionOutOfRangeError
from .inputs import where
from .ranges import check_range, index
from .storage.protocols import LayerStore


def check_stored_range(store: LayerStore, start: int, stop: int | None) -> tuple[int, int]:
    """Return [start, stop), up to the length if `stop` is None, if it is stored."""
    length = store.length  # once: another thread may append or truncate
    return check_range(start, length if stop is None else stop, length, layer=store.index)


def check_position(store: LayerStore, position: int, layer: int | None) -> int:
    """Return a position if it is stored. `layer` is the layer's index where there are several."""
    position = index(position, "position")
    length = store.length
    if not 0 <= position < length:
        raise PositionOutOfRangeError(
            f"position {position} is not stored{where(layer)}: there are {length}, counted from 0, and negative ones "
            "do not wrap",
            position=position,
            actual=length,
            layer=store.index,
        )
    return position


def check_head(store: LayerStore, head: int, layer: int | None) -> int:
    """Return a KV head if there is such a one."""
    head, heads = index(head, "head"), store.geometry.num_kv_heads
    if not 0 <= head < heads:
        raise HeadOutOfRangeError(
            f"head {head} does not exist{where(layer)}: there are {heads} KV heads, counted from 0",
            head=head,
            expected=heads,
            layer=store.index,
        )
    return head


def non_finite(store: LayerStore, name: str, start: int, row: int, layer: int | None) -> NonFiniteError:
    """Return the error for a flat row of what was to be appended at `start`."""
    position, head = divmod(row, store.geometry.num_kv_heads)
    codec = store.geometry.key_codec if name == "keys" else store.geometry.value_codec
    return NonFiniteError(
        f"{name} hold {codec.refused} at position {start + position}, head {head}{where(layer)}; nothing was appended",
        position=start + position,
        head=head,
        layer=store.index,
    )
