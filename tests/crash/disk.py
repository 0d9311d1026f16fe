"""A disk that knows what has reached it: every write, sync and rename in order, and the images a power loss may leave.

Files really exist (in a temporary folder, so that they can be mapped); beside them the disk keeps what of each is
durable and what is pending. Any subset of pending 512-byte sectors may have reached the disk, each in any of the
states it went through, and any of them may be torn. Writes through a map are pending like any other from the moment
of the store. Directory operations may have happened up to any point of their order, whatever became of the data.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from random import Random

SECTOR = 512


@dataclass
class Inode:
    """One file, whatever its names."""

    durable: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)  # pending changes of its size
    writes: list[tuple[int, bytes]] = field(default_factory=list)  # pending (offset, data)

    def settle(self) -> None:
        """Make everything pending durable."""
        for size in self.sizes:
            self.durable = resized(self.durable, size)
        for offset, data in self.writes:
            self.durable[offset : offset + len(data)] = data
        self.sizes.clear()
        self.writes.clear()

    def after_power_loss(self, random: Random) -> bytearray:
        """Return one of the contents that a power loss may leave."""
        content = bytearray(self.durable)
        if self.sizes and random.random() < 0.8:
            content = resized(content, random.choice(self.sizes))
        states = self._states(len(content))
        kept = random.choice([0.0, 0.02, 0.1, 0.5, 0.9, 0.98, 1.0])
        torn = random.choice([0.02, 0.1, 0.6])
        for sector, versions in states.items():
            version = content[sector * SECTOR : (sector + 1) * SECTOR]
            if random.random() < kept:
                before = version
                version = random.choice(versions) if random.random() < 0.3 else versions[-1]
                if random.random() < torn:
                    other = random.choice([versions[0], before])
                    cut = random.choice([i for i in range(SECTOR) if version[i] != other[i]] or [0])
                    version = version[:cut] + other[cut:] if random.random() < 0.5 else other[:cut] + version[cut:]
            content[sector * SECTOR : (sector + 1) * SECTOR] = version
        return content

    def _states(self, size: int) -> dict[int, list[bytearray]]:
        """Each pending sector's contents, write after write."""
        states: dict[int, list[bytearray]] = {}
        for offset, data in self.writes:
            for sector in range(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1):
                start = sector * SECTOR
                if start + SECTOR > size:
                    continue  # the growth was lost
                versions = states.setdefault(sector, [])
                base = versions[-1] if versions else self.durable[start : start + SECTOR].ljust(SECTOR, b"\0")
                after = bytearray(base)
                low, high = max(offset, start), min(offset + len(data), start + SECTOR)
                after[low - start : high - start] = data[low - offset : high - offset]
                versions.append(after)
        return states


def resized(content: bytearray, size: int) -> bytearray:
    return content[:size] + bytes(max(0, size - len(content)))


class Disk:
    """All inodes, and the names in one folder."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {}
        self.names: dict[str, int] = {}  # durable names
        self.pending_names: list[tuple[str, str, int]] = []  # ("set" or "drop", name, inode)

    def inode(self, number: int) -> Inode:
        return self.inodes.setdefault(number, Inode())

    def sync_names(self) -> None:
        self.names = self._names_after(len(self.pending_names))
        self.pending_names.clear()

    def _names_after(self, count: int) -> dict[str, int]:
        names = dict(self.names)
        for what, name, inode in self.pending_names[:count]:
            if what == "set":
                names[name] = inode
            else:
                names.pop(name, None)
        return names

    def power_loss(self, random: Random) -> dict[str, bytearray]:
        """Return names and contents as a restart may find them."""
        names = self._names_after(random.randint(0, len(self.pending_names)))
        contents = {inode: self.inode(inode).after_power_loss(random) for inode in set(names.values())}
        return {name: contents[inode] for name, inode in names.items()}

    def restart(self, folder: str, image: dict[str, bytearray]) -> None:
        """Continue from an image: write it to the folder, as the only durable state."""
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        self.__init__()  # type: ignore[misc]
        for name, content in image.items():
            path = os.path.join(folder, name)
            with open(path, "wb") as file:
                file.write(content)
            number = os.stat(path).st_ino
            self.inodes[number] = Inode(bytearray(content))
            self.names[name] = number
