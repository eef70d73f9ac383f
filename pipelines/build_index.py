"""Build-index: token embeddings become a compressed residual index, and a draft of a release.

From nothing, one codec is trained on a sample drawn over all shards; Ray tasks then encode the shards, each into an
immutable segment; and what probes and candidates find is measured on the corpus, so that a search can ask for a recall.

From the index that readers have, only what changed is done: new clips become segments under the same codec, clips that are
gone get tombstones, and small segments are merged. How far the codec's error on new clips is above that on the clips it was
trained on is measured; past a limit, or when as much was added as it was trained on, the index is built from nothing.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster import upkeep
from cluster.index_store import (
    Tombstones,
    num_bytes,
    read_codec,
    read_index,
    write_codec,
    write_manifest,
    write_segment,
    write_tombstones,
)
from cluster.session import Pool, check_schedule, cluster_resources
from cluster.shards import Shard, clip_rows, cut, read_tokens
from cluster.store import Store, token_table
from operators import schema
from operators.calibrate import calibrate, choose
from operators.codec import ResidualCodec
from operators.errors import ShapeError, StorageError
from operators.kmeans import ITERATIONS, MAX_POINTS, check_count, cluster_sums, next_centroids, num_centroids
from operators.maxsim import make_scorer
from operators.search import Searcher
from operators.segment import Segment, first_unusable
from pipelines.config import BuildIndexConfig
from pipelines.encode import encoder_fingerprint
from pipelines.job import Job
from pipelines.progress import Progress
from pipelines.release import Release, add_draft, find_live, is_current, live_id, publish, read_log

HELDOUT_SHARE = 0.05
MAX_HELDOUT_TOKENS = 50_000
MIN_ACTOR_TOKENS = 100_000
"""Of the sample: fewer are not worth another process."""

MIN_DRIFT_SHARE = 0.01
"""Tokens added, of those the codec was trained on, before their error says anything."""

Entry = dict[str, Any]


def build_index(job: Job, full: bool = False, draft: bool = False, dry_run: bool = False) -> None:
    """Bring the index up to date with the token embeddings, and release it.

    Parameters
    ----------
    full
        Build from nothing, whatever readers have.
    draft
        Leave the release to `maxreel publish`.

    Raises
    ------
    StorageError
        If there are no token embeddings.
    """
    release_id = update_index(job, full, dry_run)
    if dry_run:
        return
    if not draft and live_id(read_log(job.store)) != release_id:
        publish(job, release_id, "built")
    job.summary.counts["release"] = release_id
    job.summary.release = {"release_id": release_id, "state": "draft" if draft else "published"}


def update_index(job: Job, full: bool = False, dry_run: bool = False) -> int:
    """Bring the index up to date with the token embeddings, and return the release that names it.

    That is a new draft, or the live release where nothing changed since.

    Raises
    ------
    StorageError
        If there are no token embeddings.
    """
    config, store = job.config.build_index, job.store
    table = token_table(job.config.encode.encoder)
    version = store.open(table).version
    rows = clip_rows(store, table, version)
    total = int(rows["num_tokens"].to_numpy().sum())
    if total == 0:
        raise StorageError(f"{store.uri} has no token embeddings to index; run `maxreel index MANIFEST` first")
    live = find_live(store)
    reason = "asked for" if full else _why_from_nothing(job, live, table)
    found = None
    if live is not None and not reason:
        found = upkeep.examine(store, live.manifest, rows)
        reason = _outgrown(live.manifest, int(found.new["num_tokens"].to_numpy().sum()), config)
    new = rows if found is None or reason else found.new
    num_clips = _num_clips(rows)
    job.summary.counts.update(clips=num_clips, tokens=total, new_clips=_num_clips(new))
    if dry_run:
        return 0
    manifest = None
    if live is not None and found is not None and not reason:
        with job.timed("update index"):
            manifest, reason = _grow(job, live.manifest, found, version)
    if manifest is None:
        manifest = _build(job, rows, table, version)
    _report(job, manifest, live, reason, num_clips, total, rows)
    if live is not None and manifest["index_id"] == live.index_id and is_current(store, live):
        return live.release_id
    return add_draft(job, manifest)


def _why_from_nothing(job: Job, live: Release | None, table: str) -> str:
    """Return why the live index cannot be built upon, or nothing."""
    config = job.config.build_index
    if live is None:
        return "there is no released index yet"
    if live.token_table != table or live.encoder_fingerprint != encoder_fingerprint(job.config.encode):
        return "the encoder changed"
    for name in ("nbits", "num_centroids", "sample_tokens", "seed"):
        was, now = live.manifest["config"].get(name), getattr(config, name)
        if was != now:
            return f"build_index.{name} changed from {was} to {now}"
    return ""


def _outgrown(manifest: Mapping[str, Any], num_new: int, config: BuildIndexConfig) -> str:
    trained, added = manifest["drift"]["trained_tokens"], manifest["drift"]["added_tokens"] + num_new
    if added > config.retrain_growth * trained:
        return f"{added} tokens were added since the codec was trained on {trained}"
    return ""


def _num_clips(rows: pa.Table) -> int:
    return len(np.unique(rows["clip_ordinal"].to_numpy()))


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:4]}"


def _build(job: Job, rows: pa.Table, table: str, version: int) -> dict[str, Any]:
    """Build an index from nothing and return its manifest."""
    job.start_ray()
    manifest = build_from_nothing(job.store, job.config.build_index, rows, table, version, _new_id(), timed=job.timed)
    job.lease.check()
    write_manifest(job.store, manifest["index_id"], manifest)
    return manifest


def build_from_nothing(
    store: Store,
    config: BuildIndexConfig,
    rows: pa.Table,
    table: str,
    version: int,
    index_id: str,
    trained: Trained | None = None,
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    progress: str | None = "build-index",
    calibrated: bool = True,
) -> dict[str, Any]:
    """Write an index of token embeddings and return its manifest, which is yet to be written: without it there is no index.

    Parameters
    ----------
    rows
        Of the table's version, as `cluster.shards.clip_rows` gives them.
    trained
        What `train` gave for these rows and settings, where that is known; it does not depend on ``nbits``.
    timed
        Measures each step, by its name.
    progress
        Name under which progress is shown; None shows none.
    calibrated
        Measure its curve, which takes longer than all the rest. Without, it can be searched by explicit knobs only.
    """
    shards = cut(rows, config.segment_tokens)
    with timed("train codec"):
        centroids, heldout = trained or train(store, config, shards, table, version)
        fit = ray.remote(_fit).options(num_cpus=1)
        codec: ResidualCodec = ray.get(fit.remote(centroids, heldout, config.nbits, config.seed))
        codec_entry = write_codec(store, index_id, codec)
    with timed("encode segments"):
        entries = _write_segments(store, config, shards, table, version, index_id, codec_entry, progress)
    curve: dict[str, Any] = {"num_clips": 0, "points": []}
    if calibrated:
        with timed("calibrate"):
            curve = calibrate_segments(store, config, shards, entries, table, version, codec_entry)
    total = sum(entry["num_tokens"] for entry in entries)
    return {
        "index_id": index_id,
        "codec": codec_entry,
        "curve": curve,
        "table": table,
        "version": version,
        "dim": codec.dim,
        "nbits": config.nbits,
        "num_centroids": codec.num_centroids,
        "num_tokens": total,
        "segments": entries,
        "tombstones": None,
        "drift": {
            "trained_tokens": total,
            "trained_error": _mean_error(entries),
            "added_tokens": 0,
            "added_error": 0.0,
        },
        "config": config.model_dump(),
    }


def _mean_error(entries: Sequence[Mapping[str, Any]]) -> float:
    return float(np.average([e["error"] for e in entries], weights=[max(1, e["num_tokens"]) for e in entries]))


def _grow(job: Job, base: Mapping[str, Any], found: upkeep.Upkeep, version: int) -> tuple[dict[str, Any] | None, str]:
    """Return the manifest of the index brought up to date, or None and why it must be built from nothing."""
    config, index_id = job.config.build_index, _new_id()
    shards = cut(found.new, config.segment_tokens)
    kept = [entry for entry in found.segments if entry["num_dead_clips"] < entry["num_clips"]]
    if not shards and not found.num_dead:
        return dict(base), ""
    added: list[Entry] = []
    if shards:
        job.start_ray()
        added = _write_segments(job.store, config, shards, base["table"], version, index_id, base["codec"])
    drift = _add_drift(base["drift"], added)
    if (reason := _drifted(drift, config.retrain_drift)) is not None:
        return None, reason
    merges = upkeep.plan_merges([*kept, *added], config.segment_tokens)
    if merges:
        job.start_ray()
    merged = _merge_segments(job, merges, found.tombstones, index_id, base["codec"], len(shards))
    gone = {entry["path"] for entries in merges for entry in entries}
    entries = [entry for entry in (*kept, *added) if entry["path"] not in gone] + merged
    tombstones = {e["path"]: found.tombstones[e["path"]] for e in entries if e["path"] in found.tombstones}
    manifest = dict(base) | {
        "index_id": index_id,
        "version": version,
        "num_tokens": sum(upkeep.live_tokens(entry) for entry in entries),
        "segments": entries,
        "tombstones": write_tombstones(job.store, index_id, tombstones) if tombstones else None,
        "drift": drift,
    }
    job.summary.counts.update(new_segments=len(added), merged_segments=len(gone), dead_clips=found.num_dead)
    job.lease.check()
    write_manifest(job.store, index_id, manifest)
    return manifest, ""


def _add_drift(before: Mapping[str, Any], added: Sequence[Entry]) -> dict[str, Any]:
    num_added = sum(entry["num_tokens"] for entry in added)
    total = before["added_tokens"] + num_added
    errors = before["added_error"] * before["added_tokens"] + sum(e["error"] * e["num_tokens"] for e in added)
    return dict(before) | {"added_tokens": total, "added_error": errors / total if total else 0.0}


def drift_of(manifest: Mapping[str, Any]) -> float | None:
    """Return how far the codec's error on clips added since is above that on those it was trained on, as a share.

    None while too little was added to tell.
    """
    return _drift(manifest["drift"])


def _drift(drift: Mapping[str, Any]) -> float | None:
    if drift["added_tokens"] < max(1, MIN_DRIFT_SHARE * drift["trained_tokens"]):
        return None
    return float(drift["added_error"] / max(drift["trained_error"], 1e-9) - 1)


def _drifted(drift: Mapping[str, Any], limit: float) -> str | None:
    value = _drift(drift)
    if value is None or value <= limit:
        return None
    return f"the codec's error on new clips is {value:.0%} above that on those it was trained on, limit {limit:.0%}"


def _report(
    job: Job, manifest: Mapping[str, Any], live: Release | None, reason: str, num_clips: int, total: int, rows: pa.Table
) -> None:
    size = num_bytes(job.store, manifest)
    plan, rescored = choose(manifest["curve"]["points"], job.config.search.recall, 10)
    counts = job.summary.counts
    counts.update(
        index_bytes=size,
        segments=len(manifest["segments"]),
        centroids=manifest["num_centroids"],
        probes=plan.probes,
        candidates=plan.candidates,
        rescored=rescored,
    )
    by_modality = rows.group_by("modality").aggregate([("num_tokens", "sum")]).to_pylist()
    job.summary.index = {
        "index_id": manifest["index_id"],
        "clips": num_clips,
        "tokens": total,
        "tokens_by_modality": {row["modality"]: row["num_tokens_sum"] for row in by_modality},
        "segments": len(manifest["segments"]),
        "bytes": size,
        "bytes_per_token": size / total,
        "new_segments": counts["new_segments"],
        "merged_segments": counts["merged_segments"],
        "dead_clips": sum(entry["num_dead_clips"] for entry in manifest["segments"]),
        "rebuilt": reason or None if live is not None else None,
        "drift": drift_of(manifest),
        "drift_limit": job.config.build_index.retrain_drift,
    }


Trained = tuple[np.ndarray, np.ndarray]
"""Centroids, (C, dim), and held-out tokens that levels are fitted to, (T, dim)."""


def train(store: Store, config: BuildIndexConfig, shards: Sequence[Shard], table: str, version: int) -> Trained:
    """Train on a sample of every shard, in proportion to its size, spread over as many actors as there are cores.

    What is drawn, and so the result but for the order of additions, does not depend on how many there are. All of them
    must run at once: two trainings at a time could wait for each other's cores.
    """
    total = sum(int(shard.run_lengths.sum()) for shard in shards)
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
        actor.remote(shards, store, table, version, min(1.0, drawn / total), seed, part, num_actors, config.device)
        for part in range(num_actors)
    ]
    try:
        return _centroids(trainers, config, total)
    finally:
        trainers.clear()  # an error would hold on to them, and their cores are needed


def _centroids(trainers: Sequence[Any], config: BuildIndexConfig, total: int) -> Trained:
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
        centroids = next_centroids(sums, counts, config.seed)
    return centroids, heldout[:MAX_HELDOUT_TOKENS]


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


def _write_segments(
    store: Store,
    config: BuildIndexConfig,
    shards: Sequence[Shard],
    table: str,
    version: int,
    index_id: str,
    codec: Mapping[str, str],
    progress: str | None = "build-index",
) -> list[Entry]:
    device = config.device
    task = ray.remote(_write_segment).options(num_cpus=1, num_gpus=_gpus(device), max_retries=3)
    waiting = [
        task.remote(shard, f"{i:06d}", store, table, version, index_id, codec, device) for i, shard in enumerate(shards)
    ]
    return _collect(progress, waiting)


def _merge_segments(
    job: Job,
    merges: Sequence[Sequence[upkeep.Entry]],
    tombstones: Tombstones,
    index_id: str,
    codec: Mapping[str, str],
    first_name: int,
) -> list[Entry]:
    task = ray.remote(_merge_segment).options(num_cpus=1, max_retries=3)
    waiting = [
        task.remote(
            entries,
            {entry["path"]: tombstones[entry["path"]] for entry in entries if entry["path"] in tombstones},
            f"{first_name + i:06d}",
            job.store,
            index_id,
            codec,
        )
        for i, entries in enumerate(merges)
    ]
    return _collect("merge", waiting) if waiting else []


def _collect(step: str | None, waiting: list[Any]) -> list[Entry]:
    entries: list[Entry] = []
    with Progress(step, len(waiting)) if step else nullcontext() as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            entries += ray.get(done)
            if progress:
                progress.advance(len(done))
    return sorted(entries, key=lambda entry: str(entry["path"]))


def _merge_segment(
    entries: Sequence[upkeep.Entry],
    tombstones: Tombstones,
    name: str,
    store: Store,
    index_id: str,
    codec_entry: Mapping[str, str],
) -> Entry:
    """Write the clips of several segments that are still there as one segment; their codes stay as they are."""
    codec = read_codec(store, codec_entry)
    loaded = read_index(store, entries, codec, tombstones)
    segment, clips = loaded.segment, loaded.clips
    if loaded.alive is not None:
        segment, clips = segment.keep(loaded.alive), clips.filter(pa.array(loaded.alive))
    return write_segment(store, index_id, name, segment, clips, codec.num_centroids, _mean_error(entries))


def _write_segment(
    shard: Shard,
    name: str,
    store: Store,
    table: str,
    version: int,
    index_id: str,
    codec_entry: Mapping[str, str],
    device: str,
) -> Entry:
    codec = read_codec(store, codec_entry)
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
    error_of_codes = segment.error(tokens, codec)
    return write_segment(store, index_id, name, segment, clips, codec.num_centroids, error_of_codes)


def calibrate_segments(
    store: Store,
    config: BuildIndexConfig,
    shards: Sequence[Shard],
    entries: Sequence[Entry],
    table: str,
    version: int,
    codec: Mapping[str, str],
) -> dict[str, Any]:
    """Measure recall against probes and candidates on the first segments, as many as ``calibration_tokens`` allow."""
    before = np.cumsum([entry["num_tokens"] for entry in entries]) - [entry["num_tokens"] for entry in entries]
    count = max(1, int(np.searchsorted(before, config.calibration_tokens)))
    task = ray.remote(_curve).options(num_cpus=1)
    points = ray.get(task.remote(shards[:count], entries[:count], store, table, version, codec, config.seed))
    return {"num_clips": sum(entry["num_clips"] for entry in entries[:count]), "points": points}


def _curve(
    shards: Sequence[Shard],
    entries: Sequence[Entry],
    store: Store,
    table: str,
    version: int,
    codec_entry: Mapping[str, str],
    seed: int,
) -> list[dict[str, Any]]:
    codec = read_codec(store, codec_entry)
    searcher = Searcher([read_index(store, entries, codec, {}).segment], codec)
    tokens = np.concatenate([read_tokens(store, table, version, shard.rows["_rowid"]) for shard in shards])
    return calibrate(searcher, tokens, make_scorer("sum_maxsim", schema.MODALITIES), seed)
