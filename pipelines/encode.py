"""Encode: rows of ``modalities`` become token embeddings.

The unit of work is a clip, because joint encoders see all its modalities at once. Keys that are missing or stale are
found by `compare`; workers read the clips' rows, an actor pool encodes and pools them, and the driver commits.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.commits import batch_rows, compact, write_receipt
from cluster.freshness import Quarantine, Work, compare
from cluster.session import TASK_CPUS, Pool, blocks, check_schedule, even_sizes, plan_actors
from cluster.store import MODALITIES, Store, token_table
from operators import pooling, schema
from operators.encode import CLIP_MODALITIES, STAGE, Encode
from operators.encoder_clamr import ClamrEncoder
from operators.encoder_colpali import ColpaliEncoder
from operators.encoder_flmr import FlmrEncoder, PreflmrEncoder
from operators.encoder_lexical import LexicalEncoder
from operators.encoder_mire import MireEncoder
from operators.encoder_multivector import MultiVectorModel
from operators.encoder_offline import OfflineEncoder
from operators.fingerprint import fingerprint
from pipelines.config import EncodeConfig
from pipelines.job import Job, forget_failures
from pipelines.progress import Progress

ENCODERS: dict[str, Any] = {
    "offline": OfflineEncoder,
    "multivector": MultiVectorModel,
    "lexical": LexicalEncoder,
    "clamr": ClamrEncoder,
    "flmr": FlmrEncoder,
    "preflmr": PreflmrEncoder,
    "mire": MireEncoder,
    "colpali": ColpaliEncoder,
}

KEYS = ["video_id", "clip", "modality"]
CONTENT = ["spans", "frames", "audio"]
"""Columns of ``modalities`` that encoders see."""

_WORK = pa.schema(
    [
        ("video_id", pa.string()),
        ("video_fingerprint", pa.string()),
        ("row_ids", pa.list_(pa.uint64())),
        ("fingerprints", pa.list_(pa.string())),
    ]
)


def encode(job: Job, dry_run: bool = False) -> None:
    """Bring the encoder's token embedding table up to date with ``modalities``.

    Raises
    ------
    ScheduleError
        If the actor pool does not fit the cluster.
    ModelError
        If the model is missing or incomplete.
    """
    config = job.config.encode
    with job.timed("encode"):
        table = token_table(config.encoder)
        planned = plan(job.store, config, job.quarantine())
        work, difference, counts = planned.rows, planned.difference, job.summary.counts
        counts.update(encode=work.num_rows)
        counts["quarantined"] += planned.num_quarantined
        counts["waiting"] += planned.num_waiting
        counts["worked_on"] = max(counts["worked_on"], len(set(work["video_id"].to_pylist())))
        if dry_run:
            return
        if work.num_rows:
            dim = ENCODERS[config.encoder].dim_of(**config.parameters())
            job.lease.check()
            before = job.store.open_or_none(table)
            after = job.store.create(table, schema.token_embeddings(dim))
            if before is not None and before.version == after.version:
                job.store.delete_rows(table, difference.surplus_row_ids)
            _run(job, work, table, dim)
            compact(job.store, table, job.lease)
        elif difference.surplus_row_ids:
            job.lease.check()
            job.store.delete_rows(table, difference.surplus_row_ids)


def encoder_fingerprint(config: EncodeConfig) -> str:
    """Return what the token embeddings of an encode config depend on, their input aside."""
    of_encoder = ENCODERS[config.encoder].fingerprint_of(**config.parameters())
    return fingerprint(of_encoder, pooling.VERSION, config.pool_tokens.model_dump())


def plan(store: Store, config: EncodeConfig, quarantine: Quarantine) -> Work:
    """Return the clips to encode: a row each, with Lance row ids and fingerprints of its stale modalities."""
    of_encoder = encoder_fingerprint(config)
    joint = ENCODERS[config.encoder].joint_of(**config.parameters())
    rows = store.rows(MODALITIES, [*KEYS, "fingerprint"])
    rows = _with_output_fingerprints(rows, of_encoder, joint)
    difference = compare(rows, _existing(store, config.encoder), KEYS)
    # A joint encoder needs every modality of a clip that has a stale one; all of them are stale by their fingerprint.
    clips: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for row in difference.missing.to_pylist():
        clips[row["video_id"], row["clip"]].append((row["_rowid"], row["fingerprint"]))
    videos = _video_fingerprints(rows, {video_id for video_id, _ in clips})
    held, now = {v for v, value in videos.items() if quarantine.holds(v, {STAGE: value})}, time.time()
    waiting = {v for v, value in videos.items() if v not in held and quarantine.waits(v, {STAGE: value}, now)}
    work = [
        {
            "video_id": video_id,
            "video_fingerprint": videos[video_id],
            "row_ids": [row_id for row_id, _ in of_clip],
            "fingerprints": [value for _, value in of_clip],
        }
        for (video_id, _), of_clip in sorted(clips.items())
        if video_id not in held | waiting
    ]
    return Work(pa.Table.from_pylist(work, schema=_WORK), difference, len(held), len(waiting))


def _video_fingerprints(rows: pa.Table, video_ids: set[str]) -> dict[str, str]:
    """Return what stands for all embeddings that are to be made of each video."""
    own = rows.filter(pc.is_in(rows["video_id"], value_set=pa.array(sorted(video_ids), pa.string())))
    values: dict[str, list[str]] = defaultdict(list)
    for video_id, value in zip(own["video_id"].to_pylist(), own["fingerprint"].to_pylist(), strict=True):
        values[video_id].append(value)
    return {video_id: fingerprint(sorted(of_video)) for video_id, of_video in values.items()}


def _with_output_fingerprints(rows: pa.Table, of_encoder: str, joint: bool) -> pa.Table:
    inputs = rows["fingerprint"].to_pylist()
    if joint:
        of_clip: dict[tuple[str, int], list[str]] = defaultdict(list)
        clips = list(zip(rows["video_id"].to_pylist(), rows["clip"].to_pylist(), strict=True))
        for clip, value in zip(clips, inputs, strict=True):
            of_clip[clip].append(value)
        values = [
            fingerprint(of_encoder, value, sorted(of_clip[clip])) for clip, value in zip(clips, inputs, strict=True)
        ]
    else:
        values = [fingerprint(of_encoder, value) for value in inputs]
    index = rows.column_names.index("fingerprint")
    return rows.set_column(index, "fingerprint", pa.array(values, pa.string()))


def _existing(store: Store, encoder: str) -> pa.Table:
    table = store.rows(token_table(encoder), [*KEYS, "fingerprint"], schema.token_embeddings(1))
    return table.append_column("rows_per_key", pa.array([1] * table.num_rows, type=pa.int64()))


def _run(job: Job, work: pa.Table, table: str, dim: int) -> None:
    config, resources = job.config.encode, job.start_ray()
    pool = plan_pool(config, resources["CPU"], work.num_rows)
    check_schedule([pool], 2, resources)
    job.use([pool])
    committer = job.committer(table)
    read = partial(read_clips, store=job.store, version=job.store.open(MODALITIES).version)
    write = partial(
        write_receipt,
        store=job.store,
        table=table,
        table_schema=schema.token_embeddings(dim),
        to_rows=_token_rows,
        count=_count_tokens,
    )
    batches = -(-work.num_rows // config.resources.batch_clips)
    num_blocks = min(work.num_rows, max(batches, pool.num_actors))
    receipts = (
        blocks(work, even_sizes(work.num_rows, num_blocks))
        .map_batches(read, batch_format="pyarrow", batch_size=None, num_cpus=TASK_CPUS)
        .map_batches(
            Encode,
            fn_constructor_kwargs={
                "make_encoder": ENCODERS[config.encoder],
                "name": config.encoder,
                "parameters": config.parameters() | _speed(config),
                "pool_tokens": config.pool_tokens.model_dump(),
            },
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
            max_restarts=2,
            max_task_retries=1,
        )
        .map_batches(
            write,
            batch_format="pyarrow",
            batch_size=len(schema.MODALITIES) * batch_rows(work.num_rows),
            num_cpus=TASK_CPUS,
        )
    )
    num_rows = sum(len(of_clip) for of_clip in work["row_ids"].to_pylist())
    with Progress("encode", num_rows) as progress:
        for receipt in receipts.iter_rows():
            committer.add(receipt)
            progress.advance(receipt["num_items"])
    committer.flush()
    job.summary.tokens.update(committer.tally.counts)
    job.summary.add(committer.tally)
    failed = {failure["video_id"] for failure in committer.tally.failures}
    forget_failures(job, {(video_id, STAGE) for video_id in work["video_id"].to_pylist() if video_id not in failed})


def plan_pool(config: EncodeConfig, num_cpus: float, num_clips: int) -> Pool:
    """Return the encoder's actor pool: one actor a GPU, or enough to use the cores."""
    resources = config.resources
    [pool] = plan_actors({"encode": 1.0}, num_cpus, {"encode": resources.actors}, num_clips)
    return Pool("encode", pool.num_actors, pool.num_cpus, resources.gpus_each)


def _speed(config: EncodeConfig) -> dict[str, Any]:
    resources = config.resources
    return {
        "batch_tokens": resources.batch_tokens,
        "device": "cuda" if resources.gpus_each else resources.device,
        "num_threads": resources.num_threads,
    }


def read_clips(work: pa.Table, store: Store, version: int) -> pa.Table:
    """Return clips with the contents of their stale modalities. Runs on the workers."""
    clips = work.to_pylist()
    row_ids = [row_id for clip in clips for row_id in clip["row_ids"]]
    columns = [*KEYS, "start_seconds", "stop_seconds", *CONTENT]
    rows = iter(store.take(MODALITIES, version, row_ids, columns).to_pylist())
    return pa.Table.from_pylist([_clip(rows, clip) for clip in clips], schema=CLIP_MODALITIES)


def _clip(rows: Any, work: Mapping[str, Any]) -> Mapping[str, Any]:
    of_clip = [next(rows) | {"fingerprint": value} for value in work["fingerprints"]]
    return {name: of_clip[0][name] for name in ("video_id", "clip", "start_seconds", "stop_seconds")} | {
        "video_fingerprint": work["video_fingerprint"],
        "modalities": [{name: row[name] for name in ("modality", "fingerprint", *CONTENT)} for row in of_clip],
    }


def _token_rows(batch: pa.Table) -> pa.Table:
    """Return rows of the token embedding table; those of clips that failed have none."""
    done = batch.filter(pc.equal(pc.list_value_length(batch["failures"]), 0))
    return done.drop_columns(["timings", "failures", "fingerprints"])


def _count_tokens(rows: pa.Table) -> Counter[str]:
    totals = rows.group_by("modality").aggregate([("num_tokens", "sum")]).to_pylist()
    return Counter({total["modality"]: total["num_tokens_sum"] for total in totals})
