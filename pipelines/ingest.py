"""Ingest: a manifest becomes rows of ``videos``, new and changed ones only.

Each new or changed file is opened once, to learn its duration and size (later stages plan their work by them). A file
that cannot be opened is kept all the same: extract decides what it can still give, and says why it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from cluster.commits import compact, write_receipt
from cluster.freshness import compare
from cluster.session import TASK_CPUS, blocks, check_schedule, even_sizes, plan_actors
from cluster.store import FAILURES, VIDEOS
from operators import schema
from operators.decode import Probe
from operators.errors import GateFailedError
from operators.fingerprint import fingerprint
from pipelines import manifest
from pipelines.job import SAMPLES, Job, forget, forget_failures
from pipelines.manifest import Entry
from pipelines.progress import Progress

STAGE = "ingest"


def ingest(job: Job, manifest_uri: str, remove_gone: bool = False, dry_run: bool = False) -> None:
    """Bring ``videos`` up to date with a manifest.

    Parameters
    ----------
    job
        The run, which holds the store.
    manifest_uri
        A JSONL, CSV or Parquet file, a folder, or an object-store prefix.
    remove_gone
        Delete the videos that the manifest no longer lists; the jobs that follow delete what was made of them.
    dry_run
        Only count what would be done.

    Raises
    ------
    ConfigError
        If the manifest cannot be read as a whole; nothing was written then.
    GateFailedError
        If more videos are gone than ``gates.max_gone`` allows; nothing was written then.
    """
    with job.timed(STAGE):
        config, storage = job.config.ingest, job.config.storage
        checked = manifest.check(manifest_uri, storage.environment())
        existing = job.store.rows(VIDEOS, ["video_id", "fingerprint"])
        gone = existing.filter(pc.invert(pc.is_in(existing["video_id"], value_set=checked.ids)))
        if remove_gone:
            _limit_gone(job, gone.num_rows, existing.num_rows)
            job.summary.counts["gone"] = gone.num_rows
            job.summary.sample("gone", gone["video_id"].slice(0, SAMPLES).to_pylist())
        for chunk in manifest.read(
            manifest_uri,
            config.source,
            config.chunk_rows,
            config.allowed_roots,
            checked,
            storage.environment(),
            storage.to_options(),
        ):
            _ingest_chunk(job, chunk, existing, dry_run)
        if remove_gone and not dry_run:
            job.lease.check()
            job.store.delete_rows(VIDEOS, gone["_rowid"].to_pylist())
            _forget_the_gone(job, checked.ids)
        if not dry_run:
            compact(job.store, VIDEOS, job.lease)


def _forget_the_gone(job: Job, listed: pa.ChunkedArray) -> None:
    """Delete the failures of videos that are no longer listed, and of entries that this run did not meet."""
    rows = job.store.rows(FAILURES, ["video_id", "stage", "run_id"])
    gone = pc.invert(pc.is_in(rows["video_id"], value_set=listed))
    mended = pc.and_(pc.equal(rows["stage"], STAGE), pc.not_equal(rows["run_id"], job.run_id))
    unlisted = pc.and_(gone, pc.invert(pc.equal(rows["run_id"], job.run_id)))
    forget(job, rows.filter(pc.or_(unlisted, mended)))


def _limit_gone(job: Job, num_gone: int, num_videos: int) -> None:
    limit = job.config.gates.max_gone
    if limit is not None and num_gone > max(limit * num_videos, job.config.allowed_failures):
        raise GateFailedError(
            f"the manifest no longer lists {num_gone} of {num_videos} videos, more than gates.max_gone {limit:g} allows. "
            "Nothing was changed. If they are really gone, run once with --set gates.max_gone=1."
        )


def _ingest_chunk(job: Job, chunk: Sequence[Entry], existing: pa.Table, dry_run: bool) -> None:
    failed = [entry for entry in chunk if entry.error]
    table = _to_arrow([entry for entry in chunk if not entry.error])
    known = existing.filter(pc.is_in(existing["video_id"], value_set=table["video_id"]))
    known = known.append_column("rows_per_key", pa.array([1] * known.num_rows, pa.int64()))
    difference = compare(table, known, ["video_id"])
    surplus = set(difference.surplus_row_ids)
    job.summary.counts.update(
        listed=len(chunk),
        new=difference.missing.num_rows - len(surplus),
        changed=len(surplus),
        unchanged=difference.num_fresh,
        worked_on=len(failed) + difference.missing.num_rows,
    )
    is_known = pc.is_in(difference.missing["video_id"], value_set=known["video_id"])
    job.summary.sample("changed", difference.missing.filter(is_known)["video_id"].to_pylist())
    job.summary.sample("new", difference.missing.filter(pc.invert(is_known))["video_id"].to_pylist())
    if dry_run:
        return
    if difference.missing.num_rows:
        _probe_and_write(job, difference.missing, difference.surplus_row_ids)
    failed_ids = {entry.video_id for entry in failed}
    _record(job, failed, [video_id for video_id in table["video_id"].to_pylist() if video_id not in failed_ids])


def _probe_and_write(job: Job, new: pa.Table, replaced_row_ids: list[int]) -> None:
    resources = job.start_ray()
    [pool] = plan_actors({STAGE: 1.0}, resources["CPU"], {STAGE: job.config.extract.resources.decode}, new.num_rows)
    check_schedule([pool], 2, resources)
    job.use([pool])
    job.lease.check()
    job.store.delete_rows(VIDEOS, replaced_row_ids)
    committer = job.committer(VIDEOS)
    write = partial(
        write_receipt, store=job.store, table=VIDEOS, table_schema=schema.VIDEOS, to_rows=_video_rows, count=_count
    )
    num_blocks = min(new.num_rows, max(4 * pool.num_actors, new.num_rows // 64))
    receipts = (
        blocks(new, even_sizes(new.num_rows, num_blocks))
        .map_batches(
            Probe,
            fn_constructor_kwargs={
                "timeout_seconds": job.config.extract.resources.timeout_seconds,
                "environment": job.config.storage.environment(),
            },
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=pool.num_cpus,
            compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
        )
        .map_batches(write, batch_format="pyarrow", batch_size=4096, num_cpus=TASK_CPUS)
    )
    with Progress("ingest", new.num_rows) as progress:
        for receipt in receipts.iter_rows():
            committer.add(receipt)
            progress.advance(receipt["num_items"])
    committer.flush()
    job.summary.add(committer.tally)


def _to_arrow(entries: Sequence[Entry]) -> pa.Table:
    """Return what ``videos`` knows before a file is opened, with the fingerprint of each row."""
    names = [
        name for name in schema.VIDEOS.names if name not in ("duration_seconds", "width", "height", "fps", "has_audio")
    ]
    wanted = pa.schema([schema.VIDEOS.field(name) for name in names])
    rows = [
        {
            "video_id": entry.video_id,
            "uri": entry.uri,
            "source_fingerprint": entry.source_fingerprint,
            "fingerprint": fingerprint(
                Probe.VERSION,
                entry.uri,
                entry.source_fingerprint,
                entry.title,
                entry.description,
                entry.tags,
                entry.extra,
            ),
            "title": entry.title,
            "description": entry.description,
            "tags": list(entry.tags),
            "extra": entry.extra,
            "state": "active",
        }
        for entry in entries
    ]
    return pa.Table.from_pylist(rows, schema=wanted)


def _video_rows(batch: pa.Table) -> pa.Table:
    return batch.select(schema.VIDEOS.names)


def _count(rows: pa.Table) -> Counter[str]:
    return Counter(videos=rows.num_rows)


def _record(job: Job, failed: Sequence[Entry], succeeded: Sequence[str]) -> None:
    """Record entries that cannot be used, and forget those that now can."""
    committer = job.committer(VIDEOS)
    receipt: dict[str, Any] = {"fragments": [], "num_rows": 0, "num_items": len(failed), "counts": "{}", "timings": []}
    committer.add(
        receipt
        | {
            "failures": [
                {
                    "video_id": entry.video_id,
                    "stage": STAGE,
                    "error": type(entry.error).__name__,
                    "message": str(entry.error),
                    "final": False,
                    "fingerprint": "",
                }
                for entry in failed
            ]
        }
    )
    committer.flush()
    job.summary.add(committer.tally)
    forget_failures(job, {(video_id, STAGE) for video_id in succeeded})
