import numpy as np
import pytest

from operators.codec import ResidualCodec
from operators.maxsim import SCORERS, score_clips
from operators.segment import Segment, explain, search

ALL = 10**6


def corpus(num_clips=60, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    run_clip = np.repeat(np.arange(num_clips), 3)
    run_lengths = rng.integers(0, 5, len(run_clip)).astype(np.int64)
    run_lengths[:3] = 0  # the first clip has no tokens
    tokens = rng.normal(size=(run_lengths.sum(), dim)).astype(np.float32)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
    return tokens, run_lengths, run_clip, np.tile(np.array([0, 1, 3], np.uint8), num_clips), num_clips


def queries(count=4, dim=16, seed=5):
    rng = np.random.default_rng(seed)
    made = [rng.normal(size=(n + 1, dim)).astype(np.float32) for n in range(count)]
    return [query / np.linalg.norm(query, axis=1, keepdims=True) for query in made]


@pytest.fixture(scope="module")
def codec():
    tokens = corpus()[0]
    return ResidualCodec.train(tokens, tokens, 4, 8, seed=0)


def build(codec, clips=slice(None)):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    chosen = np.arange(num_clips)[clips]
    runs = np.flatnonzero(np.isin(run_clip, chosen))
    token_run = np.repeat(np.arange(len(run_lengths)), run_lengths)
    return Segment.build(
        tokens[np.isin(token_run, runs)],
        run_lengths[runs],
        run_clip[runs] - chosen[0],
        run_modality[runs],
        len(chosen),
        codec,
    )


@pytest.mark.parametrize("scorer", SCORERS)
def test_with_everything_probed_the_result_is_exact_scoring_of_the_decoded_tokens(codec, scorer):
    segment = build(codec)
    decoded = codec.decode(segment.centroid_ids, segment.codes)
    for query, (clips, scores) in zip(queries(), search(segment, codec, queries(), 10, scorer, ALL, ALL), strict=True):
        exact = score_clips([query], decoded, segment.run_lengths, segment.run_clip, segment.num_clips, scorer)[0]
        assert clips.tolist() == np.lexsort((np.arange(len(exact)), -exact))[:10].tolist()
        np.testing.assert_allclose(scores, exact[clips], rtol=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
def test_few_probes_may_miss_clips_but_never_change_the_score_of_one_found(codec, scorer):
    segment = build(codec)
    few = search(segment, codec, queries(), 5, scorer, 2, 12)
    exact = search(segment, codec, queries(), ALL, scorer, ALL, ALL)
    for (clips, scores), (all_clips, all_scores) in zip(few, exact, strict=True):
        known = dict(zip(all_clips.tolist(), all_scores.tolist(), strict=True))
        assert len(clips) == 5
        assert scores.tolist() == pytest.approx([known[clip] for clip in clips.tolist()], rel=1e-5)


@pytest.mark.parametrize("scorer", SCORERS)
def test_cutting_a_segment_in_two_does_not_change_the_ranking(codec, scorer):
    whole = search(build(codec), codec, queries(), 8, scorer, ALL, ALL)
    halves = [
        search(build(codec, part), codec, queries(), 8, scorer, ALL, ALL) for part in (slice(0, 25), slice(25, None))
    ]
    for q, (clips, _) in enumerate(whole):
        pairs = [
            (-s, c + offset)
            for half, offset in zip(halves, (0, 25), strict=True)
            for c, s in zip(*half[q], strict=True)
        ]
        assert [c for _, c in sorted(pairs)[:8]] == clips.tolist()


def test_a_clip_without_tokens_is_never_found(codec):
    for clips, _ in search(build(codec), codec, queries(), 60, "sum_maxsim", ALL, ALL):
        assert 0 not in clips.tolist()


def test_at_least_twice_k_candidates_are_rescored(codec):
    segment = build(codec)
    for starved, generous in zip(
        search(segment, codec, queries(), 10, "sum_maxsim", ALL, 1),
        search(segment, codec, queries(), 10, "sum_maxsim", ALL, 20),
        strict=True,
    ):
        assert starved[0].tolist() == generous[0].tolist()


def test_inverted_lists_hold_exactly_the_clips_of_each_centroid(codec):
    segment = build(codec)
    clip_of_token = np.repeat(segment.run_clip, segment.run_lengths)
    for centroid in range(8):
        held = segment.ivf_clips[segment.ivf_offsets[centroid] : segment.ivf_offsets[centroid + 1]]
        assert held.tolist() == sorted(set(clip_of_token[segment.centroid_ids == centroid].tolist()))


def test_a_segment_survives_being_taken_apart_and_any_change_breaks_its_checksum(codec):
    segment = build(codec)
    assert Segment.from_arrays(segment.to_arrays()).checksum() == segment.checksum()
    for name, array in segment.to_arrays().items():
        damaged = array.copy()
        damaged.flat[-1] += 1
        changed = Segment.from_arrays(segment.to_arrays() | {name: damaged})
        assert changed.checksum() != segment.checksum(), name


def test_an_explanation_names_each_query_token_s_best_token_and_modality():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), "sum_maxsim")
    assert winners.token.tolist() == [0, 1]
    assert shares == pytest.approx({0: 1 / 1.8, 3: 0.8 / 1.8})


def test_under_modality_max_only_the_winning_modality_explains():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), "modality_max")
    assert winners.token.tolist() == [2, 1]
    assert shares == pytest.approx({0: 0.0, 3: 1.0})
