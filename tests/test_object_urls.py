"""Names of caches in object stores, in memory and in folders: each is its own key, is found, and is opened again."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import obstore
import pytest
from fuzz.urls import check
from helpers.cli_support import run
from helpers.seaweed import BUCKET, Server
from helpers.support import check_filled, fill, make_file
from hypothesis import example, given
from hypothesis import strategies as st

import kvmmap
from kvmmap.storage.objects.memory import MemoryObjects

NAMES = (
    *("chat.zarr", "chat#1.zarr", "chat#2.zarr", "chat?.zarr", "chat?a=1.zarr", "a b.zarr", "a%20b.zarr"),
    *("a%2520b.zarr", "'q'.zarr"),
    *("a%2Fb.zarr", "a%zz.zarr", "a%.zarr", "a+b.zarr", "br[1].zarr", "br1.zarr", "br*.zarr", "é.zarr", "e\u0301.zarr"),
    *("日本 \U0001f600.zarr", " lead.zarr", "trail .zarr", "..a.zarr", "a..b.zarr", "...zarr", "a:b.zarr", "~.zarr"),
    *('"q".zarr', "<x>&amp;.zarr", "{a}^`|.zarr", "$HOME;x,y=z@!().zarr", "\u2028\u200b.zarr", "deep/a#b/c?d/e f.zarr"),
)
REFUSED = (
    *("a//b.zarr", "/a.zarr", "./a.zarr", "a/../b.zarr", "..", "a\\b.zarr", "a\nb.zarr", "a\x7fb.zarr"),
    "a\ufffe.zarr",
)
_numbers = itertools.count()


@given(st.sampled_from(["s3", "gs", "abfss", "memory"]), st.text(st.characters(), max_size=30))
@example("s3", "")
@example("s3", "a/")
@example("s3", "a%20b")
@example("s3", "\ud800")
def test_every_key_comes_back_from_its_url_or_is_refused(scheme: str, key: str) -> None:
    check(scheme, key)


def test_many_odd_keys() -> None:
    """The short form of `python -m fuzz.urls`, which goes through a million."""
    count = int(os.environ.get("KVMMAP_KEYS", "20000"))
    command = [sys.executable, "-m", "fuzz.urls", "--keys", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("0 wrong\n")


def live_through(url: str, length: int) -> None:
    """Create, append and read a cache by its URL."""
    make_file(url, length).close()  # type: ignore[arg-type]
    with kvmmap.open(url, "a") as cache:
        fill(cache, length + 2)
    with kvmmap.open(url) as cache:
        check_filled(cache, length + 2)
        assert cache.verify().sound


def check_names(prefix: str, keys: Any) -> None:
    """All names live side by side; `find` lists what `open` takes; removing one removes no other."""
    urls = [f"{prefix}/{name}" for name in NAMES]
    for number, url in enumerate(urls):
        live_through(url, number)
    assert sorted(kvmmap.find(f"{prefix}/")) == sorted(urls)
    for number, url in enumerate(urls):
        with kvmmap.open(url) as cache:
            assert (cache.path, cache.seq_len) == (url, number + 2)
    assert keys() >= {f"{name}/zarr.json" for name in NAMES}
    for url in urls:
        kvmmap.remove(url)
        urls = [other for other in urls if other != url]
        if len(urls) % 8 == 0:
            assert sorted(kvmmap.find(prefix)) == sorted(urls)
    assert not keys()


def test_names_in_an_object_store(s3: Server) -> None:
    prefix = f"names-{next(_numbers)}"
    store = s3.store()

    def keys() -> set[str]:
        found = [each["path"] for batch in obstore.list(store, prefix) for each in batch]
        return {path.removeprefix(f"{prefix}/") for path in found}

    check_names(f"s3://{BUCKET}/{prefix}", keys)


def test_names_in_memory() -> None:
    prefix = f"memory://names-{next(_numbers)}"

    def keys() -> set[str]:
        places = [place for place in MemoryObjects.places() if place.startswith(f"{prefix}/")]
        found = {f"{place}/{key}" for place in places for key in MemoryObjects(place).list()}
        return {path.removeprefix(f"{prefix}/") for path in found}

    check_names(prefix, keys)


@pytest.mark.parametrize("scheme", ["", "file://", "file://localhost"])
def test_names_in_folders(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "deep" / "a#b" / "c?d").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        live_through(f"{scheme}{tmp_path}/{name}", number)
    assert sorted(kvmmap.find(f"{scheme}{tmp_path}")) == sorted(f"{tmp_path}/{name}" for name in NAMES)
    for number, name in enumerate(NAMES):
        assert (tmp_path / name / "zarr.json").is_file()
        with kvmmap.open(f"{scheme}{tmp_path}/{name}") as cache:
            assert cache.seq_len == number + 2
        kvmmap.remove(f"{scheme}{tmp_path}/{name}")
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_key_can_be_is_refused(s3: Server, name: str) -> None:
    for url in (f"s3://{BUCKET}/x/{name}", f"memory://x/{name}"):
        for act in (
            lambda url: make_file(url, 1),
            kvmmap.open,
            kvmmap.remove,
            lambda url: kvmmap.copy(kvmmap.QuantizedKvCache(1, 1, 1, 8), url),
        ):
            with pytest.raises(kvmmap.NotACacheError, match="can't have"):
                act(url)


def test_long_keys(s3: Server) -> None:
    prefix = f"long-{next(_numbers)}/"
    longest = prefix + "/".join(["p" * 99] * 9)
    longest += "/" + "ü" * ((960 - len(longest) - 6) // 2)
    longest += "x" * (960 - len(longest.encode()) - 5) + ".zarr"
    assert len(longest.encode()) == 960
    live_through(f"s3://{BUCKET}/{longest}", 3)
    assert kvmmap.find(f"s3://{BUCKET}/{prefix}") == [f"s3://{BUCKET}/{longest}"]
    kvmmap.remove(f"s3://{BUCKET}/{longest}")
    with pytest.raises(kvmmap.NotACacheError, match="961 bytes"):
        kvmmap.create(f"s3://{BUCKET}/x{longest}", num_layers=1, capacity=1, num_kv_heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "can't be a bucket"),
        ("s3:///a.zarr", "can't be a bucket"),
        ("s3://b#c/a.zarr", "can't be a bucket"),
        ("s3://bücket/a.zarr", "can't be a bucket"),
        ("s3://bucket", "names a bucket"),
        ("s3://bucket/", "names a bucket"),
        ("memory://", "names nothing"),
        ("https://host", "no cache on it"),
        ("https://host/a.zarr?version=2", "write %3F"),
        ("https://host/a#b.zarr", "write %23"),
        ("https://host/a b.zarr", "write %20"),
        ("ftp://host/a.zarr", "no such kind of URL"),
        ("s3://bucket/a.kvm", "must be local"),
        ("s3://bucket/\udcff.zarr", "can't have"),
    ],
)
def test_urls_that_name_nothing(url: str, message: str) -> None:
    with pytest.raises(kvmmap.NotACacheError, match=message) as caught:
        kvmmap.open(url)
    assert "\n" not in str(caught.value)


def test_schemes_in_capitals(s3: Server) -> None:
    name = f"capitals-{next(_numbers)}.zarr"
    live_through(f"S3://{BUCKET}/{name}", 3)
    with kvmmap.open(f"s3://{BUCKET}/{name}/") as cache:
        assert cache.path == f"s3://{BUCKET}/{name}"


def test_an_existing_name_beats_a_pattern(s3: Server) -> None:
    prefix = f"s3://{BUCKET}/patterns-{next(_numbers)}"
    names = ("br[1].zarr", "br1.zarr", "br*.zarr", "dir[1]/a.zarr", "dir1/b.zarr")
    for name in names:
        make_file(f"{prefix}/{name}", 1).close()  # type: ignore[arg-type]
    for pattern, wanted in (
        ("br[1].zarr", {"br[1].zarr"}),
        ("br*.zarr", {"br*.zarr"}),
        ("br?.zarr", {"br*.zarr", "br1.zarr"}),
        ("dir[1]/", {"dir[1]/a.zarr"}),
        ("dir?/*.zarr", {"dir1/b.zarr"}),
        ("dir*/*.zarr", {"dir1/b.zarr", "dir[1]/a.zarr"}),
    ):
        shown = run("inspect", "--json", f"{prefix}/{pattern}", **s3.environment())
        assert shown.returncode == 0, shown.stderr
        assert {name for name in names if f"{prefix}/{name}" in shown.stdout} == wanted


ODD = (
    *("localhost:9000", "127.0.0.1:9000", "s3.example.com", "//x", "http://", "https://:80", "ftp://x", "http://[::1"),
    *("x y", "http://x:port", "http://x:99999", "\x01", "http://a b/", "ü", "http://ü\udcff", "%", "http://%zz/", "-"),
)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_endpoints_that_are_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for value in ODD:
        monkeypatch.setenv(variable, value)
        with pytest.raises(kvmmap.KvmmapError) as caught:
            kvmmap.open("s3://bucket/a.zarr", storage_options={"retry_config": {"max_retries": 0}})
        assert "\n" not in str(caught.value)
    monkeypatch.setenv(variable, "localhost:9000")
    with pytest.raises(kvmmap.KvmmapError, match=f"{variable}.*write http://localhost:9000"):
        kvmmap.open("s3://bucket/a.zarr")


def test_endpoints_in_options_and_profiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(kvmmap.KvmmapError, match=r"storage_options.*write http://localhost:9000"):
        kvmmap.open("s3://bucket/a.zarr", storage_options={"endpoint": "localhost:9000"})
    with pytest.raises(kvmmap.KvmmapError, match=r"storage_options.*write http://localhost:9000"):
        kvmmap.open("s3://bucket/a.zarr", storage_options={"endpoint_url": "localhost:9000"})
    (tmp_path / "config").write_text("[default]\nendpoint_url = localhost:9000\n")
    with pytest.raises(kvmmap.KvmmapError, match=r"config.*write http://localhost:9000"):
        kvmmap.open("s3://bucket/a.zarr")


VARIABLES = (
    *("AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SKIP_SIGNATURE"),
    *("AWS_ALLOW_HTTP", "AWS_CONDITIONAL_PUT", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_PROXY_URL", "HTTP_PROXY"),
    *("AWS_METADATA_ENDPOINT", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST"),
    *("AWS_CHECKSUM_ALGORITHM", "AWS_DEFAULT_REGION", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_UNSIGNED_PAYLOAD"),
)
VALUES = ("", " ", "x", "a b", "ü", "-1", "true", "http://", "/", "\nx", "x" * 5000)


def test_odd_environments_are_errors_of_ours(s3: Server) -> None:
    """Whatever obstore makes of the environment, panics of its compiled code included, is one typed error."""
    program = f"""
import itertools, os, kvmmap
options = {{"retry_config": {{"max_retries": 0}}, "client_options": {{"timeout": "2s", "connect_timeout": "1s"}}}}
before = dict(os.environ)
for name, value in itertools.product({VARIABLES!r}, {VALUES!r}):
    os.environ.clear()
    os.environ.update(before)
    os.environ[name] = value
    try:
        kvmmap.open("s3://{BUCKET}/nothing.zarr", storage_options=options)
    except kvmmap.KvmmapError as error:
        assert "\\n" not in str(error), (name, value, str(error))
print("done")
"""
    environment = {**os.environ, **s3.environment(), "AWS_ALLOW_HTTP": "true"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.stdout == "done\n", done.stderr[-3000:]


ODD_OPTIONS: tuple[dict[Any, Any], ...] = (
    *({"region": 5}, {"region": None}, {"endpoint": 5}, {"endpoint": b"http://x"}, {5: 5}, {"access_key_id": "\n"}),
    *({"token": "\x00"}, {"client_options": {"timeout": "soon"}}, {"client_options": {"nonsense": 1}}),
    *({"client_options": 5}, {"retry_config": 5}, {"retry_config": {"max_retries": -1}}, {"bucket": "other"}),
    *({"retry_config": {"max_retries": "x"}}, {"client_options": {"proxy_url": "::"}}, {"skip_signature": "maybe"}),
    *({"conditional_put": "maybe"}, {"client_options": {"user_agent": "\n"}}, {"unknown": object()}),
    *({"client_options": {"default_headers": {"x\n": "y"}}}, {"client_options": {"allow_http": "x"}}),
)


@pytest.mark.parametrize("number", range(len(ODD_OPTIONS)))
def test_odd_options_are_errors_of_ours(number: int) -> None:
    options = {"endpoint": "http://127.0.0.1:1", "access_key_id": "a", "secret_access_key": "b"} | ODD_OPTIONS[number]
    options.setdefault("retry_config", {"max_retries": 0})
    with pytest.raises(kvmmap.KvmmapError) as caught:
        kvmmap.open("s3://bucket/a.zarr", storage_options=options)
    assert "\n" not in str(caught.value)
