"""Build-index: token embeddings become a compressed residual index, and a release that readers open.

One codec is trained on a sample drawn over all shards; Ray tasks then encode the shards, each into an immutable segment.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.index_store import num_bytes, read_codec, write_codec, write_manifest, write_segment
from cluster.session import TASK_CPUS
from cluster.shards import Shard, plan_shards, read_tokens
from cluster.store import MODALITIES, RELEASES, VIDEOS, Store, token_table
from operators import schema
from operators.codec import ResidualCodec
from operators.errors import StorageError
from operators.kmeans import num_centroids
from operators.segment import Segment
from pipelines.encode import encoder_fingerprint
from pipelines.job import Job
from pipelines.progress import Progress

HELDOUT_SHARE = 0.05
MAX_HELDOUT_TOKENS = 50_000


def build_index(job: Job, dry_run: bool = False) -> dict[str, Any]:
    """Build an index of the token embeddings as they are now, release it, and return its manifest.

    Raises
    ------
    StorageError
        If there are no token embeddings.
    """
    config, store = job.config.build_index, job.store
    table = token_table(job.config.encode.encoder)
    version = store.open(table).version
    shards = plan_shards(store, table, version, config.segment_tokens)
    total = int(sum(shard.run_lengths.sum() for shard in shards))
    if total == 0:
        raise StorageError(f"{store.uri} has no token embeddings to index; run `maxreel index MANIFEST` first")
    job.summary.counts.update(
        clips=sum(shard.clips.num_rows for shard in shards), tokens=total, segments=len(shards), worked_on=len(shards)
    )
    if dry_run:
        return {}
    job.start_ray()
    index_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"
    with job.timed("train codec"):
        codec = _train(job, shards, table, version, total)
        write_codec(store, index_id, codec)
    with job.timed("encode segments"):
        entries = _write_segments(job, shards, table, version, index_id)
    manifest = {
        "index_id": index_id,
        "table": table,
        "version": version,
        "dim": codec.centroids.shape[1],
        "nbits": config.nbits,
        "num_centroids": len(codec.centroids),
        "num_tokens": total,
        "segments": entries,
        "config": config.model_dump(),
    }
    job.lease.check()
    write_manifest(store, index_id, manifest)
    size = num_bytes(store, index_id)
    release_id = _release(job, index_id, table, version)
    job.summary.counts.update(index_bytes=size, centroids=len(codec.centroids), release=release_id)
    return manifest | {"release_id": release_id, "bytes_per_token": size / total}


def _train(job: Job, shards: list[Shard], table: str, version: int, total: int) -> ResidualCodec:
    """Train on a sample of every shard, in proportion to its size."""
    config = job.config.build_index
    share = min(1.0, config.sample_tokens / total)
    sampler = ray.remote(_sample).options(num_cpus=TASK_CPUS)
    parts = ray.get(
        [sampler.remote(shard, job.store, table, version, share, config.seed + i) for i, shard in enumerate(shards)]
    )
    sample = np.random.default_rng(config.seed).permutation(np.concatenate(parts))
    num_heldout = max(1, min(MAX_HELDOUT_TOKENS, int(HELDOUT_SHARE * len(sample))))
    chosen = config.num_centroids or num_centroids(total, len(sample) - num_heldout)
    trainer = ray.remote(_train_codec).options(num_cpus=1)
    codec: ResidualCodec = ray.get(trainer.remote(sample, num_heldout, config.nbits, chosen, config.seed))
    return codec


def _sample(shard: Shard, store: Store, table: str, version: int, share: float, seed: int) -> np.ndarray:
    """Return a share of a shard's tokens, drawn by whole rows so that only those are read."""
    chosen = np.random.default_rng(seed).random(shard.rows.num_rows) < share if share < 1 else None
    rows = shard.rows if chosen is None else shard.rows.filter(pa.array(chosen))
    return read_tokens(store, table, version, rows["_rowid"])


def _train_codec(sample: np.ndarray, num_heldout: int, nbits: int, centroids: int, seed: int) -> ResidualCodec:
    return ResidualCodec.train(sample[num_heldout:], sample[:num_heldout], nbits, centroids, seed=seed)


def _write_segments(job: Job, shards: list[Shard], table: str, version: int, index_id: str) -> list[dict[str, Any]]:
    task = ray.remote(_write_segment).options(num_cpus=1, max_retries=3)
    waiting = [task.remote(shard, f"{i:06d}", job.store, table, version, index_id) for i, shard in enumerate(shards)]
    entries = []
    with Progress("build-index", len(shards)) as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            entries += ray.get(done)
            progress.advance(len(done))
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _write_segment(shard: Shard, name: str, store: Store, table: str, version: int, index_id: str) -> dict[str, Any]:
    codec = read_codec(store, index_id)
    tokens = read_tokens(store, table, version, shard.rows["_rowid"])
    segment = Segment.build(tokens, shard.run_lengths, shard.run_clip, shard.run_modality, shard.clips.num_rows, codec)
    return write_segment(store, index_id, name, segment, shard.clips)


def _release(job: Job, index_id: str, table: str, version: int) -> int:
    """Publish: one row, one atomic commit. Readers open what it names."""
    rows = job.store.open(RELEASES).scanner(columns=["release_id"]).to_table()["release_id"].to_pylist()
    release_id = max(rows, default=0) + 1
    tables = {name: job.store.open(name).version for name in (VIDEOS, MODALITIES)} | {table: version}
    encode = job.config.encode
    row = {
        "release_id": release_id,
        "state": "published",
        "index_id": index_id,
        "tables": json.dumps(tables),
        "encode": json.dumps({"config": encode.model_dump(), "fingerprint": encoder_fingerprint(encode)}),
        "gates": "{}",
        "run_id": job.run_id,
        "time": datetime.now(UTC),
    }
    job.lease.check()
    job.store.upsert(RELEASES, pa.Table.from_pylist([row], schema=schema.RELEASES), ["release_id"])
    return release_id
