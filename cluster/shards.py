"""Cuts a token embedding table into shards of whole videos, and reads one.

A clip's modalities may lie in different fragments (each can be redone alone), so a shard is a list of row ids in clip
order, not a range of fragments. The driver holds keys and lengths; workers read the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cluster.store import Store
from operators.schema import MODALITIES

KEY_COLUMNS = ["video_id", "clip", "modality", "num_tokens", "start_seconds", "stop_seconds"]


@dataclass(frozen=True)
class Shard:
    """Rows of a token embedding table, one a modality run, sorted by clip and then modality."""

    rows: pa.Table

    @cached_property
    def run_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each run, (R,)."""
        lengths: npt.NDArray[np.int64] = self.rows["num_tokens"].to_numpy().astype(np.int64)
        return lengths

    @cached_property
    def run_modality(self) -> npt.NDArray[np.uint8]:
        """Index into ``MODALITIES`` of each run, (R,)."""
        modality: npt.NDArray[np.uint8] = self.rows["modality_index"].to_numpy().astype(np.uint8)
        return modality

    @cached_property
    def run_clip(self) -> npt.NDArray[np.int64]:
        """Ordinal of each run's clip within the shard, (R,)."""
        return np.cumsum(self._starts_clip) - 1

    @cached_property
    def clips(self) -> pa.Table:
        """Key and bounds of each clip, and the rows that hold it: video_id, clip, start_seconds, stop_seconds, row_ids."""
        keys = self.rows.filter(pa.array(self._starts_clip)).select(
            ["video_id", "clip", "start_seconds", "stop_seconds"]
        )
        first_rows = pa.array(np.append(np.flatnonzero(self._starts_clip), self.rows.num_rows).astype(np.int64))
        row_ids = self.rows["_rowid"].combine_chunks().cast(pa.int64())
        return keys.append_column("row_ids", pa.LargeListArray.from_arrays(first_rows, row_ids))

    @cached_property
    def first_clip_of_video(self) -> npt.NDArray[np.int64]:
        """Ordinal of each video's first clip within the shard, (V,)."""
        return np.flatnonzero(_changes(self.clips["video_id"]))

    @cached_property
    def video_ids(self) -> npt.NDArray[np.object_]:
        """Of each video, (V,), rising."""
        taken = self.clips["video_id"].take(pa.array(self.first_clip_of_video))
        return np.array(taken.to_pylist(), dtype=object)

    @cached_property
    def _starts_clip(self) -> npt.NDArray[np.bool_]:
        ordinals = self.rows["clip_ordinal"].to_numpy()
        return np.concatenate([[True], ordinals[1:] != ordinals[:-1]]) if len(ordinals) else np.zeros(0, dtype=bool)


def clip_rows(store: Store, table: str, version: int) -> pa.Table:
    """Return the keys of a token embedding table in clip order, without the embeddings.

    Columns: video_id, clip, modality, num_tokens, start_seconds, stop_seconds, _rowid, modality_index, clip_ordinal.
    """
    rows = store.open(table, version).scanner(columns=KEY_COLUMNS, with_row_id=True).to_table()
    modality_index = pc.index_in(rows["modality"], value_set=pa.array(MODALITIES)).cast(pa.uint8())
    rows = rows.append_column("modality_index", modality_index)
    rows = rows.sort_by([("video_id", "ascending"), ("clip", "ascending"), ("modality_index", "ascending")])
    starts = _changes(rows["video_id"]) | _changes(rows["clip"])
    return rows.append_column("clip_ordinal", pa.array(np.cumsum(starts) - 1))


def _changes(column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return where a column differs from the row before, the first row too."""
    values = column.combine_chunks()
    changes = np.ones(len(values), dtype=bool)
    if len(values) > 1:
        changes[1:] = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return changes


def cut(rows: pa.Table, shard_tokens: int) -> list[Shard]:
    """Return shards of whole videos, of rows as `clip_rows` gives them, with about ``shard_tokens`` tokens each."""
    if not rows.num_rows:
        return []
    lengths = rows["num_tokens"].to_numpy().astype(np.int64)
    starts = _changes(rows["video_id"])
    # A shard ends at the first video past its budget.
    shard_of_video = (np.cumsum(lengths) - lengths)[starts] // shard_tokens
    shard_of_row = shard_of_video[np.cumsum(starts) - 1]
    bounds = np.flatnonzero(np.diff(shard_of_row, prepend=-1))
    return [Shard(rows.slice(a, b - a)) for a, b in zip(bounds, [*bounds[1:], rows.num_rows], strict=True)]


def plan_shards(store: Store, table: str, version: int, shard_tokens: int) -> list[Shard]:
    """Return shards of whole videos of a token embedding table with about ``shard_tokens`` tokens each."""
    return cut(clip_rows(store, table, version), shard_tokens)


def read_tokens(store: Store, table: str, version: int, row_ids: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    """Return the token embeddings of rows, (T, dim), float16, in the order asked for. Runs on the workers."""
    return embeddings_of(store.take(table, version, row_ids.to_pylist(), ["embeddings"])["embeddings"])


def embeddings_of(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    """Return the token embeddings of a column of rows after one another, (T, dim), float16."""
    joined = column.combine_chunks()
    dim = joined.type.value_type.list_size
    tokens: npt.NDArray[np.float16] = joined.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return tokens
