"""Serve attention over a cache that another process writes, by many reading processes behind one HTTP port.

    python examples/readers/server.py chat.kvm --workers 4

POST / with {"layer": 0, "queries": [num_q_heads lists of head_dim numbers]} answers with the output of each head, the
positions that were attended over, and the process that did it.
"""

import argparse
import json
import multiprocessing
import os
import signal
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np

import kvmmap

ATTEMPTS = 5


class Reader:
    """One process's view of a cache: opened once, and brought up to date for every request."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.cache = kvmmap.open(path)

    def attend(self, layer: int, queries: np.ndarray) -> tuple[int, np.ndarray]:
        """Refresh, and attend over all positions; return their number and the output."""
        for _ in range(ATTEMPTS):
            try:
                self.cache.refresh()
                length = self.cache.seq_len
                if not length:
                    return 0, np.zeros(queries.shape, np.float32)
                # One thread: the other processors have requests of their own.
                return length, self.cache.layers[layer].attend(queries, positions=(0, length), threads=1)
            except kvmmap.CacheChangedError:
                # The writer truncated during the read, or the file was replaced (resize).
                self.cache.close()
                self.cache = kvmmap.open(self.path)
        raise kvmmap.CacheChangedError(f"{self.path}: changed {ATTEMPTS} times while it was read")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    reader: Reader

    def do_POST(self) -> None:
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            queries = np.array(asked["queries"], np.float32)[None]
            length, output = self.reader.attend(asked["layer"], queries)
            self.answer(200, {"output": output[0].tolist(), "positions": length, "process": os.getpid()})
        except (kvmmap.ShapeMismatchError, kvmmap.LayerOutOfRangeError, KeyError, TypeError, ValueError) as error:
            self.answer(400, {"error": str(error)})  # the client's mistake, in words
        except kvmmap.KvmmapError as error:
            self.answer(503, {"error": str(error)})

    def answer(self, code: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


class Server(HTTPServer):
    """Several processes listen at one port; the system distributes requests."""

    allow_reuse_port = True


def work(path: str, port: int) -> None:
    """Answer requests until the process ends."""
    Handler.reader = Reader(path)  # in this process: a cache is opened after a fork, not before
    Server(("127.0.0.1", port), Handler).serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--port", type=int, default=0, help="any free one by default")
    args = parser.parse_args()
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", args.port))
        port = reserved.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(args.path, port), daemon=True) for _ in range(args.workers)]
        for worker in workers:
            worker.start()
        print(f"{args.workers} workers at http://127.0.0.1:{port}", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: exit())  # an orderly end: it takes the workers along
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
