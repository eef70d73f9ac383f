"""Extract: videos become rows of ``modalities``.

One streaming Ray Data pipeline of actor pools: decode -> speech -> screen text -> rows -> fragments, whose receipts the
driver commits. Work is what `compare` finds missing or stale, per video and modality: a new OCR engine redoes screen text
and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.commits import batch_rows, compact, write_receipt
from cluster.freshness import Quarantine, Work, compare
from cluster.session import TASK_CPUS, Pool, blocks, check_schedule, even_sizes, plan_actors
from cluster.store import MODALITIES, VIDEOS, Store
from operators import modalities, schema, sound, weights
from operators.decode import Decode
from operators.fingerprint import fingerprint
from operators.modalities import BLOCKED_BY, modality_rows
from operators.remote import Environment
from operators.schema import FRAME, METADATA, SCREEN_TEXT, SPEECH
from operators.screen_text import ScreenText
from operators.speech import Speech
from pipelines.config import ExtractConfig
from pipelines.job import Job, forget_failures
from pipelines.progress import Progress

STAGES = ("decode", SPEECH, SCREEN_TEXT)

WORK_SHARES = {"decode": 1.0, SPEECH: 1.0, SCREEN_TEXT: 6.0}
"""CPU time of the stages relative to each other, measured on real videos; sizes the actor pools."""

MAX_BLOCKS = 4096
"""Videos with a file are cut into at most this many blocks, so that Ray's driver keeps a bounded number of tasks."""

BLOCK_ROWS = 256
"""Videos without a file in a block: a task costs Ray more than reading the metadata of one."""


class Fingerprints:
    """What each modality of a video is made from. Model revisions are read once."""

    def __init__(self, config: ExtractConfig) -> None:
        speech, screen = config.speech, config.screen_text
        self._windows = [Decode.VERSION, config.clip_seconds]
        self._frames = config.frames.model_dump()
        self._speech: list[Any] = []
        if SPEECH in config.modalities:
            self._speech = [Speech.VERSION, speech.model_dump(), weights.fingerprint(speech.model)]
            self._speech += ["audio", sound.VERSION] if config.keep_audio else []
        self._screen_text: list[Any] = []
        if SCREEN_TEXT in config.modalities:
            model = weights.fingerprint(screen.model) if screen.engine == "easyocr" else ""
            self._screen_text = [ScreenText.VERSION, screen.model_dump(), model]

    def of(self, video: Mapping[str, Any]) -> dict[str, str]:
        """Return the fingerprint of each stage for a row of ``videos``; every modality depends on the clips' bounds."""
        decode = fingerprint(video["uri"] is not None, video["source_fingerprint"], self._windows)
        frame = fingerprint(decode, self._frames)
        return {
            "decode": decode,
            FRAME: frame,
            SPEECH: fingerprint(decode, self._speech),
            SCREEN_TEXT: fingerprint(frame, self._screen_text),
            METADATA: fingerprint(decode, modalities.VERSION, video["title"], video["description"], video["tags"]),
        }


def extract(job: Job, dry_run: bool = False) -> None:
    """Bring ``modalities`` up to date with ``videos``.

    Raises
    ------
    ScheduleError
        If the actor pools do not fit the cluster.
    ModelError
        If a model is missing.
    """
    config = job.config.extract
    with job.timed("extract"):
        fingerprints = Fingerprints(config)
        work = plan(job.store, config, fingerprints, job.quarantine())
        counts = job.summary.counts
        counts.update(extract=work.rows.num_rows, quarantined=work.num_quarantined, waiting=work.num_waiting)
        counts["worked_on"] = max(counts["worked_on"], work.rows.num_rows)
        if dry_run:
            return
        job.lease.check()
        job.store.delete_rows(MODALITIES, work.difference.surplus_row_ids)
        if work.rows.num_rows:
            _run(job, work.rows)
            compact(job.store, MODALITIES, job.lease)


def plan(store: Store, config: ExtractConfig, fingerprints: Fingerprints, quarantine: Quarantine) -> Work:
    """Return what is missing: a row a video, longest first and those without a file last."""
    videos = _videos(store, fingerprints)
    kinds = [
        pa.table({"video_id": videos["video_id"], "fingerprint": videos[modality]}).append_column(
            "modality", pa.array([modality] * videos.num_rows, pa.string())
        )
        for modality in config.modalities
    ]
    difference = compare(pa.concat_tables(kinds), _existing(store), ["video_id", "modality"])

    missing: dict[str, list[str]] = defaultdict(list)
    for row in difference.missing.select(["video_id", "modality"]).to_pylist():
        missing[row["video_id"]].append(row["modality"])
    found = pc.index_in(pa.array(list(missing), pa.string()), value_set=videos["video_id"])
    quarantined, waiting, now = set(), set(), time.time()
    work = []
    for video in videos.take(found).to_pylist():
        video_id, wanted = video["video_id"], []
        for modality in missing[video_id]:
            stages = {stage: video[stage] for stage in BLOCKED_BY[modality]}
            if quarantine.holds(video_id, stages):
                quarantined.add(video_id)
            elif quarantine.waits(video_id, stages, now):
                waiting.add(video_id)
            else:
                wanted.append(modality)
        if wanted:
            order = (video["uri"] is None, -(video["duration_seconds"] or 0.0), video_id)
            work.append((order, _work_row(video, wanted)))
    rows = [row for _, row in sorted(work, key=lambda item: item[0])]
    return Work(pa.Table.from_pylist(rows, schema=_WORK), difference, len(quarantined), len(waiting - quarantined))


def _videos(store: Store, fingerprints: Fingerprints) -> pa.Table:
    """Return row id, video_id, uri, duration and the fingerprint of each stage of every video."""
    rows = store.rows(
        VIDEOS, ["video_id", "uri", "source_fingerprint", "title", "description", "tags", "duration_seconds"]
    )
    stages: dict[str, list[str]] = {stage: [] for stage in ("decode", *schema.MODALITIES)}
    for batch in rows.to_batches(max_chunksize=10_000):
        for video in batch.to_pylist():
            for stage, value in fingerprints.of(video).items():
                stages[stage].append(value)
    found = rows.select(["_rowid", "video_id", "uri", "duration_seconds"])
    for stage, values in stages.items():
        found = found.append_column(stage, pa.array(values, pa.string()))
    return found


_WORK = pa.schema(
    [
        ("row_id", pa.uint64()),
        ("has_file", pa.bool_()),
        ("wanted", pa.list_(pa.string())),
        ("fingerprints", pa.list_(schema.STAGE_FINGERPRINT)),
    ]
)


def _work_row(video: Mapping[str, Any], wanted: list[str]) -> dict[str, Any]:
    fingerprints = [{"stage": stage, "fingerprint": video[stage]} for stage in ("decode", *schema.MODALITIES)]
    ordered = [modality for modality in schema.MODALITIES if modality in wanted]
    return {
        "row_id": video["_rowid"],
        "has_file": video["uri"] is not None,
        "wanted": ordered,
        "fingerprints": fingerprints,
    }


def _existing(store: Store) -> pa.Table:
    table = store.rows(MODALITIES, ["video_id", "modality", "fingerprint", "num_clips"])
    return table.rename_columns(["video_id", "modality", "fingerprint", "rows_per_key", "_rowid"])


def _run(job: Job, work: pa.Table) -> None:
    config, resources = job.config.extract, job.start_ray()
    sizes = _block_sizes(work)
    pools = {pool.name: pool for pool in plan_pools(config, resources["CPU"], len(sizes))}
    check_schedule(list(pools.values()), 3, resources)
    job.use(list(pools.values()))
    if config.keep_audio:
        job.lease.check()
        job.store.add_later_columns(MODALITIES)
    committer = job.committer(MODALITIES)
    read = partial(read_videos, store=job.store, version=job.store.open(VIDEOS).version)
    held = job.store.open(MODALITIES).schema
    write = partial(
        write_receipt,
        store=job.store,
        table=MODALITIES,
        table_schema=held,
        to_rows=partial(_to_rows, columns=held.names),
        count=_count,
    )
    clips = blocks(work, sizes)
    clips = clips.map_batches(read, batch_format="pyarrow", batch_size=None, num_cpus=TASK_CPUS)
    for name, operator, parameters in operators(config, job.config.storage.environment()):
        clips = clips.map_batches(
            operator,
            fn_constructor_kwargs=parameters,
            batch_format="pyarrow",
            batch_size=1,
            num_cpus=pools[name].num_cpus,
            num_gpus=pools[name].num_gpus or None,
            compute=ray.data.ActorPoolStrategy(size=pools[name].num_actors, max_tasks_in_flight_per_actor=2),
            max_restarts=2,
            max_task_retries=1,
        )
    receipts = clips.map_batches(
        write, batch_format="pyarrow", batch_size=batch_rows(work.num_rows), num_cpus=TASK_CPUS
    )
    with Progress("extract", work.num_rows) as progress:
        for receipt in receipts.iter_rows():
            committer.add(receipt)
            progress.advance(receipt["num_items"])
    committer.flush()
    job.summary.add(committer.tally)
    _forget_resolved(job, work)


def _block_sizes(work: pa.Table) -> list[int]:
    """Return how many videos go into each block: one if it has a file, as far as `MAX_BLOCKS` allows."""
    num_files = pc.sum(work["has_file"]).as_py()
    num_others = work.num_rows - num_files
    of_files = even_sizes(num_files, min(num_files, MAX_BLOCKS))
    return [*of_files, *even_sizes(num_others, -(-num_others // BLOCK_ROWS))]


def plan_pools(config: ExtractConfig, num_cpus: float, num_blocks: int) -> list[Pool]:
    """Return the actor pools of the stages that the wanted modalities need."""
    wanted = {"decode": 1.0} | {
        stage: WORK_SHARES[stage] for stage in (SPEECH, SCREEN_TEXT) if stage in config.modalities
    }
    fixed = config.resources.model_dump()
    pools = plan_actors(wanted, num_cpus, {stage: fixed[stage] for stage in STAGES}, num_blocks)
    gpus = config.resources.gpus_each
    return [Pool(p.name, p.num_actors, p.num_cpus, 0.0 if p.name == "decode" else gpus) for p in pools]


def operators(
    config: ExtractConfig, environment: Environment | None = None
) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Yield name, class and parameters of each operator, in order; ``environment`` says how to reach object stores."""
    device = "cuda" if config.resources.gpus_each else "cpu"
    frames = config.frames.model_dump()
    yield (
        "decode",
        Decode,
        frames
        | {
            "clip_seconds": config.clip_seconds,
            "timeout_seconds": config.resources.timeout_seconds,
            "environment": environment,
        },
    )
    if SPEECH in config.modalities:
        yield SPEECH, Speech, config.speech.model_dump() | {"device": device, "keep_audio": config.keep_audio}
    if SCREEN_TEXT in config.modalities:
        yield SCREEN_TEXT, ScreenText, config.screen_text.model_dump() | {"device": device}


def read_videos(work: pa.Table, store: Store, version: int) -> pa.Table:
    """Return work rows with the ``videos`` columns that the operators need. Runs on the workers."""
    columns = ["video_id", "uri", "title", "description", "tags"]
    videos = store.take(VIDEOS, version, work["row_id"].to_pylist(), columns)
    for name in ("wanted", "fingerprints"):
        videos = videos.append_column(name, work[name])
    return videos


def _to_rows(clips: pa.Table, columns: list[str]) -> pa.Table:
    """Return rows of ``modalities`` with the columns that the store's table has."""
    return modality_rows(clips).select(columns)


def _count(rows: pa.Table) -> Counter[str]:
    return Counter(rows["modality"].to_pylist())


def _forget_resolved(job: Job, work: pa.Table) -> None:
    """Forget the failures of stages that this run did anew and that did not fail again."""
    videos = read_videos(work, job.store, job.store.open(VIDEOS).version)
    failed = {(failure["video_id"], failure["stage"]) for failure in job.summary.failures}
    done = {
        (video_id, stage)
        for video_id, wanted in zip(videos["video_id"].to_pylist(), videos["wanted"].to_pylist(), strict=True)
        for modality in wanted
        for stage in BLOCKED_BY[modality]
    }
    forget_failures(job, done - failed)
