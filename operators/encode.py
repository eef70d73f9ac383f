"""The encode operator: clips in, rows of token embeddings out, pooled to their budget.

A clip that an encoder fails on costs itself: the batch is tried again clip by clip, which is also what a batch needs that a
GPU has no room for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from operators import schema
from operators.encoders import Content, Encoder, TokenEmbeddings
from operators.pooling import pool

CLIP_MODALITIES = pa.schema(
    [
        ("video_id", pa.string()),
        ("clip", pa.int32()),
        ("start_seconds", pa.float64()),
        ("stop_seconds", pa.float64()),
        ("video_fingerprint", pa.string()),
        (
            "modalities",
            pa.list_(
                pa.struct(
                    [
                        ("modality", pa.string()),
                        ("fingerprint", pa.string()),
                        ("spans", pa.list_(schema.SPAN)),
                        ("frames", pa.list_(schema.FRAME_IMAGE)),
                        ("audio", pa.binary()),
                    ]
                )
            ),
        ),
    ]
)
"""What `Encode` takes: a row a clip; ``fingerprint`` is that of the embeddings to be made, and ``video_fingerprint`` stands
for all that are to be made of the clip's video."""

STAGE = "encode"

Encoded = dict[str, TokenEmbeddings]


class Encode:
    """Encodes clips and pools each modality's tokens.

    Parameters
    ----------
    make_encoder
        Class of the encoder; loaded here, in the actor.
    name
        Recorded in every row.
    parameters
        Of the encoder.
    pool_tokens
        Budget of each modality; 0 or absent keeps all tokens.
    """

    def __init__(
        self, make_encoder: type, name: str, parameters: Mapping[str, Any], pool_tokens: Mapping[str, int]
    ) -> None:
        self._encoder: Encoder = make_encoder(**parameters)
        self._name, self._pool_tokens = name, dict(pool_tokens)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return ``batch`` with ``rows`` (of the token embedding table, nested) in place of ``modalities``."""
        started, cpu_started = time.perf_counter(), time.process_time()
        clips = batch.to_pylist()
        contents = [
            {
                m["modality"]: Content(m["spans"], m["frames"], m["audio"], clip["start_seconds"] or 0.0)
                for m in clip["modalities"]
            }
            for clip in clips
        ]
        rows = [
            row
            for clip, encoded in zip(clips, self._encode(contents), strict=True)
            for row in self._rows(clip, encoded)
        ]
        table = _to_arrow(rows, self._encoder.dim)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        timing = {"stage": STAGE, "seconds": seconds, "cpu_seconds": cpu_seconds}
        timings = pa.array([[timing], *([[]] * (len(rows) - 1))] if rows else [], type=pa.list_(schema.TIMING))
        fingerprints = [[{"stage": STAGE, "fingerprint": row["video_fingerprint"]}] for row in rows]
        return (
            table.append_column("timings", timings)
            .append_column("failures", pa.array([row["failures"] for row in rows], pa.list_(schema.FAILURE)))
            .append_column("fingerprints", pa.array(fingerprints, pa.list_(schema.STAGE_FINGERPRINT)))
        )

    def _encode(self, contents: Sequence[Mapping[str, Content]]) -> list[Encoded | Exception]:
        """Return each clip's embeddings, or what went wrong with it."""
        try:
            return list(self._encoder.encode_documents(contents))
        except Exception as error:  # the per-item boundary
            if type(error).__name__ == "AcceleratorError":
                raise  # a GPU that failed once answers nothing more: Ray starts the actor anew
            if len(contents) == 1:
                return [error]
        return [self._encode([content])[0] for content in contents]

    def _rows(self, clip: Mapping[str, Any], encoded: Encoded | Exception) -> Iterator[dict[str, Any]]:
        """Yield a row a modality; of a clip that failed one, without tokens and with the failure."""
        of_clip = {"video_fingerprint": clip["video_fingerprint"], "failures": []}
        if isinstance(encoded, Exception):
            name, message = type(encoded).__name__, f"clip {clip['clip']}: {encoded}"
            failure = {"stage": STAGE, "error": name, "message": message, "final": False}
            nothing = TokenEmbeddings(np.zeros((0, self._encoder.dim), np.float32), np.zeros(0, np.int32))
            yield self._row(clip, clip["modalities"][0], nothing) | of_clip | {"failures": [failure]}
            return
        for modality in clip["modalities"]:
            name = modality["modality"]
            yield self._row(clip, modality, pool(encoded[name], self._budget(name))) | of_clip

    def _budget(self, modality: str) -> int:
        return self._pool_tokens.get(modality, 0)

    def _row(self, clip: Mapping[str, Any], modality: Mapping[str, Any], tokens: TokenEmbeddings) -> dict[str, Any]:
        return {
            "video_id": clip["video_id"],
            "clip": clip["clip"],
            "modality": modality["modality"],
            "encoder": self._name,
            "start_seconds": clip["start_seconds"],
            "stop_seconds": clip["stop_seconds"],
            "fingerprint": modality["fingerprint"],
            "num_tokens": len(tokens.embeddings),
            "embeddings": tokens.embeddings,
            "span_index": tokens.span_index,
            "grid": list(tokens.grid) if tokens.grid else None,
        }


def _to_arrow(rows: list[dict[str, Any]], dim: int) -> pa.Table:
    """Return rows as an Arrow table without a Python object per number."""
    wanted = schema.token_embeddings(dim)
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(row["embeddings"]) for row in rows])]).astype(np.int32))
    flat = np.concatenate([row["embeddings"] for row in rows] or [np.zeros((0, dim))]).astype(np.float16)
    embeddings = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), dim))
    span_index = np.concatenate([row["span_index"] for row in rows] or [np.zeros(0, np.int32)])
    columns = {
        "embeddings": embeddings,
        "span_index": pa.ListArray.from_arrays(offsets, pa.array(span_index, type=pa.int32())),
    }
    for field in wanted:
        if field.name not in columns:
            columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
    return pa.table({field.name: columns[field.name] for field in wanted}, schema=wanted)
