"""The chain as it runs: ingest, extract, encode, build-index, search, evaluate, on tiny videos and a tiny model."""

import json
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from cluster.index_store import read_codec
from cluster.searchers import Fleet, SearchOptions, SegmentHolder
from cluster.store import FAILURES, MODALITIES, RUNS, STORAGE_VERSION, VIDEOS
from operators.encoder_lexical import LexicalEncoder
from operators.encoders import Query
from operators.errors import ConfigError, ModelError, ScheduleError, StorageError, TooManyFailuresError
from operators.maxsim import make_scorer
from operators.schema import MODALITIES as MODALITY_NAMES
from pipelines import build_index as build_index_module
from pipelines import evaluate as evaluation
from pipelines.encode import ENCODERS
from pipelines.evaluation_folder import save
from pipelines.release import open_release
from pipelines.search import Wanted, search
from tests.corpus import Corpus
from tests.media_files import make_video


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, tiny_model, cluster):
    """A corpus that was indexed and built once; tests that change it make their own."""
    corpus = Corpus(tmp_path_factory.mktemp("corpus"), tiny_model)
    corpus.job = corpus.index()
    corpus.build("build_index.nbits=8", "build_index.segment_tokens=10")
    return corpus


@pytest.fixture
def fresh(tmp_path, cluster):
    return Corpus(tmp_path)


def test_every_video_has_a_row_for_each_modality_that_did_not_fail(indexed):
    found = {(row["video_id"], row["modality"]) for row in indexed.table(MODALITIES, "video_id", "modality")}
    assert found == {(f"v{i}", m) for i in range(5) for m in ("frame", "metadata")} | {("broken", "metadata")}
    frames = {row["video_id"]: len(row["frames"]) for row in indexed.table(MODALITIES) if row["modality"] == "frame"}
    assert frames == {f"v{i}": 2 for i in range(5)}


def test_a_broken_file_is_a_row_in_failures_that_a_person_understands(indexed):
    [failure] = indexed.table(FAILURES)
    assert (failure["video_id"], failure["stage"], failure["error"], failure["final"]) == (
        "broken",
        "decode",
        "MediaError",
        True,
    )
    assert "broken.mp4" in failure["message"]


def test_ingest_learns_what_the_file_declares(indexed):
    by_id = {row["video_id"]: row for row in indexed.table(VIDEOS)}
    assert (by_id["v0"]["width"], by_id["v0"]["height"], by_id["v0"]["has_audio"]) == (64, 48, False)
    assert by_id["v0"]["duration_seconds"] == pytest.approx(1.0, abs=0.05)
    assert by_id["broken"]["duration_seconds"] is None


def test_a_clip_that_the_encoder_fails_on_costs_itself_until_it_changes(fresh, monkeypatch):
    class Fussy(LexicalEncoder):
        def encode_documents(self, clips):
            if any("moon" in span["text"] for clip in clips for content in clip.values() for span in content.spans):
                raise RuntimeError("what is a moon?")
            return super().encode_documents(clips)

    settings = ["max_failure_rate=0.9", "retries.max_attempts=1"]
    monkeypatch.setitem(ENCODERS, "lexical", Fussy)
    fresh.index(*settings)
    failed = {row["video_id"]: row for row in fresh.table(FAILURES) if row["stage"] == "encode"}
    assert set(failed) == {"v2", "v3"}
    assert (failed["v2"]["error"], failed["v2"]["message"]) == ("RuntimeError", "clip 0: what is a moon?")
    assert {row["video_id"] for row in fresh.table(fresh.tokens)} == {"v0", "v1", "v4", "broken"}

    fresh.rows[2]["title"] = "green cat"
    counts = fresh.index(*settings).summary.counts
    assert (counts["encode"], counts["quarantined"]) == (1, 2), "what did not change is not tried for ever"
    assert {row["video_id"] for row in fresh.table(FAILURES)} == {"v3", "broken"}
    assert "v2" in {row["video_id"] for row in fresh.table(fresh.tokens)}


def test_token_embeddings_have_unit_length_and_a_span_each(indexed):
    rows = [row for row in indexed.table(indexed.tokens) if row["modality"] == "metadata"]
    assert len(rows) == 6
    for row in rows:
        embeddings = np.array(row["embeddings"], np.float32)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)  # float16 on disk
        assert len(embeddings) == len(row["span_index"]) == row["num_tokens"] > 0


def test_the_run_is_recorded_with_its_config_and_counts(indexed):
    runs = {row["job"]: row for row in indexed.table(RUNS)}
    assert runs["index"]["status"] == "ok"
    assert json.loads(runs["index"]["config"])["encode"]["encoder"] == "multivector"
    assert json.loads(runs["index"]["summary"])["counts"]["new"] == 6


def test_a_second_run_does_no_work(fresh):
    fresh.index()
    before = fresh.versions()
    job = fresh.index()
    assert (job.summary.counts["unchanged"], job.summary.counts["extract"], job.summary.counts["encode"]) == (6, 0, 0)
    assert job.summary.counts["quarantined"] == 1
    assert fresh.versions() == before

    # Then, on the same store: a new title redoes the metadata of that video and nothing else.
    old = {(r["video_id"], r["modality"]): r["fingerprint"] for r in fresh.table(MODALITIES)}
    fresh.rows[1]["title"] = "green cat"
    assert fresh.index(dry_run=True).summary.counts["changed"] == 1
    assert fresh.versions() == before, "a dry run changes nothing"
    job = fresh.index()
    assert (job.summary.counts["changed"], job.summary.counts["extract"], job.summary.counts["encode"]) == (1, 1, 1)
    new = {(r["video_id"], r["modality"]): r["fingerprint"] for r in fresh.table(MODALITIES)}
    assert {key for key in new if new[key] != old[key]} == {("v1", "metadata")}

    # Another number of frames redoes frames only; a video that shrinks leaves no old rows behind.
    make_video(fresh.folder / "v2.mp4", levels=[10] * 4)
    job = fresh.index("extract.frames.frames_per_clip=1")
    assert job.summary.tokens["metadata"] == fresh_tokens(fresh, "v2", "metadata")
    assert len(fresh.table(MODALITIES)) == len(new)
    assert all(len(row["frames"]) == 1 for row in fresh.table(MODALITIES) if row["modality"] == "frame")

    # A file that was mended is indexed, and its failure forgotten.
    make_video(fresh.folder / "broken.mp4")
    fresh.index("extract.frames.frames_per_clip=1")
    assert fresh.table(FAILURES) == []
    assert ("broken", "frame") in {(row["video_id"], row["modality"]) for row in fresh.table(MODALITIES)}


def fresh_tokens(corpus, video_id, modality):
    rows = corpus.table(corpus.tokens, "video_id", "modality", "num_tokens")
    return sum(row["num_tokens"] for row in rows if (row["video_id"], row["modality"]) == (video_id, modality))


def test_a_missing_file_fails_alone_and_is_tried_again(fresh):
    fresh.rows = [*fresh.rows[:1], {"video_id": "gone", "uri": "gone.mp4"}]
    for attempt in (1, 2):
        job = fresh.index("max_failure_rate=0.9")
        [failure] = fresh.table(FAILURES)
        assert (failure["error"], failure["attempts"]) == ("SourceError", attempt)
    job.limit_failures()  # known for a night: not a reason to fail again
    assert [row["video_id"] for row in fresh.table(VIDEOS)] == ["v0"]
    assert job.summary.counts["worked_on"] == 1


def test_more_failures_than_allowed_end_with_their_own_error(fresh):
    fresh.rows = fresh.rows[-1:]
    job = fresh.index()
    with pytest.raises(TooManyFailuresError, match="1 of 1 videos failed for the first time"):
        job.limit_failures()


def test_a_job_that_cannot_be_scheduled_says_so_at_once(fresh):
    fresh.rows = fresh.rows[:1]
    with pytest.raises(ScheduleError, match="GPU"):
        fresh.index("encode.resources.gpus_each=1")


def test_an_index_with_everything_probed_ranks_as_the_exact_path_does(indexed, tmp_path):
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.txt"
    texts = {"q1": "red cat", "q2": "blue dog", "q3": "moon", "q4": "green"}
    queries.write_text(
        "".join(json.dumps({"id": q, "text": t, "target_modality": "metadata"}) + "\n" for q, t in texts.items())
    )
    qrels.write_text("q1 0 v0 1\nq2 0 v1 1\nq3 0 v2 1\nq3 0 v3 1\nq4 0 v2 1\nunasked 0 v1 1\n")
    everything = ["search.probes=1000", "search.candidates=1000"]
    results = {}
    for path in ("index", "exact"):
        for shard_tokens in (7, 10**6):
            config = indexed.config(*everything, f"evaluate.shard_tokens={shard_tokens}")
            out = tmp_path / f"{path}{shard_tokens}"
            found = evaluation.evaluate(config, queries, qrels, path)
            save(found, out, config)
            results[path, shard_tokens] = found.document
    runs = {key: scores(tmp_path / f"{key[0]}{key[1]}" / "run.trec") for key in results}
    assert runs["exact", 7] == runs["exact", 10**6], "the number of shards must not matter"
    assert runs["index", 7] == pytest.approx(runs["exact", 7], abs=0.05), "8 bits, over 4 to 5 query tokens"
    assert results["index", 7]["overlap@10 with exact"] == 1.0
    measures = results["exact", 7]["measures"]
    assert measures["metadata"]["R@1"] > 0.5
    assert measures["all"]["queries"] == 5, "a judged query that was not asked counts"
    assert measures["all"]["R@10"] == pytest.approx(4 / 5)


def scores(path):
    lines = [line.split() for line in path.read_text().splitlines()]
    assert all(len(line) == 6 and line[1] == "Q0" for line in lines)
    return {(query, video): float(score) for query, _, video, _, score, _ in lines}


def test_ir_measures_repeats_our_figures_from_the_files(indexed, tmp_path):
    import ir_measures

    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.txt"
    queries.write_text('{"id": "q1", "text": "red"}\n{"id": "q2", "text": "moon cat"}\n')
    qrels.write_text("q1 0 v0 1\nq1 0 v3 2\nq2 0 v2 1\n")
    found = evaluation.evaluate(indexed.config(), queries, qrels, "index")
    save(found, tmp_path / "out", indexed.config())
    result = found.document
    again = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.RR],
        list(ir_measures.read_trec_qrels(str(tmp_path / "out" / "qrels.txt"))),
        list(ir_measures.read_trec_run(str(tmp_path / "out" / "run.trec"))),
    )
    assert result["measures"]["all"]["nDCG@10"] == pytest.approx(again[ir_measures.nDCG @ 10], abs=1e-9)
    assert result["measures"]["all"]["RR"] == pytest.approx(again[ir_measures.RR], abs=1e-9)


def test_search_explains_each_query_token(indexed):
    [first, *_] = search(indexed.config(), Query(text="red cat"), k=2, explained=True)
    assert (first.video_id, first.title) == ("v0", "red cat")
    assert {winner.modality for winner in first.winners} == {"metadata"}
    by_token = {winner.token: winner for winner in first.winners}
    assert by_token["red"].text == "red cat"
    assert sum(first.share_by_modality.values()) == pytest.approx(1)


def test_asking_for_more_videos_than_there_are_gives_all(indexed):
    assert len(search(indexed.config(), Query(text="moon"), k=50)) == 6


def test_readers_keep_their_release_until_the_next_is_built(fresh):
    fresh.rows = fresh.rows[:2]
    fresh.index()
    fresh.build()
    fresh.rows.append({"video_id": "new", "title": "moon"})
    fresh.index()
    assert "new" not in {found.video_id for found in search(fresh.config(), Query(text="moon"), k=9)}
    fresh.build()
    assert search(fresh.config(), Query(text="moon"), k=9)[0].video_id == "new"


def test_clips_rescored_on_float_embeddings_score_as_the_exact_path_does(indexed, tmp_path):
    queries, qrels = tmp_path / "queries.jsonl", tmp_path / "qrels.txt"
    queries.write_text('{"id": "q1", "text": "red cat"}\n{"id": "q2", "text": "moon"}\n')
    qrels.write_text("q1 0 v0 1\nq2 0 v2 1\n")
    for path in ("index", "exact"):
        config = indexed.config("search.rescored=100")
        save(evaluation.evaluate(config, queries, qrels, path), tmp_path / path, config)
    runs = {path: scores(tmp_path / path / "run.trec") for path in ("index", "exact")}
    assert runs["index"] == pytest.approx(runs["exact"], abs=1e-5)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (Wanted(videos=("v1", "v2")), {"v1", "v2"}),
        (Wanted(tags=("even",)), {"v0", "v2", "v4"}),
        (Wanted(videos=("v1", "v2"), tags=("even",)), {"v2"}),
        (Wanted(tags=("nowhere",)), set()),
        (Wanted(start_seconds=1e6), set()),
    ],
)
def test_a_filter_leaves_only_what_is_wanted(indexed, wanted, found):
    assert {hit.video_id for hit in search(indexed.config(), Query(text="moon"), k=9, wanted=wanted)} == found


def test_only_the_modalities_that_count_are_scored(indexed):
    hits = search(indexed.config("search.modalities=[metadata]"), Query(text="red cat"), k=1, explained=True)
    assert hits[0].share_by_modality.get("metadata") == pytest.approx(1)


def test_the_curve_of_an_index_says_what_recall_costs(indexed):
    curve = open_release(indexed.store).manifest["curve"]
    exhaustive = [p for p in curve["points"] if p["probes"] == 0 and p["depth"] == 10]
    assert max(p["recall"] for p in exhaustive) == 1.0, "8 bits, and 10 of the few clips there are"
    assert all(0 <= p["recall"] <= 1 and p["milliseconds"] > 0 for p in curve["points"])


def test_a_fuzzed_index_is_refused_by_its_checksums(indexed, tmp_path):
    """Bytes changed anywhere in an index either leave what is read as it was, or are refused; nothing is misread."""
    store, manifest = indexed.store, open_release(indexed.store).manifest
    whole = SegmentHolder(store, manifest, manifest["segments"], False)
    options = SearchOptions(5, make_scorer("sum_maxsim", MODALITY_NAMES), probes=0)
    queries = [np.eye(128, dtype=np.float32)[:3]]
    expected = whole.search(queries, options)
    folder = Path(store.uri) / "index" / manifest["index_id"]
    files = sorted(file for file in folder.rglob("*.lance") if file.is_file())
    rng, refused = np.random.default_rng(0), 0
    for file in files * 6:
        sound = file.read_bytes()
        damaged = bytearray(sound)
        damaged[int(rng.integers(len(sound)))] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            assert SegmentHolder(store, manifest, manifest["segments"], False).search(queries, options) == expected
        except StorageError as error:
            assert "build the index again" in str(error).lower()
            refused += 1
        finally:
            file.write_bytes(sound)
    assert refused > len(files)


def test_segments_on_one_holder_or_several_in_memory_or_on_disk_give_the_same_hits(indexed, cluster):
    manifest = open_release(indexed.store).manifest
    assert len(manifest["segments"]) > 1
    queries = [np.eye(128, dtype=np.float32)[:3], np.eye(128, dtype=np.float32)[5:6]]
    options = SearchOptions(5, make_scorer("modality_max", MODALITY_NAMES), probes=0)
    alone = SegmentHolder(indexed.store, manifest, manifest["segments"], False).search(queries, options)
    assert SegmentHolder(indexed.store, manifest, manifest["segments"], True).search(queries, options) == alone
    assert Fleet(indexed.store, manifest, 2, 0.5, False).search(queries, options) == alone


def test_codes_on_disk_and_a_gpu_exclude_each_other(indexed):
    manifest = open_release(indexed.store).manifest
    with pytest.raises(ConfigError, match="a GPU holds all codes"):
        SegmentHolder(indexed.store, manifest, manifest["segments"], True, "cuda")


def test_an_actor_that_is_killed_is_replaced_and_the_query_answered(indexed, cluster):
    manifest = open_release(indexed.store).manifest
    queries = [np.eye(128, dtype=np.float32)[:3]]
    options = SearchOptions(5, make_scorer("sum_maxsim", MODALITY_NAMES), probes=0)
    fleet = Fleet(indexed.store, manifest, 2, 0.5, False)
    expected = fleet.search(queries, options)
    cluster.kill(fleet.actors[0], no_restart=False)
    assert fleet.search(queries, options) == expected


@pytest.mark.slow
def test_a_codec_trained_by_several_actors_is_that_of_one(indexed, monkeypatch):
    codecs = []
    for min_tokens in (10**9, 1):
        monkeypatch.setattr(build_index_module, "MIN_ACTOR_TOKENS", min_tokens)
        _, manifest = indexed.build("build_index.segment_tokens=10", full=True)
        codecs.append(read_codec(indexed.store, manifest["codec"]))
    alone, together = codecs
    np.testing.assert_allclose(together.centroids.floats, alone.centroids.floats, atol=2 * alone.centroids.step)
    np.testing.assert_allclose(together.levels, alone.levels, rtol=1e-3)


def test_a_damaged_embedding_is_refused_and_its_video_named(fresh):
    fresh.rows = fresh.rows[:2]
    fresh.index()
    dataset = fresh.store.open(fresh.tokens)
    rows = dataset.to_table()
    embeddings = rows["embeddings"].to_pylist()
    at = next(i for i, tokens in enumerate(embeddings) if tokens)
    embeddings[at][0] = [float("nan")] * len(embeddings[at][0])
    column = pa.array(embeddings, rows["embeddings"].type)
    damaged = rows.set_column(rows.schema.get_field_index("embeddings"), "embeddings", column)
    lance.write_dataset(damaged, dataset.uri, mode="overwrite", data_storage_version=STORAGE_VERSION)
    with pytest.raises(StorageError, match=f"video {rows['video_id'][at].as_py()}, clip 0.*not finite"):
        fresh.build()


def test_an_index_of_another_encoder_is_refused(indexed):
    release = open_release(indexed.store)
    changed = release.__class__(**{**vars(release), "encoder_fingerprint": "other"})
    with pytest.raises(ModelError, match="scores would mean nothing"):
        changed.load_encoder(1)


def test_a_bare_backbone_is_refused_before_it_gives_random_scores(fresh, tiny_model):
    fresh.rows = fresh.rows[:1]
    with pytest.raises(ModelError, match="projection would be random"):
        fresh.index("encode.encoder=multivector", f"encode.multivector.model={tiny_model}/backbone")
