import numpy as np
import pytest

from operators import maxsim
from operators.errors import ShapeError
from operators.maxsim import SCORERS, blocks, modality_max, run_maxima, run_winners, score_clips, sum_maxsim


def unit(rng, *shape):
    values = rng.normal(size=shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def packed(seed, clips=7, dim=8):
    """Clips of 0 to 4 runs of 0 to 5 tokens."""
    rng = np.random.default_rng(seed)
    runs_per_clip = rng.integers(0, 5, clips)
    run_clip = np.repeat(np.arange(clips), runs_per_clip)
    run_lengths = rng.integers(0, 6, len(run_clip)).astype(np.int64)
    return unit(rng, run_lengths.sum(), dim), run_lengths, run_clip, clips


def by_hand(query, tokens, run_lengths, run_clip, num_clips, scorer):
    """The definition, in loops."""
    scores = np.full(num_clips, -np.inf)
    ends = np.cumsum(run_lengths)
    for clip in range(num_clips):
        runs = [tokens[ends[r] - run_lengths[r] : ends[r]] for r in np.flatnonzero(run_clip == clip) if run_lengths[r]]
        if not runs:
            continue
        if scorer == "sum_maxsim":
            scores[clip] = sum(max(float(q @ t) for run in runs for t in run) for q in query)
        else:
            scores[clip] = max(sum(max(float(q @ t) for t in run) for q in query) for run in runs)
    return scores


def test_an_example_worked_out_by_hand():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    lengths, clip = np.array([1, 2]), np.array([0, 0])
    maxima = run_maxima(query, tokens, lengths)
    np.testing.assert_allclose(maxima, [[1, 0.6], [0, 1]])
    assert sum_maxsim(maxima, clip, 1).tolist() == [2.0]
    assert modality_max(maxima, clip, 1) == pytest.approx([1.6])


def test_a_document_whose_best_similarity_is_negative_keeps_it():
    query, token = np.array([[1.0, 0.0]], np.float32), np.array([[-1.0, 0.0]], np.float32)
    lengths, clip = np.array([0, 1, 0]), np.array([0, 0, 0])
    for scorer in SCORERS:
        assert score_clips([query], token, lengths, clip, 1, scorer)[0].tolist() == [-1.0]


def test_a_clip_without_tokens_scores_minus_infinity():
    tokens, lengths, clip = np.eye(2, dtype=np.float32), np.array([2, 0]), np.array([0, 1])
    for scorer in SCORERS:
        scores = score_clips([tokens], tokens, lengths, clip, 3, scorer)[0]
        assert np.isneginf(scores[1:]).all()
        assert np.isfinite(scores[0])


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_the_definition(scorer, seed):
    tokens, lengths, clip, num_clips = packed(seed)
    query = unit(np.random.default_rng(seed + 100), 3, 8)
    scores = score_clips([query], tokens, lengths, clip, num_clips, scorer)[0]
    np.testing.assert_allclose(scores, by_hand(query, tokens, lengths, clip, num_clips, scorer), rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_plain_maxsim_bounds_the_modality_wise_score(seed):
    tokens, lengths, clip, num_clips = packed(seed, clips=40)
    query = unit(np.random.default_rng(seed), 4, 8)
    plain, by_modality = (score_clips([query], tokens, lengths, clip, num_clips, s)[0] for s in SCORERS)
    assert (plain >= by_modality - 1e-6).all()


def test_a_query_scores_the_same_alone_and_in_a_batch():
    tokens, lengths, clip, num_clips = packed(3)
    queries = [unit(np.random.default_rng(i), i + 1, 8) for i in range(4)]
    together = score_clips(queries, tokens, lengths, clip, num_clips, "sum_maxsim")
    for query, scores in zip(queries, together, strict=True):
        alone = score_clips([query], tokens, lengths, clip, num_clips, "sum_maxsim")[0]
        np.testing.assert_allclose(scores, alone, rtol=1e-6)  # BLAS may sum in another order


def test_the_size_of_a_block_does_not_change_the_scores(monkeypatch):
    tokens, lengths, clip, num_clips = packed(4, clips=30)
    query = unit(np.random.default_rng(1), 3, 8)
    whole = score_clips([query], tokens, lengths, clip, num_clips, "sum_maxsim")[0]
    monkeypatch.setattr(maxsim, "BLOCK_BYTES", 36)  # 3 tokens and 3 runs: runs and clips are cut
    np.testing.assert_allclose(
        score_clips([query], tokens, lengths, clip, num_clips, "sum_maxsim")[0], whole, rtol=1e-6
    )


def test_a_clip_scores_the_same_wherever_it_stands():
    tokens, lengths, clip, num_clips = packed(6, clips=12)
    queries = [unit(np.random.default_rng(2), 3, 8)]
    ends = np.cumsum(lengths)
    order = np.random.default_rng(0).permutation(num_clips)
    runs = [r for c in order for r in np.flatnonzero(clip == c)]
    moved = np.concatenate([tokens[ends[r] - lengths[r] : ends[r]] for r in runs])
    place = np.argsort(order)
    for scorer in SCORERS:
        before = score_clips(queries, tokens, lengths, clip, num_clips, scorer)[0]
        after = score_clips(queries, moved, lengths[runs], place[clip[runs]], num_clips, scorer)[0]
        np.testing.assert_allclose(after[place], before, rtol=1e-6)  # BLAS may sum in another order


def test_a_query_without_tokens_matches_nothing_and_leaves_its_batch_alone():
    tokens, lengths, clip, num_clips = packed(3)
    query = unit(np.random.default_rng(0), 2, 8)
    for scorer in SCORERS:
        nothing, something = score_clips([query[:0], query], tokens, lengths, clip, num_clips, scorer)
        assert np.isneginf(nothing).all()
        np.testing.assert_array_equal(something, score_clips([query], tokens, lengths, clip, num_clips, scorer)[0])


def test_no_queries_and_no_clips_score_nothing():
    tokens, lengths, clip, num_clips = packed(3)
    assert score_clips([], tokens, lengths, clip, num_clips, "sum_maxsim").shape == (0, num_clips)
    none = np.zeros(0, np.int64)
    assert score_clips([tokens[:2]], tokens[:0], none, none, 0, "sum_maxsim").shape == (1, 0)


@pytest.mark.parametrize("seed", range(3))
def test_winners_are_where_the_maxima_are(seed):
    tokens, lengths, _, _ = packed(seed)
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
        score_clips([tokens], tokens, np.array([1, 1]), np.array(clips), 2, "sum_maxsim")
