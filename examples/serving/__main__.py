"""Serve chat completions of a model over a library of caches, as OpenAI's API has them.

    cd examples && python -m serving caches/ --workers 2

The page at / shows the library live. SIGTERM ends the server: answers that have begun are finished first.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import uvicorn
from uvicorn.main import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

import kvmmap

from .settings import Settings

SMALL = "SmolLM2-135M-Instruct"
STARTING = 60
"""Seconds in which a process must show that it lives; the first time, it has to start Python in them."""


def main() -> None:
    """Run the server until it is told to end."""
    options = _parser().parse_args()
    shape = {"ttl": options.ttl, "remote": options.remote}
    try:  # what is wrong is said once here, and not by each process
        kvmmap.Library(options.library, options.max_bytes, **shape, write_through=False, follow_every=None).close()
    except (kvmmap.KvmmapError, OSError) as error:
        sys.exit(str(error))
    config = uvicorn.Config(
        "serving.app:create",
        factory=True,
        host=options.host,
        port=options.port,
        workers=options.workers,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=options.grace,
        timeout_worker_healthcheck=STARTING,
    )
    with tempfile.TemporaryDirectory(prefix="kvmmap-serving-") as activity:
        Settings(
            library=os.path.abspath(options.library),
            model=options.model,
            name=options.name or (Path(options.model).name if options.model else SMALL),
            max_bytes=options.max_bytes,
            **shape,
            context=options.context,
            max_tokens=options.max_tokens,
            parallel=options.parallel,
            waiting=options.waiting,
            threads=options.threads or max(1, (os.cpu_count() or 1) // options.workers),
            max_body=options.max_body,
            show_text=options.show_text,
            telemetry=options.telemetry,
            activity=activity,
        ).store()
        with config.bind_socket() as socket:
            host, port = socket.getsockname()[:2]
            print(f"{options.workers} workers at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
            # Always processes of their own, also for one worker: one that dies is replaced.
            supervisor = Multiprocess(config, sockets=[socket])
            supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        sys.exit("the model or the library could not be opened: see above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", help="the library's directory; it is made if it is not there")
    parser.add_argument("--model", help="a folder or a hub id; SmolLM2-135M by default")
    parser.add_argument("--name", help="the model's name in requests; by default that of its folder")
    parser.add_argument("--host", default="127.0.0.1", help="there are no keys: leave it, or put a proxy before it")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    parser.add_argument("--workers", type=_count, default=2, help="processes; each loads the model")
    parser.add_argument("--parallel", type=_count, default=1, help="answers that a process computes at a time")
    parser.add_argument("--waiting", type=int, default=16, help="requests that wait for a process, at most")
    parser.add_argument(
        "--threads", type=int, default=0, help="of torch in each process; the cores, shared, by default"
    )
    parser.add_argument("--context", type=_count, help="tokens of prompt and answer; what the model is made for")
    parser.add_argument("--max-tokens", type=_count, default=512, help="of an answer, where a request does not say")
    parser.add_argument("--max-body", type=_count, default=4 << 20, help="bytes of a request")
    parser.add_argument("--max-bytes", type=_count, help="the library's budget; as it is, by default")
    parser.add_argument("--ttl", type=float, help="seconds after its last use that a segment is kept")
    parser.add_argument("--remote", help="prefix of an object store to share the library through: s3://bucket/prefix")
    parser.add_argument("--grace", type=int, default=30, help="seconds that begun answers have at the end")
    parser.add_argument("--show-text", action="store_true", help="show the beginning of prompts on the page")
    parser.add_argument("--telemetry", action="store_true", help="report to OpenTelemetry's global meter provider")
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    main()
