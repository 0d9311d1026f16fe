"""The writer's lock where there is no file system to hold one: an object that only one writer can create.

It names its owner. A process that dies leaves it behind. The next writer on the same machine finds the owner dead and
takes the lock over; writers elsewhere get an error with the owner and the lock's age, and may break it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from typing import Any

from ...errors import CacheLockedError, KvmmapError
from ..process import boot_text, is_running
from .protocol import MissingObjectError, ObjectChangedError, Objects

LOCK_KEY = "token_ids/.kvmmap.lock"
"""Under an array, where programs that list a group's members do not look, and so do not wonder."""


_given_up: set[str] = set()
"""Tokens of locks that this process has released: a lock that a server failed to delete is free."""


def new_owner() -> dict[str, Any]:
    """Return the owner that this process writes into a lock: whether it still runs can be checked."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "token": secrets.token_hex(8),
    }


def _machine() -> str:
    """Name this boot of this machine and this space of process ids; "" where that can't be told."""
    try:
        return f"{boot_text()}/{os.stat('/proc/self/ns/pid').st_ino}" if boot_text() else ""
    except OSError:
        return ""


def read_owner(objects: Objects) -> dict[str, Any] | None:
    """Return who holds the lock; {} if the lock can't be read, and None if there is none."""
    try:
        return decode_owner(objects.get(LOCK_KEY))
    except MissingObjectError:
        return None


def decode_owner(data: Any) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        owner = json.loads(bytes(data))
        if isinstance(owner, dict):
            return owner
    return {}


def is_local(owner: dict[str, Any]) -> bool:
    """True if the owner's process id means something here."""
    return bool(owner.get("machine")) and owner.get("machine") == _machine() and isinstance(owner.get("pid"), int)


def is_dead(owner: dict[str, Any]) -> bool:
    """True if the owner certainly no longer runs."""
    return is_local(owner) and not is_running(owner["pid"])


def locked_by(url: str, owner: dict[str, Any] | None, *, breakable: bool) -> CacheLockedError:
    owner = owner or {}
    pid = owner.get("pid") if isinstance(owner.get("pid"), int) else None
    who = "another process" if pid is None else f"process {pid}"
    if pid == os.getpid() and is_local(owner):
        who = "this process"
    elif pid is not None and not is_local(owner):
        who += f" on {owner.get('host')}"
    since = f" since {owner['time']}" if isinstance(owner.get("time"), str) else ""
    ways = 'close it there, or wait for it with timeout=SECONDS (reading needs no lock: mode="r")'
    if breakable:
        ways += "; if that writer is certainly gone, open it with break_lock=True"
    return CacheLockedError(f"{url}: {who} has had it open for writing{since}; {ways}", path=url, actual=pid)


class ObjectLock:
    """A lock object that is ours."""

    def __init__(self, objects: Objects, owner: dict[str, Any]) -> None:
        self._objects = objects
        self._owner = owner

    @classmethod
    def take(cls, objects: Objects, timeout: float, *, break_lock: bool) -> ObjectLock:
        """Create the lock object, or take it over from an owner that is gone; wait for one that is not."""
        deadline = time.monotonic() + timeout
        owner = new_owner()
        data = json.dumps(owner).encode()
        pause = 0.02
        while True:
            with contextlib.suppress(ObjectChangedError):
                objects.put_if(LOCK_KEY, data, None)
                _check_that_conditions_count(objects, data)
                return cls(objects, owner)
            try:
                present, tag = objects.get_tagged(LOCK_KEY)
            except MissingObjectError:
                continue  # released just now
            other = decode_owner(present)
            if other.get("token") == owner["token"]:
                return cls(objects, owner)  # our first attempt arrived, though its answer was lost
            if break_lock or other.get("token") in _given_up or is_dead(other):
                with contextlib.suppress(ObjectChangedError):
                    objects.put_if(LOCK_KEY, data, tag)
                    return cls(objects, owner)
                continue  # another writer was faster
            if time.monotonic() >= deadline:
                raise locked_by(objects.url, other, breakable=True)
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, 1.0)

    def release(self) -> None:
        _given_up.add(self._owner["token"])  # whether the server hears of it or not
        other = read_owner(self._objects)
        if other is not None and other.get("token") == self._owner["token"]:
            self._objects.delete(LOCK_KEY)

    def abandon(self) -> None:
        """Do nothing: the object is the parent's."""


def _check_that_conditions_count(objects: Objects, data: bytes) -> None:
    """A server that ignores conditions would give the lock to everyone: see that it refuses to give it twice."""
    try:
        objects.put_if(LOCK_KEY, data, None)
    except ObjectChangedError:
        return
    objects.delete(LOCK_KEY)
    raise KvmmapError(
        f"{objects.url}: the server ignores conditions on puts (If-None-Match), so it can't keep two writers apart: "
        "write the cache to a local file, and copy it there with another program"
    )
