"""Queries and relevance judgements, in the forms that the field keeps them in, and what a benchmark is made of.

Every error names the line or row: a judgement that is silently lost changes every figure.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from operators import schema
from operators.errors import ConfigError
from operators.text_based_vision import SeenObject, choose_regions, render_vision
from pipelines.records import Form, Record, read_records
from pipelines.uris import shown

Qrels = dict[str, dict[str, int]]
"""``{query_id: {video_id: grade}}``"""

ID = ("id", "_id", "query_id", "query-id", "qid")
TEXT = ("text", "query")
TARGET = ("target_modality", "query_type")
SEEN = ("objects", "texts", "caption")
QUERIES = Form(
    frozenset({*ID, *TEXT, *TARGET, "image", "boxes", *SEEN, "answers"}), bare=("id", "text"), open_text=TEXT
)

QUERY = ("query-id", "query_id", "qid")
DOCUMENT = ("corpus-id", "corpus_id", "video_id", "doc_id", "docid", "pid")
GRADE = ("score", "relevance", "grade")
QRELS = Form(frozenset({*QUERY, *DOCUMENT, *GRADE}), bare=("query-id", "iteration", "corpus-id", "score"), spaced=True)

MODALITY_OF = {
    **dict.fromkeys(("visual", "video", "base"), schema.FRAME),
    **dict.fromkeys(("ocr",), schema.SCREEN_TEXT),
    **dict.fromkeys(("asr",), schema.SPEECH),
    **dict.fromkeys(("description",), schema.METADATA),
}
"""What others call a modality; the query kinds of MultiVENT and CLaMR (arXiv:2506.06144)."""

Box = tuple[float, float, float, float]
BOXES = "they must be [left, top, right, bottom] each, as shares of the image's width and height from 0 to 1"

MULTIVENT_ID = re.compile(r"_(base|speech|ocr|description)_\d+$")


@dataclass(frozen=True)
class JudgedQuery:
    """A query, with the modality it is meant to find and the answers that a relevant text holds, if it says so.

    ``text`` may be empty where there is an ``image``: the path or URI of the image that is a part of the query.
    ``boxes`` and ``vision_text`` are those of `operators.encoders.Query`: where to look, and what others saw.
    """

    query_id: str
    text: str
    target_modality: str | None
    image: str | None = None
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    vision_text: str = ""


@dataclass(frozen=True)
class Dataset:
    """A benchmark: queries, judgements, and its videos as rows of a manifest. It fits into memory.

    ``left_out`` counts what was found and is not in it, by the reason.
    """

    queries: list[JudgedQuery]
    qrels: Qrels
    videos: list[dict[str, Any]]
    left_out: Mapping[str, int] = field(default_factory=dict)


def read_queries(*paths: Path) -> list[JudgedQuery]:
    """Return the queries of a file, or of the parts of one.

    JSON lines, JSON, CSV, TSV with or without header, or Parquet with an id, a text and optionally ``target_modality``,
    ``answers``, ``image`` (a path is relative to the file) and what was seen in it: ``boxes``, ``objects`` (each with a
    ``name``, and optionally ``attributes`` with their scores and a ``box``), ``texts`` and a ``caption``; or TREC topics.
    The names of other projects for columns and modalities are known, and the query kind in the ids of MultiVENT 2.0.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used.
    """
    queries: dict[str, JudgedQuery] = {}
    for path in paths:
        for record in read_records(path, QUERIES):
            query = _query(record, path.parent)
            if query.query_id in queries:
                raise record.error(
                    f"the query id {shown(query.query_id)} was used before. Give each query one of its own"
                )
            queries[query.query_id] = query
    if not queries:
        raise ConfigError(f"{_named(paths)} holds no queries. Was it written to its end?")
    return list(queries.values())


def _query(record: Record, folder: Path) -> JudgedQuery:
    query_id = record.identifier(*ID)
    kind = MULTIVENT_ID.search(query_id)
    target = record.optional(*TARGET) or (kind and kind[1])
    image = record.optional("image")
    return JudgedQuery(
        query_id=query_id,
        text=record.optional(*TEXT) or "" if image else record.text(*TEXT),
        target_modality=MODALITY_OF.get(target, target) if target else None,
        image=str((folder / image).resolve()) if image and "://" not in image else image,
        answers=tuple(record.texts("answers")) if record.find("answers") else (),
        **_seen(record),
    )


def _seen(record: Record) -> dict[str, Any]:
    """Return where to look in a query's image, and what others saw in it, in words, as FLMR has both."""
    objects = [_object(record, entry) for entry in record.find("objects") or ()]
    texts = record.texts("texts") if record.find("texts") else []
    caption = record.optional("caption") or ""
    boxes = [_box(record, box) for box in record.find("boxes") or ()]
    return {
        "boxes": tuple(boxes or choose_regions(objects, record.optional(*TEXT) or "")),
        "vision_text": render_vision(objects, texts, caption) if objects or texts or caption else "",
    }


def _object(record: Record, entry: Any) -> SeenObject:
    try:
        attributes = tuple((str(name), float(score)) for name, score in dict(entry.get("attributes") or {}).items())
        box = None if entry.get("box") is None else _box(record, entry["box"])
        return SeenObject(str(entry["name"]), attributes, box)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        wanted = 'it must be {"name": "cat", "attributes": {"red": 0.9}, "box": [...]}, the last two optional'
        raise record.error(f"the object is {entry!r}; {wanted}") from error


def _box(record: Record, box: Any) -> Box:
    try:
        left, top, right, bottom = map(float, box)
    except (TypeError, ValueError) as error:
        raise record.error(f"the box {box!r} is none; {BOXES}") from error
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise record.error(f"the box {box!r} is none; {BOXES}")
    return left, top, right, bottom


def read_qrels(*paths: Path) -> Qrels:
    """Return the judgements of a file, or of the parts of one.

    TREC's four columns; or JSON lines, Parquet, CSV or TSV with a header that names query, document and grade as BEIR, MTEB
    (``query-id``, ``corpus-id``, ``score``) or MultiVENT (``query_id``, ``doc_id``, ``relevance``) do.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used, or that gives a document another grade than a line before.
    """
    judgements: Qrels = defaultdict(dict)
    for record in chain.from_iterable(read_records(path, QRELS) for path in paths):
        query_id, video_id, grade = record.identifier(*QUERY), record.identifier(*DOCUMENT), _grade(record)
        before = judgements[query_id].setdefault(video_id, grade)
        if before != grade:
            raise record.error(
                f"query {query_id} and {video_id} are judged {grade} here, but {before} before. Keep one"
            )
    if not judgements:
        raise ConfigError(f"{_named(paths)} holds no judgements. Was it written to its end?")
    return dict(judgements)


def _grade(record: Record) -> int:
    value = record.find(*GRADE)
    try:
        if isinstance(value, bool) or int(value) != float(value):
            raise ValueError
        return int(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise record.error(f"the grade is {value!r}; it must be a whole number") from error


def _named(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def write(dataset: Dataset, out: Path) -> None:
    """Write ``queries.jsonl``, ``qrels.txt`` and ``manifest.jsonl``, each whole or not at all.

    Without videos there is no manifest, and one of before goes: it would be of other data.
    """
    tables = {
        "queries.jsonl": map(_query_line, dataset.queries),
        "qrels.txt": (
            f"{query_id} 0 {video_id} {grade}\n"
            for query_id, grades in dataset.qrels.items()
            for video_id, grade in grades.items()
        ),
        "manifest.jsonl": (f"{json.dumps(video, ensure_ascii=False)}\n" for video in dataset.videos),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in tables.items():
        with (out / f"{name}.partial").open("w", encoding="utf-8") as stream:
            stream.writelines(lines)
    for name in tables:
        (out / f"{name}.partial").replace(out / name)
    if not dataset.videos:
        (out / "manifest.jsonl").unlink()


def _query_line(query: JudgedQuery) -> str:
    row = {"id": query.query_id, **asdict(query)}
    del row["query_id"]
    return json.dumps({name: value for name, value in row.items() if value}, ensure_ascii=False) + "\n"
