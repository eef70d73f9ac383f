"""Token embeddings pooled to smaller budgets, as a table of their own: what an index of fewer tokens is made from.

They are pooled from what a store holds, float16 and perhaps pooled before: an encoder that pools to the smaller budget at
once merges other tokens, so that figures differ a little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import lance
import numpy as np
import pyarrow as pa
import ray

from cluster.commits import write_rows
from cluster.shards import KEY_COLUMNS, Shard, cut, read_tokens
from cluster.store import Store
from operators.encoders import TokenEmbeddings
from operators.pooling import pool


def pool_table(
    store: Store,
    table: str,
    version: int,
    rows: pa.Table,
    budgets: Mapping[str, int],
    into: Store,
    name: str,
    size: int,
) -> None:
    """Write a table of token embeddings pooled to budgets, in one commit: it is there, whole, or not at all.

    Parameters
    ----------
    rows
        Of the version to pool, as `cluster.shards.clip_rows` gives them.
    budgets
        Most tokens of each modality of a clip; those absent stay as they are.
    size
        Tokens pooled by a task.
    """
    task = ray.remote(_pool_shard).options(num_cpus=1, max_retries=3)
    shards = cut(rows, size)
    written = ray.get([task.remote(shard, store, table, version, budgets, into, name) for shard in shards])
    fragments = [lance.fragment.FragmentMetadata.from_json(text) for of_shard, _ in written for text in of_shard]
    operation = lance.LanceOperation.Overwrite(written[0][1], fragments)
    lance.LanceDataset.commit(into.table_uri(name), operation, storage_options=dict(into.options) or None)


def _pool_shard(
    shard: Shard, store: Store, table: str, version: int, budgets: Mapping[str, int], into: Store, name: str
) -> tuple[list[str], pa.Schema]:
    tokens = read_tokens(store, table, version, shard.rows["_rowid"])
    ends = np.cumsum(shard.run_lengths)
    budget_of_run = [budgets.get(modality, 0) for modality in shard.rows["modality"].to_pylist()]
    runs = [
        _pooled(tokens[end - length : end], budget)
        for end, length, budget in zip(ends, shard.run_lengths, budget_of_run, strict=True)
    ]
    lengths = np.array([len(run) for run in runs], np.int32)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    flat = pa.array(np.concatenate([tokens[:0], *runs]).ravel())
    embeddings = pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(flat, tokens.shape[1]))
    pooled = shard.rows.select(KEY_COLUMNS)
    pooled = pooled.set_column(KEY_COLUMNS.index("num_tokens"), "num_tokens", pa.array(lengths))
    pooled = pooled.append_column("embeddings", embeddings)
    return [json.dumps(fragment.to_json()) for fragment in write_rows(pooled, into, name)], pooled.schema


def _pooled(run: np.ndarray, budget: int) -> np.ndarray:
    if not budget or len(run) <= budget:
        return run
    tokens = TokenEmbeddings(run.astype(np.float32), np.zeros(len(run), np.int32))
    return pool(tokens, budget).embeddings.astype(np.float16)
