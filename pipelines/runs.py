"""Runs in TREC form: what was found for each query, best first, plain or gzipped.

Scores are written so that they fall strictly as float32, which is how trec_eval reads them: every tool ranks as we did.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cluster.searchers import Hit
from operators.errors import ConfigError

Run = dict[str, dict[str, float]]
"""Scores by query and video."""


def scores_of(hits: Mapping[str, Sequence[Hit]]) -> Run:
    """Return a run of hits, best first, whose scores fall strictly as float32."""
    return {query_id: dict(_falling((hit.video_id, hit.score) for hit in found)) for query_id, found in hits.items()}


def _falling(scored: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    ceiling = np.float32(np.inf)
    for video_id, score in scored:
        ceiling = min(np.float32(score), np.nextafter(ceiling, np.float32(-np.inf)))
        yield video_id, float(ceiling)


def write_run(path: Path, run: Run, tag: str) -> None:
    """Write a run in the order it is in, gzipped if the name ends in ``.gz``."""
    lines = (
        f"{query_id} Q0 {video_id} {rank} {score!r} {tag}\n"
        for query_id, found in run.items()
        for rank, (video_id, score) in enumerate(found.items(), start=1)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(lines).encode()
    # Without a time in the header the same run is the same file.
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)


def read_run(path: Path) -> Run:
    """Return the run of a file; ranks in it are not looked at, scores are.

    Raises
    ------
    ConfigError
        If the file cannot be read, or naming the line that is not six columns or finds a video twice for a query.
    """
    run: Run = {}
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the run {path}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            query_id, _, video_id, _, score, _ = line.split(maxsplit=5)  # a tag may hold spaces
            value = float(score)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: got {line.strip()[:200]!r}; a run is six columns: query Q0 video rank score tag"
            ) from error
        if not math.isfinite(value):
            raise ConfigError(f"{path}, line {number}: the score {score} is no number to rank by")
        if video_id in run.setdefault(query_id, {}):
            raise ConfigError(f"{path}, line {number}: {video_id} was found for query {query_id} before")
        run[query_id][video_id] = value
    return run
