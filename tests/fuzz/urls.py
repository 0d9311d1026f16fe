"""Fuzz URLs of object stores: `python -m fuzz.urls --keys 1000000`. Every key survives its URL, or is refused."""

from __future__ import annotations

import argparse
import sys
from random import Random

from kvmmap.errors import NotACacheError
from kvmmap.storage.objects.address import MAX_KEY_BYTES, RESERVED_BYTES, Address, parse

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "memory")
SIGNS = "#?%&+=;,:@!$'()*[]{}<>|^`~\"\\/. \t\n\r\0\x7f\u0085\u00a0\u200b\u2028\ufeff\ufffe\uffff\ud800\udfff"
PARTS = (
    *("%20", "%2F", "%2f", "%23", "%3F", "%00", "%", "%%", "%zz", "%E4", "%C3%A4", "%252F", "+", "&amp;", "..", "."),
    *("//", "/", "://", "s3://", "file://", ".zarr", ".zarr/", "/zarr.json", ".kvm", "#", "?", "?x=1#y", "~", "a", "é"),
    *("e\u0301", "日本", "😀", "\U0010ffff", "[1]", "*", "**", " ", "  ", "\\", "nul", "C:", "-", "--x"),
)


def some_key(random: Random) -> str:
    """Return a key, legal or not."""
    kind = random.randrange(8)
    if kind < 3:
        return "".join(random.choice(PARTS) for _ in range(random.randrange(1, 9)))
    if kind < 5:
        return "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(1, 12)))
    if kind == 5:
        return "".join(random.choice(SIGNS) for _ in range(random.randrange(0, 6)))
    if kind == 6:
        return "x" * random.randrange(MAX_KEY_BYTES - RESERVED_BYTES - 3, MAX_KEY_BYTES + 3) + random.choice(PARTS)
    return f"{chr(random.randrange(0x20, 0x3000))}{random.choice(PARTS)}{chr(random.randrange(0x110000))}.zarr"


def legal(key: str) -> bool:
    """The rule, said another way."""
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        return False
    if any(c < " " or c in "\x7f\\\ufffe\uffff" or "\ud800" <= c <= "\udfff" for c in key):
        return False
    return len(key.encode()) <= MAX_KEY_BYTES - RESERVED_BYTES


def check(scheme: str, key: str) -> bool:
    """Assert that a key comes back, or is refused from both sides; True if it comes back."""
    bucket = "" if scheme == "memory" else "bucket"
    root = Address(scheme, bucket, "")
    if legal(key):
        url = root.at(key).url
        for spelling in (url, f"{url}/"):
            assert parse(spelling) == (scheme, bucket, key), (scheme, key, spelling)
        return True
    for refused in (lambda: root.at(key), lambda: parse(f"{root.root}/{key}" if bucket else f"memory://{key}")):
        try:
            found = refused()
        except NotACacheError:
            continue
        # One slash at the end is not part of a key, and nothing at all is the bucket.
        assert found.key == key.removesuffix("/"), (scheme, key, found)
        assert not found.key or legal(found.key), (scheme, key, found)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    kept = sum(check(random.choice(SCHEMES), some_key(random)) for _ in range(arguments.keys))
    print(
        f"{arguments.keys:,} keys: {kept:,} came back from their URLs, {arguments.keys - kept:,} were refused, 0 wrong"
    )


if __name__ == "__main__":
    sys.exit(main())
