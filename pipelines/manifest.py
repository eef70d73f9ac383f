"""Reads what a user points at: a JSONL, CSV or Parquet manifest, or a folder or object-store prefix of videos.

Read in chunks, so that a manifest of millions never stands in memory as a whole. Every entry comes with what identifies
its bytes; an entry that cannot be used comes with its error instead.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.fs

from operators.errors import ConfigError, ItemError, SourceError, without_credentials
from operators.fingerprint import fingerprint
from operators.remote import Environment, locate

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv"),
)
COLUMNS = ("video_id", "uri", "title", "description", "tags")


class ManifestEntryError(ItemError):
    """An entry of the manifest cannot be used as it stands."""

    final = True


@dataclass(frozen=True)
class Entry:
    """One video as the manifest names it."""

    video_id: str
    uri: str | None
    title: str | None
    description: str | None
    tags: tuple[str, ...]
    extra: str
    source_fingerprint: str
    error: ItemError | None = None


def read(manifest: str, source: str, chunk_rows: int, environment: Environment | None = None) -> Iterator[list[Entry]]:
    """Yield the entries of a manifest in chunks.

    Parameters
    ----------
    manifest
        Path or URI of a ``.jsonl``, ``.csv`` or ``.parquet`` file, of a folder, or of an object-store prefix.
    source
        ``stat`` identifies a file by size and modification time, ``content`` by a hash of its bytes.
    environment
        How to reach object stores, where the environment of this process does not say it.

    Raises
    ------
    ConfigError
        If there is no such manifest, or it is not of a kind that can be read.
    """
    filesystem, path = _locate(manifest, environment)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise ConfigError(without_credentials(f"cannot read the manifest {manifest}: {error}")) from error
    if info.type == pyarrow.fs.FileType.Directory:
        rows = _list_videos(filesystem, path, manifest)
        base = manifest
    elif info.type == pyarrow.fs.FileType.File:
        rows = _read_rows(filesystem, path)
        base = posixpath.dirname(manifest) if "://" in manifest else str(Path(manifest).resolve().parent)
    else:
        raise ConfigError(
            f"there is no manifest at {manifest}. Give a JSONL, CSV or Parquet file, or a folder of videos."
        )
    seen: dict[str, int] = {}
    chunk: list[Entry] = []
    for number, row in rows:
        chunk.append(_entry(row, number, base, source, seen, environment))
        if len(chunk) == chunk_rows:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def check(manifest: str, source: str, chunk_rows: int, environment: Environment | None = None) -> pa.ChunkedArray:
    """Temporary."""
    chunks = read(manifest, source, chunk_rows, environment)
    return pa.chunked_array([pa.array([e.video_id for e in chunk], pa.string()) for chunk in chunks], pa.string())


def _locate(uri: str, environment: Environment | None = None) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path in it."""
    if "://" not in uri:
        return pyarrow.fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
    try:
        return locate(uri, (environment or Environment()).over(os.environ))
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(without_credentials(f"cannot reach {uri}: {error}")) from error


def _list_videos(filesystem: Any, path: str, manifest: str) -> Iterator[tuple[int, dict[str, Any]]]:
    selector = pyarrow.fs.FileSelector(path, recursive=True)
    files = sorted(
        info.path
        for info in filesystem.get_file_info(selector)
        if info.is_file and posixpath.splitext(info.path)[1].lower() in VIDEO_SUFFIXES
    )
    if not files:
        raise ConfigError(f"{manifest} holds no videos (files ending in {', '.join(VIDEO_SUFFIXES)})")
    for number, file in enumerate(files, start=1):
        yield number, {"uri": posixpath.relpath(file, path)}


def _read_rows(filesystem: Any, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    suffix = posixpath.splitext(path)[1].lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        yield from _read_jsonl(filesystem, path)
        return
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise ConfigError(
            f"the manifest {path} ends in {suffix!r}; it must be .jsonl, .csv, .tsv or .parquet, or a folder"
        )
    kind: Any = "parquet"
    if suffix != ".parquet":
        options = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
        kind = pyarrow.dataset.CsvFileFormat(parse_options=options)
    number = 1
    try:
        for batch in pyarrow.dataset.dataset(path, format=kind, filesystem=filesystem).to_batches():
            for row in batch.to_pylist():
                yield number, row
                number += 1
    except pa.ArrowInvalid as error:
        raise ConfigError(f"cannot read the manifest {path} after row {number - 1}: {error}") from error


def _read_jsonl(filesystem: Any, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Line by line, not with Arrow's reader: columns may differ between lines, and an error must name its line.
    with io.TextIOWrapper(filesystem.open_input_stream(path), encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number}: a {type(row).__name__}; each line must be a JSON object")
            yield number, row


def _entry(
    row: Mapping[str, Any],
    number: int,
    base: str,
    source: str,
    seen: dict[str, int],
    environment: Environment | None = None,
) -> Entry:
    uri = row.get("uri") or None
    video_id = str(row.get("video_id") or "") or derive_id(uri, number)
    extra = {name: value for name, value in row.items() if name not in COLUMNS and value is not None}
    location = _absolute(uri, base) if uri else None
    source_fingerprint, error = "", _problem(video_id, number, seen)
    if error is None and location is not None:
        try:
            source_fingerprint = identify(location, source, environment)
        except ItemError as problem:
            error = problem
    return Entry(
        video_id=video_id,
        uri=location,
        title=_text(row.get("title")),
        description=_text(row.get("description")),
        tags=_tags(row.get("tags")),
        extra=json.dumps(extra, default=str, sort_keys=True),
        source_fingerprint=source_fingerprint,
        error=error,
    )


def _problem(video_id: str, number: int, seen: dict[str, int]) -> ItemError | None:
    if re.search(r"\s", video_id):
        return ManifestEntryError(
            f"entry {number}: the video_id {video_id!r} holds white space, which run files cannot carry; rename it"
        )
    first = seen.setdefault(video_id, number)
    if first != number:
        return ManifestEntryError(
            f"entry {number}: the video_id {video_id!r} was already used by entry {first}; make it unique"
        )
    return None


def derive_id(uri: str | None, number: int) -> str:
    """Return the id of a video that has none: its uri, made safe for run files."""
    if not uri:
        return f"row{number}"
    safe = re.sub(r"\s", "_", uri)
    return safe if safe == uri else f"{safe}~{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def _absolute(uri: str, base: str) -> str:
    if "://" in uri:
        return uri
    if "://" in base:
        return posixpath.join(base, uri)
    return str(Path(base, uri).expanduser())


def identify(uri: str, source: str, environment: Environment | None = None) -> str:
    """Return what identifies the bytes at a uri.

    Raises
    ------
    SourceError
        If there is nothing there, or it cannot be read.
    """
    try:
        filesystem, path = _locate(uri, environment)
        info = filesystem.get_file_info(path)
        if info.type != pyarrow.fs.FileType.File:
            shown = without_credentials(uri)
            raise SourceError(f"there is no file at {shown}; check the uri in the manifest, or remove the entry")
        if source == "stat":
            return fingerprint(info.size, info.mtime_ns)
        digest = hashlib.sha256()
        with filesystem.open_input_stream(path) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:32]
    except (OSError, ConfigError) as error:
        raise SourceError(without_credentials(f"cannot read {uri}: {error}")) from error


def _text(value: Any) -> str | None:
    return str(value).strip() or None if value is not None else None


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(str(part).strip() for part in parts if str(part).strip())
