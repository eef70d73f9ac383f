import numpy as np
import pytest

from operators.codec import ResidualCodec
from operators.errors import ConfigError, ShapeError
from operators.kmeans import assign, num_centroids, train_centroids


def clustered(num_tokens, dim, seed=0, clusters=10, spread=0.3):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    tokens = centres[rng.integers(0, clusters, num_tokens)] + spread * rng.normal(size=(num_tokens, dim))
    return (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float32)


def trained(nbits, dim=16, centroids=8):
    tokens = clustered(2000, dim)
    return ResidualCodec.train(tokens[200:], tokens[:200], nbits, centroids, seed=1), tokens


def error(codec, tokens):
    return float(1 - np.einsum("td,td->t", codec.decode(*codec.encode(tokens)), tokens).mean())


@pytest.mark.parametrize("dim", [16, 128, 13])
def test_the_error_falls_as_bits_grow(dim):
    errors = [error(*trained(nbits, dim)) for nbits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 < errors[0]


@pytest.mark.parametrize(
    ("nbits", "dim", "expected"), [(1, 128, 16), (2, 128, 32), (4, 13, 7), (8, 13, 13), (1, 13, 2)]
)
def test_a_code_takes_bits_times_dim_rounded_up_to_bytes(nbits, dim, expected):
    codec, tokens = trained(nbits, dim)
    assert codec.encode(tokens[:5])[1].shape == (5, expected) == (5, codec.code_bytes)


def test_decoded_tokens_have_unit_length():
    codec, tokens = trained(2)
    np.testing.assert_allclose(np.linalg.norm(codec.decode(*codec.encode(tokens)), axis=1), 1, rtol=1e-5)


def test_a_residual_decodes_to_the_mean_of_its_bucket():
    """One centroid at the origin, cutoffs at 0: negatives become -2, others 3; then unit length."""
    codec = ResidualCodec(np.zeros((1, 2), np.float32), np.array([0.0], np.float32), np.array([-2, 3], np.float32), 1)
    ids, codes = codec.encode(np.array([[-0.5, 0.7]], np.float32))
    assert codes.tolist() == [[0b10]]
    np.testing.assert_allclose(codec.decode(ids, codes), [[-2 / 13**0.5, 3 / 13**0.5]], rtol=1e-6)


def test_bucket_means_err_less_than_middle_quantiles():
    codec, tokens = trained(2)
    residuals = (tokens[:200] - codec.centroids[assign(tokens[:200], codec.centroids)]).ravel()
    middles = np.quantile(residuals, (np.arange(4) + 0.5) / 4).astype(np.float32)
    buckets = np.searchsorted(codec.cutoffs, residuals, side="right")
    assert np.square(residuals - codec.weights[buckets]).mean() < np.square(residuals - middles[buckets]).mean()


def test_a_codec_survives_being_taken_apart():
    codec, tokens = trained(4)
    again = ResidualCodec.from_arrays(codec.to_arrays())
    for ours, theirs in zip(codec.encode(tokens), again.encode(tokens), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_allowed_is_said():
    tokens = clustered(50, 8)
    with pytest.raises(ConfigError, match="nbits is 3; allowed are 1, 2, 4, 8"):
        ResidualCodec.train(tokens, tokens, 3, 2, seed=0)
    with pytest.raises(ConfigError, match="99 centroids.*the sample has 50"):
        ResidualCodec.train(tokens, tokens, 2, 99, seed=0)
    with pytest.raises(ShapeError, match=r"\(T, 16\)"):
        trained(2)[0].encode(tokens)


def test_centroids_are_the_same_for_the_same_seed_and_have_unit_length():
    tokens = clustered(500, 8)
    first, second = (train_centroids(tokens, 4, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)


def test_every_token_goes_to_its_most_similar_centroid():
    tokens, centroids = clustered(300, 8), clustered(5, 8, seed=3)
    expected = [max(range(5), key=lambda c, t=t: float(t @ centroids[c])) for t in tokens]
    assert assign(tokens, centroids).tolist() == expected


@pytest.mark.parametrize(
    ("tokens", "sampled", "expected"),
    [
        (1_000_000, 1_000_000, 8192),  # 16 * 1000 = 16,000, rounded down to a power of two
        (3_000, 3_000, 64),  # 3,000 / 32 = 93
        (10, 10, 1),
    ],
)
def test_the_number_of_centroids_follows_the_corpus_but_never_outgrows_the_sample(tokens, sampled, expected):
    assert num_centroids(tokens, sampled) == expected
