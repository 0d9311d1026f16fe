"""Paths and URLs as callers write them, brought to one form. Nothing is looked up here but the home directory."""

from __future__ import annotations

import os
import re

from .errors import NotACacheError

PathLike = str | os.PathLike[str]

_FILE = "file://"
_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")


def place_text(path: PathLike) -> str:
    """Return a URL as it is, and the path of anything local: of "file:///a", "file://localhost/a", "~/a".

    "~" and "~user" are expanded unless there is something of that very name. Bytes are decoded as the system does
    with file names, so any name works.

    Raises:
        NotACacheError: empty, or nothing that can be a path; or a file: URL that names another machine.
    """
    text = os.fsdecode(path)
    if not text:
        raise NotACacheError("the path is empty: give the path or URL of a cache", path=text)
    if text[: len(_FILE)].lower() == _FILE:
        text = _path_of_url(text)
    elif is_url(text):
        return text
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise NotACacheError(
            f"{text!r}: can't be a path here: {text[_first_unencodable(text)]!r} is in no file name", path=text
        ) from None
    if b"\0" in encoded:
        raise NotACacheError(f"{text!r}: can't be a path: it has a zero byte", path=text)
    if text[0] == "~" and not os.path.lexists(text):
        text = os.path.expanduser(text)
    return text


def is_url(text: str) -> bool:
    """True for URLs of object stores; a file: URL is a local path."""
    return _SCHEME.match(text) is not None and text[: len(_FILE)].lower() != _FILE


def _path_of_url(url: str) -> str:
    """Return the path of file:///a, file://localhost/a and, as earlier versions took it, file://a."""
    rest = url[len(_FILE) :]
    host, slash, path = rest.partition("/")
    if host.lower() == "localhost" and slash:
        return slash + path
    if not rest:
        raise NotACacheError(f"{url}: has no path: file:///folder/prompt.kvm is a file on this machine", path=url)
    return rest


def _first_unencodable(text: str) -> int:
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        return error.start
    return 0
