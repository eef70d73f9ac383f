"""Reads what a user points at: a JSONL, CSV or Parquet manifest, or a folder or object-store prefix of videos.

Twice, since a nightly run takes what is no longer listed for gone: `check` reads all of it without looking at a video,
refuses it as a whole before anything is written, and returns the ids; `read` then gives the entries in chunks, so that a
manifest of millions never stands in memory as a whole. Every entry comes with what identifies its bytes; an entry that
cannot be used comes with its error instead. A million lines without videos take 4 s to check, 10 s to read, and 210 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import obstore
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs

from cluster.objects import open_objects
from operators.errors import ConfigError, ItemError, SourceError
from operators.fingerprint import fingerprint
from operators.remote import Environment, locate
from pipelines.manifest_files import (
    COLUMNS,
    UNREADABLE,
    Row,
    kind_of,
    listed,
    meant,
    read_csv,
    read_jsonl,
    read_parquet,
)
from pipelines.uris import Place, is_http, is_remote, is_under, redact_uri, resolve, shown, why

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv"),
)
COMPRESSED_SUFFIXES = (".bz2", ".gz", ".lz4", ".zst")

MAX_ID_BYTES = 512
MAX_URI_BYTES = 8_192
MAX_TEXT_BYTES = 1_000_000
NUM_THREADS = 32
"""How many remote videos are asked for at once: at 100 ms each, a million in under an hour instead of a day."""

LOCAL = pyarrow.fs.LocalFileSystem()
UNSAFE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")


class ManifestEntryError(ItemError):
    """An entry of the manifest cannot be used as it stands."""

    final = True


@dataclass(frozen=True)
class Entry:
    """One video as the manifest names it. Without an id that can be used, ``video_id`` is its place: ``line 3``."""

    video_id: str
    uri: str | None
    title: str | None
    description: str | None
    tags: tuple[str, ...]
    extra: str
    source_fingerprint: str
    error: ItemError | None = None


@dataclass(frozen=True)
class Checked:
    """What is known of a manifest that was read once.

    Parameters
    ----------
    ids
        The ids it lists, in order, those that it repeats as often as it does.
    repeated
        The ids listed more than once.
    num_entries
        How many entries it has, with those that have no id that can be used.
    stamp
        Size and modification time of the file; None for a folder.
    """

    ids: pa.ChunkedArray
    repeated: frozenset[str]
    num_entries: int
    stamp: tuple[int, int] | None


@dataclass(frozen=True)
class _Opened:
    """A manifest whose rows can be read: what messages call it and its rows, and what its uris are relative to."""

    name: str
    unit: str
    base: str
    stamp: tuple[int, int] | None
    rows: Callable[[], Iterator[Row]]

    @property
    def is_remote(self) -> bool:
        return "://" in self.base


def check(manifest: str, environment: Environment | None = None) -> Checked:
    """Read a manifest once without looking at a video, and return the ids it lists.

    Raises
    ------
    ConfigError
        If there is no such manifest, it is not of a kind that can be read, it is broken anywhere, or no entry has an id.
    """
    opened = _open(manifest, environment)
    ids: list[pa.Array] = []
    num_entries, problem = 0, None
    rows = opened.rows()
    while chunk := list(islice(rows, 8_192)):
        usable = []
        for number, row in chunk:
            try:
                usable.append(_video_id(row, opened.is_remote))
            except ManifestEntryError as error:
                problem = problem or f"{opened.unit} {number}: {error}"
        num_entries += len(chunk)
        ids.append(pa.array(usable, type=pa.string()))
    if not any(map(len, ids)):
        found = f"none of its {num_entries} entries can be used; {problem}" if num_entries else "it lists no videos"
        raise ConfigError(
            f"the manifest {opened.name}: {found}. It is refused, since a nightly run would otherwise remove every "
            "video; check what writes the manifest"
        )
    table = pa.chunked_array(ids)
    counts = table.value_counts()
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    return Checked(table, frozenset(repeated.to_pylist()), num_entries, opened.stamp)


def read(
    manifest: str,
    source: str,
    chunk_rows: int,
    allowed_roots: Sequence[str] = (),
    checked: Checked | None = None,
    environment: Environment | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[list[Entry]]:
    """Yield the entries of a manifest in chunks.

    Parameters
    ----------
    manifest
        Path or URI of a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file, of a folder, or of an object-store prefix.
    source
        ``stat`` identifies a file by size and modification time, ``content`` by a hash of its bytes, ``etag`` by what
        the object store or web server calls its version.
    allowed_roots
        Folders and URI prefixes that videos must lie under; none allows every place. Looked at before the video is.
    checked
        What `check` returned for it; without, it is checked first.
    environment
        How to reach object stores, where the environment of this process does not say it.
    options
        The same as storage options, for ETags.

    Raises
    ------
    ConfigError
        As `check` does, and if the manifest changes while it is read.
    """
    checked = checked or check(manifest, environment)
    opened = _open(manifest, environment)
    allowed = {redact_uri(root): resolve(root) for root in allowed_roots}
    look = partial(_look, source=source, allowed=allowed, environment=environment, options=options)
    first_numbers: dict[str, int] = {}
    rows = opened.rows()
    with _threads() as threads:
        while chunk := list(islice(rows, chunk_rows)):
            entries = [_entry(row, number, opened, checked.repeated, first_numbers) for number, row in chunk]
            entries = _identified(entries, look, threads)
            if not checked.stamp == opened.stamp == _open(manifest, environment).stamp:
                raise ConfigError(
                    f"the manifest {opened.name} changed while it was read. Write it under another name, rename it when "
                    "it is complete, and run again"
                )
            yield entries


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="manifest")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _open(manifest: str, environment: Environment | None) -> _Opened:
    """Return a manifest, of which the file system has been asked for."""
    name = redact_uri(manifest)
    try:
        filesystem, path = _locate(manifest, environment)
        info = filesystem.get_file_info(path)
    except UNREADABLE as error:
        raise ConfigError(f"cannot read the manifest {name}: {why(error, manifest)}") from error
    if info.type == pyarrow.fs.FileType.Directory:
        base = manifest.split("?")[0] if "://" in manifest else os.path.abspath(os.path.expanduser(manifest))
        return _Opened(name, "file", base, None, partial(_list_videos, filesystem, path, name, "://" in manifest))
    if info.type != pyarrow.fs.FileType.File:
        raise ConfigError(f"there is no manifest at {name}. Give a JSONL, CSV or Parquet file, or a folder of videos.")
    base = posixpath.dirname(manifest.split("?")[0]) if "://" in manifest else str(Path(manifest).resolve().parent)
    stem, suffix = posixpath.splitext(path.lower())
    compressed = suffix in COMPRESSED_SUFFIXES
    kind = posixpath.splitext(stem)[1] if compressed else suffix
    readers: dict[str, Any] = {
        ".csv": partial(read_csv, delimiter=","),
        ".tsv": partial(read_csv, delimiter="\t"),
        **dict.fromkeys((".jsonl", ".ndjson", ".json"), read_jsonl),
    }
    if not compressed:
        readers[".parquet"] = read_parquet
    if kind not in readers:
        raise ConfigError(
            f"the manifest {name} ends in {suffix!r}; it must be .jsonl, .csv or .tsv (also .gz, .zst, .bz2 or .lz4), "
            ".parquet, or a folder"
        )
    rows = partial(readers[kind], filesystem, path, name)
    return _Opened(name, "row" if kind == ".parquet" else "line", base, (info.size, info.mtime_ns or 0), rows)


def _locate(uri: str, environment: Environment | None) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path in it."""
    if "://" not in uri:
        return LOCAL, str(Path(uri).expanduser().resolve())
    try:
        return locate(uri, (environment or Environment()).over(os.environ))
    except (pa.ArrowInvalid, OSError, ConfigError) as error:
        raise ConfigError(f"cannot reach {redact_uri(uri)}: {why(error, uri)}") from error


def _list_videos(filesystem: Any, path: str, name: str, is_remote: bool) -> Iterator[Row]:
    selector = pyarrow.fs.FileSelector(path, recursive=True)
    try:
        paths = [_path_of(info) for info in filesystem.get_file_info(selector) if info.is_file]
    except UNREADABLE as error:
        raise ConfigError(f"cannot list the folder {name}: {why(error, name)}") from error
    files = sorted(path for path in paths if posixpath.splitext(path)[1].lower() in VIDEO_SUFFIXES)
    if not files:
        raise ConfigError(
            f"{name} holds no videos (files ending in {', '.join(VIDEO_SUFFIXES)}). It is refused, since a nightly run "
            "would otherwise remove every video; check the path, and that the disk is mounted"
        )
    for number, file in enumerate(files, start=1):
        relative = posixpath.relpath(file, path)
        quoted = quote(relative, errors="surrogatepass") if is_remote else relative
        yield number, {"video_id": derive_id(relative, is_remote=False), "uri": quoted}


def _path_of(info: Any) -> str:
    try:
        return str(info.path)
    except UnicodeDecodeError as error:  # a name that is not UTF-8 becomes an entry's error, not the end of the job
        return error.object.decode(errors="surrogateescape")


def _entry(
    row: Mapping[str, Any], number: int, opened: _Opened, repeated: frozenset[str], first_numbers: dict[str, int]
) -> Entry:
    """Return an entry as far as it is known without looking at the video."""
    place = f"{opened.unit} {number}"
    video_id = place
    try:
        video_id = _video_id(row, opened.is_remote)
        first = first_numbers.setdefault(video_id, number) if video_id in repeated else number
        if first != number:
            raise ManifestEntryError(
                f"the video_id {shown(video_id)} was already used by {opened.unit} {first}, which is kept; make it unique"
            )
        uri = _uri(row.get("uri"))
        return Entry(
            video_id=video_id,
            uri=_absolute(uri, opened.base) if uri else None,
            title=_text("title", row.get("title")),
            description=_text("description", row.get("description")),
            tags=_tags(row.get("tags")),
            extra=_extra(row),
            source_fingerprint="",
        )
    except ManifestEntryError as error:
        return Entry(video_id, None, None, None, (), "{}", "", ManifestEntryError(f"{opened.name}, {place}: {error}"))


def _video_id(row: Mapping[str, Any], is_remote: bool) -> str:
    """Return the id that a row gives or, without one, that of its uri."""
    given = row.get("video_id")
    if given is None:
        uri = _uri(row.get("uri"))
        if uri is None:
            columns = [column for column, value in row.items() if value is not None]
            raise ManifestEntryError(
                f"it has neither a uri nor a video_id, only {listed(columns)}. {meant(columns) or 'Give it one.'}"
            )
        return derive_id(uri, is_remote)
    is_number = type(given) is int or (type(given) is float and math.isfinite(given))
    if not is_number and not isinstance(given, str):
        raise ManifestEntryError(f"the video_id is {kind_of(given)}; allowed are text and numbers. Write it as text")
    video_id = str(given)
    if UNSAFE.search(video_id):
        raise ManifestEntryError(
            f"the video_id {shown(video_id)} holds white space or control characters, which run files cannot carry; "
            "rename it"
        )
    if not video_id:
        raise ManifestEntryError("the video_id is empty; give it one, or leave it out where there is a uri")
    _check_text("video_id", video_id, MAX_ID_BYTES)
    return video_id


def derive_id(uri: str, is_remote: bool) -> str:
    """Return the id of a video that has none: its uri, made safe for run files and rid of credentials.

    Of a URI the query string is cut, which may hold a signature. What was changed or cut is told apart by eight digits
    of a hash of the whole; so a URI that is signed anew every night needs a ``video_id`` to be known again.
    """
    safe = redact_uri(uri) if "://" in uri or not is_remote else uri.split("?")[0]
    safe = UNSAFE.sub("_", safe)
    if len(encoded := safe.encode(errors="surrogatepass")) > MAX_ID_BYTES:
        safe = encoded[: MAX_ID_BYTES - 9].decode(errors="ignore")
    return safe if safe == uri else f"{safe}~{hashlib.sha256(uri.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _uri(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ManifestEntryError(f"the uri is {kind_of(value)}; it must be text, or left out for a video without file")
    _check_text("uri", value, MAX_URI_BYTES)
    return value


def _text(column: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool | list | tuple | dict | bytes) or (isinstance(value, float) and not math.isfinite(value)):
        raise ManifestEntryError(f"the {column} is {kind_of(value)}; it must be text, or left out")
    text = str(value)
    _check_text(column, text)
    return text.strip() or None


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    wrong = [part for part in parts if not isinstance(part, str)] if isinstance(parts, list) else [value]
    if wrong:
        raise ManifestEntryError(
            f"the tags hold {kind_of(wrong[0])}; they must be a list of texts, or one text with commas between them"
        )
    _check_text("tags", ",".join(parts))
    return tuple(part.strip() for part in parts if part.strip())


def _extra(row: Mapping[str, Any]) -> str:
    extra = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
    if not extra:
        return "{}"
    try:
        text = json.dumps(extra, default=str, sort_keys=True)
    except (ValueError, RecursionError, UnicodeDecodeError) as error:
        raise ManifestEntryError(f"{listed(list(extra))} cannot be kept: {error}. Leave it out") from error
    _check_text("other columns", text if r"\ud" not in text else json.dumps(extra, default=str, ensure_ascii=False))
    return text


def _check_text(column: str, text: str, limit: int = MAX_TEXT_BYTES) -> None:
    """Refuse what no table or run file can hold."""
    try:
        num_bytes = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise ManifestEntryError(
            f"the {column} is no valid Unicode: it holds {text[error.start]!a}, half of a character or a byte that is "
            "not UTF-8; write it as UTF-8"
        ) from error
    if "\0" in text:
        raise ManifestEntryError(f"the {column} holds a NUL character; remove it")
    if num_bytes > limit:
        raise ManifestEntryError(
            f"the {column} is {num_bytes} bytes long, {shown(text)}; at most {limit} are allowed; shorten it"
        )


def _absolute(uri: str, base: str) -> str:
    if "://" in uri:
        return uri
    if "://" in base:
        return posixpath.join(base, uri)
    return str(Path(base, uri))


def _identified(
    entries: list[Entry], look: Callable[[str], str | ItemError], threads: ThreadPoolExecutor
) -> list[Entry]:
    """Return entries with what identifies their videos: many are asked for at once, several by each thread."""
    uris = [entry.uri for entry in entries if entry.uri is not None]
    size = min(64, 1 + len(uris) // (4 * NUM_THREADS))
    batches = [uris[first : first + size] for first in range(0, len(uris), size)]
    answers = chain.from_iterable(threads.map(lambda batch: [look(uri) for uri in batch], batches))
    return [entry if entry.uri is None else _with_answer(entry, next(answers)) for entry in entries]


def _with_answer(entry: Entry, found: str | ItemError) -> Entry:
    known = {"source_fingerprint": found} if isinstance(found, str) else {"error": found}
    return replace(entry, **known)


def _look(
    uri: str,
    source: str,
    allowed: Mapping[str, Place],
    environment: Environment | None,
    options: Mapping[str, str] | None,
) -> str | ItemError:
    if allowed and not is_under(resolve(uri), allowed.values()):
        return ManifestEntryError(
            f"{redact_uri(uri)} leads outside of what ingest.allowed_roots allows: {', '.join(allowed)}. Move the video, "
            "or add its folder there"
        )
    try:
        return identify(uri, source, environment, options)
    except ItemError as error:
        return error


def identify(
    uri: str, source: str, environment: Environment | None = None, options: Mapping[str, str] | None = None
) -> str:
    """Return what identifies the bytes at a uri.

    Raises
    ------
    SourceError
        If there is nothing there, or it cannot be read.
    """
    if is_http(uri) or (source == "etag" and is_remote(uri)):
        return _identify_object(uri, source, options)
    try:
        filesystem, path = _locate(uri, environment) if "://" in uri else (LOCAL, uri)
        info = filesystem.get_file_info(path)
        if info.type != pyarrow.fs.FileType.File:
            raise SourceError(
                f"there is no file at {redact_uri(uri)}; check the uri in the manifest, or remove the entry"
            )
        if source != "content":  # a file of this machine has no ETag
            return fingerprint(info.size, info.mtime_ns)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:32]
    except (*UNREADABLE, ConfigError) as error:
        raise SourceError(f"cannot read {redact_uri(uri)}: {why(error, uri)}") from error


def _identify_object(uri: str, source: str, options: Mapping[str, str] | None) -> str:
    """Return what identifies the bytes at a URI that obstore reads: the web, and an object store for its ETags."""
    try:
        store, path = _locate_object(uri, source, tuple(sorted((options or {}).items())))
        if source == "content":
            digest = hashlib.sha256()
            for block in obstore.get(store, path).stream(min_chunk_size=1 << 20):
                digest.update(block)
            return digest.hexdigest()[:32]
        head = obstore.head(store, path)
    except (*UNREADABLE, obstore.exceptions.BaseError, ConfigError) as error:
        raise SourceError(f"cannot read {redact_uri(uri)}: {why(error, uri)}") from error
    if source == "etag" and head["e_tag"]:
        return fingerprint(head["e_tag"])
    if source == "stat" and head["last_modified"].timestamp() > 0:
        return fingerprint(head["size"], head["last_modified"].timestamp())
    missing, other = ("ETag", "stat") if source == "etag" else ("modification time", "etag")
    raise SourceError(
        f"the server gives no {missing} of {redact_uri(uri)}; set ingest.source={other} or ingest.source=content"
    )


def _locate_object(uri: str, source: str, options: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    parts = urlsplit(uri)
    if not is_http(uri):
        return _object_store(f"{parts.scheme}://{parts.netloc}", source, options), uri.removeprefix(
            f"{parts.scheme}://{parts.netloc}"
        ).lstrip("/")
    if parts.query or "%" in parts.path or "//" in parts.path:
        return _object_store.__wrapped__(uri, source, ()), ""  # as it is; not kept, since it may be signed
    return _object_store(f"{parts.scheme}://{parts.netloc}", source, ()), parts.path.lstrip("/")


@lru_cache(maxsize=64)
def _object_store(root: str, source: str, options: tuple[tuple[str, str], ...]) -> Any:
    if not is_http(root):
        return open_objects(root, dict(options))
    # from_url takes some for buckets, to which a signed URL is no key. The timeout is of a request with its body.
    client: Any = {"allow_http": True, "timeout": "1 day" if source == "content" else "30s"}
    retries: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
    return obstore.store.HTTPStore.from_url(root, client_options=client, retry_config=retries)
