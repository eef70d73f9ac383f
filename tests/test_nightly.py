"""Nights as they are run: what changed, what readers see, what is refused, what is collected."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cluster.lease import Lease
from cluster.readers import being_read, reading
from cluster.shards import plan_shards
from cluster.store import FAILURES, FORMAT_PATH, MODALITIES, RELEASES, RUNS, VIDEOS, Store, token_table
from operators.encoders import Query
from operators.errors import ConfigError, GateFailedError, StorageError, TooManyFailuresError
from operators.schema import token_embeddings
from pipelines.build_index import build_index
from pipelines.cli import app
from pipelines.config import load
from pipelines.evaluate import open_fleet, search_all, search_fleet
from pipelines.gc import gc
from pipelines.job import forget, open_job
from pipelines.nightly import nightly
from pipelines.release import list_releases, open_release, publish, read_log, to_publish, to_roll_back_to
from pipelines.search import Wanted, search
from pipelines.status import select_failures
from tests.media_files import make_video

TOKENS = token_table("lexical")
WORDS = [f"word{i}" for i in range(200)]


class Nights:
    """A manifest that changes from night to night, and a store. Videos are metadata only: no file is decoded."""

    def __init__(self, folder, num_videos=40):
        self.folder, self.rng = folder, np.random.default_rng(0)
        self.titles = {f"v{i:03d}": self.title() for i in range(num_videos)}
        self.files = {}
        self.store = Store.at(str(folder / "store"))

    def title(self):
        return " ".join(self.rng.choice(WORDS, 12))

    def config(self, *assignments):
        rows = [{"video_id": v, "title": t} | self.files.get(v, {}) for v, t in self.titles.items()]
        manifest = self.folder / "manifest.jsonl"
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = [
            f"manifest={manifest}",
            "extract.modalities=[metadata]",
            "encode.encoder=lexical",
            "build_index.nbits=8",
            "build_index.segment_tokens=300",
            "retries.wait_seconds=0",
            "gates.min_recall=null",  # gates that search take as long as the rest of a night
            "gates.min_overlap=null",
            "gc.keep_hours=0",
            *assignments,
        ]
        return load([], settings, self.store.uri)

    def night(self, *assignments, dry_run=False):
        with open_job(self.config(*assignments), "nightly", dry_run) as job:
            nightly(job, dry_run)
        return job.summary

    def job(self, *assignments):
        return open_job(self.config(*assignments), "test")

    def found(self, text, k=100, *assignments):
        return {hit.video_id for hit in search(self.config("search.probes=0", *assignments), Query(text=text), k)}

    def live(self):
        return open_release(self.store).release_id


@pytest.fixture
def blank(tmp_path, cluster):
    """Before the first night."""
    return Nights(tmp_path)


@pytest.fixture(scope="module")
def first_night(tmp_path_factory, cluster):
    nights = Nights(tmp_path_factory.mktemp("first"))
    nights.night()
    return nights


@pytest.fixture
def nights(first_night, tmp_path):
    """After the first night."""
    nights = Nights(tmp_path)
    shutil.copytree(first_night.store.uri, nights.store.uri)
    return nights


def ids(store, table):
    return set(store.open(table).to_table(columns=["video_id"])["video_id"].to_pylist())


def test_a_night_does_what_changed_and_nothing_else(blank):
    first = blank.night()
    size = sum(f.stat().st_size for f in Path(blank.store.uri).rglob("*") if f.is_file())
    assert 0.5 * size < first.store_bytes <= size
    assert first.release == {"release_id": 1, "live_before": None, "state": "published"}
    again = blank.night()
    assert again.release["state"] == "unchanged"
    assert "nothing changed: release 1 stays live" in again.headline
    assert again.counts["extract"] == again.counts["encode"] == 0

    changed, gone, new = "v000", "v001", "new"
    blank.titles[changed] = "zebra crossing"
    del blank.titles[gone]
    blank.titles[new] = "zebra stripes"
    night = blank.night()
    counts = {name: night.counts[name] for name in ("new", "changed", "gone", "extract", "encode", "new_segments")}
    assert counts == {"new": 1, "changed": 1, "gone": 1, "extract": 2, "encode": 2, "new_segments": 1}
    assert night.headline == "published release 2: 1 new, 1 changed, 1 gone, 0 failed"
    for table in (VIDEOS, MODALITIES, TOKENS):
        assert ids(blank.store, table) == set(blank.titles)
    assert blank.found("zebra", 2) == {changed, new}
    only = search(blank.config("search.probes=0"), Query(text="zebra"), 9, wanted=Wanted(videos=(new, "v005")))
    assert [hit.video_id for hit in only] == [new, "v005"]
    assert not search(blank.config(), Query(text="zebra"), 9, wanted=Wanted(start_seconds=1)), (
        "they have no second second"
    )
    assert blank.found("word1 word2") == set(blank.titles), "what is gone is not found, all else is"


class Tokens:
    """Token embeddings that change from night to night, and the index of them; nothing is extracted or encoded."""

    WIDTH = 16

    def __init__(self, folder):
        self.rng = np.random.default_rng(0)
        self.config = load(
            [],
            [
                "encode.encoder=lexical",
                "build_index.nbits=8",
                "build_index.segment_tokens=3000",
                "build_index.retrain_growth=99",
            ],
            str(folder / "store"),
        )
        self.store = Store.at(self.config.store)
        self.video_ids, self.made = [], 0

    def add(self, count):
        rows = []
        for _ in range(count):
            self.made += 1
            self.video_ids.append(f"v{self.made:04d}")
            for modality in ("speech", "metadata"):
                tokens = self.rng.standard_normal((int(self.rng.integers(0, 12)), self.WIDTH))
                tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
                row = {"video_id": self.video_ids[-1], "clip": 0, "modality": modality, "encoder": "lexical"}
                row |= {"start_seconds": 0.0, "stop_seconds": 9.0, "num_tokens": len(tokens)}
                rows.append(row | {"embeddings": list(tokens.astype(np.float16)), "span_index": [0] * len(tokens)})
        self.store.append(TOKENS, pa.Table.from_pylist(rows, schema=token_embeddings(self.WIDTH)))

    def remove(self, count):
        gone = set(self.rng.choice(self.video_ids, count, replace=False).tolist())
        self.video_ids = [video for video in self.video_ids if video not in gone]
        rows = self.store.rows(TOKENS, ["video_id"])
        keep = [video in gone for video in rows["video_id"].to_pylist()]
        self.store.delete_rows(TOKENS, rows.filter(pa.array(keep))["_rowid"].to_pylist())

    def build(self, full=False):
        with open_job(self.config, "build-index") as job:
            build_index(job, full)
        return job.summary, open_release(self.store)


@pytest.mark.slow
def test_an_index_of_many_increments_ranks_as_one_built_at_once(tmp_path, cluster):
    """Twenty times clips come and go, and the table is compacted: merged, with tombstones; then built from nothing."""
    tokens, merged = Tokens(tmp_path), 0
    tokens.store.prepare()
    tokens.store.create(TOKENS, token_embeddings(Tokens.WIDTH))
    tokens.add(300)
    tokens.build()
    for night in range(20):
        tokens.remove(10)
        tokens.add(12)
        if night % 5 == 0:
            tokens.store.open(TOKENS).optimize.compact_files()
        merged += tokens.build()[0].counts["merged_segments"]
    _, grown = tokens.build()
    _, fresh = tokens.build(full=True)
    assert merged > 0
    assert grown.manifest["tombstones"]
    assert fresh.manifest["tombstones"] is None
    assert len({entry["path"].split("/")[1] for entry in grown.manifest["segments"]}) > 1, "of several nights"
    assert grown.manifest["num_tokens"] == fresh.manifest["num_tokens"]
    queries = [tokens.rng.standard_normal((4, Tokens.WIDTH)).astype(np.float32) for _ in range(10)]
    queries = [query / np.linalg.norm(query, axis=1, keepdims=True) for query in queries]
    config = load([], ["search.probes=0"])
    results = [
        search_fleet(config, open_fleet(config, tokens.store, release), queries, 400) for release in (grown, fresh)
    ]
    filled = {row["video_id"] for row in tokens.store.open(TOKENS).to_table(filter="num_tokens > 0").to_pylist()}
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = ({hit.video_id: hit.score for hit in hits} for hits in (ours, theirs))
        assert ours.keys() == theirs.keys() == filled
        assert max(abs(ours[video] - theirs[video]) for video in ours) < 0.08, "8 bits, over four query tokens"


def test_every_way_of_searching_respects_tombstones(nights):
    nights.night()
    gone = [video for video in nights.titles][:5]
    for video in gone:
        del nights.titles[video]
    nights.night("gates.max_gone=1", "gates.max_token_change=null")
    release = open_release(nights.store)
    assert sum(entry["num_dead_clips"] for entry in release.manifest["segments"]) == 5
    queries = release.load_encoder(1).encode_queries([Query(text="word1 word2 word3")])
    shards = plan_shards(nights.store, TOKENS, release.manifest["version"], 1000)
    for assignments in (
        ["search.probes=0"],
        ["search.probes=1000", "search.candidates=1000"],
        ["search.probes=0", "search.codes_on_disk=true"],
        ["search.probes=0", "search.rescored=100"],
    ):
        config = nights.config(*assignments)
        [hits] = search_fleet(config, open_fleet(config, nights.store, release), queries, 100)
        assert {hit.video_id for hit in hits} == set(nights.titles)
    [exact] = search_all(nights.config(), nights.store, release, shards, queries, 100)
    assert {hit.video_id for hit in exact} == set(nights.titles)


@pytest.mark.slow
def test_a_codec_that_no_longer_fits_is_trained_again_and_the_reason_told(nights):
    nights.night()
    codec = open_release(nights.store).manifest["codec"]
    nights.titles |= {f"unlike{i}": " ".join(f"other{j}" for j in range(i, i + 12)) for i in range(10)}
    kept = nights.night("build_index.retrain_drift=99")
    assert open_release(nights.store).manifest["codec"] == codec
    assert kept.index["drift"] > 0, "words that the codec never saw"
    nights.titles["one-more"] = "other1 other2 yet another"
    again = nights.night("build_index.retrain_drift=0.01")
    assert "the codec's error on new clips" in again.index["rebuilt"]
    assert open_release(nights.store).manifest["codec"] != codec
    assert again.index["drift"] is None, "nothing was added since"
    nights.titles |= {f"more{i}": nights.title() for i in range(60)}
    grown = nights.night("gates.max_token_change=null")
    assert "tokens were added since the codec was trained" in grown.index["rebuilt"]


def test_a_failed_gate_leaves_readers_where_they_are(nights, tmp_path):
    nights.night()
    nights.titles["new"] = "zebra"
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.txt"
    queries.write_text('{"id": "q", "text": "zebra"}\n')
    qrels.write_text("q 0 v000 1\n")  # it is not what is found
    canaries = [f"gates.canaries={queries}", f"gates.canary_qrels={qrels}", "gates.min_quality=0.9"]
    canaries.append("gates.min_recall=0.85")
    with pytest.raises(
        GateFailedError, match=r"release 2 was refused: gate nDCG@10 is .*release 1 stays live"
    ) as failed:
        nights.night(*canaries)
    assert failed.value.exit_code == 4
    assert failed.value.result["headline"].startswith("NOT PUBLISHED: gate nDCG@10 is")
    assert nights.live() == 1
    assert "new" not in nights.found("zebra", 5)
    with pytest.raises(ConfigError, match="release 2, the newest, was refused"):
        to_publish(nights.store, None)
    with nights.job() as job:
        publish(job, to_publish(nights.store, 2), "by hand")
    assert nights.found("zebra", 1) == {"new"}
    qrels.write_text("q 0 new 1\n")
    nights.titles["newer"] = "lion"
    gates = {gate["name"]: gate for gate in nights.night(*canaries).gates}
    assert gates["nDCG@10"]["value"] == 1.0
    assert gates["recall"]["passed"]


def test_a_release_that_finds_other_videos_than_the_live_one_is_refused(nights, monkeypatch):
    """With as many actors as there are cores, which must not wait for each other."""
    monkeypatch.setattr("pipelines.evaluate.ACTOR_TOKENS", 100)
    nights.night()
    nights.titles = dict(zip(nights.titles, reversed(list(nights.titles.values())), strict=True))
    with pytest.raises(GateFailedError, match="gate overlap with live is 0"):
        nights.night("gates.min_overlap=0.5", "gates.min_recall=0.9", "gates.sample_tokens=200")
    gates = {gate["name"]: gate for gate in json.loads(read_log(nights.store)[-1]["gates"])}
    assert gates["recall"]["value"] >= 0.9, "what is there is found"
    assert gates["overlap with live"]["value"] < 0.5


def test_tokens_that_vanish_stop_the_release(nights):
    nights.night()
    nights.titles = {video: title.split()[0] for video, title in nights.titles.items()}
    with pytest.raises(GateFailedError, match="gate tokens: metadata is -0.9"):
        nights.night()
    assert nights.live() == 1


def test_a_manifest_that_lost_most_videos_changes_nothing(nights):
    nights.night()
    kept = dict(list(nights.titles.items())[:10])
    lost, nights.titles = nights.titles, kept
    with pytest.raises(GateFailedError, match="no longer lists 30 of 40 videos, more than gates.max_gone 0.2"):
        nights.night()
    assert ids(nights.store, VIDEOS) == set(lost)
    nights.night("gates.max_gone=1")
    assert ids(nights.store, VIDEOS) == set(kept)


def test_a_night_with_too_many_failures_publishes_nothing(nights):
    nights.night()
    for i in range(3):
        (nights.folder / f"broken{i}.mp4").write_bytes(b"not a video")
        nights.titles[f"broken{i}"] = None
        nights.files[f"broken{i}"] = {"uri": f"broken{i}.mp4"}
    frames = "extract.modalities=[frame,metadata]"
    with pytest.raises(TooManyFailuresError) as failed:
        nights.night(frames, "max_failure_rate=0.02")
    assert failed.value.result["headline"].startswith("NOT PUBLISHED: 3 of")
    assert nights.live() == 1
    second = nights.night(frames, "max_failure_rate=0.02")
    assert second.counts["quarantined"] == 3, "final: the same bytes are not tried again"
    assert nights.live() == 2


def test_a_failure_is_tried_until_its_limit_and_forgotten_with_its_video(nights):
    """A source that is listed and missing is tried every night, and counted; gone from the manifest it is forgotten."""
    nights.titles["missing"] = None
    nights.files["missing"] = {"uri": "missing.mp4"}
    for attempt in (1, 2, 3):
        nights.night("allowed_failures=1")
        [failure] = nights.store.open(FAILURES).to_table().to_pylist()
        assert (failure["video_id"], failure["error"], failure["attempts"]) == ("missing", "SourceError", attempt)
    del nights.titles["missing"]
    nights.night()
    assert nights.store.open(FAILURES).count_rows() == 0


def test_a_source_that_cannot_be_read_tonight_stays_as_it_was(nights):
    make_video(nights.folder / "a.mp4")
    nights.titles["file"] = "zebra"
    nights.files["file"] = {"uri": "a.mp4"}
    nights.night()
    (nights.folder / "a.mp4").unlink()
    nights.night("allowed_failures=1")
    assert "file" in nights.found("zebra", 1)


def test_rolling_back_moves_readers_and_twice_goes_further_back(blank):
    for number in range(3):
        blank.titles[f"extra{number}"] = "zebra"
        blank.night("gc.keep_releases=9")
    for expected in (2, 1):
        with blank.job() as job:
            publish(job, to_roll_back_to(blank.store, None), "rolled back: test")
        assert blank.live() == expected
        assert blank.found("zebra", expected) == {f"extra{i}" for i in range(expected)}
    with pytest.raises(ConfigError, match=r"no older release.*still there are: 1, 2, 3"):
        to_roll_back_to(blank.store, None)
    [live] = [release for release in list_releases(blank.store) if release["live"]]
    assert (live["release_id"], live["reason"]) == (1, "rolled back: test")
    assert blank.night().release["release_id"] == 4, "the night after starts from what is live"
    assert blank.found("zebra", 3) == {f"extra{i}" for i in range(3)}


def test_collection_leaves_what_releases_and_readers_need(nights):
    off = "gc.after_nightly=false"
    nights.night(off)
    for i in range(4):
        nights.titles[f"extra{i}"] = "zebra"
        nights.night(off)
    held = open_release(nights.store, 2)
    orphans = [Path(nights.store.uri) / f"{TOKENS}.lance/data/orphan.lance", Path(nights.store.uri) / "index/x/orphan"]
    for orphan in orphans:
        orphan.parent.mkdir(exist_ok=True)
        orphan.write_bytes(b"x" * 1000)
    size = lambda: sum(f.stat().st_size for f in Path(nights.store.uri).rglob("*") if f.is_file())  # noqa: E731
    before = size()
    with reading(nights.store, 2), nights.job("gc.keep_releases=2") as job:
        assert being_read(nights.store) == {2}
        plan = gc(job, dry_run=True)
        assert all(orphan.exists() for orphan in orphans)
        done = gc(job)
        assert (done["releases"], done["kept"]) == (plan["releases"], plan["kept"]) == ([1, 3], [2, 4, 5])
        assert done["bytes"] == plan["bytes"] > 2000
    assert not any(orphan.exists() for orphan in orphans)
    assert size() < before
    config = nights.config("search.probes=0")
    queries = held.load_encoder(1).encode_queries([Query(text="zebra")])
    [hits] = search_fleet(config, open_fleet(config, nights.store, held), queries, 1)
    assert hits[0].video_id == "extra0", "an open reader reads on"
    assert nights.found("zebra", 4) == {f"extra{i}" for i in range(4)}
    with pytest.raises(ConfigError, match="release 1 was collected"):
        open_release(nights.store, 1)
    assert being_read(nights.store) == set(), "the mark went with its reader"
    with nights.job("gc.keep_releases=2") as job:
        assert gc(job)["releases"] == [2]
        assert len(job.store.open(TOKENS).versions()) == 2
        orphans[0].write_bytes(b"x" * 1000)
        assert gc(job)["bytes"] >= 1000, "an orphan goes also where no version does"
    assert not orphans[0].exists()
    assert nights.found("zebra", 4) == {f"extra{i}" for i in range(4)}
    with pytest.raises(ConfigError, match="release 3 cannot be gone back to; published and still there are: 4, 5"):
        to_roll_back_to(nights.store, 3)


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(blank):
    assert blank.night(dry_run=True).counts["new"] == 40
    assert not Path(blank.store.uri).exists()
    blank.night()
    blank.titles["new"] = "zebra"
    del blank.titles["v000"]
    prices = "prices={currency: EUR, cpu_hour: 3600}"
    before = {f: f.stat().st_mtime_ns for f in Path(blank.store.uri).rglob("*")}
    summary = blank.night(prices, dry_run=True)
    assert {name: summary.counts[name] for name in ("new", "gone", "extract")} == {"new": 1, "gone": 1, "extract": 1}
    assert summary.estimate["from_nights"] == 1
    assert summary.estimate["seconds"]["extract"] > 0
    assert summary.estimate["cost"]["amount"] > 0
    assert {f: f.stat().st_mtime_ns for f in Path(blank.store.uri).rglob("*")} == before


def test_a_store_of_another_format_is_refused_before_anything_is_written(nights):
    nights.night()
    nights.store.put_json(FORMAT_PATH, {"format": 99})
    with pytest.raises(StorageError, match="a store of format 99; this maxreel reads 2. Use a newer maxreel"):
        nights.night()
    with pytest.raises(StorageError, match="format 99"):
        open_release(nights.store)


def test_a_run_that_died_is_marked_by_the_next(nights):
    nights.night()
    row = nights.store.open(RUNS).to_table().to_pylist()[0] | {"run_id": "dead", "status": "running"}
    nights.store.append(RUNS, pa.Table.from_pylist([row], schema=nights.store.open(RUNS).schema))
    nights.night()
    status = {row["run_id"]: row["status"] for row in nights.store.open(RUNS).to_table().to_pylist()}
    assert status.pop("dead") == "died"
    assert set(status.values()) == {"ok"}


def test_the_log_of_releases_is_appended_to_and_never_rewritten(nights):
    nights.night()
    nights.titles["new"] = "zebra"
    before = read_log(nights.store)
    nights.night()
    after = read_log(nights.store)
    drop = [{k: v for k, v in row.items() if k != "_rowid"} for row in before]
    assert [{k: v for k, v in row.items() if k != "_rowid"} for row in after][: len(before)] == drop
    assert [(row["release_id"], row["state"]) for row in after] == [
        (1, "draft"),
        (1, "published"),
        (2, "draft"),
        (2, "published"),
    ]
    assert nights.store.open(RELEASES).count_rows() == 4


def test_a_night_whose_lease_is_held_ends_with_code_5(nights):
    from operators.errors import StoreHeldError

    with Lease(nights.store, "other", "index"), pytest.raises(StoreHeldError) as held:
        nights.night()
    assert held.value.exit_code == 5
    shutil.rmtree(nights.store.uri)


def test_the_command_line_of_a_night_and_of_the_morning_after(blank, tmp_path):
    blank.config()  # writes the manifest

    def maxreel(*arguments):
        return CliRunner().invoke(app, [*arguments, "--store", blank.store.uri])

    settings = tmp_path / "nightly.yaml"
    settings.write_text(
        f"manifest: {blank.folder}/manifest.jsonl\n"
        "extract: {modalities: [metadata]}\n"
        "encode: {encoder: lexical}\n"
        "prices: {currency: EUR, cpu_hour: 1}\n"
    )
    done = maxreel("nightly", "-c", str(settings))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("published release 1: 40 new, 0 changed, 0 gone, 0 failed")
    blank.titles = {video: "zebra" for video in blank.titles}
    blank.config()
    refused = maxreel("nightly", "-c", str(settings))
    assert refused.exit_code == 4
    assert refused.stdout.startswith("NOT PUBLISHED: gate tokens: metadata is -0.9")
    assert "maxreel publish 2" in refused.stdout
    shown = json.loads(maxreel("report", "--json", "--out", str(tmp_path / "out"), "-c", str(settings)).stdout)
    assert (shown["schema"], shown["run"]["exit_code"]) == ("maxreel.report/1", 4)
    assert (tmp_path / "out/report.html").read_text().startswith("<!DOCTYPE html>")
    runs = json.loads(maxreel("runs", "--json").stdout)["runs"]
    assert [(run["job"], run["exit_code"]) for run in runs] == [("nightly", 4), ("nightly", 0)]
    for run in runs:
        assert (Path(blank.store.uri) / f"reports/{run['run_id']}.html").exists()
    states = [
        (r["release_id"], r["state"], r["live"]) for r in json.loads(maxreel("releases", "--json").stdout)["releases"]
    ]
    assert states == [(2, "refused", False), (1, "published", True)]
    assert maxreel("publish", "2").stdout == "release 2 is live\n"
    assert maxreel("rollback", "--reason", "zebras").stdout == "release 1 is live\n"
    assert "rolled back: zebras" in maxreel("releases").stdout


def test_what_was_given_up_is_tried_again_when_asked(nights):
    (nights.folder / "broken.mp4").write_bytes(b"not a video")
    nights.titles["broken"] = "zebra"
    nights.files["broken"] = {"uri": "broken.mp4"}
    settings = ["extract.modalities=[frame,metadata]", "allowed_failures=5"]
    nights.night(*settings)
    assert nights.night(*settings).counts["extract"] == 0
    with nights.job() as job:
        with pytest.raises(ConfigError, match="no failures of other"):
            select_failures(job.store, None, ["other"])
        forget(job, select_failures(job.store, None, ["broken"]))
    assert nights.night(*settings).counts["extract"] == 1
