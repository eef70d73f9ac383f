import numpy as np
import pytest

from operators import segment as segment_module
from operators.codec import ResidualCodec
from operators.errors import ShapeError
from operators.maxsim import SCORERS, score_clips
from operators.segment import Segment, exhaustive, explain, search

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
        np.testing.assert_array_equal(scores, exact[clips])


@pytest.mark.parametrize("scorer", SCORERS)
def test_exhaustive_search_is_search_with_everything_probed(codec, scorer):
    segment = build(codec)
    everything = search(segment, codec, queries(), 10, scorer, ALL, ALL)
    for (clips, scores), (expected, exact) in zip(
        exhaustive(segment, codec, queries(), 10, scorer), everything, strict=True
    ):
        assert clips.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, exact, rtol=1e-6)  # BLAS sums in another order in a batch


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("candidates", [12, ALL])
def test_the_size_of_a_block_does_not_change_what_is_found(codec, scorer, candidates, monkeypatch):
    segment = build(codec)
    whole = search(segment, codec, queries(), 5, scorer, 3, candidates)
    monkeypatch.setattr(segment_module, "BLOCK_BYTES", 4 * 16 * 7)  # 7 decoded tokens
    for (clips, scores), (expected, exact) in zip(
        search(segment, codec, queries(), 5, scorer, 3, candidates), whole, strict=True
    ):
        assert clips.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, exact, rtol=1e-6)  # BLAS sums in another order in a block


def test_a_query_finds_the_same_alone_and_in_a_batch(codec):
    segment = build(codec)
    together = search(segment, codec, queries(), 5, "sum_maxsim", 2, 12)
    for query, (clips, scores) in zip(queries(), together, strict=True):
        [(alone, of_alone)] = search(segment, codec, [query], 5, "sum_maxsim", 2, 12)
        assert clips.tolist() == alone.tolist()
        np.testing.assert_array_equal(scores, of_alone)


def test_nothing_is_found_for_a_query_without_tokens_or_in_a_segment_without_clips(codec):
    none = np.zeros(0, np.int64)
    empty = Segment.build(np.empty((0, 16), np.float32), none, none, none.astype(np.uint8), 0, codec)
    for find in (
        lambda s, q: search(s, codec, [q], 5, "sum_maxsim", 2, 12)[0],
        lambda s, q: exhaustive(s, codec, [q], 5, "sum_maxsim")[0],
    ):
        assert find(build(codec), queries()[0][:0])[0].size == 0
        assert find(empty, queries()[0])[0].size == 0


def test_nothing_is_found_where_no_clip_holds_a_probed_centroid(codec):
    far, near = codec.centroids[:1], codec.centroids[1:2]
    segment = Segment.build(near, np.array([1]), np.array([0]), np.array([0], np.uint8), 1, codec)
    [(clips, scores)] = search(segment, codec, [far], 5, "sum_maxsim", 1, 12)
    assert clips.size == scores.size == 0


def test_equal_scores_rank_by_ordinal(codec):
    token = queries()[0]
    runs = np.arange(6)
    segment = Segment.build(np.repeat(token, 6, axis=0), np.ones(6, np.int64), runs, np.zeros(6, np.uint8), 6, codec)
    [(clips, _)] = search(segment, codec, [token], 4, "sum_maxsim", ALL, ALL)
    assert clips.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("probes", "candidates", "recall"), [(1, 20, 0.6), (2, 40, 0.85), (4, 80, 0.97)])
def test_a_planted_clip_is_found_first_and_recall_grows_with_the_work(probes, candidates, recall):
    """400 clips of tokens around 32 topics; queries are noisy copies of a clip's tokens."""
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(32, 24))
    tokens = topics[rng.integers(0, 32, 4000)] + 0.6 * rng.normal(size=(4000, 24))
    tokens = (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float32)
    wide = ResidualCodec.train(tokens, tokens[:500], 4, 32, seed=0)
    segment = Segment.build(tokens, np.full(400, 10), np.arange(400), np.zeros(400, np.uint8), 400, wide)
    asked = [tokens[10 * c : 10 * c + 6] + 0.05 * rng.normal(size=(6, 24)).astype(np.float32) for c in range(0, 400, 9)]
    found = search(segment, wide, asked, 10, "sum_maxsim", probes, candidates)
    exact = exhaustive(segment, wide, asked, 10, "sum_maxsim")
    assert [clips[0] for clips, _ in found] == list(range(0, 400, 9))
    shared = [len(set(f.tolist()) & set(e.tolist())) / 10 for (f, _), (e, _) in zip(found, exact, strict=True)]
    assert np.mean(shared) >= recall


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


def test_the_same_bytes_as_another_type_or_shape_have_another_checksum(codec):
    arrays = build(codec).to_arrays()
    for changed in ({"run_clip": arrays["run_clip"].view(np.uint64)}, {"codes": arrays["codes"].reshape(-1, 4)}):
        assert Segment.from_arrays(arrays | changed).checksum() != build(codec).checksum()


def test_the_callers_types_do_not_change_a_segment(codec):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    narrow = Segment.build(
        tokens, run_lengths.astype(np.int32), run_clip.astype(np.int32), run_modality.astype(int), num_clips, codec
    )
    assert narrow.checksum() == build(codec).checksum()


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


def test_an_explanation_names_each_query_token_s_best_token_and_modality():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), "sum_maxsim")
    assert winners.token.tolist() == [0, 1]
    assert winners.modality.tolist() == [0, 3]
    assert winners.score.tolist() == pytest.approx([1.0, 0.8])
    assert shares == pytest.approx({0: 1 / 1.8, 3: 0.8 / 1.8})


def test_under_modality_max_only_the_winning_modality_explains():
    query = np.array([[1, 0], [0, 1]], np.float32)
    tokens = np.array([[1, 0], [0.6, 0.8], [0.8, 0.6]], np.float32)
    winners, shares = explain(query, tokens, np.array([1, 2]), np.array([0, 3], np.uint8), "modality_max")
    assert winners.token.tolist() == [2, 1]
    assert winners.modality.tolist() == [3, 3]
    assert shares == pytest.approx({0: 0.0, 3: 1.0})


@pytest.mark.parametrize("scorer", SCORERS)
def test_an_explanation_adds_up_to_the_score(scorer):
    tokens, run_lengths, run_clip, run_modality, num_clips = corpus()
    ends = np.cumsum(run_lengths)
    query = queries()[3]
    scores = score_clips([query], tokens, run_lengths, run_clip, num_clips, scorer)[0]
    for clip in np.flatnonzero(np.isfinite(scores)):
        runs = np.flatnonzero(run_clip == clip)
        of_clip = tokens[ends[runs[0]] - run_lengths[runs[0]] : ends[runs[-1]]]
        winners, shares = explain(query, of_clip, run_lengths[runs], run_modality[runs], scorer)
        np.testing.assert_allclose(winners.score.sum(), scores[clip], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.einsum("qd,qd->q", query, of_clip[winners.token]), winners.score, atol=1e-6)
        assert sum(shares.values()) == pytest.approx(1)


def test_a_score_of_zero_has_no_shares_and_a_clip_without_tokens_no_explanation():
    query, token = np.array([[1, 0], [-1, 0]], np.float32), np.array([[1, 0]], np.float32)
    one, modality = np.array([1]), np.array([2], np.uint8)
    assert explain(query, token, one, modality, "sum_maxsim")[1] == {2: 0.0}
    with pytest.raises(ShapeError, match="without tokens"):
        explain(query, token[:0], np.array([0]), modality, "sum_maxsim")
