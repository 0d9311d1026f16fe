"""A sequence whose items are made when they are first asked for: the layers of an open storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, cast, overload

from .locks import Lock

T_co = TypeVar("T_co", covariant=True)


class OnDemand(Sequence[T_co], Generic[T_co]):
    """Items 0 to `count` - 1.

    Args:
        count: how many there are.
        make: makes the item of a number; called once for each, under the lock.
        lock: held while an item is made. A thread that holds it sees the same items made until it releases it.
    """

    def __init__(self, count: int, make: Callable[[int], T_co], lock: Lock) -> None:
        self._items: list[T_co | None] = [None] * count
        self._missing = count
        self._make = make
        self._lock = lock

    def made(self) -> Sequence[T_co]:
        """Return those that have been made."""
        if not self._missing:
            return cast(Sequence[T_co], self._items)
        return [item for item in self._items if item is not None]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | list[T_co]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self._items)))]
        item = self._items[index]
        if item is None:
            with self._lock:
                item = self._items[index]
                if item is None:
                    number = range(len(self._items))[index]
                    item = self._items[number] = self._make(number)
                    self._missing -= 1
        return item

    def __iter__(self) -> Iterator[T_co]:
        # A step that is pushed to every layer goes through them several times.
        return iter(self[:] if self._missing else cast(Sequence[T_co], self._items))
