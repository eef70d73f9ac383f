"""Arrow schemas of every table and of what travels between operators.

Embeddings are float16 and live in a table of their own, because DuckDB cannot scan a dataset that holds a float16
column; all other tables stay readable by DuckDB, Polars and pandas.
"""

from __future__ import annotations

import pyarrow as pa

FRAME = "frame"
SPEECH = "speech"
SCREEN_TEXT = "screen_text"
METADATA = "metadata"
MODALITIES = (FRAME, SPEECH, SCREEN_TEXT, METADATA)

SAMPLE_RATE_HZ = 16_000
"""Rate of the mono int16 PCM audio that ``Decode`` hands to ``Speech``."""

SPAN = pa.struct(
    [
        ("start_seconds", pa.float64()),
        ("stop_seconds", pa.float64()),
        ("text", pa.string()),
        ("confidence", pa.float32()),
        ("language", pa.string()),
    ]
)
"""A stretch [start, stop) of a video, counted from the start of its container, and what was said or written in it."""

FRAME_IMAGE = pa.struct([("pts_seconds", pa.float64()), ("jpeg", pa.binary())])

FAILURE = pa.struct([("stage", pa.string()), ("error", pa.string()), ("message", pa.string()), ("final", pa.bool_())])
"""Why one stage gave nothing for a video. ``final``: the same bytes would fail again."""

STAGE_FINGERPRINT = pa.struct([("stage", pa.string()), ("fingerprint", pa.string())])
"""What a stage would make of an item: a failure at this fingerprint is one of the same attempt."""

TIMING = pa.struct([("stage", pa.string()), ("seconds", pa.float64()), ("cpu_seconds", pa.float64())])
"""Wall and CPU time that one operator spent on one row."""

CLIP = pa.schema(
    [
        ("video_id", pa.string()),
        ("clip", pa.int32()),
        ("num_clips", pa.int32()),
        ("start_seconds", pa.float64()),
        ("stop_seconds", pa.float64()),
        ("frames", pa.list_(FRAME_IMAGE)),
        ("audio", pa.binary()),
        ("failures", pa.list_(FAILURE)),
        ("timings", pa.list_(TIMING)),
    ]
)
"""What ``Decode`` gives: a row a clip. ``audio`` is mono int16 PCM, null where there is none."""

VIDEOS = pa.schema(
    [
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("source_fingerprint", pa.string()),
        ("fingerprint", pa.string()),
        ("title", pa.string()),
        ("description", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("extra", pa.string()),
        ("duration_seconds", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("has_audio", pa.bool_()),
        ("state", pa.string()),
    ]
)

MODALITY_ROWS = pa.schema(
    [
        ("video_id", pa.string()),
        ("clip", pa.int32()),
        ("modality", pa.string()),
        ("num_clips", pa.int32()),
        ("start_seconds", pa.float64()),
        ("stop_seconds", pa.float64()),
        ("fingerprint", pa.string()),
        ("spans", pa.list_(SPAN)),
        ("frames", pa.list_(FRAME_IMAGE)),
        ("audio", pa.binary()),
    ]
)
"""``audio`` is a sound file (``operators.sound``) in rows of speech where the corpus keeps its sound, and null elsewhere."""

FAILURES = pa.schema(
    [
        ("video_id", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("message", pa.string()),
        ("final", pa.bool_()),
        ("attempts", pa.int32()),
        ("fingerprint", pa.string()),
        ("run_id", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
    ]
)

RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("job", pa.string()),
        ("status", pa.string()),
        ("exit_code", pa.int32()),
        ("started", pa.timestamp("us", tz="UTC")),
        ("stopped", pa.timestamp("us", tz="UTC")),
        ("config", pa.string()),
        ("code_version", pa.string()),
        ("summary", pa.string()),
    ]
)

RELEASES = pa.schema(
    [
        ("event", pa.int64()),
        ("release_id", pa.int64()),
        ("state", pa.string()),
        ("index_id", pa.string()),
        ("tables", pa.string()),
        ("encode", pa.string()),
        ("gates", pa.string()),
        ("reason", pa.string()),
        ("run_id", pa.string()),
        ("time", pa.timestamp("us", tz="UTC")),
    ]
)
"""What was done with releases, an event a row; the newest whose state is ``published`` is what readers open."""


def token_embeddings(dim: int) -> pa.Schema:
    """Return the schema of a token embedding table.

    Parameters
    ----------
    dim
        Width of one token embedding.
    """
    return pa.schema(
        [
            ("video_id", pa.string()),
            ("clip", pa.int32()),
            ("modality", pa.string()),
            ("encoder", pa.string()),
            ("start_seconds", pa.float64()),
            ("stop_seconds", pa.float64()),
            ("fingerprint", pa.string()),
            ("num_tokens", pa.int32()),
            ("embeddings", pa.list_(pa.list_(pa.float16(), dim))),
            ("span_index", pa.list_(pa.int32())),
            ("grid", pa.list_(pa.int32())),
        ]
    )
