"""Replacing a group's root, in one conditional put: the moment from which a commit counts."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import NoReturn

from ...errors import CacheChangedError, FormatError, StoreError
from ..objects.protocol import ObjectChangedError
from .handle import GroupHandle
from .layout import ROOT_KEY
from .root import Root

ATTEMPTS = 8
"""How often a commit is repeated because other programs have changed the group's attributes in between."""


class RootCommit:
    """The only one that replaces the root of a group.

    Args:
        handle: the group.
    """

    def __init__(self, handle: GroupHandle) -> None:
        self._handle = handle
        self._doubtful: tuple[Root, bytes] | None = None
        """A root that was put, and whose put failed or was not answered."""
        self.overtaken = False
        """True if another writer has committed although this one holds the lock."""

    def put(self, root: Root) -> None:
        """Make another root count. Everything that it refers to is stored.

        Raises:
            CacheChangedError: another writer has committed.
            OSError: it is unknown whether it counts; `resolve` finds out.
        """
        handle = self._handle
        for _ in range(ATTEMPTS):
            data = root.encode()
            self._doubtful = root, data
            try:
                handle.tag = handle.objects.put_if(ROOT_KEY, data, handle.tag)
                break
            except ObjectChangedError:
                if not self.resolve():
                    self.overtaken = True
                    self.refuse_overtaken()
                if handle.root.commit_id == root.commit_id:
                    root = handle.root  # it had arrived: the answer to an earlier attempt was lost
                    break
                root = replace(root, others=handle.root.others)
        else:
            raise StoreError(f"{handle.path}: other programs keep changing the group's attributes", path=handle.path)
        handle.objects.settle()
        self._doubtful = None
        handle.root = root

    def resolve(self) -> bool:
        """Find out whether a root counts whose put failed or was not answered. Take over attributes that other programs
        have changed.

        Returns:
            False if another writer has committed.
        """
        if self._doubtful is None:
            return True
        handle, (root, data) = self._handle, self._doubtful
        present, tag = handle.objects.get_tagged(ROOT_KEY)
        self._doubtful = None
        if bytes(present) == data:
            handle.root, handle.tag = root, tag
            return True
        with contextlib.suppress(FormatError):
            found = Root.decode(present, handle.path)
            for ours in (handle.root, root):
                if found.commit_id == ours.commit_id:
                    handle.root, handle.tag = replace(ours, others=found.others), tag
                    return True
        return False

    def refuse_overtaken(self) -> NoReturn:
        """Raise CacheChangedError because another writer has committed."""
        raise CacheChangedError(
            f"{self._handle.path}: another writer has changed it although this one holds the lock (which another "
            "process must have broken); nothing more can be stored: open it again",
            path=self._handle.path,
        )
