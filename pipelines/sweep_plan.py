"""What the cells of a sweep share, before anything is run: fingerprints of all that each of their parts depends on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

import pipelines
from cluster.freshness import Quarantine
from cluster.index_store import FORMAT
from cluster.shards import clip_rows
from cluster.store import Store, token_table
from operators import pooling
from operators.errors import ConfigError, StorageError
from operators.fingerprint import fingerprint
from operators.measures import answer_depth
from operators.remote import Environment
from pipelines import leaderboard
from pipelines.config import Config, EncodeConfig, PoolTokens
from pipelines.datasets import JudgedQuery, read_qrels, read_queries
from pipelines.encode import encoder_fingerprint, plan
from pipelines.queries import read_image
from pipelines.release import find_live
from pipelines.search import scorer_of
from pipelines.sweep_config import Cell

VERSION = "1"
"""Of how a cell is measured; another does every cell again, as does another version of maxreel."""


@dataclass(frozen=True)
class Asked:
    """The question of a sweep.

    Attributes
    ----------
    fingerprint
        Of queries and judgements.
    """

    queries: list[JudgedQuery]
    judgements: dict[str, dict[str, int]]
    measures: tuple[str, ...]
    depth: int
    batch_queries: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Stored:
    """What a store holds of an encoder.

    Attributes
    ----------
    encode
        How its token embeddings were made, or will be.
    num_stale
        Rows and clips to be done before it can be swept.
    version, rows
        Of the table, as `cluster.shards.clip_rows` gives them; 0 and None before there is one.
    digest
        Of every row's key and fingerprint.
    """

    encode: EncodeConfig
    num_stale: int
    version: int
    rows: pa.Table | None
    digest: str

    @property
    def table(self) -> str:
        """Name of the token embedding table."""
        return token_table(self.encode.encoder)

    @cached_property
    def largest(self) -> dict[str, int] | None:
        """Most tokens of a clip, by modality; None while some are yet to be encoded."""
        if self.num_stale or self.rows is None:
            return None
        found = self.rows.group_by("modality").aggregate([("num_tokens", "max")]).to_pylist()
        return {row["modality"]: row["num_tokens_max"] for row in found}


@dataclass(frozen=True, eq=False)
class Placed:
    """A cell, and fingerprints of what it shares with others.

    Attributes
    ----------
    pool_tokens
        Budget of every modality.
    budgets
        Those of them that leave fewer tokens than the store holds.
    tokens, trained, index, exact, fingerprint
        Of its token embeddings, their centroids, the index, the exact ranking ("" if none is wanted), and of all of it.
    """

    cell: Cell
    stored: Stored
    pool_tokens: dict[str, int]
    budgets: dict[str, int]
    tokens: str
    trained: str
    index: str
    exact: str
    fingerprint: str


def read_asked(config: Config, queries: Path, qrels: Path) -> Asked:
    """Return queries, judgements and measures.

    Raises
    ------
    ConfigError
        If one of them cannot be read, or a sweep cannot measure it.
    """
    options = config.evaluate
    if options.protocol != "trec" or answer_depth(options.measures):
        raise ConfigError("a sweep measures by evaluate.protocol=trec, and not by answers (PRRecall); see `evaluate`")
    judged, judgements = read_queries(queries), read_qrels(qrels)
    leaderboard.check(options.measures, options.protocol, judged, judgements)
    content = fingerprint([_content_of(query, config.storage.environment()) for query in judged], judgements)
    return Asked(judged, judgements, options.measures, options.depth, options.batch_queries, content)


def _content_of(query: JudgedQuery, environment: Environment) -> dict[str, Any]:
    image = fingerprint(read_image(query.image, environment).hex()) if query.image else None
    return asdict(query) | {"image": image}


def look(store: Store, base: EncodeConfig, most: PoolTokens) -> Stored:
    """Return what a store holds of an encoder.

    Its tokens are taken as made with the largest budgets of the sweep, those of its base, or those of the live release:
    whichever leaves the least to encode. A sweep must not do again what nights do with other budgets.

    Raises
    ------
    StorageError
        If there is nothing to sweep.
    """
    budgets, live = [most, base.pool_tokens], find_live(store)
    if live and live.encode.encoder == base.encoder and live.encode.parameters() == base.parameters():
        budgets.append(live.encode.pool_tokens)
    ways = [base.model_copy(update={"pool_tokens": pool_tokens}) for pool_tokens in budgets]
    num_stale, way = min(((_num_stale(store, way), way) for way in ways), key=lambda pair: pair[0])
    table = token_table(base.encoder)
    dataset = store.open_or_none(table)
    rows = None if dataset is None else clip_rows(store, table, dataset.version)
    if not num_stale and (rows is None or not rows["num_tokens"].to_numpy().sum()):
        raise StorageError(f"{store.uri} has no token embeddings to sweep; run `maxreel index MANIFEST` first")
    if dataset is None:
        return Stored(way, num_stale, 0, None, "")
    return Stored(way, num_stale, dataset.version, rows, _digest(dataset, table))


def _num_stale(store: Store, encode: EncodeConfig) -> int:
    work = plan(store, encode, Quarantine.load(store, max_attempts=1, wait_seconds=0))  # what failed is not waited for
    return int(work.rows.num_rows) + len(work.difference.surplus_row_ids)


def largest_budgets(cells: Sequence[Cell]) -> PoolTokens:
    """Return the largest budget of each modality, of all cells; 0 keeps all."""
    budgets = [cell.config.encode.pool_tokens.model_dump() for cell in cells]
    return PoolTokens(**{name: max((b[name] for b in budgets), key=lambda b: b or math.inf) for name in budgets[0]})


def _digest(dataset: Any, table: str) -> str:
    keys = dataset.to_table(columns=["video_id", "clip", "modality", "fingerprint"])
    keys = keys.sort_by([("video_id", "ascending"), ("clip", "ascending"), ("modality", "ascending")])
    digest = hashlib.sha256(table.encode())
    for column in keys.columns:
        digest.update("\n".join(map(str, column.to_pylist())).encode())
    return digest.hexdigest()


def place_all(cells: Sequence[Cell], stored: Mapping[str, Stored], asked: Asked) -> list[Placed]:
    """Return cells with what they share; ``stored`` is by encoder.

    Raises
    ------
    ConfigError
        As `place`, or if two cells are the same but for settings that change nothing here.
    """
    placed: dict[str, Placed] = {}
    for cell in cells:
        p = place(cell, stored[cell.config.encode.encoder], asked)
        other = placed.setdefault(p.fingerprint, p).cell.settings
        if apart := [name for name, value in cell.settings.items() if other[name] != value]:
            raise ConfigError(f"{', '.join(apart)}: makes no difference to a sweep; take it out of the grid")
    return list(placed.values())


def place(cell: Cell, stored: Stored, asked: Asked) -> Placed:
    """Return a cell with what it shares.

    Raises
    ------
    ConfigError
        If it wants more tokens than the store holds.
    """
    wanted, build, search = cell.config.encode.pool_tokens, cell.config.build_index, cell.config.search
    pool_tokens = stored.encode.pool_tokens.model_dump()
    pool_tokens |= {modality: getattr(wanted, modality) for modality in wanted.model_fields_set}
    budgets = _smaller(pool_tokens, stored)
    encoder = encoder_fingerprint(stored.encode)
    tokens = fingerprint(
        VERSION, pipelines.__version__, encoder, stored.digest, stored.version, pooling.VERSION, budgets
    )
    of_training = build.model_dump(exclude={"nbits", "calibration_tokens", "retrain_drift", "retrain_growth"})
    trained = fingerprint(tokens, of_training)
    index = fingerprint(trained, FORMAT, build.nbits, build.calibration_tokens)
    exact = fingerprint(tokens, asked.fingerprint, asdict(scorer_of(search)))
    if not cell.config.evaluate.compare_exact:
        exact = ""
    of_search = search.model_dump(exclude={"actors"})
    whole = fingerprint(index, exact, pool_tokens, of_search, asked.fingerprint, asked.measures, asked.depth)
    return Placed(cell, stored, pool_tokens, budgets, tokens, trained, index, exact, whole)


def _smaller(pool_tokens: Mapping[str, int], stored: Stored) -> dict[str, int]:
    """Return the budgets that leave fewer tokens than the store holds."""
    smaller = {}
    for modality, budget in pool_tokens.items():
        kept: int = getattr(stored.encode.pool_tokens, modality)
        most = math.inf if stored.largest is None else stored.largest.get(modality, 0)
        if kept and most >= kept and (not budget or budget > kept):
            raise ConfigError(
                f"encode.pool_tokens.{modality}={budget} is above the {kept} that the store's tokens were pooled to. "
                f"Sweep {kept} at most, or run `maxreel encode --set encode.pool_tokens.{modality}={budget}` first."
            )
        if budget and budget != kept and budget < most:
            smaller[modality] = budget
    return smaller


def count(placed: Sequence[Placed]) -> dict[str, int]:
    """Return how many things of each kind cells share."""
    return {
        "encodings": len({p.stored.table for p in placed}),
        "token_tables": len({p.tokens for p in placed}),
        "trainings": len({p.trained for p in placed}),
        "indices": len({p.index for p in placed}),
        "exact_rankings": len({p.exact for p in placed if p.exact}),
        "cells": len(placed),
    }
