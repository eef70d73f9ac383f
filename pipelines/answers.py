"""Which of the videos found contain an answer of the query: what ``PRRecall`` counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cluster.store import MODALITIES, Store
from pipelines.datasets import JudgedQuery
from pipelines.release import Release
from pipelines.runs import Run
from pipelines.search import any_of

VIDEOS_AT_ONCE = 1_000


def answer_ranks(
    store: Store, release: Release, queries: Sequence[JudgedQuery], run: Run, depth: int
) -> dict[str, int | None]:
    """Return the rank of the first of ``depth`` videos whose text contains an answer of the query, case ignored.

    A video's text is all that was spoken, shown and described in it. Queries without answers are left out.
    """
    asked = {query.query_id: [answer.casefold() for answer in query.answers] for query in queries if query.answers}
    wanted: Mapping[str, list[tuple[str, int]]] = defaultdict(list)
    for query_id in asked:
        for rank, video_id in enumerate(list(run.get(query_id, {}))[:depth], start=1):
            wanted[video_id].append((query_id, rank))
    ranks: dict[str, int | None] = dict.fromkeys(asked)
    video_ids = sorted(wanted)
    for first in range(0, len(video_ids), VIDEOS_AT_ONCE):
        for video_id, text in _texts(store, release, video_ids[first : first + VIDEOS_AT_ONCE]).items():
            for query_id, rank in wanted[video_id]:
                known = ranks[query_id]
                if (known is None or rank < known) and any(answer in text for answer in asked[query_id]):
                    ranks[query_id] = rank
    return ranks


def _texts(store: Store, release: Release, video_ids: Sequence[str]) -> dict[str, str]:
    table = store.open(MODALITIES, release.tables[MODALITIES])
    texts: dict[str, list[str]] = defaultdict(list)
    for row in table.to_table(columns=["video_id", "spans"], filter=any_of(video_ids)).to_pylist():
        texts[row["video_id"]] += [span["text"] for span in row["spans"] or ()]
    return {video_id: "\n".join(parts).casefold() for video_id, parts in texts.items()}
