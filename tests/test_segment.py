import numpy as np
import pytest

from operators.codec import ResidualCodec
from operators.errors import ShapeError
from operators.maxsim import make_scorer, score_clips
from operators.schema import MODALITIES
from operators.segment import Segment, checksum, explain

SCORERS = {
    "sum_maxsim": make_scorer("sum_maxsim", MODALITIES),
    "modality_max": make_scorer("modality_max", MODALITIES),
    "only speech and metadata": make_scorer("sum_maxsim", MODALITIES, only=["speech", "metadata"]),
}


def corpus(num_clips=60, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    run_clip = np.repeat(np.arange(num_clips), 3)
    run_lengths = rng.integers(0, 5, len(run_clip)).astype(np.int64)
    run_lengths[:3] = 0  # the first clip has no tokens
    tokens = rng.normal(size=(run_lengths.sum(), dim)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    return tokens, run_lengths, run_clip, np.tile(np.array([0, 1, 3], np.uint8), num_clips), num_clips


@pytest.fixture(scope="module")
def codec():
    tokens = corpus()[0]
    return ResidualCodec.train(tokens, tokens, 4, 8, seed=0)


def test_a_segment_survives_being_taken_apart_and_any_change_breaks_its_checksum(codec):
    arrays = Segment.build(*corpus(), codec).to_arrays()
    assert checksum(Segment.from_arrays(arrays).to_arrays()) == checksum(arrays)
    for name, array in arrays.items():
        damaged = array.copy()
        damaged.flat[-1] += 1
        assert checksum(arrays | {name: damaged}) != checksum(arrays), name


def test_the_same_bytes_as_another_type_or_shape_have_another_checksum(codec):
    arrays = Segment.build(*corpus(), codec).to_arrays()
    for changed in (
        {"run_clip": arrays["run_clip"].view(np.uint64)},
        {"residuals": arrays["residuals"].reshape(-1, 4)},
    ):
        assert checksum(arrays | changed) != checksum(arrays)


def test_the_callers_types_do_not_change_a_segment(codec):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    narrow = Segment.build(
        tokens, run_lengths.astype(np.int32), run_clip.astype(np.int32), run_modality.astype(int), num_clips, codec
    )
    assert checksum(narrow.to_arrays()) == checksum(Segment.build(*corpus(), codec).to_arrays())


def test_tokens_runs_and_clips_that_do_not_fit_are_refused(codec):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    with pytest.raises(ShapeError, match="add up"):
        Segment.build(tokens[1:], run_lengths, run_clip, run_modality, num_clips, codec)
    with pytest.raises(ShapeError, match="must not fall"):
        Segment.build(tokens, run_lengths, run_clip[::-1], run_modality, num_clips, codec)
    with pytest.raises(ShapeError, match=r"\[0, 59\)"):
        Segment.build(tokens, run_lengths, run_clip, run_modality, num_clips - 1, codec)
    with pytest.raises(ShapeError, match=r"\(179,\) modalities"):
        Segment.build(tokens, run_lengths, run_clip, run_modality[1:], num_clips, codec)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.0])
def test_a_token_without_a_direction_is_refused_and_its_clip_named(codec, wrong):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    at = int(run_lengths[:60].sum())  # the first token of clip 20 or of one after it
    tokens[at] = wrong
    clip = run_clip[np.searchsorted(np.cumsum(run_lengths), at, side="right")]
    with pytest.raises(ShapeError, match=f"token {at}, of clip {clip}, is zero or not finite"):
        Segment.build(tokens, run_lengths, run_clip, run_modality, num_clips, codec)


def test_an_explanation_names_each_query_token_s_best_token_and_modality():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), SCORERS["sum_maxsim"])
    assert winners.token.tolist() == [0, 1]
    assert winners.modality.tolist() == [0, 3]
    assert winners.score.tolist() == pytest.approx([1.0, 0.8])
    assert shares == pytest.approx({0: 1 / 1.8, 3: 0.8 / 1.8})


def test_under_modality_max_only_the_winning_modality_explains():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), SCORERS["modality_max"])
    assert winners.token.tolist() == [2, 1]
    assert winners.modality.tolist() == [3, 3]
    assert shares == pytest.approx({0: 0.0, 3: 1.0})


@pytest.mark.parametrize("scorer", SCORERS.values(), ids=SCORERS)
def test_an_explanation_adds_up_to_the_score(scorer):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    ends = np.cumsum(run_lengths)
    query = np.random.default_rng(5).normal(size=(4, 16)).astype(np.float32)
    scores = score_clips([query], tokens, run_lengths, run_clip, run_modality, num_clips, scorer)[0]
    for clip in np.flatnonzero(np.isfinite(scores)):
        runs = np.flatnonzero(run_clip == clip)
        of_clip = tokens[ends[runs[0]] - run_lengths[runs[0]] : ends[runs[-1]]]
        winners, shares = explain(query, of_clip, run_lengths[runs], run_modality[runs], scorer)
        np.testing.assert_allclose(winners.score.sum(), scores[clip], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.einsum("qd,qd->q", query, of_clip[winners.token]), winners.score, atol=1e-5)
        assert sum(shares.values()) == pytest.approx(1)


def test_a_score_of_zero_has_no_shares_and_a_clip_without_tokens_no_explanation():
    query, token = np.array([[1, 0], [-1, 0]], np.float32), np.array([[1, 0]], np.float32)
    one, modality = np.array([1]), np.array([2], np.uint8)
    assert explain(query, token, one, modality, SCORERS["sum_maxsim"])[1] == {2: 0.0}
    with pytest.raises(ShapeError, match="without tokens"):
        explain(query, token[:0], np.array([0]), modality, SCORERS["sum_maxsim"])
    with pytest.raises(ShapeError, match="without tokens"):
        explain(query, token, one, modality, SCORERS["only speech and metadata"])
