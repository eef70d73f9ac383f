"""Reaches files on object stores: manifests, the videos they name, and what decoder processes read.

Where an S3-compatible store is and how to sign for it are environment variables, as every AWS tool knows them. So a
decoder process finds them in its own environment, and only what is configured beyond that has to be carried to it.

pyarrow retries 408, 429, 5xx and broken connections by itself, with random waits of up to 1, 2, 4 ... 20 s, but makes three
attempts in all: five refusals in a row ended a read after 1.3 s (measured; see ``cluster/retries.py`` for the others).
Here it makes `ATTEMPTS`. A key is taken as it is written, without percent decoding, as the AWS tools do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from operators.errors import ConfigError

ATTEMPTS = 7
"""Of each request to S3; the waits between them come to 25 s on average."""

CONNECT_SECONDS = 10.0


class Environment:
    """Environment variables for processes that reach object stores. Shows no values, which may be secret.

    Not a mapping and no dataclass: Ray records the contents of those with the parameters of an operator.
    """

    def __init__(self, variables: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        self._variables = dict(variables)

    def over(self, below: Mapping[str, str]) -> dict[str, str]:
        """Return an environment with these variables set in it."""
        return {**below, **self._variables}

    def __repr__(self) -> str:
        return f"Environment({', '.join(self._variables)})"


def locate(uri: str, environment: Mapping[str, str]) -> tuple[Any, str]:
    """Return the pyarrow file system of a URI, and the path in it.

    Parameters
    ----------
    environment
        For ``s3://``: ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL``, ``AWS_REGION`` or ``AWS_DEFAULT_REGION``,
        ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY`` and ``AWS_SESSION_TOKEN``. Without keys the AWS SDK looks for
        them where it always does: profiles, web identity, instance metadata.

    Raises
    ------
    OSError, ValueError
        What pyarrow raises where it cannot reach it, or knows no such kind of URI.
    ConfigError
        If an ``s3://`` URI holds credentials.
    """
    from pyarrow.fs import FileSystem  # half of the time that a decoder process takes to start, and few need it

    if not uri.startswith("s3://"):
        located: tuple[Any, str] = FileSystem.from_uri(quote(uri, safe="/:?=&%@+,~"))
        return located
    path = uri.removeprefix("s3://").rstrip("/")
    bucket = path.partition("/")[0]
    if "@" in bucket or ":" in bucket:  # a bucket's name has neither
        raise ConfigError("an s3:// URI holds credentials; put them into the environment and write s3://bucket/key")
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or None
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None
    keys = (environment.get(f"AWS_{name}") or None for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"))
    return _s3(endpoint, region or _region(bucket, endpoint), *keys), path


@lru_cache(maxsize=64)
def _s3(endpoint: str | None, region: str, access_key: str | None, secret_key: str | None, token: str | None) -> Any:
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    return S3FileSystem(
        access_key=access_key if secret_key else None,
        secret_key=secret_key if access_key else None,
        session_token=token if access_key and secret_key else None,
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_SECONDS,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    )


@lru_cache(maxsize=64)
def _region(bucket: str, endpoint: str | None) -> str:
    """Return a bucket's region: asked from AWS, and of no matter elsewhere."""
    from pyarrow.fs import resolve_s3_region

    return "us-east-1" if endpoint else str(resolve_s3_region(bucket))
