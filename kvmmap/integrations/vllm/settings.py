"""What a user tells the connector, in `kv_connector_extra_config`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ...errors import KvmmapError
from ...library import Library


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The keys of `kv_connector_extra_config`."""

    path: str
    """Path of the library's directory, which is created if it does not exist."""

    max_bytes: int | None = None
    """Bytes on the disk to keep at most; what is worth least goes first. None: no limit of its own."""

    ttl: float | None = None
    """Seconds after their last use for which prompts are kept."""

    codec: str = "native"
    """"native" keeps keys and values bit by bit; else a preset of `kvmmap.create`, such as "fidelity"."""

    salt: str | None = None
    """A secret: equal prompts of engines with another salt don't match."""

    fingerprint: str | None = None
    """What identifies the weights, where their files can't be read; computed from the files if not given."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Read them.

        Raises:
            KvmmapError: a key is unknown, or `path` is missing.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown or "path" not in options:
            what = f"{unknown[0]!r} is not a key" if unknown else "'path' is missing"
            raise KvmmapError(f"kv_connector_extra_config: {what}; there are {', '.join(known)}")
        return cls(**options)

    def library(self) -> Library:
        """Open the library.

        Raises:
            NotACacheError, VersionMismatchError, CorruptCacheError, OSError: as `Library`.
        """
        return Library(self.path, max_bytes=self.max_bytes, ttl=self.ttl)
