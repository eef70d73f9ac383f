"""Reads the rows of JSONL, CSV and Parquet files, so that every error of a file names its line or row.

A file is refused as a whole when it is broken anywhere: half of a manifest is not told from one whose videos are gone.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from operators.errors import ConfigError
from pipelines.uris import shown, why

COLUMNS = ("video_id", "uri", "title", "description", "tags")
MISNAMED = {"id": "video_id", "key": "video_id", "file": "uri", "filename": "uri", "link": "uri", "path": "uri"}
MAX_LINE_BYTES = 64 << 20
UNREADABLE = (OSError, ValueError, RuntimeError, pa.ArrowException)
"""What Arrow, the codecs of Python and ``Path.resolve`` (links in a circle) raise."""

Row = tuple[int, Mapping[str, Any]]


def read_lines(filesystem: Any, path: str, name: str) -> Iterator[str]:
    """Yield the lines of a text file, compressed or not.

    Decoded one by one, so that an error names its line. No line is held whose length shows that this is no text.
    """
    number = 0
    try:
        with io.BufferedReader(filesystem.open_input_stream(path), 1 << 20) as stream:
            while line := stream.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise ConfigError(
                        f"{name}, line {number} is longer than {MAX_LINE_BYTES >> 20} MiB. Write one line a row"
                    )
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}, line {number}: not UTF-8 ({error.reason} at byte {error.start + 1}). Save it as UTF-8"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read {name} after line {number}: {why(error, name)}. Write or copy it again"
        ) from error


def read_jsonl(filesystem: Any, path: str, name: str) -> Iterator[Row]:
    """Yield the objects of a JSONL file with their line numbers."""
    # Not with Arrow's reader: columns may differ between lines, and an error must name its line.
    for number, line in enumerate(read_lines(filesystem, path, name), start=1):
        if line.isspace() or not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise ConfigError(
                f"{name}, line {number}: not JSON ({found}). Each line must be one JSON object; was the file "
                "written to its end?"
            ) from error
        if not isinstance(row, dict):
            raise ConfigError(
                f"{name}, line {number}: {kind_of(row)}; each line must be a JSON object such as "
                '{"video_id": "v1", "uri": "v1.mp4"}'
            )
        yield number, row


def read_csv(filesystem: Any, path: str, name: str, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file, their values all text, with the numbers of the lines they begin on."""
    header: list[str] = []
    for number, cells in read_cells(filesystem, path, name, delimiter):
        if not header:
            header = cells
            _check_columns(f"{name}, line {number}", header)
        elif len(cells) != len(header):
            raise ConfigError(
                f"{name}, line {number}: {len(cells)} values, but line 1 names {len(header)} columns. Put values "
                f'that hold {delimiter!r} into "quotes"'
            )
        else:
            yield number, {column: cell or None for column, cell in zip(header, cells, strict=True)}


def read_cells(filesystem: Any, path: str, name: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row of a CSV file with the number of the line it begins on."""
    # Not with Arrow's reader: it takes the id 007 for the number 7, and fails where a later block is not like the first.
    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; its default is less than a long description
    reader = csv.reader(read_lines(filesystem, path, name), delimiter=delimiter, strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{name}, line {number}: not CSV ({error}). Check its quotes; was the file written to its end?"
        ) from error


def read_parquet(
    filesystem: Any, path: str, name: str, choose: Callable[[str, pa.Schema], list[str] | None] | None = None
) -> Iterator[Row]:
    """Yield the rows of a Parquet file, counted from 1; of the columns that ``choose`` returns, or all of a manifest's."""
    number = 0
    try:
        with filesystem.open_input_file(path) as stream:
            file = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
            columns = (choose or _check_schema)(name, file.schema_arrow)
            for batch in file.iter_batches(batch_size=8192, columns=columns):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (*UNREADABLE, OverflowError) as error:
        raise ConfigError(
            f"cannot read {name} after row {number}: {why(error, name)}. Write or copy it again"
        ) from error


def _check_schema(name: str, schema: pa.Schema) -> None:
    _check_columns(name, schema.names)
    _check_types(name, schema)


def _check_columns(place: str, columns: Sequence[str]) -> None:
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise ConfigError(f"{place}: {listed(repeated)} named more than once. Give each column a name of its own")
    if not {"uri", "video_id"}.intersection(columns):
        raise ConfigError(
            f"{place}: it has neither a column uri nor a column video_id, only {listed(columns)}. "
            f"{meant(columns) or 'Name the columns in the first line.'}"
        )


def _check_types(name: str, schema: pa.Schema) -> None:
    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
        return any(fits(kind) for fits in texts)

    def is_texts(kind: pa.DataType) -> bool:
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        return is_text(kind) or (lists and is_text(kind.value_type))

    def is_number(kind: pa.DataType) -> bool:
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))

    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "video_id": (lambda kind: is_text(kind) or pa.types.is_integer(kind), "text or whole numbers"),
        "uri": (is_text, "text"),
        "title": (lambda kind: is_text(kind) or is_number(kind), "text"),
        "description": (lambda kind: is_text(kind) or is_number(kind), "text"),
        "tags": (is_texts, "text or lists of text"),
    }
    for column, (fits, wanted) in allowed.items():
        if column in schema.names and not fits(schema.field(column).type):
            raise ConfigError(
                f"{name}: the column {column} is of type {schema.field(column).type}; it must be {wanted}. Write it as "
                "such, from the first row on"
            )


def meant(columns: Sequence[str]) -> str:
    """Return the question whether a column was meant that has a name like one of them."""
    for column in columns[:100]:
        lower = column[:100].strip().lower().replace("-", "_")
        close = [MISNAMED[lower]] if lower in MISNAMED else difflib.get_close_matches(lower, COLUMNS[:2], 1)
        if close:
            return f"Did you mean {close[0]} by {shown(column)}?"
    return ""


def listed(names: Sequence[str]) -> str:
    """Return names as a message shows them, the first twelve."""
    return (", ".join(map(shown, names[:12])) or "nothing") + (
        f" and {len(names) - 12} more" if len(names) > 12 else ""
    )


def kind_of(value: Any) -> str:
    """Return what kind of JSON value this is, without showing it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number (NaN or Infinity)"
    kinds = {bool: "true or false", dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value)) or ("a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
