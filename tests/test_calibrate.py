import numpy as np
import pytest

from operators.calibrate import Point, calibrate, choose, sample_queries
from operators.codec import ResidualCodec
from operators.maxsim import make_scorer
from operators.schema import MODALITIES
from operators.search import EXHAUSTIVE, Plan, Searcher
from operators.segment import Segment

SUM = make_scorer("sum_maxsim", MODALITIES)


@pytest.fixture(scope="module")
def curve():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(64, 24))[rng.integers(0, 64, 6000)] + 0.8 * rng.normal(size=(6000, 24))
    tokens = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float16)
    codec = ResidualCodec.train(tokens, tokens[:500], 2, 64, seed=0)
    segment = Segment.build(tokens, np.full(600, 10), np.arange(600), np.zeros(600, np.uint8), 600, codec)
    return calibrate(Searcher([segment], codec), tokens, SUM, seed=0, num_queries=24)


def recall(curve, **wanted):
    [found] = [p["recall"] for p in curve if wanted.items() <= p.items()]
    return found


def test_recall_grows_with_probes_candidates_and_rescoring(curve):
    by_probes = [recall(curve, probes=p, candidates=4096, rescored=0, depth=10) for p in (1, 4, 32)]
    by_candidates = [recall(curve, probes=32, candidates=c, rescored=0, depth=10) for c in (32, 128, 4096)]
    by_rescored = [recall(curve, probes=0, candidates=0, rescored=r, depth=10) for r in (0, 20, 100)]
    for rising in (by_probes, by_candidates, by_rescored):
        np.testing.assert_allclose(rising, sorted(rising), atol=0.01)  # chance aside
    assert by_probes[-1] == pytest.approx(recall(curve, probes=0, candidates=0, rescored=0, depth=10), abs=0.01)
    assert by_rescored[-1] > 0.99, "rescoring lifts recall to 1"


def test_fewer_than_twice_the_results_are_never_looked_at(curve):
    assert all(p["candidates"] >= 2 * p["depth"] for p in curve if p["probes"])


def test_the_cheapest_plan_that_reaches_the_recall_is_chosen(curve):
    costs = []
    for target in (0.5, 0.8, 0.95, 0.99):
        plan, rescored = choose(curve, target, 10)
        [point] = [p for p in curve if (p["probes"], p["candidates"], p["rescored"], p["depth"])
                   == (plan.probes, plan.candidates, rescored, 10)]  # fmt: skip
        assert point["recall"] >= target
        cheaper = [p["recall"] for p in curve if p["depth"] == 10 and p["milliseconds"] < point["milliseconds"]]
        assert all(found < target for found in cheaper)
        costs.append(point["milliseconds"])
    assert costs == sorted(costs)


def test_a_recall_that_nothing_reached_gets_the_best_there_is():
    points = [vars(Point(1, 32, 0, 10, 0.7, 1.0)), vars(Point(2, 64, 0, 10, 0.8, 2.0))]
    assert choose(points, 0.9, 10) == (Plan(2, 64), 0)


def test_candidates_grow_with_the_clips_and_the_results_beyond_those_measured():
    points = [vars(Point(4, 1000, 200, 100, 0.99, 1.0))]
    assert choose(points, 0.9, 50, growth=3) == (Plan(4, 3000), 100)
    assert choose(points, 0.9, 400) == (Plan(4, 4000), 800)


def test_an_index_without_a_curve_scores_every_code():
    assert choose([], 0.9, 10) == (EXHAUSTIVE, 0)


def test_queries_are_runs_of_a_clip_s_tokens():
    tokens = np.arange(60, dtype=np.float32).reshape(30, 2)
    queries = sample_queries(tokens, np.array([0, 10, 10, 30]), 5, seed=0)
    assert {clip for clip, _ in queries} == {0, 2}
    for clip, query in queries:
        first = int(query[0, 0]) // 2
        np.testing.assert_array_equal(query, tokens[first : first + len(query)])
        assert (0, None, 10)[clip] <= first and first + len(query) <= (10, None, 30)[clip]
