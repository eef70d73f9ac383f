"""Shapes what was extracted from a clip into rows of the ``modalities`` table, and metadata text into spans.

A modality that failed gives no row, so that a later run finds it missing; one that has nothing to say (no audio, no text
on screen) gives a row without spans, so that it is not extracted again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from operators import schema

VERSION = "1"
"""Of the metadata text; bump when it changes."""

BLOCKED_BY = {
    schema.FRAME: ("decode", schema.FRAME),
    schema.SPEECH: ("decode", schema.SPEECH),
    schema.SCREEN_TEXT: ("decode", schema.FRAME, schema.SCREEN_TEXT),
    schema.METADATA: (schema.METADATA,),
}
"""Stages whose failure leaves a modality without a row."""


def metadata_spans(
    title: str | None, description: str | None, tags: Iterable[str] | None, start_seconds: float, stop_seconds: float
) -> list[dict[str, Any]]:
    """Return title, description and tags as spans over the whole clip. Ids and file names are never text."""
    texts = [title, description, ", ".join(tags or ())]
    return [
        {
            "start_seconds": start_seconds,
            "stop_seconds": stop_seconds,
            "text": text.strip(),
            "confidence": None,
            "language": None,
        }
        for text in texts
        if text and text.strip()
    ]


def modality_rows(batch: pa.Table) -> pa.Table:
    """Return rows of ``modalities`` for clips: one for each wanted modality that did not fail.

    Parameters
    ----------
    batch
        Clips with ``wanted``, ``fingerprints``, ``title``, ``description``, ``tags`` and what the operators added;
        ``audio``, if there, is an encoded file.
    """
    used = [name for name in batch.column_names if name not in ("timings", "uri")]
    rows = [row for clip in batch.select(used).to_pylist() for row in _rows_of(clip)]
    return pa.Table.from_pylist(rows, schema=schema.MODALITY_ROWS)


def _rows_of(clip: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    failed = {failure["stage"] for failure in clip["failures"] or ()}
    # A file that may be readable tomorrow is not yet searchable by its title.
    unreadable = any(failure["stage"] == "decode" and not failure["final"] for failure in clip["failures"] or ())
    fingerprints = {entry["stage"]: entry["fingerprint"] for entry in clip["fingerprints"]}
    for modality in clip["wanted"]:
        if unreadable or failed.intersection(BLOCKED_BY[modality]):
            continue
        yield {
            "video_id": clip["video_id"],
            "clip": clip["clip"],
            "modality": modality,
            "num_clips": clip["num_clips"],
            "start_seconds": clip["start_seconds"],
            "stop_seconds": clip["stop_seconds"],
            "fingerprint": fingerprints[modality],
            "spans": _spans(clip, modality),
            "frames": (clip["frames"] or []) if modality == schema.FRAME else [],
            "audio": clip.get("audio") if modality == schema.SPEECH else None,
        }


def _spans(clip: Mapping[str, Any], modality: str) -> list[dict[str, Any]]:
    if modality == schema.METADATA:
        bounds = clip["start_seconds"] or 0.0, clip["stop_seconds"] or 0.0
        return metadata_spans(clip["title"], clip["description"], clip["tags"], *bounds)
    if modality == schema.FRAME:
        return []
    return clip.get(modality) or []
