"""URLs of object stores to keys and back: the one place that knows the rule, and which keys are refused.

What follows the bucket in a URL is the key, character by character: `s3://bucket/chat#1.zarr` is the key `chat#1.zarr`,
and `%20` is three characters, as in the tools of the object stores themselves. Nothing is decoded or dropped. Only one
slash at the end is not part of the key, since that is how folders are written.

`http://` and `https://` URLs are what the web makes of them, percent-escapes included: see `check_web_url`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ...errors import NotACacheError

MAX_KEY_BYTES = 1024
"""Bytes of UTF-8 that a key of S3 has at most."""

RESERVED_BYTES = 64
"""Bytes of these that a cache needs below its own key, as for `/layers/1000/value_scales/c/100000/0/0`."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)(?:/(.*))?", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9._@:-]+")
_REFUSED = re.compile("[\\x00-\\x1f\\x7f\\\\\\ud800-\\udfff\\ufffe\\uffff]")
"""Control characters, half characters and those that XML has not can't be sent, or not be listed. Some servers make a
slash of a backslash, so that two keys would be one object."""


class Address(NamedTuple):
    """A place in an object store."""

    scheme: str
    """In lower case, without "://"."""

    bucket: str
    """Empty for `memory`, which has none."""

    key: str
    """Empty for the whole bucket."""

    @property
    def root(self) -> str:
        """URL of the bucket."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def url(self) -> str:
        """The URL that `parse` takes for this address."""
        if self.scheme == "memory":
            return f"memory://{self.key}"
        return f"{self.root}/{self.key}" if self.key else self.root

    def at(self, key: str) -> Address:
        """Return the address of another key in the same bucket.

        Raises:
            NotACacheError: an object store can't hold such a key.
        """
        other = self._replace(key=key)
        check_key(key, other.url)
        return other


def parse(url: str) -> Address:
    """Return what a URL of an object store means.

    Raises:
        NotACacheError: it is not a URL, or has a bucket or key that an object store can't hold.
    """
    found = _URL.fullmatch(url)
    if not found:
        raise NotACacheError(f"{url!r}: not a URL such as s3://bucket/prompt.zarr", path=url)
    scheme, bucket, key = found[1].lower(), found[2], found[3] or ""
    if scheme == "memory":
        bucket, key = "", url.partition("://")[2]
    elif not _BUCKET.fullmatch(bucket):
        raise NotACacheError(f"{url!r}: {bucket!r} can't be a bucket", path=url)
    key = key.removesuffix("/")
    if key:
        check_key(key, url)
    return Address(scheme, bucket, key)


def check_key(key: str, url: str) -> None:
    """Refuse a key that an object store can't hold, or not tell from others.

    Args:
        key: of a cache.
        url: for the message.

    Raises:
        NotACacheError: says which part of the key is refused.
    """
    if wrong := _REFUSED.search(key):
        raise NotACacheError(
            f"{url!r}: a key in an object store can't have {wrong[0]!r} (character {wrong.start()} of the key): choose "
            "another name",
            path=url,
        )
    for segment in key.split("/"):
        if segment in ("", ".", ".."):
            raise NotACacheError(
                f"{url!r}: a key in an object store can't have the part {segment!r} between slashes: rename it",
                path=url,
            )
    size = len(key.encode())
    if size > MAX_KEY_BYTES - RESERVED_BYTES:
        raise NotACacheError(
            f"{url[:80]!r}...: its key has {size:,} bytes, and there is room for {MAX_KEY_BYTES - RESERVED_BYTES}: "
            "choose a shorter name",
            path=url,
            expected=MAX_KEY_BYTES - RESERVED_BYTES,
            actual=size,
        )


def check_web_url(url: str) -> str:
    """Return an http:// or https:// URL without a slash at the end.

    Raises:
        NotACacheError: it has a part that is not sent as a path, so that other objects would be read.
    """
    if wrong := re.search(r"[?#\\\x00-\x20\x7f\ud800-\udfff]", url):
        code = "".join(f"%{byte:02X}" for byte in wrong[0].encode("utf-8", "surrogatepass"))
        raise NotACacheError(
            f"{url!r}: {wrong[0]!r} is not part of a path in a web address: write {code} for the character", path=url
        )
    return url.rstrip("/")
