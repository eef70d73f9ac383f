"""What may be said of a URI, and where it leads."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

SHOWN_CHARACTERS = 60
MAX_WAYS = 16

Place = tuple[str, tuple[str, ...]]
"""A server, none for this machine, and a path in every way that it may be understood."""


def is_http(uri: str) -> bool:
    """Return whether a URI is read from the web."""
    return uri.startswith(("http://", "https://"))


def is_remote(uri: str) -> bool:
    """Return whether a path or URI is not of this machine."""
    return "://" in uri and not uri.startswith("file://")


def redact_uri(uri: str) -> str:
    """Return a URI without what may be secret: user, password and query string. A path stays as it is."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    # A password may hold a slash that should have been encoded; what follows the colon of a port is a number.
    return f"{scheme}://{re.sub(r'^([^/]*@|[^/@:]*:(?![0-9]+/)[^@]*@)', '', rest.split('?')[0])}"


def why(error: Exception, uri: str) -> str:
    """Return the first line of a library's error, without the secrets of the URIs in it."""
    text = str(error).replace(uri, redact_uri(uri))
    query = uri.partition("?")[2]
    for secret in filter(None, (query, quote(query, safe=""), quote(query))):
        text = text.replace(secret, "...")
    text = text.partition("\n")[0]
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"]+", lambda found: redact_uri(found[0]), text)


def shown(text: str) -> str:
    """Return the beginning of a text as a message shows it: on one line, quoted, without the secrets of a URI."""
    text = redact_uri(text)
    return repr(text) if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]!r}..."


def resolve(uri: str) -> Place:
    """Return where a path or URI leads.

    Servers and libraries do not agree on whether ``..``, ``%2e`` and ``#`` mean anything, so all ways count. A path on
    this machine has one, its symbolic links followed; what cannot be understood has none.
    """
    if "://" not in uri:
        return "", (os.path.realpath(os.path.expanduser(uri)),)
    if re.search(r"[\\\x00-\x1f\x7f]", uri):  # libraries do not agree on where the host ends
        return "", ()
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "", ()
    if parts.scheme == "file":
        return "", (os.path.realpath(unquote(parts.path)),) if parts.netloc in ("", "localhost") else ()
    ways = {parts.path, parts.path + (parts.fragment and f"#{parts.fragment}")}
    while more := {unquote(way) for way in ways} - ways:
        ways |= more
        if len(ways) > MAX_WAYS:
            return "", ()
    # Where a query string chooses the server, as Arrow's for S3 do, it is a part of the place.
    server = f"{parts.scheme}://{parts.netloc.rpartition('@')[2].lower()}" + ("" if is_http(uri) else parts.query)
    return server, (*ways, *map(posixpath.normpath, ways))


def is_under(place: Place, roots: Iterable[Place]) -> bool:
    """Return whether a place lies in one of these folders, however its path is understood."""
    host, ways = place
    folders = [folder.rstrip("/") for root_host, root_ways in roots if root_host == host for folder in root_ways]
    return bool(ways) and all(any(f"{path}/".startswith(f"{folder}/") for folder in folders) for path in ways)
