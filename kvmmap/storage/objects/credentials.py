"""Options of an object store: from the caller, the environment, and the files of the AWS command line.

Nothing is connected to here. Endpoints are checked, since obstore's compiled code does not survive a wrong one.
"""

from __future__ import annotations

import configparser
import contextlib
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from ...errors import KvmmapError

RETRIES = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""How often a request is repeated after an error that may pass (5xx, connection lost), by default."""

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")


def store_arguments(scheme: str, storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments of obstore's `from_url`.

    Args:
        scheme: of the URL, in lower case.
        storage_options: what obstore's store takes as `config`, and its `client_options` and `retry_config`.

    Raises:
        KvmmapError: an option that can't be one, or an endpoint that is not an http address.
    """
    try:
        options = dict(storage_options or {})
        client = dict(options.pop("client_options", None) or {})
    except (TypeError, ValueError):
        raise KvmmapError("storage_options, and its client_options, are dictionaries by name") from None
    if wrong := [name for name in options if not isinstance(name, str)]:
        raise KvmmapError(f"storage_options are named by text, not {wrong[0]!r}", actual=wrong[0])
    retries = options.pop("retry_config", None) or RETRIES
    if scheme in ("s3", "s3a"):
        options = aws_options(options)
        if str(options.get("endpoint", "")).lower().startswith("http://"):
            client.setdefault("allow_http", True)  # an explicit http endpoint is intended
    if scheme == "http":
        client.setdefault("allow_http", True)
    return {"config": options or None, "client_options": client or None, "retry_config": retries}


def aws_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete options from the environment and the AWS command line's files.

    obstore itself asks for the credentials of machines and containers.
    """
    options = {key.lower().removeprefix("aws_"): value for key, value in options.items()}
    source = "storage_options"
    endpoint = options.pop("endpoint_url", None) or options.get("endpoint")
    if not endpoint:
        source, endpoint = _first(ENDPOINTS)
    asked = {"access_key_id", "skip_signature", "token"} & set(options)
    if not asked and "AWS_ACCESS_KEY_ID" not in os.environ:
        profile = _profile()
        names = {
            "access_key_id": "aws_access_key_id",
            "secret_access_key": "aws_secret_access_key",
            "session_token": "aws_session_token",
            "region": "region",
        }
        for name, key in names.items():
            if not options.get(name) and key in profile:
                options[name] = profile[key]
        if not endpoint and "endpoint_url" in profile:
            source, endpoint = "endpoint_url in ~/.aws/config", profile["endpoint_url"]
    options["endpoint"] = check_endpoint(endpoint, source) if endpoint else None
    if "region" not in options and not _first(("AWS_REGION", "AWS_DEFAULT_REGION"))[1]:
        options["region"] = "us-east-1"
    return {key: value for key, value in options.items() if value is not None}


def check_endpoint(endpoint: Any, source: str) -> str:
    """Return an endpoint, without blanks around it.

    Raises:
        KvmmapError: it is not the address of a web server.
    """
    text = str(endpoint).strip()
    try:
        parts = urlsplit(text)
        sound = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number, brackets that don't match
        sound = False
    if not sound or any(ord(c) <= 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
        hint = f": write http://{text} or https://{text}" if text and "://" not in text else ""
        raise KvmmapError(
            f"{source}: the endpoint {text!r} is not an address such as https://s3.example.com{hint}", actual=text
        )
    return text


def _first(names: Sequence[str]) -> tuple[str, str | None]:
    """Return the first environment variable that is set, and its value."""
    name = next((name for name in names if os.environ.get(name)), names[0])
    return name, os.environ.get(name) or None


def _profile() -> dict[str, str]:
    """Return the settings of the active profile in ~/.aws/credentials and ~/.aws/config."""
    name = os.environ.get("AWS_PROFILE") or "default"
    home = os.path.expanduser("~/.aws")
    parser = configparser.RawConfigParser()
    for path in (
        os.environ.get("AWS_CONFIG_FILE") or os.path.join(home, "config"),
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.path.join(home, "credentials"),
    ):
        with contextlib.suppress(configparser.Error, UnicodeDecodeError, OSError, ValueError):
            parser.read(path)
    found: dict[str, str] = {}
    for section in (f"profile {name}", name):
        if parser.has_section(section):
            found |= {key: value for key, value in parser.items(section) if value is not None}
    return found
