"""The identity of this boot of the machine, and which processes run on it."""

from __future__ import annotations

import os
import sys
from functools import cache


@cache
def boot_text() -> str:
    """Return the UUID of this boot as the system writes it; "" where it has none."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        import subprocess  # it takes longer to load than a cache to open

        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


@cache
def boot_id() -> int:
    """Return 128 bits that change when the machine starts anew; random where the system has none."""
    digits = boot_text().replace("-", "")  # the uuid module takes longer to load than a cache to open
    try:
        if len(digits) == 32:
            return int(digits, 16)
    except ValueError:
        pass
    return int.from_bytes(os.urandom(16), "little")


def is_running(pid: int) -> bool:
    """Return False if there is certainly no process of this id here."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
