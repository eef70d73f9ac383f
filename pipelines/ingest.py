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

from cluster.commits import write_receipt
from cluster.freshness import compare
from cluster.session import TASK_CPUS, blocks, check_schedule, plan_actors
from cluster.store import VIDEOS, Store
from operators import schema
from operators.decode import Probe
from operators.fingerprint import fingerprint
from pipelines import manifest
from pipelines.job import Job, forget_failures
from pipelines.manifest import Entry
from pipelines.progress import Progress

STAGE = "ingest"


def ingest(job: Job, manifest_uri: str, dry_run: bool = False) -> None:
    """Bring ``videos`` up to date with a manifest.

    Parameters
    ----------
    job
        The run, which holds the store.
    manifest_uri
        A JSONL, CSV or Parquet file, a folder, or an object-store prefix.
    dry_run
        Only count what would be done.
    """
    config = job.config.ingest
    with job.timed(STAGE):
        for chunk in manifest.read(manifest_uri, config.source, config.chunk_rows, config.allowed_roots):
            _ingest_chunk(job, chunk, dry_run)


def _ingest_chunk(job: Job, chunk: Sequence[Entry], dry_run: bool) -> None:
    failed = [entry for entry in chunk if entry.error]
    table = _to_arrow([entry for entry in chunk if not entry.error])
    difference = compare(table, _existing(job.store, table["video_id"]), ["video_id"])
    surplus = set(difference.surplus_row_ids)
    job.summary.counts.update(
        listed=len(chunk),
        new=difference.missing.num_rows - len(surplus),
        changed=len(surplus),
        unchanged=difference.num_fresh,
        worked_on=len(failed) + difference.missing.num_rows,
    )
    if dry_run:
        return
    if difference.missing.num_rows:
        _probe_and_write(job, difference.missing, difference.surplus_row_ids)
    _record(job, failed, table["video_id"].to_pylist())


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
    receipts = (
        blocks(new, min(new.num_rows, max(4 * pool.num_actors, new.num_rows // 64)))
        .map_batches(
            Probe,
            fn_constructor_kwargs={"timeout_seconds": job.config.extract.resources.timeout_seconds},
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


def _existing(store: Store, video_ids: pa.ChunkedArray) -> pa.Table:
    table = store.open(VIDEOS).scanner(columns=["video_id", "fingerprint"], with_row_id=True).to_table()
    table = table.filter(pc.is_in(table["video_id"], value_set=video_ids))
    return table.append_column("rows_per_key", pa.array([1] * table.num_rows, type=pa.int64()))


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
