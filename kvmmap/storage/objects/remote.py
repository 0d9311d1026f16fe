"""Objects in an object store, through obstore: S3 and all that speak it, Google's, Azure's, and plain HTTP to read.

Also which place a URL means, and where credentials come from. Errors of stores are brought here into ours: one line
that says what was refused, and by whom.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ...errors import AccessDeniedError, CacheNotFoundError, KvmmapError, NotACacheError, StoreError
from ..libraries import obstore
from .lock import ObjectLock, read_owner
from .protocol import Buffer, Lock, MemoryObjects, MissingObjectError, ObjectChangedError, Objects, Pieces

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")

RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""How often a request is tried again after an error that may pass (5xx, connection lost), unless asked otherwise."""

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def objects_at(url: str, storage_options: Mapping[str, Any] | None = None) -> Objects:
    """Return the place that a URL means; nothing is asked of it yet.

    Args:
        storage_options: what obstore's store takes as `config`, and its `client_options` and `retry_config`.

    Raises:
        NotACacheError: no such kind of URL, or it names no key.
        KvmmapError: an option that the store does not know.
        MissingLibraryError: obstore is needed, and not installed.
    """
    url = url.rstrip("/")
    scheme, _, rest = url.partition("://")
    if scheme == "memory":
        return MemoryObjects(url)
    if scheme in SCHEMES and "/" not in rest.strip("/"):
        raise NotACacheError(f"{url}: names a bucket and no key in it: add one, as in {url}/prompt.zarr", path=url)
    return BucketObjects(url, _store(url, storage_options))


def groups_below(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield the URLs of what is named like a group below a URL, at any depth; one request for every folder and group.

    Raises:
        As `objects_at`, and whatever a store says.
    """
    url = url.rstrip("/")
    objects = BucketObjects(url, _store(url, storage_options))
    folders = [""]
    while folders:
        for name in objects.folders(folders.pop()):
            if name.endswith(".zarr"):
                if objects.any_below(name):  # SeaweedFS keeps the folders of what was removed
                    yield f"{url}/{name}"
            else:
                folders.append(name)


def _store(url: str, storage_options: Mapping[str, Any] | None) -> Any:
    """Return obstore's store for a URL."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", "memory", *SCHEMES))
        raise NotACacheError(f"{url}: no such kind of URL; there are {known}", path=url)
    options = dict(storage_options or {})
    client = dict(options.pop("client_options", {}))
    retries = options.pop("retry_config", RETRIES)
    if scheme in ("s3", "s3a"):
        options = _aws(options)
        if str(options.get("endpoint", "")).startswith("http://"):
            client.setdefault("allow_http", True)  # whoever names such an endpoint means it
    if scheme == "http":
        client.setdefault("allow_http", True)
    library = obstore()
    try:
        return library.store.from_url(url, config=options or None, client_options=client or None, retry_config=retries)
    except (library.exceptions.BaseError, ValueError, TypeError) as error:
        raise KvmmapError(f"{url}: {_first_line(error)}") from error


def _aws(options: dict[str, Any]) -> dict[str, Any]:
    """Fill in from the environment and the AWS command's files what was not given; obstore itself asks for the
    credentials of machines and containers."""
    options = {key.lower().removeprefix("aws_"): value for key, value in options.items()}
    options.setdefault("endpoint", options.pop("endpoint_url", None) or _first(ENDPOINTS))
    asked = {"access_key_id", "skip_signature", "token"} & set(options)
    if not asked and "AWS_ACCESS_KEY_ID" not in os.environ:
        profile = _profile()
        names = {
            "access_key_id": "aws_access_key_id",
            "secret_access_key": "aws_secret_access_key",
            "session_token": "aws_session_token",
            "region": "region",
            "endpoint": "endpoint_url",
        }
        for name, key in names.items():
            if not options.get(name) and key in profile:
                options[name] = profile[key]
    if "region" not in options and not _first(("AWS_REGION", "AWS_DEFAULT_REGION")):
        options["region"] = "us-east-1"
    return {key: value for key, value in options.items() if value is not None}


def _first(names: Sequence[str]) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _profile() -> dict[str, str]:
    """Return what ~/.aws/credentials and ~/.aws/config say of the profile in use."""
    name = os.environ.get("AWS_PROFILE", "default")
    home = os.path.expanduser("~/.aws")
    parser = configparser.RawConfigParser()
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        parser.read(
            [
                os.environ.get("AWS_CONFIG_FILE", os.path.join(home, "config")),
                os.environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.join(home, "credentials")),
            ]
        )
    found: dict[str, str] = {}
    for section in (f"profile {name}", name):
        if parser.has_section(section):
            found |= dict(parser.items(section))
    return found


class BucketObjects:
    """Keys below one prefix of a bucket. Puts are atomic and durable by the server's promise."""

    remote = True

    def __init__(self, url: str, store: Any) -> None:
        self.url = url
        self._store = store

    def get(self, key: str) -> Buffer:
        with self._errors(key):
            return obstore().get(self._store, key).bytes()

    def get_tagged(self, key: str) -> tuple[Buffer, str]:
        with self._errors(key):
            result = obstore().get(self._store, key)
            return result.bytes(), _tag(result.meta)

    def get_suffix(self, key: str, size: int) -> Buffer:
        library = obstore()
        with self._errors(key):
            try:
                return library.get(self._store, key, options={"range": {"suffix": size}}).bytes()
            except library.exceptions.NotSupportedError:  # Azure
                end = library.head(self._store, key)["size"]
                return library.get_range(self._store, key, start=max(0, end - size), end=end)

    def read_into(self, key: str, pieces: Pieces) -> None:
        starts = [offset for offset, _ in pieces]
        ends = [offset + len(target) for offset, target in pieces]
        with self._errors(key):
            found = obstore().get_ranges(self._store, key, starts=starts, ends=ends)
        for (_, target), data in zip(pieces, found, strict=True):
            if len(data) != len(target):
                raise EOFError(f"{self.url}/{key}: is too short")
            target[:] = memoryview(data)

    def pieces(self, key: str, size: int) -> Iterator[Buffer]:
        with self._errors(key):
            yield from obstore().get(self._store, key).stream(min_chunk_size=size)

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        with self._errors(key):
            # A list goes out as it is; joined first, it would be copied.
            obstore().put(self._store, key, views, use_multipart=False)

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        mode = "create" if tag is None else {"e_tag": tag}
        with self._errors(key):
            return _tag(obstore().put(self._store, key, data, mode=mode, use_multipart=False))

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingObjectError), self._errors(key):
            obstore().delete(self._store, key)

    def list(self) -> Iterator[str]:
        with self._errors(""):
            for batch in obstore().list(self._store):
                for found in batch:
                    yield found["path"]

    def any_below(self, folder: str) -> bool:
        """True if there are objects below a folder."""
        with self._errors(folder):
            return any(len(batch) for batch in obstore().list(self._store, folder, chunk_size=1))

    def folders(self, folder: str) -> Sequence[str]:
        """Return the keys up to the next slash that lie right below a folder; "" is the whole place."""
        with self._errors(folder):
            found: Sequence[str] = obstore().list_with_delimiter(self._store, folder or None)["common_prefixes"]
            return found

    def remove(self) -> None:
        """It is nothing but its objects."""

    def settle(self) -> None:
        """What a server has taken it keeps."""

    def lock(self, timeout: float, *, break_lock: bool) -> Lock:
        return ObjectLock.take(self, timeout, break_lock=break_lock)

    def owner(self) -> dict[str, Any] | None:
        return read_owner(self)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Bring a store's errors into ours."""
        known = obstore().exceptions
        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise CacheNotFoundError(f"{self.url}: there is no such bucket", path=self.url) from None
            raise MissingObjectError(f"{where}: there is no such object", path=where) from None
        except (known.AlreadyExistsError, known.PreconditionError):
            raise ObjectChangedError(f"{where}: was changed by another", path=where) from None
        except (known.PermissionDeniedError, known.UnauthenticatedError) as error:
            raise AccessDeniedError(f"{where}: access refused: {_first_line(error)}", path=where) from None
        except (known.NotSupportedError, NotImplementedError) as error:
            raise StoreError(f"{where}: the store can't do this: {_first_line(error)}", path=where) from None
        except known.BaseError as error:
            text = str(error)
            if "NoSuchBucket" in text or "InvalidBucketName" in text:
                raise CacheNotFoundError(f"{self.url}: there is no such bucket", path=self.url) from None
            if "169.254.169.254" in text:  # where machines in Amazon's cloud are told theirs
                raise AccessDeniedError(
                    f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in "
                    "~/.aws, or give storage_options",
                    path=where,
                ) from None
            raise StoreError(f"{where}: {_first_line(error)}", path=where) from None


def _tag(meta: Any) -> str:
    return meta["e_tag"] or ""


def _first_line(error: Exception) -> str:
    """Return what a server said, without its XML, or an error's first line."""
    text = str(error)
    code, message = (re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    return text.partition("\n\nDebug source")[0].partition("\n")[0]
