"""The torch path on the CPU; the Triton kernels on CUDA where there is a device, and in Triton's interpreter."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from operators import kmeans
from operators.codec import ResidualCodec
from operators.errors import ConfigError, ShapeError
from operators.kmeans import Centroids
from operators.kmeans_gpu import assign_on, cluster_sums_on
from operators.maxsim import make_scorer, score_clips
from operators.search import EXHAUSTIVE, Plan, Searcher
from operators.search_gpu import PIECE, GpuSearcher
from operators.segment import Segment

MODALITIES = ["frame", "speech", "text", "tag"]
SCORERS = {
    "sum_maxsim": make_scorer("sum_maxsim", MODALITIES),
    "modality_max": make_scorer("modality_max", MODALITIES),
    "modality_weighted": make_scorer("modality_weighted", MODALITIES, weights={"frame": 0.5, "text": 2.0}),
    "group_sum": make_scorer("group_sum", MODALITIES, groups=[["frame", "tag"], ["speech"]]),
}
NUM_CLIPS = 40
LONG_RUN = PIECE + 44
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]

needs_triton = pytest.mark.skipif(TRITON_DEVICE is None, reason="neither a CUDA device nor Triton's interpreter")


@pytest.fixture(autouse=True)
def one_thread():
    """Torch's threads wait for each other where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unit(rng, *shape):
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


@functools.cache
def corpus(nbits, dim=24, long_run=LONG_RUN):
    """Clips of several runs, some empty and modalities in no order; one empty, one of one token, one with a long run."""
    rng = np.random.default_rng(nbits)
    run_clip = np.repeat(np.arange(NUM_CLIPS), 5)
    run_lengths = rng.integers(0, 5, len(run_clip)).astype(np.int64)
    run_lengths[:10] = [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    run_lengths[17] = long_run
    run_modality = rng.integers(0, len(MODALITIES), len(run_clip)).astype(np.uint8)
    run_modality[15:20] = [0, 1, 1, 0, 1]  # neighbours of one group, and a group that comes back
    tokens = unit(rng, run_lengths.sum(), dim)
    codec = ResidualCodec.train(tokens, tokens, nbits, 16, seed=0)
    return Segment.build(tokens, run_lengths, run_clip, run_modality, NUM_CLIPS, codec), codec


def some_queries(dim=24, lengths=(3, 40, 16, 1, 70)):
    rng = np.random.default_rng(9)
    return [unit(rng, length, dim) for length in lengths]


def decoded(segment, codec):
    return codec.decode(segment.codes_of(0, len(segment.centroid_ids)))


def exact_scores(segment, tokens, queries, scorer):
    runs = (segment.run_lengths, segment.run_clip, segment.run_modality)
    return score_clips(queries, tokens, *runs, segment.num_clips, scorer)


def best_of(scores, clips, k):
    """Clips by score and then by ordinal; those that score -inf are never found."""
    order = clips[np.lexsort((clips, -scores[clips]))][:k]
    return order[np.isfinite(scores[order])]


def assert_found(results, scores, expected, tolerance):
    for (clips, found), exact, wanted in zip(results, scores, expected, strict=True):
        assert len(clips) == len(wanted)
        np.testing.assert_allclose(found, exact[clips], atol=tolerance)
        # Near ties may change places.
        np.testing.assert_allclose(exact[clips], exact[wanted], atol=2 * tolerance)


def rounding_of_float16(segment, codec, queries, scorer):
    """The bound that `operators.search_gpu` states, for the longest query."""
    residuals = decoded(segment, codec) - codec.centroids.floats[segment.centroid_ids]
    longest = max(len(query) for query in queries)
    return sum(scorer.weights) * longest * (2.0**-11 * np.linalg.norm(residuals, axis=1).max() + 1e-6)


def rounding_of_bytes(segment, codec, queries, scorer):
    """The bound that `operators.search` states."""
    norm = np.linalg.norm(decoded(segment, codec), axis=1).max()
    steps = max(float(np.abs(query).max(axis=1).sum()) for query in queries) / 127
    return sum(scorer.weights) * (norm * np.sqrt(codec.dim) / 2 * steps + 70 * 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SCORERS)
def test_scoring_every_code_is_exact_scoring_of_the_decoded_tokens(device, nbits, name):
    segment, codec = corpus(nbits)
    queries, scorer = some_queries(), SCORERS[name]
    results = GpuSearcher([segment], codec, device, "torch").search(queries, 10, EXHAUSTIVE, scorer)
    scores = exact_scores(segment, decoded(segment, codec), queries, scorer)
    expected = [best_of(row, np.arange(NUM_CLIPS), 10) for row in scores]
    assert_found(results, scores, expected, tolerance=1e-4)  # up to 70 similarities are added in another order


@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SCORERS)
def test_it_agrees_with_the_search_on_bytes(nbits, name):
    segment, codec = corpus(nbits)
    queries, scorer = some_queries(), SCORERS[name]
    ours = GpuSearcher([segment], codec, "cpu").search(queries, 10, EXHAUSTIVE, scorer)
    theirs = Searcher([segment], codec).search(queries, 10, EXHAUSTIVE, scorer)
    for (clips, scores), (other, others) in zip(ours, theirs, strict=True):
        assert len(clips) == len(other)
        np.testing.assert_allclose(scores, others, atol=rounding_of_bytes(segment, codec, queries, scorer))


def by_definition(segment, codec, query, plan, k, scorer, allowed):
    """Clips that probing finds, cut to the candidates by their centroids, ranked by their codes; and all scores."""
    centroids = codec.centroids.floats
    nearest = np.argsort(-(query @ centroids.T), axis=1)[:, : plan.probes]
    token_clip = np.repeat(np.arange(NUM_CLIPS), np.diff(segment.token_of_clip))
    met = np.unique(token_clip[np.isin(segment.centroid_ids, nearest)])
    met = met[allowed[met]]
    coarse = exact_scores(segment, centroids[segment.centroid_ids], [query], scorer)[0]
    candidates = met[np.lexsort((met, -coarse[met]))][: max(plan.candidates, 2 * k)]
    scores = exact_scores(segment, decoded(segment, codec), [query], scorer)[0]
    return scores, best_of(scores, candidates, k)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("plan", [Plan(1, 0), Plan(2, 8), Plan(16, 12), Plan(3, NUM_CLIPS // 2 - 1)])
@pytest.mark.parametrize("filtered", [False, True])
def test_a_plan_finds_what_its_definition_says(name, plan, filtered):
    segment, codec = corpus(4)
    queries, scorer = some_queries(), SCORERS[name]
    allowed = np.arange(NUM_CLIPS) % 2 == 0 if filtered else None
    results = GpuSearcher([segment], codec, "cpu").search(queries, 3, plan, scorer, allowed)
    everything = np.ones(NUM_CLIPS, np.bool_) if allowed is None else allowed
    pairs = [by_definition(segment, codec, query, plan, 3, scorer, everything) for query in queries]
    assert_found(results, [scores for scores, _ in pairs], [wanted for _, wanted in pairs], tolerance=1e-4)


@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(2, 6)])
def test_only_allowed_clips_are_found(plan):
    segment, codec = corpus(4)
    searcher = GpuSearcher([segment], codec, "cpu")
    allowed = np.zeros(NUM_CLIPS, np.bool_)
    allowed[20:30] = True
    for clips, _ in searcher.search(some_queries(), 3, plan, SCORERS["sum_maxsim"], allowed):
        assert len(clips) == 3
        assert allowed[clips].all()
    nothing = searcher.search(some_queries(), 3, plan, SCORERS["sum_maxsim"], np.zeros(NUM_CLIPS, np.bool_))
    assert [len(clips) for clips, _ in nothing] == [0] * 5


@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(1, 6)])
@pytest.mark.parametrize("budget", [1, 1 << 28])
def test_of_equal_clips_the_lower_ordinals_come_first(plan, budget):
    token = np.array([[0.6, 0.8]], np.float32)
    codec = ResidualCodec.train(token, token, 4, 1, seed=0)
    ones = np.ones(20, np.int64)
    segment = Segment.build(token.repeat(20, axis=0), ones, np.arange(20), np.zeros(20, np.uint8), 20, codec)
    searcher = GpuSearcher([segment], codec, "cpu", budget_bytes=budget)
    clips, scores = searcher.search([token], 3, plan, SCORERS["sum_maxsim"])[0]
    assert clips.tolist() == [0, 1, 2]
    np.testing.assert_allclose(scores, 1, atol=1e-2)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(1, 2)])
def test_negative_similarities_are_not_beaten_by_padding(name, plan):
    token = np.array([[0.6, 0.8]], np.float32)
    codec = ResidualCodec.train(token, token, 4, 1, seed=0)
    clips = np.array([1, 3, 5, 6])  # the others have no tokens
    segment = Segment.build(
        token.repeat(4, axis=0), np.ones(4, np.int64), clips, np.array([0, 0, 1, 0], np.uint8), 8, codec
    )
    queries = [-token, -token.repeat(17, axis=0)]
    exact = exact_scores(segment, decoded(segment, codec), queries, SCORERS[name])
    for k in (1, 8):
        for (found, scores), of_query in zip(
            GpuSearcher([segment], codec, "cpu").search(queries, k, plan, SCORERS[name]), exact, strict=True
        ):
            assert found.tolist() == best_of(of_query, np.arange(8), k).tolist()
            assert (scores < 0).all()
            np.testing.assert_allclose(scores, of_query[found], rtol=1e-5)


def test_clips_of_modalities_that_do_not_count_are_never_found():
    segment, codec = corpus(4)
    scorer = make_scorer("sum_maxsim", MODALITIES, only=["tag"])
    with_tag = np.unique(segment.run_clip[(segment.run_modality == 3) & (segment.run_lengths > 0)])
    assert len(with_tag) < NUM_CLIPS - 1
    for plan in (EXHAUSTIVE, Plan(16, 20)):
        (clips, _), *_ = GpuSearcher([segment], codec, "cpu").search(some_queries(), 20, plan, scorer)
        assert set(clips) <= set(with_tag)


@pytest.mark.parametrize("plan", [EXHAUSTIVE, Plan(4, 12)])
@pytest.mark.parametrize("budget", [1, 30_000])
def test_the_budget_does_not_change_what_is_found(plan, budget):
    segment, codec = corpus(2)
    queries = some_queries(lengths=(3, 40, 2))
    whole = GpuSearcher([segment], codec, "cpu").search(queries, 5, plan, SCORERS["group_sum"])
    parts = GpuSearcher([segment], codec, "cpu", budget_bytes=budget)
    for (clips, scores), (expected, exact) in zip(
        parts.search(queries, 5, plan, SCORERS["group_sum"]), whole, strict=True
    ):
        assert clips.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, exact, rtol=1e-5)  # products are added in another order


def test_it_does_not_matter_how_clips_were_cut_into_segments():
    segment, codec = corpus(4)
    cut = 17
    token, run = segment.token_of_clip[cut], segment.run_of_clip[cut]
    parts = [
        Segment(
            segment.run_lengths[runs],
            segment.run_clip[runs] - first,
            segment.run_modality[runs],
            segment.centroid_ids[tokens],
            segment.scales[tokens],
            segment.residuals[tokens],
            last - first,
        )
        for runs, tokens, first, last in (
            (slice(run), slice(token), 0, cut),
            (slice(run, None), slice(token, None), cut, NUM_CLIPS),
        )
    ]
    for plan in (EXHAUSTIVE, Plan(4, 12)):
        one, two = (
            GpuSearcher(segments, codec, "cpu").search(some_queries(), 5, plan, SCORERS["sum_maxsim"])
            for segments in ([segment], parts)
        )
        for (clips, scores), (others, same) in zip(one, two, strict=True):
            assert clips.tolist() == others.tolist()
            np.testing.assert_array_equal(scores, same)


def test_a_query_without_tokens_finds_nothing_and_leaves_the_others_in_place():
    segment, codec = corpus(4)
    searcher = GpuSearcher([segment], codec, "cpu")
    queries = some_queries()
    for plan in (EXHAUSTIVE, Plan(2, 8)):
        alone = searcher.search(queries[:1], 3, plan, SCORERS["sum_maxsim"])[0]
        empty, other = searcher.search([np.empty((0, 24), np.float32), queries[0]], 3, plan, SCORERS["sum_maxsim"])
        assert len(empty[0]) == len(empty[1]) == 0
        assert other[0].tolist() == alone[0].tolist()
    assert searcher.search([], 3, EXHAUSTIVE, SCORERS["sum_maxsim"]) == []


def test_what_does_not_fit_is_refused():
    segment, codec = corpus(4)
    with pytest.raises(ConfigError, match="auto, triton, torch"):
        GpuSearcher([segment], codec, "cpu", "cutlass")
    on_disk = Segment.from_arrays(segment.to_arrays() | {"residuals": segment.residuals[:0]})
    with pytest.raises(ShapeError, match="residual"):
        GpuSearcher([on_disk], codec, "cpu")
    searcher = GpuSearcher([segment], codec, "cpu")
    with pytest.raises(ShapeError, match=r"\(Tq, 24\)"):
        searcher.search(some_queries(dim=16), 3, EXHAUSTIVE, SCORERS["sum_maxsim"])
    with pytest.raises(ShapeError, match=r"\(40,\)"):
        searcher.search(some_queries(), 3, EXHAUSTIVE, SCORERS["sum_maxsim"], np.ones(3, np.bool_))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            GpuSearcher([segment], codec)


@needs_triton
@pytest.mark.parametrize(("nbits", "dim"), [(1, 96), (2, 384), (4, 24), (4, 128), (8, 96)])
def test_triton_scores_as_decoding_does(nbits, dim):
    """Dimensions that fill their blocks and that do not, tiles of 16 and 64, runs longer than a block."""
    segment, codec = corpus(nbits, dim, long_run=70)
    queries = some_queries(dim, lengths=(3, 40))
    tokens = decoded(segment, codec)
    searcher = GpuSearcher([segment], codec, TRITON_DEVICE, "triton")
    for name in ("sum_maxsim", "group_sum"):
        exact = exact_scores(segment, tokens, queries, SCORERS[name])
        results = searcher.search(queries, 3, EXHAUSTIVE, SCORERS[name])
        expected = [best_of(row, np.arange(NUM_CLIPS), 3) for row in exact]
        assert_found(results, exact, expected, rounding_of_float16(segment, codec, queries, SCORERS[name]))


@needs_triton
def test_triton_finds_the_candidates_that_torch_does():
    segment, codec = corpus(4, long_run=70)
    queries, scorer = some_queries(lengths=(3, 70)), SCORERS["modality_max"]
    triton, plain = (
        GpuSearcher([segment], codec, TRITON_DEVICE, kernels).search(queries, 3, Plan(2, 6), scorer)
        for kernels in ("triton", "torch")
    )
    tolerance = rounding_of_float16(segment, codec, queries, scorer)
    for (clips, scores), (expected, exact) in zip(triton, plain, strict=True):
        assert clips.tolist() == expected.tolist()
        np.testing.assert_allclose(scores, exact, atol=tolerance)


@needs_triton
def test_triton_keeps_negative_similarities_and_the_length_of_query_tokens():
    token = np.array([[0.6, 0.8]], np.float32)
    codec = ResidualCodec.train(token, token, 4, 1, seed=0)
    segment = Segment.build(token, np.array([0, 1]), np.array([0, 1]), np.zeros(2, np.uint8), 3, codec)
    queries = [-1e6 * token, -1e-6 * token.repeat(17, axis=0)]  # neither fits float16 as it is
    for (clips, scores), expected in zip(
        GpuSearcher([segment], codec, TRITON_DEVICE, "triton").search(queries, 3, EXHAUSTIVE, SCORERS["sum_maxsim"]),
        (-1e6, -17e-6),
        strict=True,
    ):
        assert clips.tolist() == [1]
        np.testing.assert_allclose(scores, expected, rtol=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter's own run")
def test_triton_in_its_interpreter():
    """In a process of its own: Triton decides when it is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_triton", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parent.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def clustered(count, dim=32):
    rng = np.random.default_rng(3)
    centres = unit(rng, 20, dim)
    tokens = centres[rng.integers(0, 20, count)] + 0.1 * rng.normal(size=(count, dim)) / np.sqrt(dim)
    return tokens.astype(np.float32), centres


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_tokens_go_to_the_centroid_that_they_go_to_on_the_cpu(device, dtype):
    tokens, centres = clustered(5000)
    centroids = Centroids.round(centres)
    ids = assign_on(tokens.astype(dtype), centroids, device)
    assert ids.dtype == np.int32
    # Clusters stand so far apart that no rounding moves a token.
    np.testing.assert_array_equal(ids, kmeans.assign(tokens.astype(dtype), centroids))


def test_tokens_between_centroids_go_to_the_nearest_in_float32():
    rng = np.random.default_rng(0)
    tokens, centroids = unit(rng, 2000, 24), Centroids.round(unit(rng, 50, 24))
    similarities = tokens @ centroids.floats.T
    ids = assign_on(tokens, centroids, "cpu")
    rows = np.arange(len(tokens))
    np.testing.assert_allclose(similarities[rows, ids], similarities.max(axis=1), atol=1e-6)  # near ties
    assert np.mean(ids == kmeans.assign(tokens, centroids)) > 0.9
    np.testing.assert_array_equal(assign_on(1e5 * tokens, centroids, "cpu"), ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_bytes", [1 << 26, 20_000])
def test_sums_and_counts_are_those_of_the_cpu(device, block_bytes, monkeypatch):
    for name in ("CPU_BLOCK_BYTES", "CUDA_BLOCK_BYTES"):
        monkeypatch.setattr(f"operators.kmeans_gpu.{name}", block_bytes)
    tokens, centres = clustered(3000)
    centroids = np.concatenate([centres, -centres[:1]])  # the last gets no token
    sums, counts = cluster_sums_on(tokens, centroids, device)
    expected, expected_counts = kmeans.cluster_sums(tokens, centroids)
    assert (sums.dtype, counts.dtype, counts[-1]) == (np.float64, np.int64, 0)
    np.testing.assert_array_equal(counts, expected_counts)
    np.testing.assert_allclose(sums, expected, atol=1e-9)
    again, _ = cluster_sums_on(tokens, centroids, device)
    np.testing.assert_array_equal(sums, again)


def test_tokens_of_another_width_are_refused():
    with pytest.raises(ShapeError, match=r"\(T, 32\)"):
        assign_on(np.ones((2, 8), np.float32), Centroids.round(clustered(1)[1]), "cpu")
    assert len(assign_on(np.empty((0, 32), np.float32), Centroids.round(clustered(1)[1]), "cpu")) == 0
