"""An evaluation in the forms that other tools read: MTEB's results, tables in Markdown and LaTeX, names for trackers.

All are made from the document of ``metrics.json``. That file itself is what DVC reads: it shows each number and text in it
by its path (``measures.all.nDCG@10``), and leaves out lists, so intervals, and nulls. MLflow refuses ``@`` in names:
`flatten` gives it the names that MTEB uses.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from operators.measures import rises

MTEB_NAMES = {"nDCG": "ndcg", "AP": "map", "R": "recall", "P": "precision", "RR": "mrr", "Success": "hit_rate"}
"""Of the measures that MTEB computes too, by trec_eval as ir_measures does."""

ALPHA = 0.05
"""Adjusted p-values up to this get a dagger."""

UNTRACKED = ("measures", "intervals", "systems", "depth", "release_id")
"""Of the document: what is flattened by itself, and numbers that measure nothing."""


def write_formats(folder: Path, document: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write ``mteb.json``, ``tables.md``, ``tables.tex`` and ``params.yaml`` into an evaluation's folder.

    Parameters
    ----------
    document
        Of ``metrics.json``.
    config
        The resolved configuration as plain values, ``Config.model_dump(mode="json")``.
    """
    result = to_mteb(document, folder.resolve().name)
    texts = {
        "mteb.json": json.dumps(result, indent=2) + "\n",
        "tables.md": to_markdown(document),
        "tables.tex": to_latex(document),
        "params.yaml": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def flat_name(name: str) -> str:
    """Return a name of lower-case letters, digits and ``_``: ``nDCG@10`` is ``ndcg_at_10``, as MTEB calls it."""
    head = re.split(r"[^A-Za-z]", name, maxsplit=1)[0]
    named = MTEB_NAMES.get(head, head) + name[len(head) :]
    return re.sub(r"[^a-z0-9]+", "_", named.lower().replace("@", "_at_")).strip("_")


def flatten(document: Mapping[str, Any]) -> dict[str, float]:
    """Return every figure by one name, for ``mlflow.log_metrics``.

    The primary system's are ``ndcg_at_10``, of the queries that aim at speech ``speech/ndcg_at_10``; another system's are
    ``systems/only_speech/ndcg_at_10``; the rest is ``cost/p50_seconds`` and the like.
    """
    systems = {name: of["measures"] for name, of in document["systems"].items() if name != document["system"]}
    others = {name: value for name, value in document.items() if name not in UNTRACKED}
    tree = {**document["measures"], "systems": systems, **others}
    return {"/".join(flat_name(part) for part in path if part != "all"): value for path, value in _numbers(tree)}


def _numbers(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, name))
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield (*path, name), float(value)


def to_mteb(document: Mapping[str, Any], task_name: str, languages: Sequence[str] = ("und-Zyyy",)) -> dict[str, Any]:
    """Return the primary system's measures as MTEB keeps the result of a task.

    MTEB did not compute them, so ``mteb_version`` is null; `pipelines.mteb_adapter` lets it.

    Parameters
    ----------
    languages
        Of the queries as MTEB names them, for example ``eng-Latn``; undetermined unless given. MTEB leaves out a result
        without any.
    """
    measures = document["measures"]["all"]
    scores = {flat_name(name): measures[name] for name in _measures(document) if math.isfinite(measures[name])}
    of_test = {"main_score": measures[document["primary_measure"]], "hf_subset": "default", "languages": [*languages]}
    return {
        "dataset_revision": "local",
        "task_name": task_name,
        "mteb_version": None,
        "scores": {"test": [scores | of_test]},
        "evaluation_time": None,
        "kg_co2_emissions": None,
        "date": datetime.fromisoformat(document["created"]).timestamp(),
    }


@dataclass(frozen=True)
class _Cell:
    value: str
    interval: str
    is_best: bool = False
    differs: bool = False


def to_markdown(document: Mapping[str, Any]) -> str:
    """Return a table of the systems over all queries: a row a system, a column a measure."""
    measures = _measures(document)
    rows = [[_escape_markdown(label), *map(_markdown_cell, cells)] for label, cells in _rows(document, measures)]
    heading = [_escape_markdown(text) for text in ("system", *measures)]
    lines = [heading, ["---", *("---:" for _ in measures)], *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{_escape_markdown(_caption(document))}\n"


def to_latex(document: Mapping[str, Any]) -> str:
    """Return the same table for LaTeX with the package ``booktabs``."""
    measures = _measures(document)
    rows = [[_escape_latex(label), *map(_latex_cell, cells)] for label, cells in _rows(document, measures)]
    heading = [_escape_latex(text) for text in ("system", *measures)]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_escape_latex(_caption(document))}}}",
            rf"  \begin{{tabular}}{{l{'r' * len(measures)}}}",
            r"    \toprule",
            f"    {' & '.join(heading)} \\\\",
            r"    \midrule",
            *(f"    {' & '.join(row)} \\\\" for row in rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _measures(document: Mapping[str, Any]) -> list[str]:
    return [name for name in document["measures"]["all"] if name != "queries"]


def _caption(document: Mapping[str, Any]) -> str:
    primary = document["systems"][document["system"]]["label"]
    return (
        f"{document['measures']['all']['queries']} queries. Best in bold, 95 % bootstrap intervals in brackets. "
        f"† differs from {primary}: paired randomisation, Holm over systems, p ≤ {ALPHA:g}."
    )


def _rows(document: Mapping[str, Any], measures: Sequence[str]) -> Iterator[tuple[str, list[_Cell]]]:
    systems = document["systems"].values()
    best = {name: _best(name, [of["measures"]["all"].get(name, math.nan) for of in systems]) for name in measures}
    for of in systems:
        yield of["label"], [_cell(of, name, best[name]) for name in measures]


def _best(measure: str, values: Sequence[float]) -> str:
    better = max if rises(measure) else min
    return _number(better((value for value in values if math.isfinite(value)), default=math.nan))


def _cell(system: Mapping[str, Any], measure: str, best: str) -> _Cell:
    value = system["measures"]["all"].get(measure, math.nan)
    if math.isnan(value):
        return _Cell("–", "")
    interval = system.get("intervals", {}).get("all", {}).get(measure)
    shown = f" [{', '.join(map(_number, interval))}]" if interval else ""
    p = system.get("against", {}).get(measure, {}).get("p_holm")
    # What is printed alike is best alike.
    return _Cell(_number(value), shown, _number(value) == best, p is not None and p <= ALPHA)


def _number(value: float) -> str:
    return f"{value:.3f}"


def _markdown_cell(cell: _Cell) -> str:
    value = f"**{cell.value}**" if cell.is_best else cell.value
    return f"{value}{'†' if cell.differs else ''}{cell.interval}"


def _latex_cell(cell: _Cell) -> str:
    value = rf"\textbf{{{cell.value}}}" if cell.is_best else _escape_latex(cell.value)
    interval = rf"{{\scriptsize{cell.interval}}}" if cell.interval else ""
    return f"{value}{_escape_latex('†') if cell.differs else ''}{interval}"


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    # A bracket or star at the start of a row would be an argument of the row before.
    | {character: f"{{{character}}}" for character in "[]*"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    | {"†": r"$^{\dagger}$", "≤": r"$\leq$", "–": "--"}
)


def _escape_latex(text: str) -> str:
    return " ".join(text.split()).translate(LATEX)
