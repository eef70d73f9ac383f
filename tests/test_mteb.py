"""MTEB drives the engine: its own task class, its own measures, our index."""

import json
import sys

import ir_measures
import pytest

from cluster.store import MODALITIES, RUNS, VIDEOS, Store, token_table
from operators.errors import ConfigError
from pipelines.config import load
from pipelines.evaluate import evaluate
from pipelines.formats import to_mteb
from pipelines.mteb_adapter import MaxreelSearch, to_corpus_id, to_video_id
from pipelines.release import open_release
from tests.media_files import make_video

CORPUS = {
    "plain": ("A walk", "the dog walks by the river with a red ball"),
    "with space": ("A swim", "a dog swims across the river"),
    "100%": ("", "the cat sleeps by the fire all day"),
    "50%20off": ("Sale", "red shoes at half price, all day"),
    "ünï/코드": ("Moon", "the moon over the river, red at the horizon"),
    "tab\there": ("Market", "apples and shoes at the market"),
    "d7": ("Fire", "a fire by the river, a dog barks"),
    "d8": ("", "the market opens at the horizon of the day"),
    "d9": ("Cats", "two cats and a dog share a ball"),
    "d10": ("River", "the river"),
    "d11": ("Night", "no moon, no fire, a long night"),
    "d12": ("Price", "the price of apples"),
}
QUERIES = {
    "q1": "dog by the river",
    "q 2": "red ball",
    "q3": "market day apples",
    "q4": "moon and fire",
    "q5": "cat asleep",
    "q6": "half price shoes",
}
QRELS = {
    "q1": {"plain": 2, "with space": 2, "d7": 1, "d10": 0},
    "q 2": {"plain": 1, "d9": 1},
    "q3": {"tab\there": 2, "d12": 1, "d8": 1},
    "q4": {"d11": 1, "ünï/코드": 1},
    "q5": {"100%": 1, "d9": 1},
    "q6": {"50%20off": 1},
}


@pytest.fixture(scope="module")
def mteb():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # a request to the hub fails the test
        yield pytest.importorskip("mteb", reason="mteb is not installed: pip install -c constraints.txt '.[mteb]'")


def corpus_of(documents=CORPUS):
    from datasets import Dataset

    return Dataset.from_list([{"id": i, "title": title, "text": text} for i, (title, text) in documents.items()])


def queries_of(queries=QUERIES):
    from datasets import Dataset

    return Dataset.from_list([{"id": i, "text": text} for i, text in queries.items()])


@pytest.fixture(scope="module")
def task(mteb):
    """A retrieval task of MTEB whose data is made here."""
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    class TwelveDocuments(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="TwelveDocuments",
            description="Twelve documents and six queries.",
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "made/here", "revision": "1"},
        )

        def load_data(self, **_):
            split = RetrievalSplitData(corpus=corpus_of(), queries=queries_of(), relevant_docs=QRELS, top_ranked=None)
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return TwelveDocuments()


def config(*assignments):
    settings = ["encode.encoder=lexical", "search.probes=0", "search.rescored=0"]
    return load([], [*settings, *assignments])


@pytest.fixture(scope="module")
def evaluated(task, mteb, cluster, tmp_path_factory):
    """The model, MTEB's scores of it, and the run that MTEB kept."""
    folder = tmp_path_factory.mktemp("mteb")
    model = MaxreelSearch(config(), folder / "stores")
    result = mteb.evaluate(
        model, task, cache=None, prediction_folder=folder, show_progress_bar=False, co2_tracker=False
    )
    [scores] = result.task_results[0].scores["test"]
    predictions = json.loads((folder / "TwelveDocuments_predictions.json").read_text())
    return model, scores, predictions["default"]["test"], folder


def of_task(task):
    return {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}


def store_of(folder):
    return Store.at(str(folder / "stores" / "TwelveDocuments-test-default" / "store"))


MEASURES = {"nDCG@10": "ndcg_at_10", "AP@10": "map_at_10", "R@3": "recall_at_3", "P@5": "precision_at_5"}
MEASURES |= {"RR@10": "mrr_at_10", "Success@1": "hit_rate_at_1", "nDCG@1": "ndcg_at_1"}


def test_mteb_scores_the_engine_as_ir_measures_scores_its_run(evaluated):
    _, scores, run, _ = evaluated
    assert set(run) == set(QUERIES)
    assert {document for ranked in run.values() for document in ranked} <= set(CORPUS)
    ours = ir_measures.calc_aggregate([ir_measures.parse_measure(name) for name in MEASURES], QRELS, run)
    expected = {MEASURES[str(measure)]: pytest.approx(value, abs=1e-5) for measure, value in ours.items()}
    assert {name: scores[name] for name in expected} == expected
    assert 0.5 < scores["ndcg_at_10"] == scores["main_score"] < 1, "neither luck nor a trivial task"


def test_mteb_scores_the_engine_as_our_own_evaluation_does(evaluated, tmp_path):
    _, scores, _, folder = evaluated
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"id": to_video_id(i), "text": text}) + "\n" for i, text in QUERIES.items())
    )
    (tmp_path / "qrels.txt").write_text(
        "".join(f"{to_video_id(q)} 0 {to_video_id(d)} {grade}\n" for q, of in QRELS.items() for d, grade in of.items())
    )
    settings = config(f"evaluate.measures=[{', '.join(MEASURES)}]").model_copy(update={"store": store_of(folder).uri})
    found = evaluate(settings, tmp_path / "queries.jsonl", tmp_path / "qrels.txt").document["measures"]["all"]
    assert {name: found[name] for name in MEASURES} == {
        name: pytest.approx(scores[of_mteb], abs=1e-5) for name, of_mteb in MEASURES.items()
    }


def test_indexing_a_corpus_again_does_what_changed_and_nothing_else(task, mteb, cluster, tmp_path):
    model, store = MaxreelSearch(config(), tmp_path / "stores"), store_of(tmp_path)

    def index(documents):
        model.index(corpus_of(documents), **of_task(task), encode_kwargs={}, num_proc=None)
        tables = (VIDEOS, MODALITIES, token_table("lexical"))
        versions = {name: store.open(name).version for name in tables}
        last = max(store.open(RUNS).to_table().to_pylist(), key=lambda row: row["started"])
        return versions, open_release(store).release_id, json.loads(last["summary"])["counts"]

    versions, release_id, _ = index(CORPUS)
    assert index(CORPUS)[:2] == (versions, release_id)
    fewer = dict(list(CORPUS.items())[:5]) | {"plain": ("A walk", "rewritten")}
    _, newer, counts = index(fewer)
    wanted = {"new": 0, "changed": 1, "gone": 7, "unchanged": 4, "extract": 1, "encode": 1}
    assert newer > release_id
    assert {name: counts.get(name, 0) for name in wanted} == wanted


def test_given_documents_are_ranked_all_and_no_others(evaluated, task):
    model, *_ = evaluated
    given = {"q1": ["d12", "with space", "100%"], "q 2": ["d10"], "q3": []}
    found = model.search(queries_of(), **of_task(task), top_k=10, encode_kwargs={}, top_ranked=given, num_proc=None)
    assert {query: set(ranked) for query, ranked in found.items() if ranked} == {
        "q1": {"d12", "with space", "100%"},
        "q 2": {"d10"},
    }
    assert max(found["q1"], key=found["q1"].get) == "with space"
    assert set(found) == set(QUERIES), "MTEB leaves queries out of its means that a run lacks"


def test_no_more_documents_are_returned_than_asked_for(evaluated, task):
    model, _, run, _ = evaluated
    found = model.search(queries_of(), **of_task(task), top_k=3, encode_kwargs={}, num_proc=None)
    assert found == {
        query: dict(sorted(ranked.items(), key=lambda item: -item[1])[:3]) for query, ranked in run.items()
    }


def test_instructions_follow_the_text_of_queries(evaluated, task, mteb):
    from datasets import Dataset

    model, *_ = evaluated
    asked = [{"id": "a", "text": "shoes", "instruction": "moon"}, {"id": "b", "text": "shoes", "instruction": None}]
    asked.append({"id": "c", "text": "shoes moon", "instruction": ""})
    found = model.search(Dataset.from_list(asked), **of_task(task), top_k=5, encode_kwargs={}, num_proc=None)
    assert found["a"] == found["c"] != found["b"]


def test_videos_are_taken_from_bytes_and_paths(task, mteb, cluster, tmp_path):
    from datasets import Dataset, Video

    make_video(tmp_path / "one.mp4", levels=[40] * 10)
    make_video(tmp_path / "two.mp4", levels=[80] * 20)
    rows = [
        {"id": "bytes", "video": {"bytes": (tmp_path / "one.mp4").read_bytes(), "path": None}, "title": "one"},
        {"id": "path", "video": {"bytes": None, "path": str(tmp_path / "two.mp4")}, "title": "two"},
    ]
    plain = Dataset.from_list(rows)
    model, store = MaxreelSearch(config("extract.modalities=[metadata]"), tmp_path / "stores"), store_of(tmp_path)
    versions = set()
    for corpus in (plain, plain.cast_column("video", Video())):
        model.index(corpus, **of_task(task), encode_kwargs={}, num_proc=None)
        versions.add(store.open(VIDEOS).version)
    videos = {row["video_id"]: row for row in store.open(VIDEOS).to_table().to_pylist()}
    assert len(versions) == 1, "the same bytes are the same video"
    assert videos["path"]["uri"] == str(tmp_path / "two.mp4")
    assert videos["path"]["duration_seconds"] == pytest.approx(2 * videos["bytes"]["duration_seconds"])


@pytest.mark.parametrize("corpus_id", [*CORPUS, "%", "%41", "a\u2028b\x00\x85", "x" * 512])
def test_ids_are_carried_through_run_files_and_back(corpus_id):
    video_id = to_video_id(corpus_id)
    assert video_id.split() == [video_id]
    assert video_id.isprintable()
    assert to_corpus_id(video_id) == corpus_id


@pytest.mark.parametrize("corpus_id", ["", "x" * 513, " " * 171])
def test_ids_that_run_files_cannot_carry_are_refused(corpus_id):
    with pytest.raises(ConfigError, match="empty or too long"):
        to_video_id(corpus_id)


def test_what_changes_results_changes_the_revision_they_are_kept_under(mteb, tmp_path):
    def revision(*assignments):
        return MaxreelSearch(config(*assignments), tmp_path).mteb_model_meta.revision

    settings = ["encode.lexical.dim=32", "build_index.nbits=2", "search.scorer=modality_max", "extract.clip_seconds=30"]
    assert len({revision(), *map(revision, settings)}) == 1 + len(settings)
    assert revision("encode.resources.actors=1", "search.actors=2", "search.device=cuda", "store=/x") == revision()


def test_columns_that_cannot_be_used_are_refused(task, mteb, tmp_path):
    from datasets import Dataset

    model = MaxreelSearch(config(), tmp_path)
    with pytest.raises(ConfigError, match="TwelveDocuments has the columns id, image; what can be indexed is text"):
        model.index(Dataset.from_dict({"id": ["a"], "image": ["b"]}), **of_task(task))
    for column, value in (("image", "b"), ("text", [{"role": "user", "content": "b"}])):
        with pytest.raises(ConfigError, match=f"queries must be text.*got id, {column}"):
            model.search(Dataset.from_dict({"id": ["a"], column: [value]}), **of_task(task), top_k=1)


def test_without_mteb_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt '.\[mteb\]'"):
        MaxreelSearch(config(), tmp_path)


def test_mteb_reads_the_result_that_an_evaluation_writes(mteb, tmp_path):
    from mteb.results import TaskResult

    measures = {"all": {"queries": 6, "nDCG@10": 0.75, "RR": 0.5}}
    document = {"created": "2026-11-21T10:00:00+00:00", "primary_measure": "nDCG@10", "measures": measures}
    (tmp_path / "mteb.json").write_text(json.dumps(to_mteb(document, "cacm")))
    result = TaskResult.from_disk(tmp_path / "mteb.json")
    assert (result.task_name, result.get_score(), result.date.year) == ("cacm", 0.75, 2026)
    assert result.scores["test"][0]["ndcg_at_10"] == 0.75
