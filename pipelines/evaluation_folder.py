"""What an evaluation leaves in its folder, and how it is read again.

``qrels.txt`` and ``run.trec`` are what any other evaluator needs to repeat the figures; ``metrics.json`` holds them, and
``per_query.parquet`` their parts. Every other system has its run in ``runs/`` and its parts in ``systems.parquet``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from operators.errors import ConfigError
from pipelines.config import Config
from pipelines.details import save_details
from pipelines.evaluate import SCHEMA, Evaluation
from pipelines.formats import write_formats
from pipelines.leaderboard import Values
from pipelines.report import clean
from pipelines.runs import Run, read_run, write_run


def save(evaluation: Evaluation, folder: Path, config: Config) -> None:
    """Write runs, measures and judgements, and the tables that other tools take; ``metrics.json`` last."""
    folder.mkdir(parents=True, exist_ok=True)
    primary, *others = evaluation.systems
    write_run(folder / "run.trec", primary.run, f"maxreel-{primary.name}".replace(" ", "-"))
    for system in others:
        write_run(folder / "runs" / file_name(system.name), system.run, f"maxreel-{system.name}".replace(" ", "-"))
    lines = [
        f"{query_id} 0 {video_id} {grade}\n"
        for query_id, grades in evaluation.judgements.items()
        for video_id, grade in grades.items()
    ]
    (folder / "qrels.txt").write_text("".join(lines), encoding="utf-8")
    tables = {system.name: _table(evaluation, system.name) for system in evaluation.systems}
    pyarrow.parquet.write_table(tables[primary.name], folder / "per_query.parquet")
    named = [
        table.add_column(0, "system", pa.array([name] * table.num_rows, pa.string())) for name, table in tables.items()
    ]
    pyarrow.parquet.write_table(pa.concat_tables(named), folder / "systems.parquet")
    if evaluation.hits:
        save_details(evaluation, folder, config)
    write_formats(folder, evaluation.document, clean(config.model_dump(mode="json")))
    (folder / "metrics.json").write_text(json.dumps(evaluation.document, indent=1) + "\n", encoding="utf-8")


def file_name(system: str) -> str:
    """Return the name of a system's run in ``runs/``."""
    return system.replace(":", "-").replace(" ", "-") + ".trec.gz"


def _table(evaluation: Evaluation, system: str) -> pa.Table:
    """Return a row a judged query: query_id, text, target_modality, and a column a measure, null where it has none."""
    asked = {query.query_id: query for query in evaluation.queries}
    values = evaluation.values[system]
    units = list(values)
    queries = [asked.get(unit) or asked.get(unit.rpartition("#")[0]) for unit in units]
    columns: dict[str, Any] = {
        "query_id": pa.array(units, pa.string()),
        "text": pa.array([query.text if query else None for query in queries], pa.string()),
        "target_modality": pa.array([query.target_modality if query else None for query in queries], pa.string()),
    }
    names = [name for name in evaluation.document["measures"]["all"] if name != "queries"]
    return pa.table(columns | {n: pa.array([values[unit].get(n) for unit in units], pa.float64()) for n in names})


@dataclass(frozen=True)
class Saved:
    """An evaluation read from its folder: its primary system.

    Attributes
    ----------
    texts, values
        Of each judged query.
    shares
        Of the score of a query's video, by modality, where its hits were explained.
    """

    name: str
    document: dict[str, Any]
    run: Run
    texts: dict[str, str | None]
    values: Values
    judgements: dict[str, dict[str, int]]
    shares: dict[tuple[str, str], dict[str, float]]


def load(folder: Path) -> Saved:
    """Return the primary system of an evaluation.

    Raises
    ------
    ConfigError
        If the folder holds none, or one of another version.
    """
    document = read_document(folder)
    rows = pyarrow.parquet.read_table(folder / "per_query.parquet").to_pylist()
    names = [name for name in document["measures"]["all"] if name != "queries"]
    values = {row["query_id"]: {name: row[name] for name in names if row[name] is not None} for row in rows}
    judgements: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels.txt").read_text(encoding="utf-8").splitlines():
        query_id, _, video_id, grade = line.split()
        judgements.setdefault(query_id, {})[video_id] = int(grade)
    texts = {row["query_id"]: row["text"] for row in rows}
    run = read_run(folder / "run.trec")
    return Saved(folder.resolve().name, document, run, texts, values, judgements, _shares(folder / "details.parquet"))


def _shares(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    if not path.exists():
        return {}
    rows = pyarrow.parquet.read_table(path, columns=["query_id", "video_id", "shares"]).to_pylist()
    return {(row["query_id"], row["video_id"]): {s["modality"]: s["share"] for s in row["shares"]} for row in rows}


def read_document(folder: Path) -> dict[str, Any]:
    """Return ``metrics.json``; errors as `load`."""
    try:
        document: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} holds no evaluation ({error}); make one with `maxreel evaluate ... --out {folder}`"
        ) from error
    if document.get("schema") != SCHEMA:
        raise ConfigError(f"{folder} holds {document.get('schema', 'something else')}, this version reads {SCHEMA}")
    return document
