"""Why a search did not return a video that is known to be there: at which stage it was lost, and what would find it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from cluster.readers import reading
from cluster.searchers import SegmentHolder, Trace
from cluster.store import FAILURES, MODALITIES, VIDEOS, Store
from operators.encoders import Query
from pipelines.config import Config
from pipelines.job import open_store
from pipelines.release import Release, open_release
from pipelines.search import Wanted, any_of, filter_of, search_options

Json = dict[str, Any]

NOTHING = "nothing in it gives a token: no frames that are recognised, no speech, no text, no title"


def why_not(config: Config, query: Query, video_id: str, k: int, wanted: Wanted) -> Json:
    """Return the stage at which a video was lost to a search for ``k`` videos, and the detail of it.

    Stages, in their order: ``unknown``, ``failed``, ``not extracted``, ``not encoded``, ``not indexed``,
    ``without tokens``, ``tombstoned``, ``filtered out``, ``not probed``, ``pruned``, ``outscored``; or ``found``.
    """
    store = open_store(config)
    release = open_release(store)
    with reading(store, release.release_id):
        manifest = release.manifest
        holder = SegmentHolder(store, manifest, manifest["segments"], config.search.codes_on_disk)
        [embedded] = release.load_encoder(os.cpu_count() or 1, config.search.device).encode_queries([query])
        options = replace(search_options(config.search, k), filter=filter_of(store, release, wanted))
        trace = holder.trace(embedded, options, video_id)
        stage, detail = _before_index(store, release, video_id) if trace.stage == "not indexed" else _in_index(trace, k)
    found: Json = {
        "query": query.text,
        "video_id": video_id,
        "stage": stage,
        "detail": detail,
        "release_id": release.release_id,
    }
    if trace.hit:
        found |= {"start_seconds": trace.hit.start_seconds, "stop_seconds": trace.hit.stop_seconds}
    return found


def _in_index(trace: Trace, k: int) -> tuple[str, str]:
    plan, fate, hit, last = trace.plan, trace.fate, trace.hit, trace.last
    if trace.stage == "without tokens":
        return trace.stage, NOTHING
    if trace.stage == "tombstoned":
        return trace.stage, (
            "the video changed or left after the index was made of it; what replaced it comes with the next release "
            "(`maxreel build-index`)"
        )
    if trace.stage == "filtered out":
        return trace.stage, "--video, --tag, --from and --to leave none of its clips"
    if trace.stage == "not probed" and plan and fate:
        return trace.stage, (
            f"none of its clips holds one of the {plan.probes} nearest centroids of a query token; {fate.among} clips do. "
            f"`--set search.probes={trace.probes_needed}` would meet it"
        )
    if trace.stage == "pruned" and fate:
        return trace.stage, (
            f"its best clip is {fate.place} of {fate.among} by centroids, and {fate.limit} are scored on their codes. "
            f"`--set search.candidates={fate.place}` would keep it"
        )
    if trace.stage == "found" and hit:
        return trace.stage, f"it is {trace.rank} of the first {k}, with a score of {hit.score:.3f}"
    if hit and last:
        return trace.stage, (
            f"it was scored and is {trace.rank}, with {hit.score:.3f}; the last of the first {k} has {last.score:.3f}. "
            f"`-k {trace.rank}` would show it"
        )
    return trace.stage, "it was scored, but has no token of a modality that counts"


def _before_index(store: Store, release: Release, video_id: str) -> tuple[str, str]:
    """Return where a video that the index lacks was lost, by the tables as they are now."""
    of_video = any_of([video_id])
    failures = store.open(FAILURES).to_table(filter=of_video).to_pylist()
    causes = "; ".join(f"{row['stage']}: {row['message']}" for row in failures)
    is_known = bool(store.open(VIDEOS).count_rows(of_video))
    if not is_known and not causes:
        return "unknown", "the store has no such video: is it in the manifest, and was `maxreel index` run since?"
    encoded = store.open_or_none(release.token_table)
    if encoded is not None and encoded.count_rows(f"{of_video} AND num_tokens > 0"):
        return "not indexed", (
            f"it was encoded after release {release.release_id} was made; it comes with the next (`maxreel build-index`)"
        )
    if causes:
        return "failed", f"{causes}. Mend the file, or `maxreel retry --video {video_id}`"
    modalities = store.open_or_none(MODALITIES)
    if modalities is None or not modalities.count_rows(of_video):
        return "not extracted", "nothing was extracted from it yet; run `maxreel index MANIFEST`"
    if encoded is None or not encoded.count_rows(of_video):
        return "not encoded", "it was extracted but not encoded yet; run `maxreel encode`"
    return "without tokens", NOTHING
