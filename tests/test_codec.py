import numpy as np
import pytest

from operators import codec as codec_module
from operators.codec import ResidualCodec
from operators.errors import ConfigError, ShapeError
from operators.kmeans import assign


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


@pytest.mark.parametrize("dim", [16, 128, 384, 13])
def test_the_error_falls_as_bits_grow(dim):
    errors = [error(*trained(nbits, dim)) for nbits in (1, 2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3 < errors[0]


@pytest.mark.parametrize(
    ("nbits", "dim", "expected"), [(1, 128, 16), (2, 384, 96), (4, 13, 7), (8, 13, 13), (1, 13, 2)]
)
def test_a_code_takes_bits_times_dim_rounded_up_to_bytes(nbits, dim, expected):
    codec, tokens = trained(nbits, dim)
    ids, codes = codec.encode(tokens[:5])
    assert codes.shape == (5, expected)
    assert codec.bytes_per_token == expected + 4 == (ids.nbytes + codes.nbytes) / 5


def test_decoded_tokens_have_unit_length():
    codec, tokens = trained(2)
    np.testing.assert_allclose(np.linalg.norm(codec.decode(*codec.encode(tokens)), axis=1), 1, rtol=1e-5)


def test_a_residual_decodes_to_the_mean_of_its_bucket():
    """One centroid at the origin, cutoffs at 0: negatives become -2, others 3; then unit length."""
    codec = ResidualCodec(np.zeros((1, 2), np.float32), np.array([0.0], np.float32), np.array([-2, 3], np.float32), 1)
    ids, codes = codec.encode(np.array([[-0.5, 0.7]], np.float32))
    assert codes.tolist() == [[0b10]]
    np.testing.assert_allclose(codec.decode(ids, codes), [[-2 / 13**0.5, 3 / 13**0.5]], rtol=1e-6)


def test_a_residual_on_a_cutoff_belongs_to_the_bucket_above():
    codec = ResidualCodec(np.zeros((1, 2), np.float32), np.array([0.5], np.float32), np.array([-2, 3], np.float32), 1)
    assert codec.encode(np.array([[0.5, 0.4]], np.float32))[1].tolist() == [[0b01]]


@pytest.mark.parametrize("dim", [5, 8, 13])
@pytest.mark.parametrize("nbits", [1, 2, 4, 8])
def test_every_bucket_of_every_dimension_comes_back(nbits, dim):
    """A centroid at the origin; weights far apart and without common directions, so that a decoded token tells its
    buckets apart after normalisation.
    """
    size = 2**nbits
    cutoffs = np.arange(1, size, dtype=np.float32)
    weights = np.arange(size, dtype=np.float32) + 0.5
    codec = ResidualCodec(np.zeros((1, dim), np.float32), cutoffs, weights, nbits)
    buckets = np.random.default_rng(0).integers(0, size, (50, dim))
    decoded = codec.decode(*codec.encode((buckets + 0.25).astype(np.float32)))
    expected = weights[buckets] / np.linalg.norm(weights[buckets], axis=1, keepdims=True)
    np.testing.assert_allclose(decoded, expected, rtol=1e-6)


def test_cutoffs_are_quantiles_of_the_held_out_residuals():
    codec, tokens = trained(2)
    residuals = tokens[:200] - codec.centroids[assign(tokens[:200], codec.centroids)]
    below = [(residuals < cutoff).mean() for cutoff in codec.cutoffs]
    assert below == pytest.approx([0.25, 0.5, 0.75], abs=1e-3)


def test_a_token_is_encoded_the_same_alone_and_in_any_block(monkeypatch):
    codec, tokens = trained(4)
    ids, codes = codec.encode(tokens)
    monkeypatch.setattr(codec_module, "BLOCK_BYTES", 4 * 16 * 7)  # 7 tokens; 2,000 is no multiple
    in_blocks = codec.encode(tokens)
    np.testing.assert_array_equal(in_blocks[0], ids)
    np.testing.assert_array_equal(in_blocks[1], codes)
    for t in (0, 999):
        alone = codec.encode(tokens[t : t + 1])
        assert alone[0].tolist() == ids[t : t + 1].tolist()
        assert alone[1].tolist() == codes[t : t + 1].tolist()


def test_equal_residuals_still_make_a_codec_and_no_tokens_encode_to_none():
    tokens = np.tile(np.array([[1, 0, 0, 0]], np.float32), (20, 1))
    codec = ResidualCodec.train(tokens, tokens, 4, 1, seed=0)
    np.testing.assert_allclose(codec.decode(*codec.encode(tokens)), tokens, atol=1e-6)
    assert codec.decode(*codec.encode(tokens[:0])).shape == (0, 4)


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
    with pytest.raises(ConfigError, match="no token is held out"):
        ResidualCodec.train(tokens, tokens[:0], 2, 2, seed=0)
    with pytest.raises(ConfigError, match="nbits is 3"):
        ResidualCodec(tokens, np.zeros(7, np.float32), np.zeros(8, np.float32), 3)
    with pytest.raises(ShapeError, match=r"\(2,\) and weights \(4,\); 2 bits want \(3,\) and \(4,\)"):
        ResidualCodec(tokens, np.zeros(2, np.float32), np.zeros(4, np.float32), 2)
    with pytest.raises(ShapeError, match=r"\(T, 16\)"):
        trained(2)[0].encode(tokens)
