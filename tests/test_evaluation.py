"""Evaluations as they are run: systems from one pass, comparisons, and where videos are lost."""

import io
import json
import re
import subprocess
import sys

import ir_measures
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.store import MODALITIES, Store, token_table
from operators import schema
from operators.encoders import Query
from operators.errors import ConfigError
from operators.search import Searcher
from pipelines.build_index import build_index
from pipelines.cli import app
from pipelines.compare import diff
from pipelines.config import load
from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.evaluation_folder import load as load_folder
from pipelines.evaluation_folder import read_document, save
from pipelines.extract import extract
from pipelines.ingest import ingest
from pipelines.job import open_job
from pipelines.page import verdict
from pipelines.release import open_release
from pipelines.runs import read_run
from pipelines.search import Wanted, _patch
from pipelines.why_not import why_not

WORDS = [f"word{i}" for i in range(120)]
SETTINGS = [
    "extract.modalities=[metadata]",
    "encode.encoder=lexical",
    "build_index.nbits=8",
    "build_index.retrain_drift=100",
    "build_index.num_centroids=150",
    "search.probes=1000",
]


class Judged:
    """Thirty videos of which each has words in three modalities, and queries of the words of one."""

    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.folder, self.store = folder, Store.at(str(folder / "store"))
        self.texts = {
            modality: {f"v{i:02d}": " ".join(rng.choice(WORDS, 8)) for i in range(30)}
            for modality in (schema.METADATA, schema.SPEECH, schema.SCREEN_TEXT)
        }
        self.queries, self.qrels = folder / "queries.jsonl", folder / "qrels.txt"
        asked, judged = [], []
        for number, modality in enumerate(3 * [schema.METADATA, schema.SPEECH, schema.SCREEN_TEXT]):
            video_id = f"v{3 * number:02d}"
            words = self.texts[modality][video_id].split()[:3]
            text = " ".join([*words, WORDS[number]])
            asked.append({"id": f"q{number}", "text": text, "target_modality": modality, "answers": [" ".join(words)]})
            judged.append(f"q{number} 0 {video_id} 1\nq{number} 0 v29 0\n")
        self.queries.write_text("".join(json.dumps(row) + "\n" for row in asked))
        self.qrels.write_text("".join(judged))

    def config(self, *assignments):
        return load([], [*SETTINGS, *assignments], self.store.uri)

    def index(self, rows, *assignments):
        """Ingest titles, put what was said and shown beside them, and encode."""
        manifest = self.folder / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with open_job(self.config(*assignments), "index") as job:
            ingest(job, str(manifest), remove_gone=True)
            extract(job)
            self.put(schema.SPEECH, self.texts[schema.SPEECH])
            self.put(schema.SCREEN_TEXT, self.texts[schema.SCREEN_TEXT])
            self.put(schema.FRAME, {})
            encode(job)

    def put(self, modality, texts):
        known = {row["video_id"] for row in self.store.rows(MODALITIES, ["video_id"]).to_pylist()}
        dataset = self.store.open(MODALITIES)
        if dataset.count_rows(f"modality = '{modality}'"):
            return
        span = {"start_seconds": 2.0, "stop_seconds": 9.0, "confidence": 1.0, "language": "en"}
        row = {"clip": 0, "modality": modality, "num_clips": 1, "start_seconds": 0.0, "stop_seconds": 10.0}
        rows = [
            row | {"video_id": v, "fingerprint": f"{modality} {v}", "spans": [span | {"text": text}], "frames": []}
            for v, text in texts.items()
            if v in known
        ]
        if modality == schema.FRAME:
            frames = [{"pts_seconds": 3.0, "jpeg": jpeg(640, 360)}]
            rows = [row | {"video_id": v, "fingerprint": "f", "spans": [], "frames": frames} for v in sorted(known)]
        self.store.append(MODALITIES, pa.Table.from_pylist(rows, schema=schema.MODALITY_ROWS))

    def titles(self):
        return [{"video_id": v, "title": title} for v, title in self.texts[schema.METADATA].items()]

    def build(self, *assignments):
        with open_job(self.config(*assignments), "build-index") as job:
            build_index(job)

    def evaluate(self, *assignments, path="exact", against=None, out=None):
        config = self.config(*assignments)
        found = evaluate(config, self.queries, self.qrels, path, against)
        if out is not None:
            save(found, out, config)
        return found


def jpeg(width, height):
    data = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def judged(tmp_path_factory, cluster):
    made = Judged(tmp_path_factory.mktemp("judged"))
    made.index(made.titles())
    made.build()
    return made


@pytest.fixture(scope="module")
def folder(judged, tmp_path_factory):
    """An evaluation of the index, saved."""
    folder = tmp_path_factory.mktemp("evaluation") / "index"
    judged.evaluate("evaluate.measures=[nDCG@10,R@1,MdR,PRRecall@1]", path="index", out=folder)
    return folder


def order(run):
    return {query_id: list(videos) for query_id, videos in run.items()}


def test_one_pass_gives_what_scoring_each_choice_of_modalities_for_itself_gives(judged):
    together = {system.name: system for system in judged.evaluate().systems}
    for name, modalities in {
        "only:speech": "[speech]",
        "without:speech": "[frame,screen_text,metadata]",
        "without:metadata": "[frame,speech,screen_text]",
    }.items():
        alone = judged.evaluate(f"search.modalities={modalities}").systems[0]
        assert order(together[name].run) == order(alone.run), name
        assert alone.run["q0"] == pytest.approx(together[name].run["q0"], abs=1e-5)
    other = judged.evaluate("search.scorer=modality_max").systems[0]
    assert order(together["modality_max"].run) == order(other.run)


def test_no_system_depends_on_how_many_shards_there_are_or_how_queries_are_batched(judged):
    whole = judged.evaluate()
    pieces = judged.evaluate("evaluate.shard_tokens=40", "evaluate.batch_queries=2")
    for one, other in zip(pieces.systems, whole.systems, strict=True):
        assert order(one.run) == order(other.run), one.name
        for query_id, found in one.run.items():  # products of other shapes may be rounded otherwise
            assert found == pytest.approx(other.run[query_id], abs=1e-5)
    assert pieces.document["modality_selection"] == whole.document["modality_selection"]


def test_the_modality_that_a_query_is_made_of_is_the_one_that_finds_it(judged):
    document = judged.evaluate("evaluate.measures=[RR]").document
    systems = document["systems"]
    assert systems["only:speech"]["measures"]["speech"]["RR"] > 0.8
    assert systems["without:speech"]["measures"]["speech"]["RR"] < 0.5
    of_targets = [systems[f"only:{target}"]["measures"][target]["RR"] for target in judged.texts]
    assert systems["oracle router"]["measures"]["all"]["RR"] == pytest.approx(np.mean(of_targets))
    assert document["modality_selection"]["accuracy"] == 1
    against = systems["without:speech"]["against"]["RR"]
    assert against["difference"] < 0 and against["losses"] >= 2 and against["p_holm"] >= against["p"]


def test_the_overlap_is_of_no_more_than_was_asked_for(judged):
    document = judged.evaluate("evaluate.depth=3", path="index").document
    assert document["overlap@3 with exact"] > 0.9
    assert "overlap@10 with exact" not in document


def test_of_ranks_less_is_better(judged):
    found = judged.evaluate("evaluate.measures=[RR,MnR]")
    against = found.document["systems"]["only:screen_text"]["against"]["MnR"]
    ours, theirs = found.values["only:screen_text"], found.values["exact"]
    assert against["losses"] == sum(ours[query]["MnR"] > theirs[query]["MnR"] for query in ours) > against["wins"]
    assert against["difference"] > 0 and not against["rises"]
    assert verdict(against | {"p_holm": 0.01}) == "worse"
    with pytest.raises(ConfigError, match="MnR falls. Put it later"):
        judged.evaluate("evaluate.measures=[MnR,RR]")


def test_a_patch_is_where_its_place_in_the_grid_says():
    assert _patch([2, 2, 4], 0) == (0, 0, 0.25, 0.5)
    assert _patch([2, 2, 4], 8 + 6) == (0.5, 0.5, 0.75, 1), "of the second frame"
    assert _patch(None, 3) is None


def test_a_system_beside_itself_does_not_differ(judged, folder):
    same = judged.evaluate(path="index", against=str(folder / "run.trec")).document["systems"]["against"]["against"]
    assert same["nDCG@10"] == {
        "difference": 0, "low": 0, "high": 0, "p": 1, "p_holm": 1, "wins": 0, "ties": 9, "losses": 0,
        "rises": True,
    }  # fmt: skip
    live = open_release(judged.store).release_id
    of_release = judged.evaluate("evaluate.compare_exact=false", path="index", against=str(live)).document["systems"]
    assert list(of_release) == ["index", f"release {live}"]
    assert of_release[f"release {live}"]["against"]["nDCG@10"]["ties"] == 9


def test_the_folder_repeats_every_figure_with_a_public_tool(folder):
    document = read_document(folder)
    command = [sys.executable, "-m", "ir_measures", str(folder / "qrels.txt"), str(folder / "run.trec"), "nDCG@10 R@1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    figures = document["measures"]["all"]
    assert said == ["nDCG@10", f"{figures['nDCG@10']:.4f}", "R@1", f"{figures['R@1']:.4f}"]
    rows = pyarrow.parquet.read_table(folder / "per_query.parquet").to_pylist()
    assert np.mean([row["nDCG@10"] for row in rows]) == pytest.approx(figures["nDCG@10"])
    assert {row["target_modality"] for row in rows} == {"metadata", "speech", "screen_text"}
    systems = pyarrow.parquet.read_table(folder / "systems.parquet")["system"].to_pylist()
    assert list(dict.fromkeys(systems)) == list(document["systems"])
    speech = read_run(folder / "runs" / "only-speech.trec.gz")
    measured = ir_measures.calc_aggregate([ir_measures.nDCG @ 10], load_folder(folder).judgements, speech)
    again = document["systems"]["only:speech"]["measures"]["all"]["nDCG@10"]
    assert measured[ir_measures.nDCG @ 10] == pytest.approx(again)


def test_the_folder_shows_no_credential(judged, tmp_path):
    secret = "manifest=https://user:hunter2@host/m.jsonl?sig=hunter2"
    found = judged.evaluate("evaluate.compare_exact=false", "evaluate.details=0", path="index")
    save(found, tmp_path, judged.config(secret, "evaluate.details=0"))
    assert "hunter2" not in (tmp_path / "params.yaml").read_text()
    assert "https://" in (tmp_path / "params.yaml").read_text()


def test_answers_are_looked_for_in_the_text_of_the_videos_found(folder):
    document = read_document(folder)
    assert document["measures"]["all"]["PRRecall@1"] == document["measures"]["all"]["R@1"] > 0.5
    assert document["measures"]["all"]["MdR"] == 1


def test_hits_are_explained_with_a_picture_and_their_context(folder):
    rows = pyarrow.parquet.read_table(folder / "details.parquet").to_pylist()
    assert len(rows) == 9 * 5
    [first] = [row for row in rows if row["query_id"] == "q1" and row["rank"] == 1]
    assert (first["video_id"], first["relevant"], first["best_seconds"]) == ("v03", 1, 2.0)
    assert Image.open(io.BytesIO(first["thumbnail"])).size == (320, 180)
    assert [winner["modality"] for winner in first["winners"]][:3] == ["speech"] * 3
    assert {s["modality"] for s in first["spans"]} == {"metadata", "speech", "screen_text"}
    assert sum(share["share"] for share in first["shares"]) == pytest.approx(1)


def test_the_diagonal_protocol_searches_judged_videos_only_and_says_what_can_be_reached(judged):
    document = judged.evaluate("evaluate.protocol=clamr_diagonal", "evaluate.measures=[R@1]").document
    assert document["ceiling"] == {"R@1": 1.0}, "no video is judged for two queries"
    assert document["measures"]["all"]["queries"] == 9
    assert document["depth"] == 10, "the nine, and one that was judged and is not relevant"
    with pytest.raises(ConfigError, match="clamr_diagonal has no AP"):
        judged.evaluate("evaluate.protocol=clamr_diagonal", "evaluate.measures=[AP]")


def test_a_diff_lists_what_became_better_and_worse_and_shows_one_query(judged, folder, tmp_path):
    judged.evaluate("search.modalities=[speech]", out=tmp_path / "speech")
    found = diff(folder, tmp_path / "speech")
    assert (found["queries"], found["only_in_one"]) == (9, 0)
    row = found["measures"]["nDCG@10"]
    assert row["difference"] == pytest.approx(row["b"] - row["a"])
    assert row["losses"] == len(found["worse"]) >= 5 and row["wins"] == len(found["better"])
    assert all(query["difference"] < 0 for query in found["worse"])
    one = diff(folder, tmp_path / "speech", "q0")
    [relevant] = [video for video in one["videos"] if video["grade"] == 1]
    assert relevant["video_id"] == "v00" and relevant["a"]["rank"] == 1
    assert relevant["b"] is None or relevant["b"]["rank"] > 1
    assert any("speech" in video["why"] for video in one["videos"]), "some were explained in both"
    with pytest.raises(ConfigError, match="neither evaluation has a judged query 'q99'"):
        diff(folder, tmp_path / "speech", "q99")
    with pytest.raises(ConfigError, match="holds no evaluation"):
        diff(folder, tmp_path)


def test_the_commands_print_what_was_found(judged, folder, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    qrels = ("--qrels", folder / "qrels.txt")
    printed = run("evaluate", *qrels, "--run", folder / "run.trec", "--against", folder / "runs" / "RRF.trec.gz")
    assert "RRF.trec.gz" in printed and "p (Holm)" in printed
    asked = ("evaluate", *qrels, "--queries", judged.queries, "--store", judged.store.uri, "--out", tmp_path / "out")
    printed = run(*asked, *(part for setting in SETTINGS for part in ("--set", setting)))
    assert "without:speech" in printed and "ms p50" in printed and "a video" in printed
    assert "9 queries of both" in run("diff", folder, tmp_path / "out")
    assert "rank in index" in run("diff", folder, tmp_path / "out", "--query", "q0")
    assert "v28  outscored" in run("search", "word1", "--why-not", "v28", "-k", "1", "--store", judged.store.uri)
    result = CliRunner().invoke(app, ["evaluate", *map(str, qrels), "--store", judged.store.uri])
    assert result.exit_code == 2 and "--queries to search with, or --run to measure" in result.stderr


class Lost(Judged):
    """A store in which videos were lost before and after an index was made."""

    def plant(self):
        self.index(self.titles())
        self.build()
        changed = [row | ({"title": "other words"} if row["video_id"] == "v01" else {}) for row in self.titles()]
        new = {"video_id": "new", "title": "word3 word5"}
        missing = {"video_id": "missing", "uri": str(self.folder / "no.mp4"), "title": "word4"}
        self.index([*changed, missing, {"video_id": "silent", "title": ""}], "max_failure_rate=1")
        self.build()
        self.index([*changed, new, missing, {"video_id": "silent", "title": ""}], "max_failure_rate=1")
        with open_job(self.config(), "ingest") as job:
            ingest(job, str(self.manifest_with({"video_id": "raw", "title": "word6"})))

    def manifest_with(self, row):
        path = self.folder / "more.jsonl"
        path.write_text((self.folder / "manifest.jsonl").read_text() + json.dumps(row) + "\n")
        return path

    def words_without(self, video_id):
        """Return two words that others have and a video has not."""
        own = " ".join(texts.get(video_id, "") for texts in self.texts.values()).split()
        others = " ".join(text for texts in self.texts.values() for v, text in texts.items() if v != video_id).split()
        return " ".join(sorted(set(others) - set(own))[:2])


@pytest.fixture(scope="module")
def lost(tmp_path_factory, cluster):
    made = Lost(tmp_path_factory.mktemp("lost"))
    made.plant()
    return made


@pytest.mark.parametrize(
    ("video_id", "settings", "wanted", "stage", "detail"),
    [
        ("nowhere", [], Wanted(), "unknown", "is it in the manifest"),
        ("missing", [], Wanted(), "failed", "no.mp4"),
        ("raw", [], Wanted(), "not extracted", "maxreel index MANIFEST"),
        ("new", [], Wanted(), "not indexed", "it comes with the next"),
        ("silent", [], Wanted(), "without tokens", "nothing in it gives a token"),
        ("v02", [], Wanted(videos=("v03",)), "filtered out", "leave none of its clips"),
        ("v02", ["search.probes=1", "search.candidates=999"], Wanted(), "not probed", "search.probes="),
        ("v02", ["search.probes=999", "search.candidates=2"], Wanted(), "pruned", "search.candidates="),
        ("v02", ["search.probes=999", "search.candidates=999"], Wanted(), "outscored", "would show it"),
    ],
)
def test_a_lost_video_is_said_to_be_lost_where_it_was(lost, monkeypatch, video_id, settings, wanted, stage, detail):
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)  # so small an index would not be probed
    found = why_not(lost.config(*settings), Query(text=lost.words_without("v02")), video_id, 1, wanted)
    assert found["stage"] == stage, found
    assert detail in found["detail"]


@pytest.mark.parametrize("setting", ["search.probes", "search.candidates"])
def test_what_is_said_to_find_a_lost_video_does(lost, monkeypatch, setting):
    monkeypatch.setattr(Searcher, "_scans_cheaper", lambda *_: False)
    few = {"search.probes": 1, "search.candidates": 2}
    settings = [f"{name}={value if name == setting else 999}" for name, value in few.items()]
    before = why_not(lost.config(*settings), Query(text=lost.words_without("v02")), "v02", 1, Wanted())
    advised = re.search(rf"--set ({setting}=\d+)`", before["detail"])[1]
    after = why_not(lost.config(*settings, advised), Query(text=lost.words_without("v02")), "v02", 1, Wanted())
    assert before["stage"] in ("not probed", "pruned") and after["stage"] == "outscored"


def test_a_video_that_changed_and_is_not_built_in_again_has_a_tombstone(lost):
    store, manifest = lost.store, open_release(lost.store).manifest
    assert manifest["tombstones"]
    config = lost.config()
    table = token_table("lexical")
    with open_job(config, "drop") as job:
        rows = store.open(table).scanner(columns=["video_id"], with_row_id=True, filter="video_id = 'v07'").to_table()
        store.delete_rows(table, rows["_rowid"].to_pylist())
        build_index(job)
    assert why_not(config, Query(text=WORDS[0]), "v07", 1, Wanted())["stage"] == "tombstoned"
