"""Loaders by name for benchmarks that the user has on disk; nothing is downloaded, and no pickle is opened.

Videos get ids as the annotations have them. Texts that are the queries are never put into the manifest, where they would
answer themselves. The forms of MSR-VTT, TVR, MultiVENT and BEIR were seen in the published files, those of DiDeMo and
ActivityNet in copies of them; those of VATEX, MSVD, YouCook2 and MTEB are as their authors and other loaders describe them.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from operators import schema
from operators.errors import ConfigError
from pipelines.datasets import ID, Dataset, JudgedQuery, Qrels, read_qrels, read_queries, write
from pipelines.manifest import VIDEO_SUFFIXES
from pipelines.manifest_files import listed
from pipelines.records import WHOLE, Form, Record, read_json, read_lines, read_records, record_of, records_of
from pipelines.uris import shown

TABLE = (".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz", ".txt")
TEST_LIST = "test_list.txt"
"""Beside the captions: the ids of the videos that count, one a line, where a file holds more (MSVD's 670, VATEX' 1,500)."""


def make_dataset(name: str, folder: Path, out: Path, videos: Path | None, split: str | None = None) -> dict[str, Any]:
    """Write a benchmark as ``manifest.jsonl``, ``queries.jsonl`` and ``qrels.txt``, and return counts.

    Parameters
    ----------
    folder
        Where its annotations are, or their one file.
    videos
        Where its video files are, at any depth, named as the annotations name the videos, with any ending.
    split
        Of those that keep several beside each other (`WITH_SPLITS`); ``test`` (YouCook2: ``validation``) unless given.

    Raises
    ------
    ConfigError
        If there is no such benchmark, or a file is missing, broken or ambiguous.
    """
    if name not in LOADERS:
        close = [f"did you mean {found}? " for found in difflib.get_close_matches(name, LOADERS, 1)]
        raise ConfigError(f"there is no loader {name!r}; {''.join(close)}There are {', '.join(LOADERS)}")
    if not folder.exists():
        raise ConfigError(f"there is nothing at {folder}; give the folder of the annotations of {name}")
    if split and name not in WITH_SPLITS:
        raise ConfigError(f"--split {split}: {name} has one split. Leave it out")
    dataset = _complete(LOADERS[name](folder, split), videos)
    write(dataset, out)
    return {
        "directory": str(out),
        "videos": len(dataset.videos),
        "queries": len(dataset.queries),
        "judgements": sum(map(len, dataset.qrels.values())),
        "left_out": dict(dataset.left_out),
    }


def _complete(dataset: Dataset, folder: Path | None) -> Dataset:
    """Return a benchmark of judged queries and of videos that have a file or text, and what that leaves out.

    The judgements stay: a query whose video is gone counts as 0, as it does in published figures.
    """
    files = _video_files(folder) if folder else {}
    rows = [{**row, "uri": uri} if (uri := _file_of(row["video_id"], files)) else row for row in dataset.videos]
    if folder and not any("uri" in row for row in rows):
        raise ConfigError(
            f"no video file in {folder} is named as one of the benchmark's videos, such as "
            f"{listed([row['video_id'] for row in rows[:3]])}. Give the folder that holds them, with these names"
        )
    kept = [row for row in rows if row.keys() & {"uri", "title", "description"}]
    asked = {query.query_id for query in dataset.queries}
    where = f"or a file in {folder}" if folder else "(name the folder of their files by --videos)"
    left_out = {
        **dataset.left_out,
        f"videos without text {where}": len(rows) - len(kept),
        "queries without judgements": len(asked - dataset.qrels.keys()),
        "judged queries without a text": len(dataset.qrels.keys() - asked),
        **(_lost(dataset.qrels, {row["video_id"] for row in kept}) if kept else {}),
    }
    return Dataset(
        queries=[query for query in dataset.queries if query.query_id in dataset.qrels],
        qrels={query_id: grades for query_id, grades in dataset.qrels.items() if query_id in asked},
        videos=kept,
        left_out={reason: count for reason, count in left_out.items() if count},
    )


def _lost(qrels: Qrels, ids: set[str]) -> dict[str, int]:
    """Return how much of the judgements cannot be found in a manifest of these ids."""
    judged = {video_id for grades in qrels.values() for video_id in grades}
    relevant = [{video_id for video_id, grade in grades.items() if grade > 0} for grades in qrels.values()]
    return {
        "judged videos that the manifest lacks": len(judged - ids),
        "queries that count as 0, since it lacks all their relevant videos": sum(
            bool(found) and not found & ids for found in relevant
        ),
    }


def _video_files(folder: Path) -> dict[str, list[str]]:
    """Return the video files below a folder by their names, with and without endings."""
    files: dict[str, list[str]] = defaultdict(list)
    for root, _, names in os.walk(folder):
        for path in (Path(root, name).absolute() for name in names):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                files[path.name].append(str(path))
                files[path.stem].append(str(path))
    return files


def _file_of(video_id: str, files: Mapping[str, list[str]]) -> str | None:
    """Return a video's file; ActivityNet's may lack the ``v_`` of its id, DiDeMo's have another ending than its id."""
    stem = _stem(video_id)
    found = next((files[name] for name in (video_id, stem, stem.removeprefix("v_")) if name in files), [])
    if len(found) > 1:
        raise ConfigError(f"the video {video_id} may be {found[0]} or {found[1]}. Leave one in the folder of videos")
    return found[0] if found else None


def _stem(video_id: str) -> str:
    return Path(video_id).stem if Path(video_id).suffix.lower() in VIDEO_SUFFIXES else video_id


def _find(folder: Path, *patterns: str) -> Path:
    """Return the file of the first pattern that fits one, in a folder or one below it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the folder that holds {', '.join(patterns)}")
    for pattern in patterns:
        found = sorted({*folder.glob(pattern), *folder.glob(f"*/{pattern}"), *folder.glob(f"{pattern}.gz")})
        if len(found) > 1:
            names = listed([str(path.relative_to(folder)) for path in found])
            raise ConfigError(f"{folder} holds {names}. Leave one of them")
        if found:
            return found[0]
    held = listed(sorted(path.name for path in folder.iterdir()))
    raise ConfigError(f"{folder} holds {held}, but no {' or '.join(patterns)}. Give the folder of the annotations")


def _text_corpus(folder: Path, split: str | None) -> Dataset:
    """Load a BEIR folder, or MTEB's tables in Parquet: its documents become videos that have a title and a description."""
    videos: dict[str, dict[str, Any]] = {}
    columns = Form(frozenset({*ID, "title", "text"}))
    for path in _parts(folder, split, "corpus"):
        for record in read_records(path, columns):
            video_id = record.identifier(*ID)
            if video_id in videos:
                raise record.error(f"the id {shown(video_id)} was used before. Give each document one of its own")
            texts = {"title": record.optional("title"), "description": record.optional("text")}
            videos[video_id] = {"video_id": video_id} | {name: text for name, text in texts.items() if text}
    queries = read_queries(*_parts(folder, split, "queries"))
    return Dataset(queries, read_qrels(*_parts(folder, split, "qrels", "default")), list(videos.values()))


def _parts(folder: Path, split: str | None, *names: str) -> list[Path]:
    """Return the files of a table: one beside the folders, or those of a split in its own folder."""
    for name in names:
        single = [path for ending in TABLE if (path := folder / f"{name}{ending}").is_file()]
        inside = sorted(path for path in folder.glob(f"{name}/*") if path.name.endswith(TABLE))
        if found := single[:1] or inside:
            break
    else:
        endings = ", ".join(TABLE)
        raise ConfigError(
            f"{folder} holds no {names[0]}: neither a file {names[0]} ({endings}) nor a folder of such files"
        )
    if single:
        return found
    splits = sorted({re.split(r"[-.]", path.name)[0] for path in inside})
    wanted = split or "test"
    if wanted not in splits and (len(splits) > 1 or (split and names[0] == "qrels")):
        raise ConfigError(
            f"{inside[0].parent} holds the splits {listed(splits)}, not {wanted!r}. Choose one by --split"
        )
    parts = [path for path in inside if re.split(r"[-.]", path.name)[0] == (wanted if wanted in splits else splits[0])]
    total = re.search(r"-of-(\d+)", parts[0].name)
    if total and int(total[1]) != len(parts):
        raise ConfigError(
            f"{parts[0].parent} holds {len(parts)} of the {int(total[1])} parts of {parts[0].name}. Get all"
        )
    return parts


def _read_msvd(path: Path, split: str | None) -> Iterator[Record]:
    """Yield the lines of ``AllVideoDescriptions.txt``: a video and a caption; it begins with a comment."""
    for number, line in read_lines(path):
        if not line.startswith("#"):
            video, _, caption = line.strip().partition(" ")
            yield Record(f"{path}, line {number}", {"video": video, "caption": caption})


def _read_youcook2(path: Path, split: str | None) -> Iterator[Record]:
    """Yield the segments of a subset. Each is a clip, whose file is to be cut and named ``<video>_<number>``."""
    [document] = records_of(str(path), [read_json(path)])
    videos = list(records_of(str(path), document.find("database")))
    subset = split or "validation"
    subsets = sorted({video.text("subset") for video in videos})
    if subset not in subsets:
        raise ConfigError(f"{path}: it has the splits {listed(subsets)}, not {subset!r}. Choose one by --split")
    for video in videos:
        for number, annotation in enumerate(video.find("annotations") or [] if video.text("subset") == subset else []):
            clip = record_of(f"{video.place}, segment {number}", annotation)
            segment = clip.find("segment")
            if not isinstance(segment, list) or len(segment) != 2:
                raise clip.error(f"its segment is {segment!r}; it must be [start, stop] in seconds")
            name = video.text("key")
            place = {"clip": f"{name}_{clip.values.get('id', number)}", "video": name}
            times = dict(zip(("start_seconds", "stop_seconds"), segment, strict=True))
            yield replace(clip, values={**clip.values, **place, **times})


@dataclass(frozen=True)
class Captions:
    """A benchmark whose queries are the captions of its videos.

    Parameters
    ----------
    files
        What its file may be called.
    video, text, query
        Columns of the video, its caption or list of captions, and of the caption's own id, if it has one.
    joined
        Paragraph-to-video: the sentences of a video are one query. Otherwise every caption is one.
    targets
        Which modality a value of the column ``type`` asks for.
    kept
        Columns that go into the manifest, where they are never indexed.
    read
        How its rows are read, where it is no table.
    """

    files: tuple[str, ...]
    video: tuple[str, ...]
    text: tuple[str, ...]
    query: tuple[str, ...] = ()
    joined: bool = False
    targets: Mapping[str, str | None] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    read: Callable[[Path, str | None], Iterable[Record]] | None = None

    def load(self, folder: Path, split: str | None) -> Dataset:
        """Return the benchmark, and of a list of test videos beside its file those videos alone."""
        path = folder if folder.is_file() else _find(folder, *self.files)
        wanted = _test_list(path.parent / TEST_LIST)
        captions: dict[str, list[tuple[Record, str]]] = defaultdict(list)
        unwanted: set[str] = set()
        form = Form(frozenset({*self.video, *self.text, *self.query}), open_text=self.text)
        for record in self.read(path, split) if self.read else read_records(path, form):
            video_id, texts = record.identifier(*self.video), record.texts(*self.text)
            if not texts or not (any if self.joined else all)(texts):
                raise record.error(f"the {self.text[0]} is empty. {WHOLE}")
            if wanted is None or wanted & {video_id, _stem(video_id)}:
                captions[video_id] += [(record, text) for text in texts]
            else:
                unwanted.add(video_id)
        if not captions:
            raise ConfigError(
                f"{path} holds no captions{'' if wanted is None else f' of a video that {TEST_LIST} names'}"
            )
        videos = [
            {"video_id": video_id, **{name: found[0][0].values[name] for name in self.kept}}
            for video_id, found in captions.items()
        ]
        left_out = {
            f"videos that {TEST_LIST} does not name": len(unwanted),
            f"videos of {TEST_LIST} without captions": len(wanted or captions) - len(captions),
        }
        return Dataset(*self._queries(captions), videos, left_out)

    def _queries(self, captions: Mapping[str, list[tuple[Record, str]]]) -> tuple[list[JudgedQuery], Qrels]:
        queries: dict[str, JudgedQuery] = {}
        qrels: Qrels = {}
        for video_id, found in captions.items():
            paragraph = [(found[0][0], " ".join(text for _, text in found if text))]
            for number, (record, text) in enumerate(paragraph if self.joined else found):
                own = record.find(*self.query) is not None
                query_id = (
                    record.identifier(*self.query) if own else video_id if self.joined else f"{video_id}#{number}"
                )
                if query_id in qrels:
                    raise record.error(f"the query id {shown(query_id)} was used before. Give each one of its own")
                kind = record.find("type")
                if self.targets and kind not in self.targets:
                    raise record.error(f"the type is {kind!r}; it must be one of {', '.join(self.targets)}")
                queries[query_id] = JudgedQuery(query_id, text, self.targets.get(kind))
                qrels[query_id] = {video_id: 1}
        return list(queries.values()), qrels


def _test_list(path: Path) -> frozenset[str] | None:
    if not path.is_file():
        return None
    return frozenset(line.strip() for _, line in read_lines(path))


def _multivent1(folder: Path, split: str | None) -> Dataset:
    """Load MultiVENT 1: the text on an event finds its videos, which keep their descriptions.

    Event, category and language are not indexed: they would give the answers away.
    """
    events: dict[str, JudgedQuery] = {}
    qrels: Qrels = defaultdict(dict)
    videos: dict[str, dict[str, Any]] = {}
    names = ("video_url", "video_description", "language", "event_category", "event_name", "en_article_excerpt")
    path = folder if folder.is_file() else _find(folder, "multivent_base*.csv", "multivent*.csv")
    records = list(read_records(path, Form(frozenset(names))))
    for record in records:
        url = urlsplit(record.text("video_url"))
        named = {"video": parse_qs(url.query).get("v", [url.path.rstrip("/").rpartition("/")[2]])[0]}
        video_id, event = replace(record, values=named).identifier("video"), record.identifier("event_name")
        query = JudgedQuery(event, record.text("en_article_excerpt"), None)
        if events.setdefault(event, query) != query:
            raise record.error(f"the event {event} had another en_article_excerpt before. Keep one")
        qrels[event][video_id] = 1
        kept = {name: record.find(name) for name in ("language", "event_category")}
        videos.setdefault(video_id, {"video_id": video_id, "description": record.text("video_description"), **kept})
    left_out = {"videos that were listed before": len(records) - len(videos)}
    return Dataset(list(events.values()), dict(qrels), list(videos.values()), left_out)


def _multivent2(folder: Path, split: str | None) -> Dataset:
    """Load MultiVENT 2.0: queries, judgements and, where they lie beside them, the ids of all videos."""
    queries = read_queries(_find(folder, "*_q.csv", "*queries*.csv"))
    qrels = read_qrels(_find(folder, "*_j.jsonl", "*judg*.jsonl", "*qrels*"))
    ids = dict.fromkeys(video_id for grades in qrels.values() for video_id in grades)
    if found := [*folder.glob("*_ids.csv")]:
        ids = dict.fromkeys(record.identifier("id") for record in read_records(found[0], Form(frozenset({"id"}))))
    return Dataset(queries, qrels, [{"video_id": video_id} for video_id in ids])


Loader = Callable[[Path, str | None], Dataset]
WITH_SPLITS = ("beir", "mteb", "youcook2")

LOADERS: dict[str, Loader] = {
    "beir": _text_corpus,
    "mteb": _text_corpus,
    "msrvtt-1k-a": Captions(
        files=("*JSFUSION_test*.csv", "*ret_test1k*.json", "*test*1k*.json"),
        video=("video_id", "video"),
        text=("sentence", "caption"),
        query=("key",),
    ).load,
    "didemo": Captions(
        files=("test_data.json", "didemo_ret_test.json"), video=("video",), text=("description", "caption"), joined=True
    ).load,
    "activitynet": Captions(
        files=("val_1.json", "anet_ret_val_1.json"), video=("key", "video"), text=("sentences", "caption"), joined=True
    ).load,
    "vatex": Captions(
        files=("vatex_public_test*.json", "vatex_validation*.json", "vatex*.json"), video=("videoid",), text=("encap",)
    ).load,
    "msvd": Captions(files=("AllVideoDescriptions.txt",), video=("video",), text=("caption",), read=_read_msvd).load,
    "youcook2": Captions(
        files=("youcookii_annotations_trainval.json", "youcookii_annotations*.json"),
        video=("clip",),
        text=("sentence",),
        kept=("video", "start_seconds", "stop_seconds"),
        read=_read_youcook2,
    ).load,
    "tvr": Captions(
        files=("tvr_val_release.jsonl", "tvr_val*.jsonl"),
        video=("vid_name",),
        text=("desc",),
        query=("desc_id",),
        targets={"v": schema.FRAME, "t": schema.SPEECH, "vt": None},
    ).load,
    "multivent1": _multivent1,
    "multivent2": _multivent2,
}
