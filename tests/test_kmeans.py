import numpy as np
import pytest

from operators import kmeans
from operators.errors import ConfigError, ShapeError
from operators.kmeans import assign, num_centroids, train_centroids


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


def test_each_centroid_points_where_its_tokens_do():
    """The fixed point of spherical k-means, which tight clusters reach well within the iterations."""
    tokens = around(np.eye(6), 600, spread=0.01)
    centroids = train_centroids(tokens, 4, seed=3)
    ids = assign(tokens, centroids)
    means = unit(np.stack([tokens[ids == centroid].sum(axis=0) for centroid in range(4)]))
    np.testing.assert_allclose(centroids, means, atol=1e-4)


def test_more_iterations_bring_tokens_closer_to_their_centroids():
    tokens = around(np.eye(16), 2000, spread=0.5)

    def closeness(iterations):
        centroids = train_centroids(tokens, 32, seed=0, iterations=iterations)
        return (tokens @ centroids.T).max(axis=1).mean()

    assert closeness(10) > closeness(1)


def test_centroids_are_the_same_for_the_same_seed_whatever_the_threads_and_have_unit_length():
    tokens = around(np.eye(8), 500, spread=0.4)
    one, two, other = (train_centroids(tokens, 16, seed, num_threads=n) for seed, n in ((7, 1), (7, 2), (8, 1)))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, rtol=1e-5)


def test_training_leaves_the_number_of_threads_as_it_was():
    import faiss

    before = faiss.omp_get_max_threads()
    train_centroids(np.eye(4, dtype=np.float32), 2, seed=0, num_threads=before + 1)
    assert faiss.omp_get_max_threads() == before


def test_as_many_centroids_as_tokens_are_the_tokens():
    tokens = np.eye(5, dtype=np.float32)
    centroids = train_centroids(tokens, 5, seed=0)
    np.testing.assert_allclose(np.sort(centroids, axis=0), np.sort(tokens, axis=0), atol=1e-6)


@pytest.mark.parametrize("count", [0, 6])
def test_a_count_that_the_sample_cannot_support_is_refused(count):
    with pytest.raises(ConfigError, match=f"{count} centroids.*the sample has 5"):
        train_centroids(np.eye(5, dtype=np.float32), count, seed=0)


def test_every_token_goes_to_its_most_similar_centroid():
    rng = np.random.default_rng(3)
    tokens, centroids = unit(rng.normal(size=(300, 8))), unit(rng.normal(size=(5, 8)))
    expected = [max(range(5), key=lambda c, t=t: float(t @ centroids[c])) for t in tokens]
    assert assign(tokens, centroids).tolist() == expected


def test_the_size_of_a_block_does_not_change_assignments(monkeypatch):
    rng = np.random.default_rng(4)
    tokens, centroids = unit(rng.normal(size=(300, 8))), unit(rng.normal(size=(5, 8)))
    whole = assign(tokens, centroids)
    monkeypatch.setattr(kmeans, "ASSIGN_BLOCK_BYTES", 4 * 5 * 7)  # 7 tokens; 300 is no multiple
    np.testing.assert_array_equal(assign(tokens, centroids), whole)


def test_no_tokens_have_no_assignments():
    assert assign(np.empty((0, 8), np.float32), np.eye(8, dtype=np.float32)).shape == (0,)


def test_widths_that_differ_are_named():
    with pytest.raises(ShapeError, match=r"\(2, 3\).*\(T, 8\)"):
        assign(np.ones((2, 3), np.float32), np.eye(8, dtype=np.float32))
