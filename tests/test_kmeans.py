import numpy as np
import pytest

from operators import kmeans
from operators.errors import ConfigError, ShapeError
from operators.kmeans import Centroids, assign, cluster_sums, next_centroids, num_centroids, train_centroids


def unit(values):
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def around(centres, num_tokens, spread, seed=0):
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(centres), num_tokens)
    return unit(centres[chosen] + spread * rng.normal(size=(num_tokens, centres.shape[1])))


@pytest.mark.parametrize(
    ("tokens", "sampled", "expected"),
    [
        (1_000_000, 1_000_000, 8192),  # 16 * 1000 = 16,000, rounded down to a power of two
        (65_536, 65_536, 2048),  # 16 * 256 = 4,096, but 65,536 / 32 = 2,048
        (1_000_000, 3_200, 64),  # 3,200 / 32 = 100
        (3_000, 3_000, 64),  # 3,000 / 32 = 93
        (10, 10, 1),
        (0, 0, 1),
    ],
)
def test_the_number_of_centroids_follows_the_corpus_but_never_outgrows_the_sample(tokens, sampled, expected):
    assert num_centroids(tokens, sampled) == expected


def closeness(tokens, centroids):
    return float((tokens @ centroids.T).max(axis=1).mean())


def test_each_centroid_points_where_its_tokens_do():
    """The fixed point of spherical k-means, which tight clusters reach well within the iterations."""
    tokens = around(np.eye(6), 600, spread=0.01)
    centroids = train_centroids(tokens, 4, seed=3, iterations=20)
    ids = assign(tokens, Centroids.round(centroids))
    means = unit(np.stack([tokens[ids == centroid].sum(axis=0) for centroid in range(4)]))
    assert np.einsum("cd,cd->c", centroids, means).min() > 0.95  # rounded to 8 bits, ties may go either way


def test_centroids_fit_as_well_as_those_of_faiss():
    faiss = pytest.importorskip("faiss")
    tokens = around(unit(np.random.default_rng(9).normal(size=(64, 32))), 4096, spread=0.15)
    theirs = faiss.Kmeans(32, 64, niter=kmeans.ITERATIONS, spherical=True, seed=0, min_points_per_centroid=1)
    theirs.train(tokens)
    assert closeness(tokens, train_centroids(tokens, 64, seed=0)) > 0.98 * closeness(tokens, theirs.centroids)


def test_more_iterations_bring_tokens_closer_to_their_centroids():
    tokens = around(np.eye(16), 2000, spread=0.5)
    near, far = (closeness(tokens, train_centroids(tokens, 32, seed=0, iterations=n)) for n in (10, 1))
    assert near > far


def test_centroids_are_the_same_for_the_same_seed_whatever_the_threads_and_have_unit_length():
    tokens = around(np.eye(8), 2000, spread=0.4)
    one, two, other = (train_centroids(tokens, 16, seed, num_threads=n) for seed, n in ((7, 1), (7, 2), (8, 1)))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)


def test_sums_of_parts_are_the_sums_of_the_whole():
    """What makes k-means over several actors the k-means over one."""
    tokens = around(np.eye(8), 1000, spread=0.4)
    centroids = train_centroids(tokens, 16, seed=0, iterations=1)
    whole = next_centroids(*cluster_sums(tokens, centroids), 0)
    parts = [cluster_sums(tokens[i::3], centroids) for i in range(3)]
    joined = next_centroids(sum(s for s, _ in parts), sum(c for _, c in parts), 0)
    np.testing.assert_allclose(joined, whole, atol=1e-6)


def test_a_centroid_without_tokens_takes_part_of_the_largest_cluster():
    sums = np.array([[10.0, 0, 0], [0, 0, 0], [0, 2, 0]])
    centroids = next_centroids(sums, np.array([10, 0, 2]), seed=0)
    assert centroids[1] @ centroids[0] > 0.99
    assert not np.array_equal(centroids[1], centroids[0])
    np.testing.assert_array_equal(centroids[2], [0, 1, 0])


@pytest.mark.parametrize("count", [0, 6])
def test_a_count_that_the_sample_cannot_support_is_refused(count):
    with pytest.raises(ConfigError, match=f"{count} centroids.*the sample has 5"):
        train_centroids(np.eye(5, dtype=np.float32), count, seed=0)


@pytest.mark.parametrize(("dim", "count"), [(8, 5), (13, 1), (128, 300), (384, 37)])
def test_every_token_goes_to_its_most_similar_centroid_or_one_as_near(dim, count):
    rng = np.random.default_rng(3)
    tokens, centroids = unit(rng.normal(size=(700, dim))), Centroids.round(unit(rng.normal(size=(count, dim))))
    similarities = tokens @ centroids.floats.T
    found = similarities[np.arange(700), assign(tokens, centroids)]
    # Tokens are rounded to 8 bits for the comparison.
    assert (similarities.max(axis=1) - found).max() < 0.02
    assert (found == similarities.max(axis=1)).mean() > 0.93


def test_the_size_of_a_block_does_not_change_assignments(monkeypatch):
    rng = np.random.default_rng(4)
    tokens, centroids = unit(rng.normal(size=(300, 8))), Centroids.round(unit(rng.normal(size=(5, 8))))
    whole = assign(tokens, centroids)
    monkeypatch.setattr(kmeans, "BLOCK_TOKENS", 7)
    np.testing.assert_array_equal(assign(tokens, centroids), whole)


def test_comparing_with_groups_first_finds_centroids_nearly_as_near(monkeypatch):
    tokens = around(unit(np.random.default_rng(9).normal(size=(200, 16))), 6000, spread=0.2)
    centroids = Centroids.round(train_centroids(tokens, 1024, seed=0, iterations=2))
    flat = assign(tokens, centroids)
    monkeypatch.setattr(kmeans, "TWO_LEVEL_FROM", 512)
    monkeypatch.setattr(kmeans, "TWO_LEVEL_BLOCK_TOKENS", 1000)
    grouped = assign(tokens, centroids, num_threads=2)
    near, nearest = (np.einsum("td,td->t", tokens, centroids.floats[ids]) for ids in (grouped, flat))
    assert (grouped == flat).mean() > 0.9
    assert near.mean() > 0.99 * nearest.mean()


def test_rounded_centroids_differ_by_half_a_step_at_most():
    floats = unit(np.random.default_rng(0).normal(size=(50, 24)))
    rounded = Centroids.round(floats)
    assert np.abs(rounded.floats - floats).max() <= 0.51 * rounded.step


def test_no_tokens_have_no_assignments():
    assert assign(np.empty((0, 8), np.float32), Centroids.round(np.eye(8, dtype=np.float32))).shape == (0,)


def test_widths_that_differ_are_named():
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(T, 8\)"):
        assign(np.ones((2, 3), np.float32), Centroids.round(np.eye(8, dtype=np.float32)))
