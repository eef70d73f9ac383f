"""What frozen towers give, computed once with Ray and kept in files that training maps into memory.

A kind's items are cut into shards, a folder each, which appears whole or not at all; so a run that was killed makes only
those that are missing. The name of the kind's folder is a fingerprint of items, models and settings. Numbers are float16: a
picture of CLIP ViT-B/32 takes 77 KB. On several machines the folder must be one that all of them see.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from cluster.session import blocks, check_schedule, even_sizes, plan_actors
from cluster.store import MODALITIES, Store
from operators import weights
from operators.encoder_mire import GUIDE
from operators.encoders import open_picture
from operators.fingerprint import fingerprint
from operators.text_based_vision import PASSAGE
from pipelines.config import TowersConfig, TrainConfig
from pipelines.progress import Progress

Kind = Literal["pictures", "guides", "passages"]
Halves = npt.NDArray[np.float16]

SHARD_ITEMS = {"pictures": 256, "guides": 2048, "passages": 2048}
BATCH_PICTURES = 16


@dataclass(frozen=True)
class Towers:
    """The frozen models, by what makes them: those of ``encode.flmr`` or ``encode.mire``."""

    system: str
    text_model: str
    vision_model: str
    precision: str
    attention: str
    query_length: int | None
    document_length: int | None
    passage_tokens: int
    device: str
    num_threads: int

    @classmethod
    def of(cls, system: str, towers: TowersConfig, train: TrainConfig) -> Towers:
        """Return those of a configuration."""
        return cls(
            system,
            towers.text_model,
            towers.vision_model,
            towers.precision,
            towers.attention,
            towers.query_length,
            towers.document_length,
            train.passage_tokens,
            "cuda" if train.resources.use_gpu else "cpu",
            train.resources.num_threads,
        )

    def fingerprint_of(self, kind: Kind) -> str:
        """Return what features of a kind depend on, their items aside."""
        if kind == "pictures":
            return fingerprint("pictures", weights.fingerprint(self.vision_model), self.precision)
        lengths = (self.query_length,) if kind == "guides" else (self.document_length, self.passage_tokens)
        marked = self.system if kind == "passages" else ""
        return fingerprint(kind, weights.fingerprint(self.text_model), self.precision, lengths, marked)

    def open_text(self) -> Any:
        """Return the text tower."""
        from operators.text_tower import TextTower

        return TextTower(
            self.text_model,
            precision=self.precision,
            device=self.device,
            num_threads=self.num_threads,
            attention=self.attention,
            query_length=self.query_length,
            document_length=self.document_length,
            document_markers=PASSAGE if self.system == "flmr" else None,
        )

    def open_vision(self) -> Any:
        """Return the vision tower."""
        from operators.vision_tower import VisionTower

        return VisionTower(self.vision_model, self.precision, self.device, self.num_threads, self.attention)


@dataclass(frozen=True)
class Features:
    """Features of a kind's items on disk."""

    folder: Path
    num_items: int
    kind: Kind

    @property
    def shards(self) -> list[range]:
        """The places of each shard's items."""
        size = SHARD_ITEMS[self.kind]
        return [range(first, min(first + size, self.num_items)) for first in range(0, self.num_items, size)]

    def path(self, shard: int) -> Path:
        """Return a shard's folder."""
        return self.folder / f"{shard:06d}"

    def rows(self, name: str, places: Sequence[int]) -> Halves:
        """Return the rows of an array of fixed-size items."""
        size = SHARD_ITEMS[self.kind]
        return np.stack([self._array(name)[place // size][place % size] for place in places])

    def texts(self, places: Sequence[int]) -> tuple[Halves, npt.NDArray[np.bool_]]:
        """Return token embeddings of texts, (B, T, dim), and the (B, T) mask of what is real."""
        size = SHARD_ITEMS[self.kind]
        found = []
        for place in places:
            ends = self._array("ends")[place // size]
            first = ends[place % size - 1] if place % size else 0
            found.append(self._array("tokens")[place // size][first : ends[place % size]])
        lengths = np.array([len(tokens) for tokens in found])
        padded = np.zeros((len(found), max(1, lengths.max()), found[0].shape[1]), np.float16)
        for row, tokens in enumerate(found):
            padded[row, : len(tokens)] = tokens
        return padded, np.arange(padded.shape[1]) < lengths[:, None]

    @cached_property
    def _open(self) -> dict[str, list[Any]]:
        return {}

    def _array(self, name: str) -> list[Any]:
        if name not in self._open:
            files = [self.path(shard) / f"{name}.npy" for shard in range(len(self.shards))]
            self._open[name] = [np.load(file, mmap_mode="r") for file in files]
        return self._open[name]


class MakeFeatures:
    """Makes shards, in an actor that loads a tower when it first needs it."""

    def __init__(
        self, features: Mapping[Kind, Features], towers: Towers, store: Store | None, version: int | None
    ) -> None:
        self._features, self._towers, self._store, self._version = features, towers, store, version

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the shards of a batch and return their numbers."""
        for work in batch.to_pylist():
            self._write(self._features[work["kind"]].path(work["shard"]), self._make(work["kind"], work["items"]))
        return batch.select(["shard"])

    @cached_property
    def _text(self) -> Any:
        return self._towers.open_text()

    @cached_property
    def _vision(self) -> Any:
        return self._towers.open_vision()

    def _make(self, kind: str, items: Sequence[str]) -> dict[str, Any]:
        if kind == "pictures":
            return self._of_pictures([json.loads(item) for item in items])
        tokens = self._of_guides(items) if kind == "guides" else self._of_passages(items)
        return {"tokens": np.concatenate(tokens), "ends": np.cumsum([len(of_text) for of_text in tokens])}

    def _of_pictures(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        vectors, patches = [], []
        for first in range(0, len(items), BATCH_PICTURES):
            encoded = self._read(items[first : first + BATCH_PICTURES])
            of_batch = self._vision.features([open_picture(picture) for picture in encoded])
            vectors.append(of_batch[0].half().cpu().numpy())
            patches.append(of_batch[1].half().cpu().numpy())
        return {"vectors": np.concatenate(vectors), "patches": np.concatenate(patches)}

    def _read(self, items: Sequence[Mapping[str, Any]]) -> list[bytes]:
        row_ids = list(dict.fromkeys(item["row_id"] for item in items if "row_id" in item))
        frames: dict[int, Any] = {}
        if row_ids and self._store is not None and self._version is not None:
            rows = self._store.take(MODALITIES, self._version, row_ids, ["frames"])["frames"].to_pylist()
            frames = dict(zip(row_ids, rows, strict=True))
        return [
            frames[item["row_id"]][item["frame"]]["jpeg"] if "row_id" in item else Path(item["file"]).read_bytes()
            for item in items
        ]

    def _of_guides(self, texts: Sequence[str]) -> list[Halves]:
        """Return what MIRe's pooling is guided by: embeddings as they are, of words only; of no text, of its fixed one."""
        encoded = self._text.encode_queries([text if text.strip() else GUIDE for text in texts], filled=False)
        return [states.embeddings.cpu().numpy()[states.row.kept].astype(np.float16) for states in encoded]

    def _of_passages(self, texts: Sequence[str]) -> list[Halves]:
        import torch

        encoded = self._text.encode_documents(list(texts))
        units = [torch.nn.functional.normalize(states.embeddings, dim=-1).cpu().numpy() for states in encoded]
        return [
            embeddings[states.row.kept][: self._towers.passage_tokens].astype(np.float16)
            for states, embeddings in zip(encoded, units, strict=True)
        ]

    def _write(self, folder: Path, arrays: Mapping[str, Any]) -> None:
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        if folder.exists():  # made by a task that Ray took for dead
            shutil.rmtree(partial)
        else:
            partial.rename(folder)


def make_features(
    folder: Path,
    items: Mapping[Kind, Sequence[str]],
    towers: Towers,
    store: Store | None,
    version: int | None,
    resources: Mapping[str, float],
    actors: int | None = None,
) -> dict[Kind, Features]:
    """Return the features of each kind's items, computing those that are not on disk yet; Ray is running.

    Raises
    ------
    ScheduleError
        If the actors do not fit the cluster.
    """
    features = {
        kind: Features(folder / f"{kind}-{fingerprint(towers.fingerprint_of(kind), of_kind)[:12]}", len(of_kind), kind)
        for kind, of_kind in items.items()
    }
    work = missing(features, items)
    if not work:
        return features
    [pool] = plan_actors({"features": 1.0}, resources["CPU"], {"features": actors}, len(work))
    pool = replace(pool, num_gpus=1.0 if towers.device == "cuda" else 0.0)
    check_schedule([pool], 0, resources)
    made = blocks(pa.Table.from_pylist(work), even_sizes(len(work), len(work))).map_batches(
        MakeFeatures,
        fn_constructor_kwargs={"features": features, "towers": towers, "store": store, "version": version},
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
        max_restarts=2,
        max_task_retries=1,
    )
    with Progress("features", len(work)) as progress:
        for _ in made.iter_rows():
            progress.advance(1)
    return features


def missing(features: Mapping[Kind, Features], items: Mapping[Kind, Sequence[str]]) -> list[dict[str, Any]]:
    """Return the shards that are not on disk: ``kind``, ``shard`` and ``items`` of each."""
    return [
        {"kind": kind, "shard": shard, "items": [items[kind][i] for i in places]}
        for kind, of_kind in features.items()
        for shard, places in enumerate(of_kind.shards)
        if not of_kind.path(shard).exists()
    ]
