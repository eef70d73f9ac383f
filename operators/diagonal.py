"""The protocol under which CLaMR's MultiVENT figures were made, to be set beside them and beside nothing else.

There is one candidate a judgement: a video judged for four queries is four candidates, of which only the query's own
counts as relevant. They score alike, so the rank of the right one among its copies is chance: values here are expectations
over it. A ranker that puts every query's video first therefore reaches far less than 1, the *ceiling*, which depends on the
judgements alone: 0.648 nDCG@10 on the public ones of MultiVENT 2.0, of which CLaMR reports 0.585.

References
----------
CLaMR, arXiv:2506.06144, and its published evaluation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from operators.errors import ConfigError
from operators.measures import Judgements, Run, ranking

NAME = re.compile(r"(nDCG|R|Success|RR)(?:@(\d+))?")


def check_measures(names: Sequence[str]) -> None:
    """Raise ConfigError unless all measures are defined for one relevant candidate a query."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(f"clamr_diagonal has no {name}; it knows nDCG, nDCG@k, R@k, Success@k, RR and RR@k")


def diagonal(names: Sequence[str], judgements: Judgements, run: Run) -> dict[str, dict[str, float]]:
    """Return each measure of each judgement, by ``query_id#video_id``."""
    copies = _copies(judgements)
    values = {}
    for query_id, grades in judgements.items():
        before, places = 0, {}
        for video_id in ranking(run.get(query_id, {})):
            places[video_id] = before
            before += copies[video_id]
        for video_id in _relevant(grades):
            place = places.get(video_id)
            expected = {name: 0.0 if place is None else _expected(name, place, copies[video_id]) for name in names}
            values[f"{query_id}#{video_id}"] = expected
    return values


def ceiling(names: Sequence[str], judgements: Judgements) -> dict[str, float]:
    """Return what a ranker reaches that puts the copies of each judgement's own video first."""
    copies = _copies(judgements)
    own = [copies[video_id] for grades in judgements.values() for video_id in _relevant(grades)]
    return {name: float(np.mean([_expected(name, 0, count) for count in own])) for name in names}


def _relevant(grades: Mapping[str, int]) -> list[str]:
    return [video_id for video_id, grade in grades.items() if grade > 0]


def _copies(judgements: Judgements) -> Counter[str]:
    return Counter(video_id for grades in judgements.values() for video_id in _relevant(grades))


def _expected(name: str, before: int, copies: int) -> float:
    """Return the value of a measure where the right candidate is any of so many after so many others."""
    match = NAME.fullmatch(name)
    assert match is not None  # by `check_measures`
    ranks = np.arange(before + 1, before + copies + 1)
    gains = {"nDCG": 1 / np.log2(1 + ranks), "RR": 1 / ranks}.get(match[1], np.ones(copies))
    return float(np.where(ranks <= int(match[2]), gains, 0).mean() if match[2] else gains.mean())
