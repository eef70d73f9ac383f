import numpy as np
import pytest

from operators import maxsim
from operators.errors import ConfigError, ShapeError
from operators.maxsim import blocks, make_scorer, run_maxima, run_winners, score_clips

NAMES = ("frame", "speech", "screen_text", "metadata")
SUM = make_scorer("sum_maxsim", NAMES)
MAX = make_scorer("modality_max", NAMES)
WEIGHTED = make_scorer("modality_weighted", NAMES, weights={"frame": 0.5, "speech": 2})
GROUPS = make_scorer("group_sum", NAMES, groups=[["frame"], ["speech", "metadata"]])
ONLY = make_scorer("sum_maxsim", NAMES, only=["speech", "screen_text"])
SCORERS = [SUM, MAX, WEIGHTED, GROUPS, ONLY]


def unit(rng, *shape):
    values = rng.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def packed(seed, clips=7, dim=8):
    """Clips of 0 to 4 runs of 0 to 5 tokens."""
    rng = np.random.default_rng(seed)
    runs_per_clip = rng.integers(0, 5, clips)
    run_clip = np.repeat(np.arange(clips), runs_per_clip)
    run_lengths = rng.integers(0, 6, len(run_clip)).astype(np.int64)
    run_modality = np.concatenate([np.zeros(0), *(np.arange(n) for n in runs_per_clip)]).astype(np.uint8)
    return unit(rng, run_lengths.sum(), dim), run_lengths, run_clip, run_modality, clips


def by_hand(query, tokens, run_lengths, run_clip, run_modality, num_clips, scorer):
    """The definition, in loops."""
    scores = np.full(num_clips, -np.inf)
    ends = np.cumsum(run_lengths)
    for clip in range(num_clips):
        groups = {}
        for r in np.flatnonzero(run_clip == clip):
            if run_lengths[r] and scorer.group_of[run_modality[r]] >= 0:
                groups.setdefault(scorer.group_of[run_modality[r]], []).extend(
                    tokens[ends[r] - run_lengths[r] : ends[r]]
                )
        sums = [
            scorer.weights[group] * sum(max(float(q @ t) for t in held) for q in query)
            for group, held in groups.items()
        ]
        if sums:
            scores[clip] = max(sums) if scorer.combine == "max" else sum(sums)
    return scores


def test_an_example_worked_out_by_hand():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    lengths, clip, modality = np.array([1, 2]), np.array([0, 0]), np.array([0, 1], np.uint8)
    np.testing.assert_allclose(run_maxima(query, tokens, lengths), [[1, 0.6], [0, 1]])

    def score(scorer):
        return score_clips([query], tokens, lengths, clip, modality, 1, scorer)[0, 0]

    assert score(SUM) == 2.0
    assert score(MAX) == pytest.approx(1.6)
    assert score(WEIGHTED) == pytest.approx(0.5 * 1.0 + 2 * 1.6)
    assert score(GROUPS) == pytest.approx(1.0 + 1.6)
    assert score(ONLY) == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mean_maxsim", NAMES), "no such scorer: mean_maxsim; allowed are sum_maxsim"),
        (("sum_maxsim", NAMES, None, None, ["sound"]), "no such modality: sound; allowed are frame"),
        (("modality_weighted", NAMES, {"sound": 1.0}), "no such modality: sound"),
        (("group_sum", NAMES, None, [["frame"], ["frame"]]), "each in one group at most"),
        (("group_sum", NAMES), "group_sum takes groups"),
    ],
)
def test_scorers_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_scorer(*arguments)


def test_a_document_whose_best_similarity_is_negative_keeps_it():
    query, token = np.array([[1.0, 0.0]], np.float32), np.array([[-1.0, 0.0]], np.float32)
    lengths, clip, modality = np.array([0, 1, 0]), np.array([0, 0, 0]), np.array([0, 1, 2], np.uint8)
    for scorer in (SUM, MAX, GROUPS, ONLY):
        assert score_clips([query], token, lengths, clip, modality, 1, scorer)[0].tolist() == [-1.0]


def test_a_clip_without_tokens_scores_minus_infinity():
    tokens, lengths, clip = np.eye(2, dtype=np.float32), np.array([2, 0]), np.array([0, 1])
    for scorer in SCORERS:
        scores = score_clips([tokens], tokens, lengths, clip, np.array([1, 1], np.uint8), 3, scorer)[0]
        assert np.isneginf(scores[1:]).all()
        assert np.isfinite(scores[0])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_definition(scorer, seed):
    tokens, lengths, clip, modality, num_clips = packed(seed)
    query = unit(np.random.default_rng(seed + 100), 3, 8)
    scores = score_clips([query], tokens, lengths, clip, modality, num_clips, scorer)[0]
    np.testing.assert_allclose(scores, by_hand(query, tokens, lengths, clip, modality, num_clips, scorer), rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_plain_maxsim_bounds_the_modality_wise_score(seed):
    tokens, lengths, clip, modality, num_clips = packed(seed, clips=40)
    query = unit(np.random.default_rng(seed), 4, 8)
    plain, by_modality = (score_clips([query], tokens, lengths, clip, modality, num_clips, s)[0] for s in (SUM, MAX))
    assert (plain >= by_modality - 1e-6).all()


def test_a_query_scores_the_same_alone_and_in_a_batch():
    tokens, lengths, clip, modality, num_clips = packed(3)
    queries = [unit(np.random.default_rng(i), i + 1, 8) for i in range(4)]
    together = score_clips(queries, tokens, lengths, clip, modality, num_clips, SUM)
    for query, scores in zip(queries, together, strict=True):
        alone = score_clips([query], tokens, lengths, clip, modality, num_clips, SUM)[0]
        np.testing.assert_allclose(scores, alone, rtol=1e-6)  # BLAS may sum in another order


def test_the_size_of_a_block_does_not_change_the_scores(monkeypatch):
    tokens, lengths, clip, modality, num_clips = packed(4, clips=30)
    query = unit(np.random.default_rng(1), 3, 8)
    whole = score_clips([query], tokens, lengths, clip, modality, num_clips, SUM)[0]
    monkeypatch.setattr(maxsim, "BLOCK_BYTES", 36)  # 3 tokens and 3 runs: runs and clips are cut
    np.testing.assert_allclose(
        score_clips([query], tokens, lengths, clip, modality, num_clips, SUM)[0], whole, rtol=1e-6
    )


def test_a_clip_scores_the_same_wherever_it_stands():
    tokens, lengths, clip, modality, num_clips = packed(6, clips=12)
    queries = [unit(np.random.default_rng(2), 3, 8)]
    ends = np.cumsum(lengths)
    order = np.random.default_rng(0).permutation(num_clips)
    runs = [r for c in order for r in np.flatnonzero(clip == c)]
    moved = np.concatenate([tokens[ends[r] - lengths[r] : ends[r]] for r in runs])
    place = np.argsort(order)
    for scorer in SCORERS:
        before = score_clips(queries, tokens, lengths, clip, modality, num_clips, scorer)[0]
        after = score_clips(queries, moved, lengths[runs], place[clip[runs]], modality[runs], num_clips, scorer)[0]
        np.testing.assert_allclose(after[place], before, rtol=1e-6)  # BLAS may sum in another order


def test_a_query_without_tokens_matches_nothing_and_leaves_its_batch_alone():
    tokens, lengths, clip, modality, num_clips = packed(3)
    query = unit(np.random.default_rng(0), 2, 8)
    for scorer in SCORERS:
        nothing, something = score_clips([query[:0], query], tokens, lengths, clip, modality, num_clips, scorer)
        assert np.isneginf(nothing).all()
        np.testing.assert_array_equal(
            something, score_clips([query], tokens, lengths, clip, modality, num_clips, scorer)[0]
        )


def test_no_queries_and_no_clips_score_nothing():
    tokens, lengths, clip, modality, num_clips = packed(3)
    assert score_clips([], tokens, lengths, clip, modality, num_clips, SUM).shape == (0, num_clips)
    none = np.zeros(0, np.int64)
    assert score_clips([tokens[:2]], tokens[:0], none, none, none.astype(np.uint8), 0, SUM).shape == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_winners_are_where_the_maxima_are(seed):
    tokens, lengths, *_ = packed(seed)
    query = unit(np.random.default_rng(seed + 50), 3, 8)
    winners, maxima = run_winners(query, tokens, lengths)
    np.testing.assert_allclose(maxima, run_maxima(query, tokens, lengths), rtol=1e-6)
    ends = np.cumsum(lengths)
    for run, length in enumerate(lengths):
        if length == 0:
            assert (winners[:, run] == -1).all()
            continue
        assert ((ends[run] - length <= winners[:, run]) & (winners[:, run] < ends[run])).all()
        np.testing.assert_allclose(np.einsum("qd,qd->q", query, tokens[winners[:, run]]), maxima[:, run], rtol=1e-5)


def test_the_first_of_equal_tokens_wins():
    tokens = np.array([[0, 1], [1, 0], [1, 0]], np.float32)
    assert run_winners(tokens[1:2], tokens, np.array([0, 3]))[0].tolist() == [[-1, 1]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([2, 2, 2], [(0, 2), (2, 3)]),
        ([9, 1, 9], [(0, 1), (1, 2), (2, 3)]),  # larger than the budget: alone
        ([0, 4, 0, 0, 1], [(0, 4), (4, 5)]),
        ([], []),
    ],
)
def test_blocks_hold_as_much_as_the_budget_allows(sizes, expected):
    assert list(blocks(np.array(sizes, np.int64), 4)) == expected


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"\(1, 3\)"):
        run_maxima(np.ones((1, 3), np.float32), np.ones((2, 2), np.float32), np.array([2]))
    with pytest.raises(ShapeError, match="add up to 3"):
        run_maxima(np.ones((1, 2), np.float32), np.ones((2, 2), np.float32), np.array([3]))
    with pytest.raises(ShapeError, match="a run length is -1"):
        run_maxima(np.ones((1, 2), np.float32), np.ones((2, 2), np.float32), np.array([3, -1]))


@pytest.mark.parametrize(
    ("clips", "message"),
    [([0], r"\(1,\) clips"), ([1, 0], "must not fall"), ([0, 2], r"\[0, 2\)"), ([-1, 0], "lie in")],
)
def test_clips_that_do_not_fit_the_runs_are_refused(clips, message):
    tokens = np.eye(2, dtype=np.float32)
    with pytest.raises(ShapeError, match=message):
        score_clips([tokens], tokens, np.array([1, 1]), np.array(clips), np.zeros(len(clips), np.uint8), 2, SUM)
