import gzip
import math

import pytest

from operators.diagonal import ceiling, diagonal
from operators.errors import ConfigError
from operators.measures import answer_depth, check_measures, mean, per_query, ranking
from operators.modality_selection import selection
from operators.schema import MODALITIES
from pipelines.runs import read_run, scores_of, write_run

JUDGED = {"q1": {"a": 2, "b": 1, "c": 0}, "q2": {"a": 1}, "unasked": {"b": 1}}
RUN = {"q1": {"c": 3.0, "b": 2.0, "a": 1.0}, "q2": {"b": 1.0, "c": 0.5}}


def test_measures_are_those_of_the_definitions():
    values = per_query(["nDCG@2", "R@2", "Success@2", "RR", "Judged@2"], JUDGED, RUN, depth=3)
    assert values["q1"]["nDCG@2"] == pytest.approx((1 / math.log2(3)) / (2 + 1 / math.log2(3)), abs=1e-6)
    assert (values["q1"]["R@2"], values["q1"]["Success@2"], values["q1"]["RR"]) == (0.5, 1, 0.5)
    assert (values["q2"]["R@2"], values["q2"]["Success@2"]) == (0, 0)
    assert (values["q1"]["Judged@2"], values["q2"]["Judged@2"]) == (1, 0)
    assert values["unasked"] == {"nDCG@2": 0, "R@2": 0, "Success@2": 0, "RR": 0, "Judged@2": 0}


def test_ranks_of_the_first_relevant_video_are_one_past_the_depth_where_there_is_none():
    values = per_query(["MdR", "MnR"], JUDGED, RUN, depth=3)
    assert [values[query]["MnR"] for query in JUDGED] == [2, 4, 4]
    assert mean("MnR", [2, 4, 9]) == 5 and mean("MdR", [2, 4, 9]) == 4
    assert math.isnan(mean("MnR", []))


def test_the_three_recalls_differ():
    judged, run = {"q": {"a": 1, "b": 1}}, {"q": {"a": 1.0, "x": 0.5}}
    values = per_query(["Success@2", "R@2", "PRRecall@1", "PRRecall@2"], judged, run, 2, {"q": 2})["q"]
    assert values == {"Success@2": 1, "R@2": 0.5, "PRRecall@1": 0, "PRRecall@2": 1}
    assert per_query(["PRRecall@2"], judged, run, 2, {"q": None})["q"] == {"PRRecall@2": 0}
    assert per_query(["PRRecall@2"], judged, run, 2)["q"] == {}, "without answers there is no value"
    assert answer_depth(["nDCG@10", "PRRecall@5", "PRRecall@20"]) == 20


def test_equal_scores_rank_by_descending_id_as_trec_eval_does():
    assert ranking({"a": 1.0, "c": 1.0, "b": 2.0}) == ["b", "c", "a"]
    judged = {"q": {"c": 1}}
    values = per_query(["RR", "MnR"], judged, {"q": {"a": 1.0, "c": 1.0}}, 2)["q"]
    assert values == {"RR": 1, "MnR": 1}


@pytest.mark.parametrize("name", ["nDCG@x", "accuracy", "PRRecall", "MdR@5"])
def test_unknown_measures_are_refused(name):
    with pytest.raises(ConfigError, match="use names of ir_measures"):
        check_measures(["nDCG@10", name])


def test_one_candidate_a_judgement_bounds_what_a_perfect_ranker_reaches():
    judged = {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"b": 1}}
    perfect = {"q1": {"a": 2.0, "b": 1.0}, "q2": {"a": 2.0, "b": 1.0}, "q3": {"b": 2.0, "a": 1.0}}
    values = diagonal(["R@1", "RR"], judged, perfect)
    assert values == {
        "q1#a": {"R@1": 0.5, "RR": 0.75},
        "q2#a": {"R@1": 0.5, "RR": 0.75},
        "q3#b": {"R@1": 1.0, "RR": 1.0},
    }
    assert ceiling(["R@1"], judged)["R@1"] == pytest.approx(2 / 3)
    wrong = diagonal(["RR", "nDCG@2", "R@2"], judged, {"q3": {"a": 2.0, "b": 1.0}})
    assert wrong["q3#b"] == {"RR": pytest.approx(1 / 3), "nDCG@2": 0, "R@2": 0}, "behind both copies of a"
    assert wrong["q1#a"] == {"RR": 0, "nDCG@2": 0, "R@2": 0}


def test_the_modality_that_wins_most_tokens_is_the_one_selected():
    wins = [("frame", (5, 1, 0, 0)), ("speech", (3, 2, 0, 0)), ("speech", (0, 4, 0, 1)), (None, (9, 0, 0, 0))]
    found = selection(wins, MODALITIES)
    assert found["pairs"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["any_accuracy"] == 1
    assert found["macro_precision"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["macro_recall"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found["predicted"]["frame"] == pytest.approx(2 / 3)
    assert selection([(None, (1, 0, 0, 0))], MODALITIES) is None


class Hit:
    def __init__(self, video_id, score):
        self.video_id, self.score = video_id, score


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
def test_a_run_is_read_as_it_was_written_and_its_scores_fall(tmp_path, name):
    run = scores_of({"q": [Hit("b", 1.0), Hit("a", 1.0), Hit("c", 0.25)]})
    assert list(run["q"]) == ["b", "a", "c"]
    assert run["q"]["b"] > run["q"]["a"] > run["q"]["c"]
    write_run(tmp_path / name, run, "tag")
    assert read_run(tmp_path / name) == run
    assert ranking(run["q"]) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q Q0 v 1 0.5 t\nq Q0 v 2 0.4 t\n", "line 2: v was found for query q before"),
        ("q Q0 v 1 0.5\n", "line 1: got 'q Q0 v 1 0.5'; a run is six columns"),
        ("q Q0 v 1 high t\n", "line 1"),
        ("q Q0 v 1 nan t\n", "line 1: the score nan"),
    ],
)
def test_a_run_that_cannot_be_used_names_its_line(tmp_path, text, said):
    (tmp_path / "run.trec").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_run(tmp_path / "run.trec")


def test_a_truncated_gzip_is_an_error(tmp_path):
    (tmp_path / "run.trec.gz").write_bytes(gzip.compress(b"q Q0 v 1 0.5 t\n" * 100)[:-9])
    with pytest.raises(ConfigError, match="cannot read the run"):
        read_run(tmp_path / "run.trec.gz")
