"""Lets ``mteb.evaluate`` drive this engine: MTEB brings corpus, queries, judgements and measures.

A corpus becomes a manifest and goes through the whole chain into a store of its own, so that indexing it again does what
changed and nothing else; queries are searched on its released index as `evaluate` does. `MaxreelSearch` implements MTEB's
``SearchProtocol``, as of version 2.26.

Supported are text queries, with their instruction after them as MTEB's own models read it, over documents with a ``title``
and ``text``, which are indexed as metadata, and a ``video``: a path, bytes, or what Hugging Face's ``Video`` holds. Columns
of audio and images are not used; the sound of a video is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

import pipelines
from cluster.readers import reading
from cluster.searchers import Filter, Fleet, Hit
from cluster.session import session
from operators.encoders import Query
from operators.errors import ConfigError
from operators.fingerprint import fingerprint
from operators.schema import METADATA
from pipelines.build_index import build_index
from pipelines.config import Config
from pipelines.encode import encode, encoder_fingerprint
from pipelines.evaluate import open_fleet, search_fleet
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job, open_store
from pipelines.manifest import MAX_ID_BYTES
from pipelines.release import open_release
from pipelines.runs import scores_of

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta

log = logging.getLogger("maxreel")

COLUMNS = ("id", "title", "text", "video")
"""Of a corpus, those that are used."""

ESCAPED = re.compile(r"[\s\x00-\x1f\x7f-\x9f%]")
"""What a manifest refuses in an id, and the escape character."""


class MaxreelSearch:
    """A model of MTEB that is this engine.

    Parameters
    ----------
    config
        How to extract, encode, index and search. Its store and manifest are not used.
    folder
        Where each task, split and subset gets a store.

    Raises
    ------
    ConfigError
        If mteb is not installed.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        if importlib.util.find_spec("mteb") is None:
            raise ConfigError("mteb is not installed; run `pip install -c constraints.txt '.[mteb]'`")
        self._config, self._folder = config, folder.resolve()

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """What MTEB keeps results under; the revision stands for every setting that may change them."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        config = self._config
        speed = {"resources", "actors", "device", "codes_on_disk"}
        parts = (config.extract, config.build_index, config.search)
        settings = [part.model_dump(mode="json", exclude=speed) for part in parts]
        return ModelMeta.create_empty(
            {
                "name": f"maxreel/{config.encode.encoder}",
                "revision": fingerprint(pipelines.__version__, encoder_fingerprint(config.encode), settings),
                "modalities": ["text", "video"],
                "model_type": ["late-interaction"],
                "similarity_fn_name": ScoringFunction.MAX_SIM,
            }
        )

    def index(self, corpus: Dataset, *, task_metadata: TaskMetadata, hf_split: str, hf_subset: str, **_: Any) -> None:
        """Bring the store of a corpus up to date with it. MTEB's ``encode_kwargs`` and ``num_proc`` are the config's to say.

        Raises
        ------
        ConfigError
            If the corpus has neither text nor videos, or an id that a run file cannot carry.
        TooManyFailuresError
            If more documents failed than ``max_failure_rate`` allows.
        """
        if not {"text", "video"} & set(corpus.column_names):
            raise ConfigError(
                f"the corpus of {task_metadata.name} has the columns {', '.join(corpus.column_names)}; "
                "what can be indexed is text and video"
            )
        folder, config = self._of_task(task_metadata, hf_split, hf_subset)
        manifest = _write_manifest(folder, corpus)
        if "video" not in corpus.column_names:  # text needs no models of speech and screen text
            config = _with(config, "extract", modalities=(METADATA,))
        with open_job(config, "mteb") as job:
            ingest(job, manifest, remove_gone=True)
            extract(job)
            encode(job)
            build_index(job)
            job.limit_failures()
        if failed := {failure["video_id"] for failure in job.summary.failures}:
            log.warning("%d documents failed; see `maxreel failures --store %s`", len(failed), config.store)

    def search(
        self,
        queries: Dataset,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: Mapping[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Return the scores of the best ``top_k`` documents of each query; of ``top_ranked`` only, where they are given.

        Raises
        ------
        ConfigError
            If the queries are not text.
        StorageError
            If the corpus was not indexed.
        """
        texts = _texts(queries)
        config = self._of_task(task_metadata, hf_split, hf_subset)[1]
        store, ray = open_store(config), config.ray
        release = open_release(store)
        embedded = release.load_encoder(num_threads=os.cpu_count() or 1).encode_queries([Query(text=t) for t in texts])
        with (
            reading(store, release.release_id),
            session(ray.address, ray.num_cpus, ray.object_store_bytes, ray.no_progress_seconds),
        ):
            fleet = open_fleet(config, store, release)
            if top_ranked is None:
                found = search_fleet(config, fleet, embedded, top_k)
            else:
                named = [top_ranked.get(query_id, []) for query_id in queries["id"]]
                found = _rank(config, fleet, embedded, top_k, named)
        run = scores_of(dict(zip(queries["id"], found, strict=True)))
        return {query_id: {to_corpus_id(i): score for i, score in of.items()} for query_id, of in run.items()}

    def _of_task(self, task_metadata: TaskMetadata, hf_split: str, hf_subset: str) -> tuple[Path, Config]:
        folder = self._folder / re.sub(r"[^\w.-]", "_", f"{task_metadata.name}-{hf_split}-{hf_subset}")
        config = _with(self._config, "gates", max_gone=1.0)  # a task's corpus is what it is
        return folder, config.model_copy(update={"store": str(folder / "store")})


def to_video_id(corpus_id: str) -> str:
    """Return a document's id without what run files cannot carry; `to_corpus_id` turns it back.

    Raises
    ------
    ConfigError
        If it is empty or too long.
    """
    video_id = ESCAPED.sub(lambda found: quote(found.group(), safe=""), corpus_id)
    if not 0 < len(video_id.encode()) <= MAX_ID_BYTES:
        raise ConfigError(
            f"the corpus id {corpus_id[:80]!r} is empty or too long: 1 to {MAX_ID_BYTES} bytes are allowed, white space "
            "and per cent signs counting as three each"
        )
    return video_id


def to_corpus_id(video_id: str) -> str:
    """Return what `to_video_id` was given."""
    return unquote(video_id)


def _with(config: Config, block: str, **settings: Any) -> Config:
    return config.model_copy(update={block: getattr(config, block).model_copy(update=settings)})


def _write_manifest(folder: Path, corpus: Dataset) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        for row in _undecoded(corpus):
            entry = {
                "video_id": to_video_id(row["id"]),
                "title": row.get("title"),
                "description": row.get("text"),
                "uri": _uri(row.get("video"), folder / "videos"),
            }
            stream.write(json.dumps(entry) + "\n")
    return str(path)


def _undecoded(corpus: Dataset) -> Iterator[dict[str, Any]]:
    """Yield the rows of a corpus with the columns that are used, videos as files or bytes."""
    from datasets import Video

    corpus = corpus.select_columns([name for name in COLUMNS if name in corpus.column_names])
    if isinstance(corpus.features.get("video"), Video):
        corpus = corpus.cast_column("video", Video(decode=False))
    yield from corpus


def _uri(video: Mapping[str, Any] | str | bytes | None, folder: Path) -> str | None:
    """Return where a video is; bytes become a file named by their hash, so that the same ones are known again."""
    if video is None:
        return None
    if isinstance(video, Mapping):
        path, content = video.get("path"), video.get("bytes")
    else:
        path, content = (None, video) if isinstance(video, bytes) else (video, None)
    if content is None:
        return path if path is None or "://" in path else str(Path(path).absolute())
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}{Path(path or '').suffix or '.mp4'}"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(file)
    return str(file)


def _texts(queries: Dataset) -> list[str]:
    """Return the text of each query, its instruction after it."""
    columns = queries.column_names
    texts = list(queries["text"]) if "text" in columns else []
    if not all(isinstance(text, str) for text in texts) or "text" not in columns:
        raise ConfigError(f"queries must be text, not images, videos or conversations; got {', '.join(columns)}")
    instructions = queries["instruction"] if "instruction" in columns else [None] * len(texts)
    return [f"{text} {more}" if more else text for text, more in zip(texts, instructions, strict=True)]


def _rank(
    config: Config, fleet: Fleet, queries: Sequence[np.ndarray], depth: int, named: Sequence[Sequence[str]]
) -> list[list[Hit]]:
    """Return the documents named for each query, ranked. All are scored: probing would lose some."""
    config = _with(config, "search", probes=0)
    only = [Filter(video_ids=frozenset(map(to_video_id, ids))) for ids in named]
    return [
        hits
        for query, of_query in zip(queries, only, strict=True)
        for hits in search_fleet(config, fleet, [query], depth, of_query)
    ]
