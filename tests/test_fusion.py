import numpy as np
import pytest

from cluster.exact import Pool
from operators.fusion import reciprocal_rank, route, weighted_mean
from pipelines.config import SearchConfig
from pipelines.systems import scorers, systems

NONE = -np.inf
SCORES = np.array([[3.0, NONE], [2.0, 10.0], [1.0, 20.0]])


def test_the_mean_puts_each_modality_between_0_and_1_and_counts_a_lacking_one_as_0():
    assert weighted_mean(SCORES, np.ones(2)) == pytest.approx([0.5, 0.25, 0.5])
    assert weighted_mean(SCORES, np.array([3.0, 1.0])) == pytest.approx([0.75, 0.375, 0.25])
    assert weighted_mean(SCORES, np.zeros(2)) == pytest.approx([0.5, 0.25, 0.5]), "nothing learned: all alike"


def test_equal_scores_are_all_the_best_there_is_and_an_empty_modality_is_nothing():
    assert weighted_mean(np.array([[1.0, NONE], [1.0, NONE]]), np.ones(2)) == pytest.approx([0.5, 0.5])


def test_reciprocal_ranks_are_added_by_weight():
    found = reciprocal_rank(SCORES, np.array([1.0, 1.0]))
    assert found == pytest.approx([0.5 / 61, 0.5 / 62 + 0.5 / 62, 0.5 / 63 + 0.5 / 61])
    alone = reciprocal_rank(SCORES, np.array([1.0, 0.0]))
    assert alone == pytest.approx([1 / 61, 1 / 62, 1 / 63])


def test_a_query_is_routed_to_the_modality_whose_first_video_stands_out():
    assert route(np.array([[5.0, 9.0], [4.0, 1.0], [3.0, 1.1], [2.0, 0.9]])) == 1
    assert route(np.array([[1.0, NONE], [1.0, 4.0], [0.5, NONE]])) == 0, "one video says nothing"


def pools(num_queries=10):
    """Frames rank v0 first, metadata v1; speech and screen text are lacking. Metadata is right."""
    names = list(scorers(SearchConfig()))
    scores = np.full((2, len(names)), -np.inf, np.float32)
    for i, name in enumerate(names):
        both = name.startswith("without") or ":" not in name
        scores[:, i] = [1.0, 0.5] if both or name == "only:frame" else [-np.inf] * 2
        if name == "only:metadata":
            scores[:, i] = [0.2, 0.9]
    places = np.zeros(scores.shape, np.int32), np.zeros(scores.shape), np.ones(scores.shape)
    pool = Pool(np.array(["v0", "v1"], object), scores, *places)
    return {f"q{i}": pool for i in range(num_queries)}


def first(found, name):
    [system] = [s for s in found if s.name == name]
    return {query_id: next(iter(videos)) for query_id, videos in system.run.items()}


def test_fusions_learn_from_other_queries_only():
    asked = pools()
    right = {"only:frame": dict.fromkeys(asked, 0.0), "only:metadata": dict.fromkeys(asked, 1.0)}
    right |= {"only:speech": dict.fromkeys(asked, 0.0), "only:screen_text": dict.fromkeys(asked, 0.0)}
    targets = dict.fromkeys(asked, "metadata")
    found = systems(SearchConfig(), asked, right, targets, 10)
    for name in ("best modality", "weighted mean", "weighted RRF", "oracle router"):
        assert set(first(found, name).values()) == {"v1"}, name
    # Were q0's own outcome looked at, metadata would be best for it, too.
    only_q0 = right | {
        "only:metadata": dict.fromkeys(asked, 0.0) | {"q0": 1.0},
        "only:frame": dict.fromkeys(asked, 0.1),
    }
    learned = first(systems(SearchConfig(), asked, only_q0, targets, 10), "best modality")
    assert learned["q0"] == "v0"
    assert learned["q1"] == "v1", "q0 is one of its others, and weighs more than 0.1"


def test_systems_stand_in_the_order_of_their_kinds_and_a_lacking_target_leaves_the_oracle_out():
    found = systems(
        SearchConfig(), pools(), {f"only:{m}": {} for m in ("frame", "speech", "screen_text", "metadata")}, {}, 5
    )
    kinds = [system.kind for system in found]
    assert kinds == sorted(kinds, key=["late interaction", "fusion", "single modality", "ablation"].index)
    assert "oracle router" not in {system.name for system in found}
    assert first(found, "only:metadata") == {f"q{i}": "v1" for i in range(10)}
