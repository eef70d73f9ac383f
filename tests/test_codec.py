import numpy as np
import pytest

from operators.codec import Codes, ResidualCodec
from operators.errors import ConfigError, ShapeError
from operators.kmeans import Centroids


def clustered(num_tokens, dim, seed=0, clusters=10, spread=0.3):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    tokens = centres[rng.integers(0, clusters, num_tokens)] + spread * rng.normal(size=(num_tokens, dim))
    return (tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float32)


def trained(nbits, dim=16, centroids=8):
    tokens = clustered(2000, dim)
    return ResidualCodec.train(tokens[200:], tokens[:200], nbits, centroids, seed=1), tokens


def at_origin(levels, nbits, dim):
    """A codec of one centroid at the origin, of bytes 0 to 2^nbits - 1, so that a token is its residual."""
    centroids = Centroids(np.full((1, dim), 128, np.uint8), -1.28, 0.01)
    cutoffs = (levels[1:] + levels[:-1]) / 2
    step = (levels[-1] - levels[0]) / 255
    level_bytes = np.rint((levels - levels[0]) / step).astype(np.uint8)
    return ResidualCodec(
        centroids, cutoffs.astype(np.float32), float(levels[0]), float(step), level_bytes, 0.01, 10, nbits
    )


def error(codec, tokens):
    decoded = codec.decode(codec.encode(tokens))
    return float(1 - (np.einsum("td,td->t", decoded, tokens) / np.linalg.norm(decoded, axis=1)).mean())


@pytest.mark.parametrize("dim", [16, 128, 384, 13])
def test_the_error_falls_as_bits_grow(dim):
    errors = [error(*trained(nbits, dim)) for nbits in (1, 2, 4, 8)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 2e-4 < errors[0]


@pytest.mark.parametrize(
    ("nbits", "dim", "expected"), [(1, 128, 16), (2, 384, 96), (4, 13, 8), (8, 13, 16), (1, 13, 4)]
)
def test_a_code_takes_bits_times_dim_rounded_up_to_four_bytes(nbits, dim, expected):
    codec, tokens = trained(nbits, dim)
    codes = codec.encode(tokens[:5])
    assert codes.residuals.shape == (5, expected) == (5, codec.code_bytes)
    assert codes.scales.shape == codes.centroid_ids.shape == (5,)


@pytest.mark.parametrize("dim", [5, 8, 13, 96])
@pytest.mark.parametrize("nbits", [1, 2, 4])
def test_every_level_of_every_dimension_comes_back(nbits, dim):
    levels = np.linspace(-1.7, 1.7, 2**nbits)
    codec = at_origin(levels, nbits, dim)
    chosen = np.random.default_rng(0).integers(0, 2**nbits, (50, dim))
    residuals = codec.levels[chosen]
    norms = np.linalg.norm(residuals, axis=1, keepdims=True)
    # Unit residuals of length sqrt(dim): of what is encoded, the levels nearest to it come back, whatever its length.
    expected = codec.levels[np.searchsorted(codec.cutoffs, residuals / norms * np.sqrt(dim), side="right")]
    decoded = codec.decode(codec.encode((0.3 * residuals / norms).astype(np.float32)))
    cosine = (
        np.einsum("td,td->t", decoded, expected) / np.linalg.norm(decoded, axis=1) / np.linalg.norm(expected, axis=1)
    )
    np.testing.assert_allclose(cosine, 1, atol=1e-5)


def test_the_coded_residual_is_as_long_along_the_true_one_as_that_is():
    codec, tokens = trained(2, dim=64)
    codes = codec.encode(tokens)
    residuals = tokens - codec.centroids.floats[codes.centroid_ids]
    coded = codec.decode(codes) - codec.centroids.floats[codes.centroid_ids]
    along = np.einsum("td,td->t", coded, residuals) / np.einsum("td,td->t", residuals, residuals)
    # A byte for the scale; the least and the largest are cut off.
    np.testing.assert_allclose(np.quantile(along, [0.005, 0.5, 0.995]), 1, atol=0.02)


def test_lloyd_levels_err_less_than_the_means_of_quantile_buckets():
    codec, tokens = trained(2, dim=64)
    residuals = tokens - codec.centroids.floats[codec.encode(tokens).centroid_ids]
    unit = residuals / np.linalg.norm(residuals, axis=1, keepdims=True) * 8
    cutoffs = np.quantile(unit, [0.25, 0.5, 0.75])
    means = np.array([unit[np.searchsorted(cutoffs, unit) == b].mean() for b in range(4)])
    ours = codec.levels[np.searchsorted(codec.cutoffs, unit, side="right")]
    assert np.square(unit - ours).mean() < 0.95 * np.square(unit - means[np.searchsorted(cutoffs, unit)]).mean()


def test_a_token_is_encoded_the_same_alone_in_any_block_and_in_threads():
    codec, tokens = trained(4)
    tokens = np.concatenate([tokens] * 3)  # more than one block
    together, threaded = codec.encode(tokens), codec.encode(tokens, num_threads=3)
    for name in ("centroid_ids", "scales", "residuals"):
        np.testing.assert_array_equal(getattr(together, name), getattr(threaded, name))
        for t in (0, 999, 5999):
            alone = codec.encode(tokens[t : t + 1])
            np.testing.assert_array_equal(getattr(alone, name), getattr(together, name)[t : t + 1])


def test_float16_tokens_are_encoded_as_their_float32_values():
    codec, tokens = trained(4)
    half = tokens.astype(np.float16)
    np.testing.assert_array_equal(codec.encode(half).residuals, codec.encode(half.astype(np.float32)).residuals)


def test_a_token_that_is_its_centroid_decodes_to_it():
    codec, _ = trained(2)
    codes = codec.encode(codec.centroids.floats)
    own = Codes(np.arange(8, dtype=np.int32), np.zeros(8, np.uint8), codes.residuals)
    np.testing.assert_array_equal(codec.decode(own), codec.centroids.floats)


def test_equal_tokens_still_make_a_codec_and_no_tokens_encode_to_none():
    tokens = np.tile(np.array([[1, 0, 0, 0]], np.float32), (20, 1))
    codec = ResidualCodec.train(tokens, tokens, 4, 1, seed=0)
    np.testing.assert_allclose(codec.decode(codec.encode(tokens)), tokens, atol=0.01)
    assert codec.decode(codec.encode(tokens[:0])).shape == (0, 4)


def test_a_codec_survives_being_taken_apart():
    codec, tokens = trained(4)
    again = ResidualCodec.from_arrays(codec.to_arrays())
    np.testing.assert_array_equal(again.decode(again.encode(tokens)), codec.decode(codec.encode(tokens)))


def test_what_is_not_allowed_is_said():
    tokens = clustered(50, 8)
    with pytest.raises(ConfigError, match="nbits is 3; allowed are 1, 2, 4, 8"):
        ResidualCodec.train(tokens, tokens, 3, 2, seed=0)
    with pytest.raises(ConfigError, match="99 centroids.*the sample has 50"):
        ResidualCodec.train(tokens, tokens, 2, 99, seed=0)
    with pytest.raises(ConfigError, match="no token is held out"):
        ResidualCodec.train(tokens, tokens[:0], 2, 2, seed=0)
    codec = trained(2)[0]
    with pytest.raises(ShapeError, match=r"\(2,\) and levels \(4,\); 2 bits want \(3,\) and \(4,\)"):
        ResidualCodec(codec.centroids, codec.cutoffs[:2], -1, 0.1, codec.level_bytes, 0.1, 1, 2)
    with pytest.raises(ShapeError, match=r"\(T, 16\)"):
        codec.encode(tokens)
