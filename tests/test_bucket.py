"""Caches in an object store: a real S3 server, conditional puts, refusals, and the number of requests."""

from __future__ import annotations

import itertools
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers.seaweed import BUCKET, READER_KEYS, Server
from helpers.support import check_filled, make_file, rows, run_python
from zarr.storage import ObjectStore

import kvmmap
from kvmmap.storage.objects.protocol import ObjectChangedError
from kvmmap.storage.objects.remote import objects_at
from kvmmap.storage.zarr.reader import ZarrReader

_numbers = itertools.count()


@pytest.fixture
def url(s3: Server) -> str:
    return f"s3://{BUCKET}/test-{next(_numbers)}/cache.zarr"


def test_append_in_one_process_and_in_a_second_and_read_in_a_third(url: str) -> None:
    code = (
        "import sys, kvmmap; from helpers.support import fill\n"
        "with kvmmap.open(sys.argv[1], 'a') as cache: fill(cache, int(sys.argv[2]))"
    )
    make_file(url, 10).close()  # type: ignore[arg-type]
    run_python(code, url, 300)
    run_python(code, url, 517)
    with kvmmap.open(url) as cache:
        check_filled(cache, 517)
        assert cache.verify().sound
        assert cache.facts()["state"] == "closed"


def test_a_model_generates_into_a_bucket_and_from_it(url: str, s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers.tiny_models import generate, model, prompt

    from kvmmap.integrations.transformers import KvmmapCache, reuse

    for name in s3.environment():
        monkeypatch.delenv(name, raising=False)
    net, ids, options = model("gemma3", "kvmmap"), prompt(40), s3.options()
    expected, _ = generate(net, ids, KvmmapCache(net), 20)
    with KvmmapCache.create(url, net, storage_options=options) as cache:
        tokens, _ = generate(net, ids, cache, 10)
    with KvmmapCache.open(url, net, "a", storage_options=options) as cache:
        assert reuse(cache, tokens) == 49
        assert generate(net, tokens, cache, 10)[0].tolist() == expected.tolist()
    with KvmmapCache.open(url, net, storage_options=options) as cache:
        assert reuse(cache, ids) == 39
        assert generate(net, ids, cache, 20)[0].tolist() == expected.tolist()


def test_readers_beside_flush_and_truncate(url: str) -> None:
    with make_file(url, 600, metadata={"a": 1}) as cache:  # type: ignore[arg-type]
        cache.flush()
        with kvmmap.open(url) as reader:
            assert reader.metadata == {"a": 1}
            assert reader.facts()["state"] == "open for writing"
            check_filled(reader, 600)
            cache.truncate(500)
            cache.push_step(rows(2, 2, 8, seed=77), rows(2, 2, 8, seed=77), 3)
            cache.flush()
            check_filled(reader, 600)  # it has them in memory
            with pytest.raises(kvmmap.CacheChangedError):
                reader.verify()
            assert reader.refresh()
            assert reader.seq_len == 501
            assert reader.token_ids[-1] == 3
            assert reader.verify().sound


def test_one_writer(url: str) -> None:
    with make_file(url, 3):  # type: ignore[arg-type]
        with pytest.raises(kvmmap.CacheLockedError, match="this process"):
            kvmmap.open(url, "a")
        with kvmmap.open(url, "a", break_lock=True) as second:
            check_filled(second, 0)


def test_the_server_keeps_conditions(url: str) -> None:
    objects = objects_at(url)
    tag = objects.put_if("x", b"1", None)
    with pytest.raises(ObjectChangedError):
        objects.put_if("x", b"2", None)
    newer = objects.put_if("x", b"3", tag)
    with pytest.raises(ObjectChangedError):
        objects.put_if("x", b"4", tag)
    assert bytes(objects.get("x")) == b"3"
    assert objects.get_tagged("x")[1] == newer


def test_read_only_credentials(url: str, s3: Server) -> None:
    make_file(url, 300).close()  # type: ignore[arg-type]
    options = s3.options(READER_KEYS)
    with kvmmap.open(url, storage_options=options) as cache:
        check_filled(cache, 300)
    with pytest.raises(kvmmap.AccessDeniedError, match="AccessDenied"):
        kvmmap.open(url, "a", storage_options=options)
    with pytest.raises(kvmmap.AccessDeniedError, match=r"InvalidAccessKeyId|SignatureDoesNotMatch") as caught:
        kvmmap.open(url, storage_options=s3.options({"access_key_id": "nobody", "secret_access_key": "x"}))
    assert isinstance(caught.value, PermissionError)
    assert "\n" not in str(caught.value)


def test_missing_caches(url: str, s3: Server) -> None:
    with pytest.raises(kvmmap.CacheNotFoundError, match="no such object"):
        kvmmap.open(url)
    with pytest.raises(kvmmap.CacheNotFoundError, match="no such bucket"):
        kvmmap.open("s3://nonesuch/cache.zarr")
    with pytest.raises(kvmmap.NotACacheError, match="names a bucket"):
        kvmmap.open(f"s3://{BUCKET}")
    with pytest.raises(kvmmap.KvmmapError, match="bogus"):
        kvmmap.open(url, storage_options=s3.options(bogus=1))
    nobody: dict[str, Any] = s3.options(endpoint="http://127.0.0.1:1", retry_config={"max_retries": 0})
    with pytest.raises(kvmmap.StoreError, match=r"127\.0\.0\.1:1") as caught:
        kvmmap.open(url, storage_options=nobody)
    assert isinstance(caught.value, OSError)


def test_credentials_from_files(url: str, s3: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_file(url, 5).close()  # type: ignore[arg-type]
    options = s3.options()
    for name in s3.environment():
        monkeypatch.delenv(name)
    keys = [f"aws_{name} = {options[name]}" for name in ("access_key_id", "secret_access_key")]
    (tmp_path / "credentials").write_text("\n".join(["[work]", *keys, ""]))
    (tmp_path / "config").write_text(f"[profile work]\nregion = us-east-1\nendpoint_url = {options['endpoint']}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    with kvmmap.open(url) as cache:
        check_filled(cache, 5)


def test_plain_zarr_reads_it(url: str, s3: Server) -> None:
    make_file(url, 300).close()  # type: ignore[arg-type]
    store = ObjectStore(s3.store(url.partition(f"{BUCKET}/")[2]), read_only=True)
    with kvmmap.open(url) as cache:
        array = zarr.open_group(store, mode="r")["layers/1/value_codes"]
        np.testing.assert_array_equal(array[:300], cache.layers[1].value_codes)


class Proxy:
    """A proxy before the server, which counts requests and answers some with an error."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = port
        self.requests: list[str] = []
        self.fail = 0
        """So many of the next requests get 503."""
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            threading.Thread(target=self._pump, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                line = data.split(b"\r\n", 1)[0]
                if line.endswith(b"HTTP/1.1"):
                    with self._lock:
                        self.requests.append(line.decode().removesuffix(" HTTP/1.1"))
                        failing, self.fail = self.fail > 0, max(0, self.fail - 1)
                    if failing:
                        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                        return
                server.sendall(data)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def proxy(s3: Server) -> Any:
    with Proxied(s3) as proxy:
        yield proxy


class Proxied(Proxy):
    """A proxy of a test server."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.port)
        self.options = server.options(endpoint=f"http://127.0.0.1:{self.port}")

    def __enter__(self) -> Proxied:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def test_opening_and_the_first_read_are_few_round_trips(url: str, proxy: Proxied) -> None:
    """128k tokens x 32 layers: one request to open; then an index and checksums at once, then the block."""
    with kvmmap.create(url, num_layers=32, capacity=131072, num_kv_heads=1, head_dim=8) as cache:
        piece = rows(32, 8192, 1, 8)
        for _ in range(16):
            cache.extend(piece, piece)
    with kvmmap.open(url, storage_options=proxy.options) as cache:
        assert cache.seq_len == 131072
        assert proxy.requests == [f"GET /{BUCKET}/{url.partition(f'{BUCKET}/')[2]}/zarr.json"]
        expected = kvmmap.dequantize_rows(*kvmmap.quantize_rows(piece[31, 5]))
        np.testing.assert_array_equal(cache.layers[31].get_keys_at(8192 + 5), expected)
        assert len(proxy.requests) == 1 + 4 + 1  # small shards come whole, together with the checksums


def test_transient_errors_are_retried(url: str, proxy: Proxied) -> None:
    make_file(url, 300).close()  # type: ignore[arg-type]
    with kvmmap.open(url, storage_options=proxy.options) as cache:
        proxy.fail = 3
        check_filled(cache, 300)
    assert proxy.fail == 0


def test_persistent_errors_are_raised(url: str, proxy: Proxied) -> None:
    make_file(url, 300).close()  # type: ignore[arg-type]
    options = proxy.options | {"retry_config": {"max_retries": 1}}
    with kvmmap.open(url, storage_options=options) as cache:
        proxy.fail = 10**6
        with pytest.raises(kvmmap.StoreError, match="503"):
            cache.layers[0].read_keys()
        proxy.fail = 0
        check_filled(cache, 300)


def test_later_layers_are_prefetched(url: str) -> None:
    make_file(url, 600, num_layers=2).close()  # type: ignore[arg-type]
    storage = ZarrReader.open(objects_at(url))
    with kvmmap.QuantizedKvCache.of_storage(storage) as cache:
        cache.layers[0].read_keys()
        assert set(storage.shards._under_way) == {(1, 0)}
        check_filled(cache, 600)
        assert not storage.shards._under_way
