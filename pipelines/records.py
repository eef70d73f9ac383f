"""Reads tables that others wrote, of whatever form, as records that know the line or row they came from.

JSON lines, JSON, CSV, TSV, columns between white space, TREC topics and Parquet, all but the last also as ``.gz``. The
form is told by the content, and by the ending where that does not tell. A file that is broken anywhere is refused at the
line, since a benchmark of which a part is missing gives figures that look like those of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.errors import ConfigError
from pipelines import manifest_files
from pipelines.manifest import LOCAL, MAX_ID_BYTES, UNSAFE
from pipelines.manifest_files import kind_of, listed
from pipelines.uris import shown


@dataclass(frozen=True)
class Record:
    """A row of a table, its columns by their names in lower case, and where it stands."""

    place: str
    values: Mapping[str, Any]

    def error(self, message: str) -> ConfigError:
        """Return an error that names the line."""
        return ConfigError(f"{self.place}: {message}")

    def find(self, *columns: str) -> Any:
        """Return the value of the first of these columns that it has, or None."""
        return next((self.values[name] for name in columns if self.values.get(name) is not None), None)

    def texts(self, *columns: str) -> list[str]:
        """Return the texts of a column that holds one or a list of them; any may be empty.

        Raises
        ------
        ConfigError
            If there is no such column, or it holds what is no text.
        """
        value = self.find(*columns)
        if value is None:
            raise self.error(f"it has no {' or '.join(columns)}, only {listed(list(self.values))}. {WHOLE}")
        found = value if isinstance(value, list) else [value]
        for text in found:
            if isinstance(text, bool) or not isinstance(text, str | int):
                raise self.error(f"the {columns[0]} is {kind_of(text)}; it must be text")
            if HALF.search(str(text)):
                raise self.error(f"the {columns[0]} holds half of a character, {ascii(text)[:60]}; write it as UTF-8")
        return [str(text).strip() for text in found]

    def text(self, *columns: str) -> str:
        """Return the text of a column, which may be a whole number but not be empty."""
        found = self.texts(*columns)
        if len(found) != 1:
            raise self.error(f"the {columns[0]} is a list of {len(found)}; it must be one text")
        if not found[0]:
            raise self.error(f"the {columns[0]} is empty. {WHOLE}")
        return found[0]

    def optional(self, *columns: str) -> str | None:
        """Return the text of a column, or None where there is none."""
        value = self.find(*columns)
        return None if value is None or not str(value).strip() else self.text(*columns)

    def identifier(self, *columns: str) -> str:
        """Return an id that run files and manifests can carry."""
        found = self.text(*columns)
        if UNSAFE.search(found) or len(found.encode(errors="replace")) > MAX_ID_BYTES:
            raise self.error(
                f"the {columns[0]} {shown(found)} holds white space or control characters, or is longer than "
                f"{MAX_ID_BYTES} bytes: run files cannot carry it. Rename it, in the judgements too"
            )
        return found


HALF = re.compile("[\ud800-\udfff]")
WHOLE = "Was the file written to its end?"


@dataclass(frozen=True)
class Form:
    """What a table may look like.

    Parameters
    ----------
    columns
        Names that its columns may have. Others are not read from Parquet; two of them in the first line make it a header.
    bare
        The columns of a text file without header.
    spaced
        Whether those stand between white space, not tabs.
    open_text
        Columns that, where they come last, take what a delimiter too many cut off: text with commas without quotes.
    """

    columns: frozenset[str]
    bare: tuple[str, ...] = ()
    spaced: bool = False
    open_text: tuple[str, ...] = ()


def read_records(path: Path, form: Form) -> Iterator[Record]:
    """Yield the rows of a table.

    Raises
    ------
    ConfigError
        Naming the line or row that cannot be used, or the file that cannot be read.
    """
    name = str(path)
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet":
        rows = manifest_files.read_parquet(LOCAL, name, name, partial(_columns_of, form))
        return (record_of(f"{path}, row {number}", row) for number, row in rows)
    first = next((line.lstrip() for _, line in read_lines(path)), "")
    if first.startswith("[") or (ending == ".json" and first.startswith("{")):
        return _read_json(path)
    if first.startswith("{"):
        return _read_json_lines(path)
    if first.startswith("<"):
        return _read_topics(path)
    return _read_cells(path, "," if ending == ".csv" else "\t", form)


def _read_json_lines(path: Path) -> Iterator[Record]:
    rows = manifest_files.read_jsonl(LOCAL, str(path), str(path))
    return (record_of(f"{path}, line {number}", row) for number, row in rows)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers from 1."""
    lines = enumerate(manifest_files.read_lines(LOCAL, str(path), str(path)), start=1)
    return ((number, line) for number, line in lines if line and not line.isspace())


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    text = "".join(manifest_files.read_lines(LOCAL, str(path), str(path)))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"{path}{line}: not JSON ({error}). {WHOLE}") from error


def _read_json(path: Path) -> Iterator[Record]:
    try:
        document = read_json(path)
    except ConfigError as error:
        if getattr(error.__cause__, "msg", None) == "Extra data":  # a second line: JSON lines under another ending
            return _read_json_lines(path)
        raise
    return records_of(str(path), document)


def records_of(place: str, document: Any) -> Iterator[Record]:
    """Yield the objects of a list, or of an object of objects, whose keys become the column ``key``; or the one object."""
    if isinstance(document, dict) and all(isinstance(value, dict) for value in document.values()):
        rows = [(shown(key), {"key": key, **row}) for key, row in document.items()]
    else:
        rows = [(str(n), row) for n, row in enumerate(document if isinstance(document, list) else [document], start=1)]
    for name, row in rows:
        yield record_of(f"{place}, entry {name}", row)


def record_of(place: str, row: Any) -> Record:
    """Return a row that must be an object."""
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: {kind_of(row)}; it must be a JSON object")
    return Record(place, {name.lower(): value for name, value in row.items()})


def _columns_of(form: Form, name: str, schema: pa.Schema) -> list[str]:
    """Return those columns that are asked for: beside them may stand the videos themselves."""
    used = [column for column in schema.names if column.lower() in form.columns]
    if not used:
        raise ConfigError(f"{name}: it has the columns {listed(schema.names)}, {_none_of(form)}")
    return used


def _none_of(form: Form) -> str:
    return f"none of {', '.join(sorted(form.columns))}"


TAG = re.compile(r"<[^>]*>")
NUMBER = re.compile(r"<(num|docno)>\s*(?:Number:)?\s*([^<\s]+)\s*(?:</\1>)?", re.IGNORECASE)
TITLE = re.compile(r"<title>\s*(?:Topic:)?([^<]*)", re.IGNORECASE)


def _read_topics(path: Path) -> Iterator[Record]:
    """Yield ``id`` and ``text`` of TREC topics: their titles, or all the text of those that are documents (CACM)."""
    start, lines, is_document = 0, list[str](), False
    for number, line in read_lines(path):
        tag = line.strip().lower()
        if tag in ("<top>", "<doc>"):
            if start:
                raise ConfigError(f"{path}, line {number}: the topic that begins on line {start} has no end. {WHOLE}")
            start, lines, is_document = number, [], tag == "<doc>"
        elif tag in ("</top>", "</doc>"):
            yield _topic(f"{path}, line {start or number}", "".join(lines), is_document)
            start = 0
        elif start:
            lines.append(line)
        elif tag:
            raise ConfigError(f"{path}, line {number}: got {shown(line.strip())} where <top> or <DOC> must stand")
    if start:
        raise ConfigError(f"{path}, line {start}: the topic that begins here has no end. {WHOLE}")


def _topic(place: str, body: str, is_document: bool) -> Record:
    number, title = NUMBER.search(body), TITLE.search(body)
    text = TAG.sub(" ", NUMBER.sub(" ", body)) if is_document and not title else title[1] if title else None
    return Record(place, {"id": number[2] if number else None, "text": text and " ".join(text.split())})


def _read_cells(path: Path, delimiter: str, form: Form) -> Iterator[Record]:
    """Yield the rows of a text table, with or without a header."""
    columns: tuple[str, ...] = ()
    between = {",": "commas", "\t": "tabs"}[delimiter]
    for number, cells in _rows_of_cells(path, delimiter):
        if not columns:
            header = tuple(cell.strip().lower() for cell in cells)
            if len(form.columns.intersection(header)) >= min(2, len(header)):
                columns = header
                continue
            if not form.bare:
                raise ConfigError(f"{path}, line {number}: the header names {listed(header)}, {_none_of(form)}")
            columns, between = form.bare, "white space" if form.spaced else between
        if between == "white space":
            cells = " ".join(cells).split()
        if len(cells) > len(columns) and columns[-1] in form.open_text:
            last = len(columns) - 1
            cells = [*cells[:last], ("," if between == "commas" else " ").join(cells[last:])]
        if len(cells) != len(columns):
            raise ConfigError(
                f"{path}, line {number}: got {shown(' '.join(cells))}, {len(cells)} columns between {between}; wanted "
                f"{len(columns)}: {', '.join(columns)}"
            )
        yield Record(f"{path}, line {number}", {name: cell or None for name, cell in zip(columns, cells, strict=True)})


def _rows_of_cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row. Only CSV has quotes: what TSV has is text."""
    if delimiter == ",":
        return manifest_files.read_cells(LOCAL, str(path), str(path), delimiter)
    return ((number, line.rstrip("\r\n").split(delimiter)) for number, line in read_lines(path))
