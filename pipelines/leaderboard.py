"""What systems reached over judged queries: by target modality, with intervals, and each against the first.

Where a measure has no value for some queries (``PRRecall`` without answers) it is a mean over the others, and left out of a
group in which no query has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from operators import diagonal
from operators.errors import ConfigError
from operators.measures import Judgements, answer_depth, check_measures, mean, per_query, rises
from operators.significance import bootstrap, compare, holm
from pipelines.datasets import JudgedQuery
from pipelines.runs import Run

Protocol = Literal["trec", "clamr_diagonal"]

Values = dict[str, dict[str, float]]
"""Of each measure, by judged query; under ``clamr_diagonal`` by ``query#video``."""

Json = dict[str, Any]


def check(names: Sequence[str], protocol: Protocol, queries: Sequence[JudgedQuery], judgements: Judgements) -> None:
    """Raise ConfigError unless the measures are known and at least one query is judged."""
    check_measures(names)
    if not rises(names[0]):
        raise ConfigError(f"evaluate.measures: more must be better in the first; {names[0]} falls. Put it later")
    if protocol == "clamr_diagonal":
        diagonal.check_measures(names)
    if not any(query.query_id in judgements for query in queries):
        raise ConfigError("none of the queries is judged: do the ids of the queries and the qrels belong together?")
    if answer_depth(names) and not any(query.answers for query in queries if query.query_id in judgements):
        raise ConfigError("PRRecall looks for answers, and no judged query has any: give queries a list of `answers`")


def values_of(
    names: Sequence[str],
    protocol: Protocol,
    judgements: Judgements,
    run: Run,
    depth: int,
    answered: Mapping[str, int | None] | None = None,
) -> Values:
    """Return each measure of each judged query, by the protocol; see `operators.measures.per_query`."""
    if protocol == "clamr_diagonal":
        return diagonal.diagonal(names, judgements, run)
    return per_query(names, judgements, run, depth, answered)


def groups_of(queries: Sequence[JudgedQuery], units: Sequence[str]) -> dict[str, list[str]]:
    """Return judged queries by the modality they are meant to find; ``all`` holds every one."""
    target = {query.query_id: query.target_modality for query in queries}
    groups: dict[str, list[str]] = {"all": list(units)}
    for unit in units:
        if name := target.get(unit) or target.get(unit.rpartition("#")[0]):
            groups.setdefault(name, []).append(unit)
    return groups


def summary(names: Sequence[str], values: Values, groups: Mapping[str, Sequence[str]]) -> Json:
    """Return the mean of each measure in each group, and its interval over queries."""
    measures: Json = {}
    intervals: Json = {}
    for group, units in groups.items():
        found = {name: [values[unit][name] for unit in units if name in values[unit]] for name in names}
        columns = {name: column for name, column in found.items() if column}
        measures[group] = {"queries": len(units)} | {name: mean(name, column) for name, column in columns.items()}
        # The interval of a median would be another: MdR has none.
        intervals[group] = {n: list(bootstrap(np.array(c))) for n, c in columns.items() if n != "MdR"}
    return {"measures": measures, "intervals": intervals}


def differences(names: Sequence[str], values: Mapping[str, Values]) -> dict[str, Json]:
    """Return how every system but the first compares with the first, p-values adjusted over systems by Holm."""
    primary, *others = values
    found: dict[str, Json] = {name: {} for name in others}
    for measure in names:
        if measure == "MdR":
            continue
        units = [unit for unit in values[primary] if all(measure in values[name][unit] for name in values)]
        theirs = np.array([values[primary][unit][measure] for unit in units])
        ours = {name: np.array([values[name][unit][measure] for unit in units]) for name in others}
        compared = {name: compare(ours[name], theirs, rises=rises(measure)) for name in others}
        for name, p_holm in zip(others, holm([difference.p for difference in compared.values()]), strict=True):
            found[name][measure] = asdict(compared[name]) | {"p_holm": p_holm, "rises": rises(measure)}
    return found
