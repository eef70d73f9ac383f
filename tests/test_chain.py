"""Every encoder that has an image tower through the whole chain, with tiny random weights laid out as a hub id would be."""

import json

import numpy as np
import pyarrow as pa
import pytest

from cluster.store import MODALITIES, Store, token_table
from operators import schema
from operators.encoders import Query
from operators.sound import encode_sound
from pipelines.build_index import build_index
from pipelines.config import load
from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.evaluation_folder import load as load_folder
from pipelines.evaluation_folder import save
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.search import search
from tests.media_files import make_video, tone

TITLES = ["red cat", "blue dog", "green moon", "red moon", "blue cat"]
SETTINGS = [
    "extract.modalities=[frame,metadata]",
    "extract.frames.frames_per_clip=3",
    "build_index.nbits=8",
    "search.probes=1000",
    "search.candidates=1000",
    "encode.resources.actors=1",
    "evaluate.measures=[RR, R@1]",
    "evaluate.details=3",
]

ALIKE = {"colpali", "flmr", "mire"}
"""Encoders that see a query's picture as they see a frame, and nothing with it."""


class Pictures:
    """Five videos of still pictures with titles, one of which has sound, extracted; and two queries."""

    def __init__(self, folder):
        self.folder, self.store = folder, Store.at(str(folder / "store"))
        rng = np.random.default_rng(0)
        for i in range(len(TITLES)):
            picture = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            make_video(folder / f"v{i}.mp4", levels=[0] * 10, picture=picture)
        rows = [{"video_id": f"v{i}", "uri": f"v{i}.mp4", "title": title} for i, title in enumerate(TITLES)]
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with open_job(self.config(), "index") as job:
            ingest(job, str(folder / "manifest.jsonl"))
            extract(job)
        self._say("v2", "blue moon")
        frames = self.store.open(MODALITIES).to_table(filter="modality = 'frame' AND video_id = 'v3'").to_pylist()
        self.picture = frames[0]["frames"][1]["jpeg"]
        (folder / "asked.jpg").write_bytes(self.picture)
        asked = [{"id": "words", "text": "blue dog"}, {"id": "picture", "image": "asked.jpg"}]
        (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        (folder / "qrels.txt").write_text("words 0 v1 1\npicture 0 v3 1\n")

    def _say(self, video_id, text):
        span = {"start_seconds": 0.0, "stop_seconds": 1.0, "text": text, "confidence": 1.0, "language": "en"}
        row = {"video_id": video_id, "clip": 0, "modality": schema.SPEECH, "num_clips": 1, "fingerprint": "said"}
        row |= {"start_seconds": 0.0, "stop_seconds": 1.0, "spans": [span], "frames": []}
        row |= {"audio": encode_sound(tone(1.0).tobytes())}
        self.store.append(MODALITIES, pa.Table.from_pylist([row], schema=schema.MODALITY_ROWS))

    def config(self, *assignments):
        return load([], [*SETTINGS, *assignments], self.store.uri)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, cluster):
    return Pictures(tmp_path_factory.mktemp("pictures"))


def _clamr(request):
    """Omni, which hears the sound that the store keeps."""
    model = request("tiny_clamr_omni")
    return ["encode.encoder=clamr", f"encode.clamr.model={model}", "encode.clamr.precision=float32"]


def _colpali(request):
    model = request("tiny_colpali")("colqwen2")
    return ["encode.encoder=colpali", f"encode.colpali.model={model}", "encode.colpali.precision=float32"]


def _flmr(request):
    tiny = request("tiny_flmr")
    parts = {"text_model": tiny.colbert, "vision_model": tiny.clip, "head": tiny.head_flmr}
    return ["encode.encoder=flmr", *(f"encode.flmr.{name}={path}" for name, path in parts.items())]


def _preflmr(request):
    model = request("tiny_flmr").preflmr
    return ["encode.encoder=preflmr", f"encode.preflmr.model={model}", "encode.preflmr.instruction=find it"]


def _mire(request):
    tiny = request("tiny_flmr")
    lengths = ["encode.mire.query_length=12", "encode.mire.document_length=16"]
    return ["encode.encoder=mire", f"encode.mire.model={tiny.mire}", f"encode.mire.vision_model={tiny.clip}", *lengths]


def slow(settings):
    return pytest.param(settings, marks=pytest.mark.slow)


@pytest.mark.parametrize("settings", [_clamr, _colpali, slow(_flmr), slow(_preflmr), _mire])
def test_an_encoder_goes_through_the_whole_chain(pictures, request, tmp_path, settings):
    config = pictures.config(*settings(request.getfixturevalue))
    with open_job(config, "index") as job:
        encode(job)
    rows = pictures.store.open(token_table(config.encode.encoder)).to_table().to_pylist()
    assert {(row["video_id"], row["modality"]) for row in rows} >= {
        (f"v{i}", modality) for i in range(5) for modality in (schema.FRAME, schema.METADATA)
    } | {("v2", schema.SPEECH)}
    assert all(row["num_tokens"] > 0 for row in rows)
    with open_job(config, "index", dry_run=True) as job:
        encode(job, dry_run=True)
    assert job.summary.counts["encode"] == 0, "what is made is fresh"
    with open_job(config, "build-index") as job:
        build_index(job, full=True)

    found = search(config, Query(image=pictures.picture), 5, explained=True)
    assert len(found) == 5 and found[0].winners
    if config.encode.encoder in ALIKE:
        assert found[0].video_id == "v3", "its own frame is nearest, whatever the weights are"

    evaluation = evaluate(config, pictures.folder / "queries.jsonl", pictures.folder / "qrels.txt")
    assert evaluation.document["measures"]["all"]["queries"] == 2
    assert evaluation.document["overlap@10 with exact"] > 0.9
    save(evaluation, tmp_path / "evaluation", config)
    assert load_folder(tmp_path / "evaluation")
