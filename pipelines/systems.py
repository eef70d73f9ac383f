"""The systems that an evaluation sets side by side, from one exact pass over the token embeddings.

Late interaction by its scorers; every single modality; late interaction without each modality; and the fusions of
single-modality rankings that CLaMR and MultiVENT 2.0 compare with. None is encoded or indexed for itself: all are other sums
of the same best similarities. What a fusion must learn (weights, which modality is best) it learns from the other four
fifths of the queries, never from the query that it ranks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.exact import Pool
from cluster.searchers import Hit
from operators import fusion
from operators.maxsim import Scorer, make_scorer
from operators.schema import MODALITIES
from pipelines.config import SearchConfig
from pipelines.runs import Run, scores_of
from pipelines.search import scorer_of

FOLDS = 5

PRIMARY, LATE, FUSION, SINGLE, ABLATION, AGAINST = (
    "primary",
    "late interaction",
    "fusion",
    "single modality",
    "ablation",
    "against",
)


@dataclass(frozen=True)
class System:
    """One way to rank: its name in tables, what it is set beside, its label for people, and what it found."""

    name: str
    kind: str
    label: str
    run: Run


def scorers(config: SearchConfig) -> dict[str, tuple[str, str, Scorer]]:
    """Return the kind, label and scorer of every system that is a sum of best similarities, the configured one first."""
    chosen = list(config.modalities or MODALITIES)
    found: dict[str, tuple[str, str, Scorer]] = {
        config.scorer: (LATE, f"late interaction, {config.scorer}, exact", scorer_of(config))
    }
    for name in ("sum_maxsim", "modality_max"):
        scorer = make_scorer(name, MODALITIES, only=chosen)
        found.setdefault(name, (LATE, f"late interaction, {name}, exact", scorer))
    for modality in chosen:
        only = make_scorer("sum_maxsim", MODALITIES, only=[modality])
        found[f"only:{modality}"] = (SINGLE, f"{modality} alone", only)
    for modality in chosen if len(chosen) > 1 else ():
        rest = config.model_copy(update={"modalities": tuple(m for m in chosen if m != modality)})
        if config.scorer != "group_sum" or any(set(group) - {modality} for group in config.groups):
            found[f"without:{modality}"] = (ABLATION, f"{config.scorer} without {modality}", scorer_of(rest))
    return found


def systems(
    config: SearchConfig,
    pools: Mapping[str, Pool],
    quality: Mapping[str, Mapping[str, float]],
    targets: Mapping[str, str | None],
    k: int,
) -> list[System]:
    """Return all systems of an exact pass.

    Parameters
    ----------
    pools
        Of each query, scored by `scorers` in their order.
    quality
        First measure of each single modality, ``only:frame`` and so on, by query: what fusions learn from.
    targets
        Modality that each query is meant to find, if it says so.
    """
    known = scorers(config)
    found = [
        System(name, kind, label, scores_of({query_id: pool.best(i, k) for query_id, pool in pools.items()}))
        for i, (name, (kind, label, _)) in enumerate(known.items())
    ]
    columns = [i for i, (kind, _, _) in enumerate(known.values()) if kind == SINGLE]
    if len(columns) > 1:
        found += _fusions(list(known), columns, pools, quality, targets, k)
    order = (LATE, FUSION, SINGLE, ABLATION)
    return sorted(found, key=lambda system: order.index(system.kind))


def _fusions(
    names: Sequence[str],
    columns: Sequence[int],
    pools: Mapping[str, Pool],
    quality: Mapping[str, Mapping[str, float]],
    targets: Mapping[str, str | None],
    k: int,
) -> list[System]:
    weights = _learned([quality[names[column]] for column in columns], list(pools))
    modalities = [names[column].partition(":")[2] for column in columns]
    even = np.ones(len(columns))
    hits: dict[str, dict[str, list[Hit]]] = {label: {} for label in FUSIONS}
    for query_id, pool in pools.items():
        scores, learned = pool.scores[:, columns], weights[query_id]
        chosen = {
            "mean": fusion.weighted_mean(scores, even),
            "weighted mean": fusion.weighted_mean(scores, learned),
            "RRF": fusion.reciprocal_rank(scores, even),
            "weighted RRF": fusion.reciprocal_rank(scores, learned),
            "best modality": scores[:, int(np.argmax(learned))],
            "router": scores[:, fusion.route(scores)] if len(scores) else scores[:, 0],
        }
        if (target := targets.get(query_id)) in modalities:
            chosen["oracle router"] = scores[:, modalities.index(target)]
        for name, fused in chosen.items():
            hits[name][query_id] = _ranked(pool, fused, columns, k)
    complete = {name: found for name, found in hits.items() if len(found) == len(pools)}
    return [System(name, FUSION, FUSIONS[name], scores_of(found)) for name, found in complete.items()]


FUSIONS = {
    "mean": "mean of scores between 0 and 1",
    "weighted mean": "weighted mean, weights learned on other queries",
    "RRF": "reciprocal rank fusion",
    "weighted RRF": "reciprocal rank fusion weighted by modality",
    "best modality": "the modality that is best on other queries",
    "router": "the modality whose first video stands out most",
    "oracle router": "the modality that the query is meant for",
}


def _learned(
    quality: Sequence[Mapping[str, float]], query_ids: Sequence[str]
) -> dict[str, npt.NDArray[np.floating[Any]]]:
    """Return for each query the mean quality of each modality on the queries of other folds."""
    values = np.array([[of_modality.get(query_id, np.nan) for query_id in query_ids] for of_modality in quality])
    fold = np.arange(len(query_ids)) % FOLDS
    learned: dict[str, npt.NDArray[np.floating[Any]]] = {}
    for number in range(FOLDS):
        others = values[:, fold != number]
        counted = np.isfinite(others)
        of_fold = np.where(counted, others, 0).sum(axis=1) / np.maximum(1, counted.sum(axis=1))
        learned |= {query_ids[i]: of_fold for i in range(number, len(query_ids), FOLDS)}
    return learned


def _ranked(pool: Pool, fused: npt.NDArray[np.floating[Any]], columns: Sequence[int], k: int) -> list[Hit]:
    """Return the best by a fused score, each at the clip of its best modality."""
    found = []
    for i in np.argsort(-fused, kind="stable")[:k]:
        best = columns[int(np.argmax(pool.scores[i, columns]))]
        if np.isfinite(fused[i]) and np.isfinite(pool.scores[i, best]):
            bounds = int(pool.clips[i, best]), float(pool.starts[i, best]), float(pool.stops[i, best])
            found.append(Hit(pool.video_ids[i], float(fused[i]), *bounds))
    return found
