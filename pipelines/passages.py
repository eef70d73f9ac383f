"""Passages: questions about images and their answers become examples to train retrieval with.

MIRe's response-to-passage conversion. The retriever is BM25 over a file of passages, or the released index of a store,
whose passages are what is said, shown and told of its clips. It runs in this process, and holds a file of passages in
memory: the scores of their words, and their first sentences.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.readers import reading
from cluster.searchers import Hit, SegmentHolder
from cluster.store import MODALITIES, Store
from operators import schema
from operators.bm25 import Bm25
from operators.encoders import Query
from operators.errors import ConfigError
from operators.response_to_passage import NUM_PASSAGES, Prepared, first_sentences, prepare, to_document
from pipelines.config import Config
from pipelines.job import open_store
from pipelines.records import Form, Record, read_records
from pipelines.release import Release, open_release
from pipelines.search import any_of, search_options

QUESTION, RESPONSE, TEXT = ("question", "text"), ("response", "answer"), ("text", "passage", "contents")
EXAMPLES = Form(frozenset({"image", *QUESTION, *RESPONSE}))
PASSAGES = Form(frozenset({"id", "title", *TEXT}), bare=("id", "text"), open_text=("text",))

BATCH_EXAMPLES = 256

NUM_SEARCHED = 4 * NUM_PASSAGES
"""Videos searched for each answer: those of which only pictures are known give no passage."""

NOTHING_FOUND = "for whose answer nothing was found"

TEXT_ORDER = (schema.METADATA, schema.SPEECH, schema.SCREEN_TEXT)
"""Of a clip's texts: a title says what it is about, and only the first sentences of a passage are used."""

Retrieve = Callable[[Sequence[str]], list[list[str]]]
"""Returns the passages found for each of some answers, best first, at most `NUM_PASSAGES`."""


@dataclass(frozen=True)
class Example:
    """A question about an image, and its answer."""

    image: str
    prepared: Prepared


def make_passages(config: Config, examples: Path, out: Path, passages: Path | None = None) -> dict[str, Any]:
    """Write ``{image, text, passage}`` for each example that can be converted, and return the counts.

    Parameters
    ----------
    examples
        ``image``, ``question`` (or ``text``) and ``response`` (or ``answer``), as JSON lines or another form of
        ``pipelines.records``. An image that is a path is relative to the file; in ``out``, to that file.
    passages
        ``text``, as JSON lines, TSV (id and text, or with a header) or the like; None searches the configured store.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used; or if nothing is left, or there is nowhere to search.
    StorageError
        If the store has no release.
    """
    if passages is None and config.store is None:
        raise ConfigError("passages takes --passages FILE or --store STORE to find them in")
    if out.resolve() == examples.resolve():
        raise ConfigError(f"--out {out} is the file of the examples itself; name another")
    # Read once before what takes long: a broken line at the end would waste it.
    left_out = Counter(example.prepared.reason for example in read_examples(examples))
    num_examples, num_kept = left_out.total(), left_out.pop(None, 0)
    if not num_kept:
        raise ConfigError(f"{examples}: none of {num_examples} examples can be used; {_listed(left_out)}")
    kept = (example for example in read_examples(examples) if example.prepared.reason is None)
    with _from_store(config) if passages is None else _from_file(passages) as retrieve:
        num_written = _write(out, _converted(kept, retrieve, os.path.relpath(examples.parent, out.parent)))
    if num_kept > num_written:
        left_out[NOTHING_FOUND] = num_kept - num_written
    return {
        "file": str(out),
        "examples": num_examples,
        "written": num_written,
        "left_out": dict(left_out.most_common()),
    }


def _listed(left_out: Mapping[str | None, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "the file is empty"


def read_examples(path: Path) -> Iterator[Example]:
    """Yield the questions and answers of a file, those that are to be left out too.

    Raises
    ------
    ConfigError
        Naming the line that cannot be used.
    """
    for record in read_records(path, EXAMPLES):
        image = record.text("image")
        yield Example(image, prepare(image, record.text(*QUESTION), record.text(*RESPONSE)))


def _converted(examples: Iterable[Example], retrieve: Retrieve, moved: str) -> Iterator[dict[str, str]]:
    """Yield what is written; ``moved`` leads from the folder of the output to that of the examples."""
    examples = iter(examples)
    while batch := list(islice(examples, BATCH_EXAMPLES)):
        found = retrieve([example.prepared.response for example in batch])
        for example, passages in zip(batch, found, strict=True):
            if passages:
                yield {
                    "image": example.image if "://" in example.image else _joined(moved, example.image),
                    "text": example.prepared.question,
                    "passage": to_document(example.prepared.response, passages),
                }


def _joined(folder: str, path: str) -> str:
    """Return a path from another folder; an absolute one stays."""
    return os.path.normpath(os.path.join(folder, path))


def _write(out: Path, rows: Iterable[Mapping[str, str]]) -> int:
    """Write JSON lines, all or none, and return how many."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part, count = out.with_name(f"{out.name}.partial"), 0
    with part.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    part.replace(out)
    return count


@contextmanager
def _from_file(path: Path) -> Iterator[Retrieve]:
    texts = [text for record in read_records(path, PASSAGES) if (text := _passage(record))]
    if not texts:
        raise ConfigError(f"{path} holds no passages. Was it written to its end?")
    bm25 = Bm25(texts)
    texts = [first_sentences(text) for text in texts]  # the rest is not needed any more

    def retrieve(responses: Sequence[str]) -> list[list[str]]:
        return [[texts[index] for index, _ in found] for found in bm25.search(responses, NUM_PASSAGES)]

    yield retrieve


def _passage(record: Record) -> str:
    """Return a text, which may be empty in corpora that others made."""
    return " ".join(record.texts(*TEXT))


@contextmanager
def _from_store(config: Config) -> Iterator[Retrieve]:
    store = open_store(config)
    release = open_release(store)
    with reading(store, release.release_id):
        num_threads = os.cpu_count() or 1
        encoder = release.load_encoder(num_threads)
        manifest = release.manifest
        holder = SegmentHolder(store, manifest, manifest["segments"], config.search.codes_on_disk, config.search.device)
        options = replace(search_options(config.search, NUM_SEARCHED), threads=num_threads)

        def retrieve(responses: Sequence[str]) -> list[list[str]]:
            found = holder.search(encoder.encode_queries([Query(text=text) for text in responses]), options)
            texts = _clip_texts(store, release, {hit.video_id for hits in found for hit in hits})
            return [first_with_text(hits, texts) for hits in found]

        yield retrieve


def first_with_text(hits: Iterable[Hit], texts: Mapping[tuple[str, int], str]) -> list[str]:
    """Return the texts of the best clips that have any."""
    found = (texts[hit.video_id, hit.clip] for hit in hits if (hit.video_id, hit.clip) in texts)
    return list(islice(found, NUM_PASSAGES))


def _clip_texts(store: Store, release: Release, video_ids: Iterable[str]) -> dict[tuple[str, int], str]:
    """Return what is said, shown and told of each clip of some videos, spans as sentences; clips without are left out."""
    wanted = sorted(video_ids)
    if not wanted:
        return {}
    table = store.open(MODALITIES, release.tables[MODALITIES])
    rows = table.to_table(columns=["video_id", "clip", "modality", "spans"], filter=any_of(wanted)).to_pylist()
    texts: dict[tuple[str, int], str] = {}
    for row in sorted((row for row in rows if row["spans"]), key=lambda row: TEXT_ORDER.index(row["modality"])):
        key, spans = (row["video_id"], row["clip"]), " ".join(_sentence(span["text"]) for span in row["spans"])
        texts[key] = f"{texts[key]} {spans}" if key in texts else spans
    return texts


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
