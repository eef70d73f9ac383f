"""Opens the object store behind a store's small objects, with the storage options that Lance takes.

Lance and obstore stand on the same Rust ``object_store`` crate and share the names of its options, but not their places:
Lance takes all in one dictionary, obstore has one for the HTTP client, refuses names it does not know, and panics on some
that it does (``allow_http``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import obstore

from operators.errors import ConfigError, StorageError, without_credentials

CLIENT_OPTIONS = frozenset(
    (
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "http1_only"),
        *("http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle", "http2_only"),
        *("pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate", "proxy_excludes"),
        *("root_certificate", "timeout", "user_agent"),
    )
)

LANCE_OPTIONS = frozenset(("client_max_retries", "client_retry_timeout", "download_retry_count"))
"""Not obstore's, which has its own retries."""


_ANSWER = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error>.*?<Code>(.*?)</Code>\s*<Message>(.*?)</Message>.*", re.DOTALL)
"""What S3 says of an error."""


def open_objects(uri: str, options: Mapping[str, str], patient: bool = True) -> Any:
    """Return obstore's handle of a store.

    Parameters
    ----------
    options
        As Lance takes them.
    patient
        Retry for minutes, as a job should. A person who waits gets an answer in seconds.

    Raises
    ------
    ConfigError
        If the options do not fit the kind of store.
    """
    if "://" not in uri:
        return obstore.store.LocalStore(uri, mkdir=True)
    client: dict[str, Any] = {name: value for name, value in options.items() if name in CLIENT_OPTIONS}
    others = {name: value for name, value in options.items() if name not in CLIENT_OPTIONS | LANCE_OPTIONS}
    if not uri.startswith("s3"):
        others = {name: value for name, value in others.items() if not name.startswith("aws_")}
    arguments: dict[str, Any] = {}
    if not patient:
        client |= {"timeout": "10s", "connect_timeout": "3s"}
        arguments["retry_config"] = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
    try:
        return obstore.store.from_url(uri, client_options=client or None, **others, **arguments)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"storage options for {without_credentials(uri)}: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Return what an error of obstore says, on one line, without the dump of its source and without credentials."""
    text = _ANSWER.sub(r"\1: \2", str(error).partition("\n\nDebug source:")[0])
    return without_credentials(" ".join(text.split()))


def is_refusal(error: Exception) -> bool:
    """Return whether a store said that these credentials may not do this; obstore has a class of its own for some only."""
    return "status code: 401" in str(error) or "status code: 403" in str(error)


def storage_error(doing: str, uri: str, error: Exception) -> StorageError:
    """Return our error for one of obstore's, with what to do about it."""
    text = describe(error)
    advice = "Run `maxreel doctor --store` for a diagnosis."
    if is_refusal(error):
        advice = (
            "The store refuses these credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.*_env."
        )
    return StorageError(f"cannot {doing} {uri}: {text}. {advice}")
