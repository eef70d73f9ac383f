"""Build-index: token embeddings become a compressed residual index, and a release that readers open.

One codec is trained on a sample drawn over all shards; Ray tasks then encode the shards, each into an immutable segment;
and what probes and candidates find is measured on the corpus, so that a search can ask for a recall.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.index_store import num_bytes, read_codec, read_index, write_codec, write_manifest, write_segment
from cluster.session import Pool, check_schedule, cluster_resources
from cluster.shards import Shard, plan_shards, read_tokens
from cluster.store import MODALITIES, RELEASES, VIDEOS, Store, token_table
from operators import schema
from operators.calibrate import calibrate, choose
from operators.codec import ResidualCodec
from operators.errors import ShapeError, StorageError
from operators.kmeans import ITERATIONS, MAX_POINTS, check_count, cluster_sums, next_centroids, num_centroids
from operators.maxsim import make_scorer
from operators.schema import MODALITIES as MODALITY_NAMES
from operators.search import Searcher
from operators.segment import Segment, first_unusable
from pipelines.encode import encoder_fingerprint
from pipelines.job import Job
from pipelines.progress import Progress

HELDOUT_SHARE = 0.05
MAX_HELDOUT_TOKENS = 50_000
MIN_ACTOR_TOKENS = 100_000
"""Of the sample: fewer are not worth another process."""


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
        codec_checksum = write_codec(store, index_id, codec)
    with job.timed("encode segments"):
        entries = _write_segments(job, shards, table, version, index_id)
    with job.timed("calibrate"):
        curve = _calibrate(job, shards, entries, table, version, index_id)
    manifest = {
        "index_id": index_id,
        "codec_checksum": codec_checksum,
        "curve": curve,
        "table": table,
        "version": version,
        "dim": codec.dim,
        "nbits": config.nbits,
        "num_centroids": codec.num_centroids,
        "num_tokens": total,
        "segments": entries,
        "config": config.model_dump(),
    }
    job.lease.check()
    write_manifest(store, index_id, manifest)
    size = num_bytes(store, index_id)
    release_id = _release(job, index_id, table, version)
    plan, rescored = choose(curve["points"], job.config.search.recall, 10)
    job.summary.counts.update(
        index_bytes=size,
        centroids=codec.num_centroids,
        release=release_id,
        probes=plan.probes,
        candidates=plan.candidates,
        rescored=rescored,
    )
    return manifest | {"release_id": release_id, "bytes_per_token": size / total}


def _train(job: Job, shards: list[Shard], table: str, version: int, total: int) -> ResidualCodec:
    """Train on a sample of every shard, in proportion to its size, spread over as many actors as there are cores.

    What is drawn, and so the result but for the order of additions, does not depend on how many there are.
    """
    config = job.config.build_index
    wanted = config.num_centroids or num_centroids(total, total)
    drawn = min(config.sample_tokens, MAX_POINTS * wanted / (1 - HELDOUT_SHARE) + MAX_HELDOUT_TOKENS)
    num_actors = max(1, min(int(cluster_resources()["CPU"]), math.ceil(drawn / MIN_ACTOR_TOKENS)))
    gpus = _gpus(config.device)
    if gpus:
        num_actors = min(num_actors, max(1, int(cluster_resources().get("GPU", 0))))
    check_schedule([Pool("train codec", num_actors, 1, gpus)], 0, cluster_resources())
    actor = ray.remote(_Trainer).options(num_cpus=1, num_gpus=gpus)
    seed = config.seed
    trainers = [
        actor.remote(shards, job.store, table, version, min(1.0, drawn / total), seed, part, num_actors, config.device)
        for part in range(num_actors)
    ]
    heldout = np.concatenate(ray.get([trainer.heldout.remote() for trainer in trainers]))
    num_sampled = sum(ray.get([trainer.num_sampled.remote() for trainer in trainers]))
    count = config.num_centroids or num_centroids(total, num_sampled)
    check_count(num_sampled, count)
    keys, tokens = zip(*ray.get([trainer.first.remote(count) for trainer in trainers]), strict=True)
    centroids = np.concatenate(tokens)[np.argsort(np.concatenate(keys), kind="stable")[:count]].astype(np.float32)
    if len(heldout) == 0:  # of a few rows all may have gone to the sample
        heldout = np.concatenate(tokens)
    for _ in range(ITERATIONS):
        sent = ray.put(centroids)
        sums, counts = ray.get(_sum([trainer.cluster_sums.remote(sent) for trainer in trainers]))
        centroids = next_centroids(sums, counts, seed)
    del trainers  # their cores are needed
    fit = ray.remote(_fit).options(num_cpus=1)
    codec: ResidualCodec = ray.get(fit.remote(centroids, heldout[:MAX_HELDOUT_TOKENS], config.nbits, seed))
    return codec


def _gpus(device: str) -> float:
    return 0.0 if device == "cpu" else 1.0


def _fit(centroids: np.ndarray, heldout: np.ndarray, nbits: int, seed: int) -> ResidualCodec:
    return ResidualCodec.fit(centroids, heldout, nbits, seed)


class _Trainer:
    """Holds one part of the sample. An actor."""

    def __init__(
        self,
        shards: Sequence[Shard],
        store: Store,
        table: str,
        version: int,
        share: float,
        seed: int,
        part: int,
        num_parts: int,
        device: str,
    ) -> None:
        self._device = device
        sampled: list[np.ndarray] = []
        heldout: list[np.ndarray] = []
        keys = []
        for number, shard in enumerate(shards):
            rng = np.random.default_rng((seed, number))
            rows = np.flatnonzero(rng.random(shard.rows.num_rows) < share)
            is_heldout = rng.random(len(rows)) < HELDOUT_SHARE
            if is_heldout.all():
                is_heldout[:1] = False
            lengths = shard.run_lengths[rows]
            own = np.arange(len(rows)) % num_parts == part
            of_rows = rng.random(int(lengths.sum()))[np.repeat(own & ~is_heldout, lengths)]
            for chosen, into in ((own & ~is_heldout, sampled), (own & is_heldout, heldout)):
                taken = shard.rows["_rowid"].take(pa.array(rows[chosen]))
                if len(taken):
                    into.append(read_tokens(store, table, version, taken))
            keys.append(of_rows)
        dim = next((tokens.shape[1] for tokens in [*sampled, *heldout]), 0)
        empty = np.empty((0, dim), np.float16)
        self._sampled, self._heldout = np.concatenate([empty, *sampled]), np.concatenate([empty, *heldout])
        self._keys = np.concatenate(keys)

    def num_sampled(self) -> int:
        return len(self._sampled)

    def heldout(self) -> np.ndarray:
        return self._heldout

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of the ``count`` smallest random keys, and those keys."""
        order = np.argsort(self._keys, kind="stable")[:count]
        return self._keys[order], self._sampled[order]

    def cluster_sums(self, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self._device == "cpu":
            return cluster_sums(self._sampled, centroids)
        from operators.kmeans_gpu import cluster_sums_on

        return cluster_sums_on(self._sampled, centroids, self._device)


def _sum(parts: list[Any]) -> Any:
    """Return a reference to the sum of pairs of arrays, added by tasks in a tree: no process holds more than a few."""
    add = ray.remote(_add).options(num_cpus=0)
    while len(parts) > 1:
        parts = [add.remote(*parts[i : i + 4]) for i in range(0, len(parts), 4)]
    return parts[0]


def _add(*pairs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return sum(sums for sums, _ in pairs), sum(counts for _, counts in pairs)  # type: ignore[return-value]


def _write_segments(job: Job, shards: list[Shard], table: str, version: int, index_id: str) -> list[dict[str, Any]]:
    device = job.config.build_index.device
    task = ray.remote(_write_segment).options(num_cpus=1, num_gpus=_gpus(device), max_retries=3)
    waiting = [
        task.remote(shard, f"{i:06d}", job.store, table, version, index_id, device) for i, shard in enumerate(shards)
    ]
    entries = []
    with Progress("build-index", len(shards)) as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            entries += ray.get(done)
            progress.advance(len(done))
    return sorted(entries, key=lambda entry: str(entry["name"]))


def _write_segment(
    shard: Shard, name: str, store: Store, table: str, version: int, index_id: str, device: str
) -> dict[str, Any]:
    codec = read_codec(store, index_id)
    tokens = read_tokens(store, table, version, shard.rows["_rowid"])
    lengths, clips, ids = shard.run_lengths, shard.clips, None
    if device != "cpu":
        from operators.kmeans_gpu import assign_on

        ids = assign_on(tokens, codec.centroids, device)
    try:
        segment = Segment.build(tokens, lengths, shard.run_clip, shard.run_modality, clips.num_rows, codec, ids=ids)
    except ShapeError as error:
        token = first_unusable(tokens)
        if token is None:
            raise
        row = shard.rows.slice(int(np.searchsorted(np.cumsum(lengths), token, side="right")), 1).to_pylist()[0]
        raise StorageError(
            f"video {row['video_id']}, clip {row['clip']}, {row['modality']}: a token embedding is zero or not finite. "
            f"Encode this video again: its rows in {table} are damaged, or the encoder is."
        ) from error
    return write_segment(store, index_id, name, segment, clips, codec.num_centroids)


def _calibrate(
    job: Job, shards: list[Shard], entries: list[dict[str, Any]], table: str, version: int, index_id: str
) -> dict[str, Any]:
    """Measure recall against probes and candidates on the first segments, as many as ``calibration_tokens`` allow."""
    before = np.cumsum([entry["num_tokens"] for entry in entries]) - [entry["num_tokens"] for entry in entries]
    count = max(1, int(np.searchsorted(before, job.config.build_index.calibration_tokens)))
    task = ray.remote(_curve).options(num_cpus=1)
    seed = job.config.build_index.seed
    points = ray.get(task.remote(shards[:count], entries[:count], job.store, table, version, index_id, seed))
    return {"num_clips": sum(entry["num_clips"] for entry in entries[:count]), "points": points}


def _curve(
    shards: Sequence[Shard],
    entries: Sequence[dict[str, Any]],
    store: Store,
    table: str,
    version: int,
    index_id: str,
    seed: int,
) -> list[dict[str, Any]]:
    codec = read_codec(store, index_id)
    searcher = Searcher([read_index(store, index_id, entries, codec).segment], codec)
    tokens = np.concatenate([read_tokens(store, table, version, shard.rows["_rowid"]) for shard in shards])
    return calibrate(searcher, tokens, make_scorer("sum_maxsim", MODALITY_NAMES), seed)


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
