"""Objects in an object store, through obstore: S3 and all that speak it, Google's, Azure's, and plain HTTP to read.

All errors of stores are converted here into ours: one line that says what was refused, and by whom.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import AccessDeniedError, CacheNotFoundError, KvmmapError, NotACacheError, StoreError
from ..libraries import obstore
from .address import check_web_url, parse
from .credentials import store_arguments
from .lock import ObjectLock, read_owner
from .memory import MemoryObjects
from .protocol import Buffer, Lock, MissingObjectError, ObjectChangedError, Objects, Pieces

BUCKETS = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl")
WEB = ("http", "https")
SCHEMES = ("memory", *BUCKETS, *WEB)


def objects_at(url: str, storage_options: Mapping[str, Any] | None = None) -> Objects:
    """Return the place that a URL means. No request is made yet.

    Args:
        storage_options: what obstore's store takes as `config`, and its `client_options` and `retry_config`.

    Raises:
        NotACacheError: no such kind of URL, or it names no key, or one that can't be.
        KvmmapError: an option that the store does not know.
        MissingLibraryError: obstore is needed, and not installed.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in WEB:
        url = check_web_url(url)
        if not url.partition("://")[2].partition("/")[2]:
            raise NotACacheError(f"{url}: names a server and no cache on it: add a path", path=url)
        return BucketObjects(url, _store(url, scheme, storage_options), "")
    address = parse(url)
    if not address.key:
        if address.scheme == "memory":
            raise NotACacheError(f"{url}: names nothing: add a name, as in memory://prompt", path=url)
        raise NotACacheError(
            f"{address.url}: names a bucket and no key in it: add one, as in {address.root}/prompt.zarr", path=url
        )
    if address.scheme == "memory":
        return MemoryObjects(address.url)
    return BucketObjects(address.url, _store(address.root, address.scheme, storage_options), address.key)


def groups_below(url: str, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Yield the URLs of what is named like a group below a URL, at any depth; one request for every folder and group.

    Raises:
        As `objects_at`, and whatever a store says.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in WEB:
        raise NotACacheError(f"{url}: a web server has no list of its files: name a cache", path=url)
    address = parse(url)
    if address.scheme == "memory":
        for place in MemoryObjects.places():
            key = parse(place).key
            if key.endswith(".zarr") and (not address.key or key.startswith(f"{address.key}/")):
                yield place
        return
    objects = BucketObjects(address.url, _store(address.root, address.scheme, storage_options), address.key)
    folders = [address.key]
    while folders:
        for key in objects.folders(folders.pop()):
            if key.endswith(".zarr"):
                if objects.any_below(key):  # SeaweedFS keeps the folders of what was removed
                    with contextlib.suppress(NotACacheError):  # a key that other programs made, and open() refuses
                        yield address.at(key).url
            else:
                folders.append(key)


def _store(url: str, scheme: str, storage_options: Mapping[str, Any] | None) -> Any:
    """Return obstore's store for the URL of a bucket, or of a place on the web."""
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise NotACacheError(f"{url}: no such kind of URL; there are {known}", path=url)
    arguments = store_arguments(scheme, storage_options)
    library = obstore()
    try:
        return library.store.from_url(url, **arguments)
    except BaseException as error:
        if isinstance(error, Exception) or _is_panic(error):  # no request was made: it can only be the options
            raise KvmmapError(f"{url}: {_first_line(error)}", path=url) from None
        raise


def _is_panic(error: BaseException) -> bool:
    """True for what obstore raises where its compiled code gave up: not an Exception, and of no importable type."""
    return type(error).__name__ == "PanicException"


JOINED_BYTES = 64 << 10
"""Pieces of an object come as the client receives them, some 400 KiB each, and are joined only below this size: joining
copies them, which takes two thirds of what writing them to a file does."""


class BucketObjects:
    """Objects below one key of a bucket. The server promises that puts are atomic and durable.

    Args:
        url: what errors and users call the place.
        store: obstore's store of the bucket.
        prefix: the key; empty for the whole.
    """

    remote = True

    def __init__(self, url: str, store: Any, prefix: str) -> None:
        self.url = url
        self._store = store
        self._prefix = prefix
        self._base = f"{prefix}/" if prefix else ""

    def get(self, key: str) -> Buffer:
        with self._errors(key):
            return obstore().get(self._store, self._base + key).bytes()

    def get_tagged(self, key: str) -> tuple[Buffer, str]:
        with self._errors(key):
            result = obstore().get(self._store, self._base + key)
            return result.bytes(), _tag(result.meta)

    def get_suffix(self, key: str, size: int) -> Buffer:
        library = obstore()
        with self._errors(key):
            try:
                return library.get(self._store, self._base + key, options={"range": {"suffix": size}}).bytes()
            except library.exceptions.NotSupportedError:  # Azure
                end = library.head(self._store, self._base + key)["size"]
                return library.get_range(self._store, self._base + key, start=max(0, end - size), end=end)

    def read_into(self, key: str, pieces: Pieces) -> None:
        starts = [offset for offset, _ in pieces]
        ends = [offset + len(target) for offset, target in pieces]
        with self._errors(key):
            found = obstore().get_ranges(self._store, self._base + key, starts=starts, ends=ends)
        for (_, target), data in zip(pieces, found, strict=True):
            if len(data) != len(target):
                raise EOFError(f"{self.url}/{key}: is too short")
            target[:] = memoryview(data)

    def pieces(self, key: str, size: int) -> Iterator[Buffer]:
        with self._errors(key):
            yield from obstore().get(self._store, self._base + key).stream(min_chunk_size=min(size, JOINED_BYTES))

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        views = [memoryview(part).cast("B") for part in parts]
        with self._errors(key):
            # A list goes out as it is; joined first, it would be copied.
            obstore().put(self._store, self._base + key, views, use_multipart=False)

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        mode = "create" if tag is None else {"e_tag": tag}
        with self._errors(key):
            return _tag(obstore().put(self._store, self._base + key, data, mode=mode, use_multipart=False))

    def delete(self, key: str) -> None:
        with contextlib.suppress(MissingObjectError), self._errors(key):
            obstore().delete(self._store, self._base + key)

    def list(self) -> Iterator[str]:
        with self._errors(""):
            for batch in obstore().list(self._store, self._prefix or None):
                for found in batch:
                    yield found["path"].removeprefix(self._base)

    def list_after(self, folder: str, after: str) -> Iterator[tuple[str, int, float]]:
        """Yield key, size, and time of writing by the server's clock, of the objects in a folder, in the order of keys.

        Args:
            folder: its key here, without a slash at the end.
            after: a key; only those after it are listed. Empty for all.
        """
        with self._errors(folder):
            offset = self._base + after if after else None
            for batch in obstore().list(self._store, self._base + folder, offset=offset, chunk_size=1000):
                for found in batch:
                    modified = found["last_modified"].timestamp()
                    yield found["path"].removeprefix(self._base), found["size"], modified

    def any_below(self, folder: str) -> bool:
        """True if there are objects below a folder; its key is that of the bucket."""
        with self._errors(folder):
            return any(len(batch) for batch in obstore().list(self._store, folder, chunk_size=1))

    def folders(self, folder: str) -> Sequence[str]:
        """Return the keys of the folders directly below a folder, both in the bucket; "" is the bucket itself."""
        with self._errors(folder):
            found: Sequence[str] = obstore().list_with_delimiter(self._store, folder or None)["common_prefixes"]
            return found

    def unlink(self) -> bool:
        return False

    def remove(self) -> None:
        """There is nothing but the objects."""

    def settle(self) -> None:
        """Puts are durable when the server answers."""

    def without_sync(self) -> BucketObjects:
        return self

    def lock(self, timeout: float, *, break_lock: bool) -> Lock:
        return ObjectLock.take(self, timeout, break_lock=break_lock)

    def owner(self) -> dict[str, Any] | None:
        return read_owner(self)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Convert a store's errors into ours."""
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
            if "169.254.169.254" in text:  # where machines in Amazon's cloud get their credentials
                raise AccessDeniedError(
                    f"{where}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in "
                    "~/.aws, or give storage_options",
                    path=where,
                ) from None
            raise StoreError(f"{where}: {_first_line(error)}", path=where) from None
        except (ValueError, TypeError, RuntimeError, UnicodeError) as error:  # what it can't send, or not make sense of
            raise StoreError(f"{where}: {_first_line(error)}", path=where) from None
        except BaseException as error:
            if _is_panic(error):
                raise StoreError(f"{where}: the store's client failed: {_first_line(error)}", path=where) from None
            raise


def _tag(meta: Any) -> str:
    return meta["e_tag"] or ""


def _first_line(error: BaseException) -> str:
    """Return what a server said, without its XML, or an error's first line."""
    text = str(error)
    code, message = (re.search(f"<{name}>(.*?)</{name}>", text, re.DOTALL) for name in ("Code", "Message"))
    if code:
        return f"{code[1]}: {message[1]}" if message else code[1]
    return text.partition("\n\nDebug source")[0].partition("\n")[0]
