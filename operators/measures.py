"""Measures of runs: those of ir_measures by its names, and three that text-to-video papers report and it lacks.

A run is ``{query_id: {video_id: score}}``; equal scores rank by descending id, and a judged query that the run lacks counts
as 0, as in trec_eval with ``-c``. Three things are called recall in papers and have three names here: ``Success@k`` (any
relevant video is found), ``R@k`` (the share of relevant videos) and ``PRRecall@k`` (any found video contains an answer).

``MdR``, ``MnR``
    Median and mean over queries of the rank of the first relevant video; one past the run's depth where it is not found.
``PRRecall@k``
    1 if one of the first k videos contains an answer string of the query, case ignored (FLMR, arXiv:2309.17133).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np

from operators.errors import ConfigError

Run = Mapping[str, Mapping[str, float]]
Judgements = Mapping[str, Mapping[str, int]]

RANKS = ("MdR", "MnR")
ANSWERS = re.compile(r"PRRecall@(\d+)")


def check_measures(names: Sequence[str]) -> None:
    """Raise ConfigError unless all are names of measures."""
    for name in names:
        if name in RANKS or ANSWERS.fullmatch(name):
            continue
        try:
            ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError) as error:
            raise ConfigError(
                f"evaluate.measures: {error}; use names of ir_measures, for example nDCG@10 R@100 RR Success@10 "
                "Judged@10, or MdR, MnR, PRRecall@5"
            ) from error


def rises(name: str) -> bool:
    """Return whether more is better."""
    return name not in RANKS


def answer_depth(names: Sequence[str]) -> int:
    """Return how many videos of each query must be looked through for answers."""
    return max((int(match[1]) for name in names if (match := ANSWERS.fullmatch(name))), default=0)


def per_query(
    names: Sequence[str],
    judgements: Judgements,
    run: Run,
    depth: int,
    answered: Mapping[str, int | None] | None = None,
) -> dict[str, dict[str, float]]:
    """Return each measure of each judged query.

    Parameters
    ----------
    depth
        Of the run; what was not found ranks one below.
    answered
        Rank of the first video that contains an answer, from 1, of the queries that have answers; None if none does. A
        query that is not here has no value for ``PRRecall``.
    """
    values: dict[str, dict[str, float]] = {query_id: {} for query_id in judgements}
    parsed = {ir_measures.parse_measure(n): n for n in names if n not in RANKS and not ANSWERS.fullmatch(n)}
    for query_id in judgements:
        values[query_id] |= dict.fromkeys(parsed.values(), 0.0)
    known = {query_id: dict(found) for query_id, found in run.items() if query_id in judgements}
    graded = {query_id: dict(grades) for query_id, grades in judgements.items()}
    for value in ir_measures.iter_calc(list(parsed), graded, known) if parsed else ():
        values[value.query_id][parsed[value.measure]] = value.value
    for name in names:
        if name in RANKS:
            for query_id, grades in judgements.items():
                values[query_id][name] = float(_first_relevant(run.get(query_id, {}), grades) or depth + 1)
        elif match := ANSWERS.fullmatch(name):
            for query_id, rank in (answered or {}).items():
                if query_id in values:
                    values[query_id][name] = float(rank is not None and rank <= int(match[1]))
    return values


def _first_relevant(found: Mapping[str, float], grades: Mapping[str, int]) -> int | None:
    ranked = ranking(found)
    return next((rank for rank, video_id in enumerate(ranked, start=1) if grades.get(video_id, 0) > 0), None)


def ranking(found: Mapping[str, float]) -> list[str]:
    """Return videos best first; equals by descending id, as trec_eval ranks them."""
    return sorted(found, key=lambda video_id: (found[video_id], video_id), reverse=True)


def mean(name: str, values: Sequence[float]) -> float:
    """Return what a measure is over queries: the mean, or for ``MdR`` the median; nan of none."""
    if not len(values):
        return float("nan")
    return float(np.median(values) if name == "MdR" else np.mean(values))
