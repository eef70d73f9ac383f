"""Queries as encoders take them: the text of a judged query, and the image that is a part of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from operators.encoders import Encoder, Floats, Query
from operators.errors import ConfigError
from operators.remote import Environment, locate
from pipelines.datasets import JudgedQuery
from pipelines.uris import is_http, is_remote, redact_uri, why

AT_ONCE = 32
"""Queries whose images are in memory together: one of 12 megapixels takes 36 MB when it is decoded."""


def to_query(judged: JudgedQuery, environment: Environment) -> Query:
    """Return a query with its image read.

    Raises
    ------
    ConfigError
        If the image cannot be read.
    """
    image = read_image(judged.image, environment) if judged.image else None
    return Query(judged.text or None, image, judged.boxes, judged.vision_text)


def encode_queries(encoder: Encoder, judged: Sequence[JudgedQuery], environment: Environment) -> list[Floats]:
    """Return (Tq, dim) token embeddings of each query.

    Raises
    ------
    ConfigError
        Naming the query whose image cannot be read, or that the encoder does not take.
    """
    found: list[Floats] = []
    for first in range(0, len(judged), AT_ONCE):
        some = judged[first : first + AT_ONCE]
        try:
            found += encoder.encode_queries([to_query(query, environment) for query in some])
        except ConfigError:
            for query in some:  # which one it was
                _encode_one(encoder, query, environment)
            raise
    return found


def _encode_one(encoder: Encoder, query: JudgedQuery, environment: Environment) -> None:
    try:
        encoder.encode_queries([to_query(query, environment)])
    except ConfigError as error:
        raise ConfigError(f"query {query.query_id}: {error}") from error


def read_image(uri: str, environment: Environment) -> bytes:
    """Return the bytes of an image file of this machine or an object store.

    Raises
    ------
    ConfigError
        If it cannot be read, or lies on a web server.
    """
    if is_http(uri):
        raise ConfigError(f"the image {redact_uri(uri)} is on a web server; download it and give the file")
    try:
        if not is_remote(uri):
            return Path(uri.removeprefix("file://")).expanduser().read_bytes()
        filesystem, path = locate(uri, environment.over(os.environ))
        with filesystem.open_input_stream(path) as stream:
            content: bytes = stream.read()
            return content
    except (OSError, ValueError) as error:
        raise ConfigError(f"the image {redact_uri(uri)} cannot be read: {why(error, uri)}") from error
