"""Images, videos and audio in a prompt: which tokens stand for which of them, and a digest of what stands behind.

Placeholders of two images have the same token ids. What tells the images apart are the tensors that a processor makes
of them. An *item* is what one image, video or piece of audio takes up of a sequence: from its first placeholder to its
last. Where tensors can't be split by item, all of a kind are one item.

Pure: knows token ids and arguments of models; no caches, models or hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from .arguments import has_effect

KINDS = ("image", "video", "audio")


class Item(NamedTuple):
    """What one image, video or piece of audio takes up of a sequence."""

    start: int
    """Position of its first placeholder."""

    stop: int
    """The position behind its last one."""

    digest: str
    """Its kind, a colon, and the XXH3 (128 bits, hexadecimal) of what stands behind it."""

    @property
    def kind(self) -> str:
        """ "image", "video" or "audio"."""
        return self.digest.partition(":")[0]

    def moved(self, by: int) -> Item:
        """Return the item that many positions later."""
        return self._replace(start=self.start + by, stop=self.stop + by)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The items of one kind in a prompt, and what of a model's arguments belongs to which."""

    items: tuple[Item, ...]
    """In the order of the prompt."""

    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """How many rows of each argument belong to each item."""

    names: frozenset[str] = frozenset()
    """All arguments of this kind, also those that belong to no item alone."""


def media_tokens(config: Any) -> dict[str, frozenset[int]]:
    """Return the token ids that stand for something else than themselves, such as a part of an image, by kind.

    Args:
        config: a model's; those of its parts count as well.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}) or {})]
    found: dict[str, frozenset[int]] = {}
    for kind in KINDS:
        names = [f"{kind}_token_id", f"{kind}_token_index", *(["image_patch_id"] if kind == "image" else [])]
        numbers = (getattr(part, name, None) for part in parts for name in names)
        if ids := frozenset(number for number in numbers if isinstance(number, int)):
            found[kind] = ids
    return found


def groups(
    given: Mapping[str, Any], ids: NDArray[Any], tokens: Mapping[str, frozenset[int]], start: int = 0
) -> list[Group]:
    """Return the images, videos and audio of a prompt, or of a part of one.

    Args:
        given: arguments of a model or of `generate` by name; those without effect on keys and values don't count.
        ids: token ids, [n].
        tokens: placeholders by kind.
        start: the position of the first of the ids.

    Returns:
        Groups whose items cover all placeholders of their kind. A kind whose tensors are not there has none, and so
        has every kind if an argument's content can't be seen.
    """
    effects = {name: value for name, value in given.items() if has_effect(name, value)}
    if any(not isinstance(value, torch.Tensor | list | tuple) for value in effects.values()):
        return []
    types = {name: effects.pop(name) for name in list(effects) if name.endswith("token_type_ids")}
    marks = {kind: np.isin(ids, list(numbers)) for kind, numbers in tokens.items()}
    present = [kind for kind, marked in marks.items() if marked.any()]
    found = []
    for kind in present:
        own = {name: value for name, value in effects.items() if _kind_of(name, present) == kind}
        if any(isinstance(value, torch.Tensor) for value in own.values()):
            found.append(_group(kind, own, np.flatnonzero(marks[kind]), types, len(ids), start))
    if len(found) < len({_kind_of(name, present) for name in effects}):
        return []
    return found


def digested(given: Mapping[str, Any], ids: NDArray[Any], tokens: Mapping[str, frozenset[int]]) -> tuple[Item, ...]:
    """Return the items of a prompt in its order; see `groups`."""
    return tuple(sorted(item for group in groups(given, ids, tokens) for item in group.items))


def without_first(given: Mapping[str, Any], found: Sequence[Group], length: int) -> dict[str, Any]:
    """Return a prompt's arguments without those of items among its first `length` tokens."""
    left = dict(given)
    for group in found:
        done = sum(item.stop <= length for item in group.items)
        if done == len(group.items):
            for name in group.names:
                left.pop(name, None)
        elif done:
            for name, rows in group.rows.items():
                left[name] = given[name][sum(rows[:done]) :]
    return left


def typed_around(types: torch.Tensor, start: int, stop: int) -> tuple[int, int]:
    """Return the range of tokens around [start, stop) whose types are not zero: processors mark what frames an image.

    Args:
        types: of all tokens, [n].
        start, stop: of an item.
    """
    plain = (types == 0).cpu().numpy()
    before, behind = np.flatnonzero(plain[:start]), np.flatnonzero(plain[stop:])
    return (int(before[-1]) + 1 if len(before) else 0), (stop + int(behind[0]) if len(behind) else len(plain))


def odd_type(given: Mapping[str, Any], items: Sequence[Item], start: int, count: int) -> int | None:
    """Return the first of the new tokens that has a type of its own without being part of an item; None: there is none.

    Args:
        given: arguments of a model by name.
        items: of the sequence.
        start: the position of the first new token.
        count: new tokens.
    """
    for name, value in given.items():
        if name.endswith("token_type_ids") and isinstance(value, torch.Tensor) and value.numel():
            types = value.reshape(-1)[-count:]
            odd = (types != 0).cpu().numpy()
            for item in items:
                if item.stop > start and item.start < start + len(types):
                    first, stop = max(item.start - start, 0), min(item.stop - start, len(types))
                    odd[slice(*typed_around(types, first, stop))] = False
            if odd.any():
                return int(np.argmax(odd))
    return None


def _kind_of(name: str, present: Sequence[str]) -> str:
    """The kind of media that an argument belongs to, of those that a prompt has."""
    if len(present) == 1:
        return present[0]
    if "video" in name or "second_per_grid" in name:
        return "video"
    return "audio" if any(part in name for part in ("audio", "feature", "input_values")) else "image"


def _group(
    kind: str,
    own: Mapping[str, Any],
    marked: NDArray[np.intp],
    types: Mapping[str, Any],
    count: int,
    start: int,
) -> Group:
    sizes, rows = _split(own, marked)
    ends = np.cumsum(sizes)
    items = []
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        first, stop = int(marked[end - size]), int(marked[end - 1]) + 1
        hashed = xxhash.xxh3_128(f"{kind} {size} {stop - first}".encode())
        for name, value in sorted(own.items()):
            if name in rows:
                before = sum(rows[name][:number])
                value = value[before : before + rows[name][number]]
            hash_value(hashed, name, value)
        for name, value in sorted(types.items()):
            typed = value.reshape(-1)[-count:]
            hash_value(hashed, name, typed[slice(*typed_around(typed, first, stop))])
        items.append(Item(start + first, start + stop, f"{kind}:{hashed.hexdigest()}"))
    return Group(items=tuple(items), rows=rows, names=frozenset(own))


def _split(own: Mapping[str, Any], marked: NDArray[np.intp]) -> tuple[list[int], dict[str, list[int]]]:
    """Return how many placeholders each item has, and how many rows of each argument.

    Tensors are split only where each item's placeholders are known: by grids of patches, or because each item has a
    run of placeholders, or all items are equally large. Otherwise all are one item.
    """
    tensors = {name: value for name, value in own.items() if isinstance(value, torch.Tensor) and value.ndim}
    grid = next((value for name, value in tensors.items() if name.endswith("grid_thw") and value.ndim == 2), None)
    if grid is not None:
        units = grid.prod(-1).tolist()
        total, sizes = sum(units), [len(marked) * unit // sum(units) for unit in units]
        exact = all(size and size * total == len(marked) * unit for size, unit in zip(sizes, units, strict=True))
        count = len(units)
        rows = {name: units if len(value) == total else [1] * count for name, value in own.items() if _long(value)}
        if exact and all(len(own[name]) in (total, count) for name in rows):
            return sizes, rows
        return [len(marked)], {}
    count = max((len(value) for value in tensors.values() if value.ndim > 2), default=1)
    rows = {name: [1] * count for name, value in own.items() if _long(value) and len(value) == count}
    runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(marked) > 1, [True]]))).tolist()
    if count == len(runs):
        return runs, rows
    alike = all(bool((value == value[:1]).all()) for value in tensors.values() if value.ndim <= 2)
    if alike and len(tensors) == len(rows) and len(marked) % count == 0:
        return [len(marked) // count] * count, rows
    return [len(marked)], {}


def _long(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.ndim > 0) or isinstance(value, list | tuple)


def hash_value(hashed: Any, name: str, value: Any) -> None:
    """Add an argument of a model to a digest: its name, and the dtypes, shapes and bytes of its tensors."""
    for part in _tensors(value):
        hashed.update(f"\0{name} {part.dtype} {list(part.shape)}\0".encode())
        hashed.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    else:
        yield torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)
