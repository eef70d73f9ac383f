"""The store: one folder or object-store prefix that holds every Lance table, the indices and the lease.

``lancedb.connect(store.uri)`` opens it. One dictionary of storage options (credentials, endpoint, region) serves tables and
small objects alike (``cluster/objects.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import lance
import obstore
import pyarrow as pa

from cluster.objects import open_objects, storage_error
from cluster.retries import retried
from operators import schema
from operators.errors import ConfigError, StorageError

VIDEOS = "videos"
MODALITIES = "modalities"
FAILURES = "failures"
RUNS = "runs"
RELEASES = "releases"

SCHEMAS: dict[str, pa.Schema] = {
    VIDEOS: schema.VIDEOS,
    MODALITIES: schema.MODALITY_ROWS,
    FAILURES: schema.FAILURES,
    RUNS: schema.RUNS,
    RELEASES: schema.RELEASES,
}

LATER_COLUMNS = {MODALITIES: frozenset({"audio"})}
"""Columns that tables of older stores lack. They read as null, and are added when there is something to write in them."""

FORMAT = 2
"""Of the store as a whole; a job refuses others. 2: tables keep stable row ids, by which an index names its clips."""

FORMAT_PATH = "maxreel.json"

STORAGE_VERSION = "2.0"
"""Lance file format. 2.0 scans nested lists about 2.5 times as fast as 2.2 (measured on 1,000 x 300 x 128 float16)."""

DELETE_BATCH_ROWS = 10_000


def token_table(encoder: str) -> str:
    """Return the name of an encoder's token embedding table: encoders of different widths live side by side."""
    return f"token_embeddings_{encoder}"


@dataclass(frozen=True)
class Store:
    """One store. Cheap to pickle: workers open their own handles.

    Parameters
    ----------
    uri
        Absolute local path or object-store URI, without a trailing slash. Use `Store.at` to make one.
    options
        Storage options as Lance takes them, for example ``aws_endpoint``. Not shown: they may hold credentials.
    tables_of
        URI of the store whose tables these are, if not its own: an index of them is then written elsewhere.
    """

    uri: str
    options: Mapping[str, str] = field(default_factory=dict, repr=False)
    tables_of: str | None = None

    @classmethod
    def at(cls, location: str, options: Mapping[str, str] | None = None) -> Store:
        """Return the store at a path or URI."""
        if "://" not in location:
            return cls(str(Path(location).expanduser().resolve()), dict(options or {}))
        return cls(location.rstrip("/"), dict(options or {}))

    @cached_property
    def objects(self) -> Any:
        """The obstore handle for small objects (lease, index manifests)."""
        return open_objects(self.uri, self.options)

    def table_uri(self, name: str) -> str:
        """Return where a table lives."""
        return f"{self.tables_of or self.uri}/{name}.lance"

    def open(self, name: str, version: int | None = None) -> lance.LanceDataset:
        """Return a table, optionally at a version.

        Raises
        ------
        StorageError
            If it does not exist or cannot be read.
        """
        dataset = self.open_or_none(name, version)
        if dataset is None:
            at = "" if version is None else f" at version {version}"
            raise StorageError(
                f"{self.uri} has no table {name!r}{at}. Run `maxreel index MANIFEST --store {self.uri}` first, "
                "or check --store."
            )
        return dataset

    def open_or_none(self, name: str, version: int | None = None) -> lance.LanceDataset | None:
        """Return a table, or None where it was never created."""
        try:
            return lance.dataset(self.table_uri(name), version=version, storage_options=dict(self.options) or None)
        except ValueError as error:  # what Lance raises for a missing dataset or version
            if "not found" in str(error).lower():
                return None
            raise StorageError(f"cannot open {self.table_uri(name)}: {error}") from error
        except OSError as error:
            raise StorageError(f"cannot open {self.table_uri(name)}: {error}") from error

    def rows(self, name: str, columns: Sequence[str], table_schema: pa.Schema | None = None) -> pa.Table:
        """Return columns of every row, and ``_rowid``; none where the table was never created."""
        dataset = self.open_or_none(name)
        if dataset is not None:
            return dataset.scanner(columns=list(columns), with_row_id=True).to_table()
        of_table = table_schema or SCHEMAS[name]
        fields = [*(of_table.field(column) for column in columns), pa.field("_rowid", pa.uint64())]
        return pa.schema(fields).empty_table()

    def create(self, name: str, table_schema: pa.Schema | None = None) -> lance.LanceDataset:
        """Return a table, made empty if it is not there.

        A token embedding table of another schema (a new encoder width under the same name) starts again from empty;
        older versions keep the old rows for the releases that read them. Row ids never come again.

        Raises
        ------
        StorageError
            If another table has a schema that this version does not know.
        """
        wanted = table_schema or SCHEMAS[name]
        dataset = self.open_or_none(name)
        if dataset is not None and dataset.schema.equals(_without_later_columns(name, wanted, dataset.schema)):
            return dataset
        if dataset is not None and name in SCHEMAS:
            raise StorageError(
                f"{self.table_uri(name)} has other columns than this maxreel writes; it was made by another version. "
                "Use that version, or index into a new store."
            )
        return lance.write_dataset(
            wanted.empty_table(),
            self.table_uri(name),
            mode="create" if dataset is None else "overwrite",
            data_storage_version=STORAGE_VERSION,
            enable_stable_row_ids=True,
            storage_options=dict(self.options) or None,
        )

    def prepare(self) -> None:
        """Make every table of a new store, or check that the store is of this format.

        Raises
        ------
        StorageError
            If it is of another.
        """
        self.check_format()
        if not self.exists(FORMAT_PATH):
            self.put_json(FORMAT_PATH, {"format": FORMAT})
        for name in SCHEMAS:
            self.create(name)

    def check_format(self) -> None:
        """Do nothing if the store is empty or of this format.

        Raises
        ------
        StorageError
            If it is of another.
        """
        if self.open_or_none(VIDEOS) is None:
            return
        found = (
            self.get_json(FORMAT_PATH) if self.exists(FORMAT_PATH) else {"format": 1}
        )  # the last that did not say so
        number = found.get("format") if isinstance(found, dict) else None
        if number != FORMAT:
            newer = isinstance(number, int) and number > FORMAT
            remedy = "Use a newer maxreel" if newer else "Index into a new store"
            raise StorageError(f"{self.uri} is a store of format {number}; this maxreel reads {FORMAT}. {remedy}.")

    def num_bytes(self) -> int:
        """Return the size of everything in the store."""
        return sum(entry["size"] for batch in obstore.list(self.objects) for entry in batch)

    def exists(self, path: str) -> bool:
        """Return whether there is a small object at a path."""
        try:
            obstore.head(self.objects, path)
        except FileNotFoundError:
            return False
        return True

    def take(self, name: str, version: int, row_ids: Sequence[int], columns: Sequence[str]) -> pa.Table:
        """Return rows of a table's version by Lance row id, in the order asked for."""
        dataset = self.open(name, version)
        lacking = LATER_COLUMNS.get(name, frozenset()).difference(dataset.schema.names).intersection(columns)
        there = [column for column in columns if column not in lacking]
        rows: pa.Table = dataset._take_rows(list(row_ids), columns=there)
        for column in lacking:
            rows = rows.append_column(column, pa.nulls(rows.num_rows, SCHEMAS[name].field(column).type))
        return rows.select(list(columns))

    def add_later_columns(self, name: str) -> None:
        """Add the columns that a table of an older store lacks, without rewriting a row. Only by the lease's holder."""

        def add() -> None:
            dataset = self.open(name)
            lacking = [field for field in SCHEMAS[name] if field.name not in dataset.schema.names]
            if lacking:
                dataset.add_columns(pa.schema(lacking))

        retried(add, f"adding columns to {name}")

    def delete_rows(self, name: str, row_ids: Sequence[int]) -> None:
        """Delete rows by Lance row id (valid for the version they were read from, while we are the only writer)."""
        for first in range(0, len(row_ids), DELETE_BATCH_ROWS):
            batch = row_ids[first : first + DELETE_BATCH_ROWS]
            rows = f"_rowid IN ({', '.join(map(str, batch))})"
            retried(lambda rows=rows: self.open(name).delete(rows), f"deleting from {name}")  # type: ignore[misc]

    def append(self, name: str, rows: pa.Table) -> None:
        """Add rows to a small table, in one commit. Only by the lease's holder."""
        lance.write_dataset(
            rows,
            self.table_uri(name),
            mode="append",
            data_storage_version=STORAGE_VERSION,
            storage_options=dict(self.options) or None,
        )

    def upsert(self, name: str, rows: pa.Table, keys: Sequence[str]) -> None:
        """Insert rows, replacing those with the same keys. Only for small tables, only by the lease's holder."""

        def merge() -> None:
            merge_insert = self.create(name).merge_insert(list(keys))
            merge_insert.when_matched_update_all().when_not_matched_insert_all().execute(rows)

        retried(merge, f"writing to {name}")

    def put_json(self, path: str, value: Any) -> None:
        """Write a small JSON object."""
        try:
            obstore.put(self.objects, path, json.dumps(value, indent=1).encode())
        except obstore.exceptions.BaseError as error:
            raise storage_error("write", f"{self.uri}/{path}", error) from error

    def get_json(self, path: str) -> Any:
        """Read a small JSON object.

        Raises
        ------
        StorageError
            If it is missing or is not JSON.
        """
        try:
            return json.loads(bytes(obstore.get(self.objects, path).bytes()))
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.uri}/{path} is missing; build the index again with `maxreel build-index`"
            ) from error
        except obstore.exceptions.BaseError as error:
            raise storage_error("read", f"{self.uri}/{path}", error) from error
        except ValueError as error:
            raise StorageError(f"{self.uri}/{path} is not JSON: {error}") from error


def _without_later_columns(name: str, wanted: pa.Schema, held: pa.Schema) -> pa.Schema:
    """Return a table's schema as an older store may have it, if this one does."""
    later = LATER_COLUMNS.get(name, frozenset())
    return pa.schema([field for field in wanted if field.name in held.names or field.name not in later])


def check_location(location: str | None) -> str:
    """Return a store location that was given, or say how to give one."""
    if not location:
        raise ConfigError("no store was given. Pass --store DIR (or s3://bucket/prefix), or set `store:` in a config.")
    return location
