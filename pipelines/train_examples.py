"""What training learns from: examples in JSON lines, or pairs drawn from a store, and which of them are held out.

For ``flmr`` and ``mire`` a line is ``{"image": path, "text": question, "passage": text, "negatives": [text, ...]}``, and
paths are taken from the file's folder. Without a file, each frame of the store is paired with each text of its own clip: no
labels, and no better than what is said while something is seen. For ``clamr`` a line is ``{"text": query, "video_id": id,
"target_modality": name, "negatives": [id, ...]}``, with ``"clip": number`` where a video has several.

Examples are held out by group, the hash of which decides: the image, the video, or what ``"group"`` says. So crops of one
photograph that name it are never on both sides. Where lines say ``"held_out": true``, these are, and no others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from cluster.store import MODALITIES, Store
from operators import schema
from operators.errors import ConfigError
from operators.fingerprint import fingerprint

System = Literal["clamr", "flmr", "mire"]

COLUMNS = ["video_id", "clip", "modality", "fingerprint"]


@dataclass(frozen=True)
class Example:
    """One row; numbers are places in the lists of `Examples`.

    Attributes
    ----------
    group
        What it is held out by.
    query, document
        Its text, and what answers it: a passage, or a clip.
    negatives
        Documents that do not.
    picture
        Of flmr and mire.
    modality
        Number of the modality it is about; -1 where that is not said.
    held_out
        Whether its line says so.
    """

    group: str
    query: int
    document: int
    negatives: tuple[int, ...] = ()
    picture: int = -1
    modality: int = -1
    held_out: bool = False


@dataclass
class Examples:
    """Examples and what they are made of, each once.

    Attributes
    ----------
    queries
        Texts.
    documents
        Passages, or clips as JSON of (video_id, clip).
    pictures
        As JSON: a file's path and what tells its bytes, or a frame of the store.
    """

    rows: list[Example] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    _places: dict[tuple[str, str], int] = field(default_factory=dict)

    def place(self, kind: Literal["queries", "documents", "pictures"], item: str) -> int:
        """Return where an item is in its list, added if it is new."""
        known = self._places.setdefault((kind, item), len(getattr(self, kind)))
        if known == len(getattr(self, kind)):
            getattr(self, kind).append(item)
        return known

    def fingerprint(self) -> str:
        """Return what stands for all of it."""
        whole = hashlib.sha256()
        for part in (self.queries, self.documents, self.pictures):
            whole.update(json.dumps(part).encode())
        for row in self.rows:
            whole.update(repr(row).encode())
        return whole.hexdigest()[:32]

    def split(self, share: float, limit: int, seed: int) -> tuple[list[int], list[int]]:
        """Return the rows to train on and those held out: about a share of groups, and of these ``limit`` rows at most.

        Raises
        ------
        ConfigError
            If either side is empty.
        """
        groups = sorted({row.group for row in self.rows}, key=lambda group: fingerprint(seed, group))
        held = set(groups[: round(share * len(groups)) or 1])
        is_said = any(row.held_out for row in self.rows)
        is_held_out = [row.held_out if is_said else row.group in held for row in self.rows]
        trained = [place for place, held_out in enumerate(is_held_out) if not held_out]
        tested = [place for place, held_out in enumerate(is_held_out) if held_out]
        if not trained or not tested:
            raise ConfigError(
                f"{len(self.rows)} examples of {len(groups)} groups cannot be split into trained and held-out groups; "
                "give examples of two groups at least"
            )
        return trained, sorted(tested, key=lambda place: fingerprint(seed, place))[:limit]


def read_examples(system: System, file: Path | None, store: Store | None, version: int | None) -> Examples:
    """Return the examples of a file, or those that a store's own clips give, as of a version of its ``modalities``.

    Raises
    ------
    ConfigError
        If there are none, or a line is not one.
    """
    if system == "clamr":
        if file is None or store is None:
            raise ConfigError("train clamr takes --examples FILE.jsonl and the --store whose clips they name")
        return _of_clips(file, store, version)
    if file is not None:
        return _of_pictures(file)
    if store is None:
        raise ConfigError(f"train {system} takes --examples FILE.jsonl, or a --store to draw pairs from")
    return _of_store(store, version)


def _of_pictures(file: Path) -> Examples:
    found = Examples()
    for number, line in _lines(file):
        image = (file.parent / _text(line, "image", file, number)).resolve()
        if not image.is_file():
            raise ConfigError(f"{file}, line {number}: there is no image {image}")
        stat = image.stat()
        picture = json.dumps({"file": str(image), "size": stat.st_size, "mtime": stat.st_mtime_ns})
        found.rows.append(
            Example(
                str(line.get("group", image)),
                found.place("queries", line.get("text") or ""),
                found.place("documents", _text(line, "passage", file, number)),
                tuple(found.place("documents", text) for text in _texts(line, file, number)),
                found.place("pictures", picture),
                held_out=line.get("held_out") is True,
            )
        )
    return _some(found, str(file))


def _of_store(store: Store, version: int | None) -> Examples:
    """Return each frame of a store with each text of its clip."""
    found = Examples()
    for clip in _clips(store, version, [*COLUMNS, "spans"], frames=True):
        texts = [" ".join(span["text"] for span in row["spans"] or ()) for row in clip]
        for row in clip:
            for frame in range(row["num_frames"]):
                picture = {"row_id": row["_rowid"], "frame": frame, "fingerprint": row["fingerprint"]}
                place = found.place("pictures", json.dumps(picture))
                for text in filter(str.strip, texts):
                    document, query = found.place("documents", text), found.place("queries", "")
                    found.rows.append(Example(row["video_id"], query, document, (), place))
    return _some(found, store.uri)


def _of_clips(file: Path, store: Store, version: int | None) -> Examples:
    found = Examples()
    clips: dict[str, list[int]] = {}
    for clip in _clips(store, version, COLUMNS):
        clips.setdefault(clip[0]["video_id"], []).append(clip[0]["clip"])
    for number, line in _lines(file):
        where = f"{file}, line {number}"
        modality = line.get("target_modality")
        if modality is not None and modality not in schema.MODALITIES:
            raise ConfigError(f"{where}: no modality {modality!r}; allowed are {', '.join(schema.MODALITIES)}")
        document = found.place("documents", _clip(line.get("video_id"), line.get("clip"), clips, where))
        negatives = [_clip(video_id, None, clips, where) for video_id in _texts(line, file, number)]
        found.rows.append(
            Example(
                str(line.get("group", line["video_id"])),
                found.place("queries", _text(line, "text", file, number)),
                document,
                tuple(found.place("documents", key) for key in negatives),
                modality=-1 if modality is None else schema.MODALITIES.index(modality),
                held_out=line.get("held_out") is True,
            )
        )
    return _some(found, str(file))


def _clip(video_id: Any, clip: Any, clips: Mapping[str, Sequence[int]], where: str) -> str:
    """Return the key of a video's clip: the one that is named, or its only one."""
    of_video = clips.get(video_id, [])
    if clip is None and len(of_video) > 1:
        raise ConfigError(f'{where}: the video {video_id} has {len(of_video)} clips; say which with "clip": NUMBER')
    chosen = of_video[0] if clip is None and of_video else clip
    if chosen not in of_video:
        raise ConfigError(f"{where}: the store has no clip {chosen} of a video {video_id!r}")
    return json.dumps([video_id, chosen])


def _clips(
    store: Store, version: int | None, columns: Sequence[str], frames: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each clip, in order; of pictures only how many there are, though Lance reads them to count."""
    counted = {name: name for name in columns} | ({"num_frames": "array_length(frames)"} if frames else {})
    rows: pa.Table = store.open(MODALITIES, version).scanner(columns=counted, with_row_id=True).to_table()
    clip: list[dict[str, Any]] = []
    for row in rows.sort_by([("video_id", "ascending"), ("clip", "ascending"), ("modality", "ascending")]).to_pylist():
        row["num_frames"] = row.get("num_frames") or 0
        if clip and (row["video_id"], row["clip"]) != (clip[0]["video_id"], clip[0]["clip"]):
            yield clip
            clip = []
        clip.append(row)
    if clip:
        yield clip


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the examples {file}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}, line {number} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file}, line {number} is no JSON object")
        yield number, content


def _text(line: Mapping[str, Any], name: str, file: Path, number: int) -> str:
    value = line.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{file}, line {number}: {name} must be a text that is not empty; got {value!r}")
    return value


def _texts(line: Mapping[str, Any], file: Path, number: int) -> list[str]:
    value = line.get("negatives") or []
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ConfigError(f"{file}, line {number}: negatives must be a list of texts; got {value!r}")
    return value


def _some(found: Examples, where: str) -> Examples:
    if not found.rows:
        raise ConfigError(f"{where} gives no examples: it holds no frames beside texts, or no lines")
    return found
