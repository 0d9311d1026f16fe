"""What the server was started with, as the processes that answer get it: in an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Self

VARIABLE = "KVMMAP_SERVING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The server's options; `__main__` explains them."""

    library: str
    model: str | None
    name: str
    max_bytes: int | None
    ttl: float | None
    remote: str | None
    context: int | None
    max_tokens: int
    parallel: int
    waiting: int
    threads: int
    max_body: int
    show_text: bool
    telemetry: bool
    activity: str
    """A folder that all processes write the state of their requests to."""

    def store(self) -> None:
        """Hand them to the processes that are started from now on."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def load(cls) -> Self:
        """Return what `store` stored."""
        return cls(**json.loads(os.environ[VARIABLE]))
