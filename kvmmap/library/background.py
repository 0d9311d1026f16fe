"""The thread that shares a library in the background: follows the log, and pushes what was committed."""

from __future__ import annotations

import os
import threading
import time

from ..errors import KvmmapError
from .sharing import Sharing

LONGEST_PAUSE = 60.0
"""Seconds between attempts while the store can't be reached, at most."""


class Background:
    """Shares while a library is open. The thread starts with the first `kick`, and in forked processes anew.

    Args:
        sharing: what to do.
        interval: seconds between looks at the log.
        push: also push.
    """

    def __init__(self, sharing: Sharing, interval: float, *, push: bool) -> None:
        self._sharing = sharing
        self._interval = interval
        self._push = push
        self._mutex = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._pid = 0
        self.error: KvmmapError | OSError | None = None
        """Why the last attempt failed; None if it did not."""

    def kick(self) -> None:
        """Let the thread look at once: something was committed, or is looked for."""
        with self._mutex:
            if self._pid != os.getpid():
                self._wake, self._thread, self._pid = threading.Event(), None, os.getpid()
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._run, name="kvmmap library", daemon=True)
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        pause = self._interval
        while not self._stopping:
            self._wake.clear()
            try:
                if self._push:
                    self._sharing.push()
                else:
                    self._sharing.follow()
                self.error, pause = None, self._interval
            except (KvmmapError, OSError) as error:
                # The store is away, or the disk is full: sessions continue without it, and it is tried again.
                self.error, pause = error, min(max(pause, 0.5) * 2, LONGEST_PAUSE)
                time.sleep(min(pause, 0.5))
            self._wake.wait(pause)

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        with self._mutex:
            self._stopping = True
            thread, mine = self._thread, self._pid == os.getpid()
        self._wake.set()
        if thread is not None and mine and thread is not threading.current_thread():
            thread.join()
