"""Why single queries found what they found: thumbnails, winning tokens and their contexts, for an evaluation's page."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from cluster.searchers import Hit
from cluster.store import VIDEOS, Store
from operators.encoders import Encoder, Query, open_picture
from operators.maxsim import Scorer
from operators.schema import FRAME
from pipelines.config import Config
from pipelines.evaluate import Evaluation
from pipelines.job import open_store
from pipelines.queries import to_query
from pipelines.release import Release, open_release
from pipelines.search import Explanation, any_of, explain, scorer_of

HITS_EACH = 5
THUMBNAIL_PIXELS = 320

ROWS = pa.schema(
    [
        ("query_id", pa.string()),
        ("query_image", pa.binary()),
        ("rank", pa.int32()),
        ("video_id", pa.string()),
        ("title", pa.string()),
        ("score", pa.float32()),
        ("relevant", pa.int32()),
        ("start_seconds", pa.float64()),
        ("stop_seconds", pa.float64()),
        ("best_seconds", pa.float64()),
        ("thumbnail", pa.binary()),
        ("patch", pa.list_(pa.float32())),
        ("shares", pa.list_(pa.struct([("modality", pa.string()), ("share", pa.float32())]))),
        (
            "winners",
            pa.list_(
                pa.struct(
                    [
                        ("token", pa.string()),
                        ("modality", pa.string()),
                        ("score", pa.float32()),
                        ("start_seconds", pa.float64()),
                        ("text", pa.string()),
                    ]
                )
            ),
        ),
        (
            "spans",
            pa.list_(
                pa.struct(
                    [
                        ("modality", pa.string()),
                        ("start_seconds", pa.float64()),
                        ("stop_seconds", pa.float64()),
                        ("text", pa.string()),
                    ]
                )
            ),
        ),
    ]
)
"""Of ``details.parquet``: a row a hit. ``relevant`` is its grade, null where it was not judged; ``query_image`` stands in
the first row of its query."""


def save_details(evaluation: Evaluation, folder: Path, config: Config) -> None:
    """Explain the first hits of the worst queries, as many as ``evaluate.details``, into ``details.parquet``."""
    store = open_store(config)
    release = open_release(store, evaluation.document["release_id"])
    encoder = release.load_encoder(os.cpu_count() or 1, config.search.device)
    scorer = scorer_of(config.search)
    rows: list[dict[str, Any]] = []
    for query_id in _worst(evaluation, config):
        [judged] = [query for query in evaluation.queries if query.query_id == query_id]
        query = to_query(judged, config.storage.environment())
        rows += _rows(evaluation, query_id, query, store, release, encoder, scorer)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=ROWS), folder / "details.parquet")


def _worst(evaluation: Evaluation, config: Config) -> list[str]:
    """Return the queries that were asked and judged, worst first by the first measure."""
    name, values = config.evaluate.measures[0], evaluation.values[evaluation.systems[0].name]
    worth: dict[str, list[float]] = {}
    for unit, of_unit in values.items():
        query_id = unit if unit in evaluation.hits else unit.rpartition("#")[0]
        if query_id in evaluation.hits:
            worth.setdefault(query_id, []).append(of_unit.get(name, 0.0))
    return sorted(worth, key=lambda query_id: (np.mean(worth[query_id]), query_id))[: config.evaluate.details]


def _rows(
    evaluation: Evaluation,
    query_id: str,
    query: Query,
    store: Store,
    release: Release,
    encoder: Encoder,
    scorer: Scorer,
) -> Iterator[dict[str, Any]]:
    [embedded] = encoder.encode_queries([query])
    tokens, hits = encoder.query_tokens(query), evaluation.hits[query_id][:HITS_EACH]
    titles = _titles(store, release, [hit.video_id for hit in hits])
    grades = evaluation.judgements.get(query_id, {})
    for rank, hit in enumerate(hits, start=1):
        explained = explain(store, release, hit, embedded, tokens, scorer)
        yield _row(explained, hit) | {
            "query_id": query_id,
            "query_image": _small(query.image) if query.image and rank == 1 else None,
            "rank": rank,
            "title": titles.get(hit.video_id),
            "relevant": grades.get(hit.video_id),
        }


def _row(explained: Explanation, hit: Hit) -> dict[str, Any]:
    # A frame that won is worth seeing; else the frame nearest to what was said or shown.
    seen = [winner for winner in explained.winners if winner.modality == FRAME] or explained.winners
    best = max(seen, key=lambda winner: winner.score, default=None)
    moment = best.start_seconds if best else hit.start_seconds
    return {
        "video_id": hit.video_id,
        "score": hit.score,
        "start_seconds": hit.start_seconds,
        "stop_seconds": hit.stop_seconds,
        "best_seconds": moment,
        "thumbnail": _thumbnail(explained.contents.get(FRAME, {}).get("frames") or (), moment),
        "patch": best.patch if best else None,
        "shares": [{"modality": m, "share": share} for m, share in explained.share_by_modality.items()],
        "winners": [
            {
                "token": w.token,
                "modality": w.modality,
                "score": w.score,
                "start_seconds": w.start_seconds,
                "text": w.text,
            }
            for w in explained.winners
        ],
        "spans": [
            {name: span[name] for name in ("start_seconds", "stop_seconds", "text")} | {"modality": modality}
            for modality, content in explained.contents.items()
            for span in content["spans"] or ()
        ],
    }


def _thumbnail(frames: Sequence[Mapping[str, Any]], seconds: float) -> bytes | None:
    """Return the frame nearest to a moment, as a small JPEG."""
    if not frames:
        return None
    return _small(min(frames, key=lambda frame: abs(frame["pts_seconds"] - seconds))["jpeg"])


def _small(image: bytes) -> bytes:
    """Return a picture as a small JPEG."""
    picture, small = open_picture(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    picture.save(small, "JPEG", quality=75)
    return small.getvalue()


def _titles(store: Store, release: Release, video_ids: Sequence[str]) -> dict[str, str | None]:
    if not video_ids:
        return {}
    table = store.open(VIDEOS, release.tables[VIDEOS])
    rows = table.to_table(columns=["video_id", "title"], filter=any_of(video_ids)).to_pylist()
    return {row["video_id"]: row["title"] for row in rows}
