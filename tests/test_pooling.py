import numpy as np

from operators import pooling
from operators.encoders import TokenEmbeddings
from operators.pooling import pool


def tokens(num_tokens, dim=8, seed=0):
    embeddings = np.random.default_rng(seed).normal(size=(num_tokens, dim)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return TokenEmbeddings(embeddings, np.arange(num_tokens, dtype=np.int32))


def test_what_fits_its_budget_is_left_alone():
    given = tokens(5)
    assert pool(given, 5) is given
    assert pool(given, 0) is given


def test_copies_are_merged_and_others_are_kept():
    distinct = tokens(3)
    copied = TokenEmbeddings(np.repeat(distinct.embeddings, 4, axis=0), np.arange(12, dtype=np.int32))
    pooled = pool(copied, 3)
    np.testing.assert_allclose(pooled.embeddings, distinct.embeddings, atol=1e-6)
    assert (pooled.span_index // 4).tolist() == [0, 1, 2]


def test_a_budget_is_kept_over_several_pieces_and_tokens_stay_in_order(monkeypatch):
    monkeypatch.setattr(pooling, "LINKAGE_TOKENS", 20)
    pooled = pool(tokens(90), 12)
    assert 0 < len(pooled.embeddings) <= 12
    assert pooled.span_index.tolist() == sorted(pooled.span_index.tolist())
    np.testing.assert_allclose(np.linalg.norm(pooled.embeddings, axis=1), 1, rtol=1e-5)


def test_a_pooled_token_is_the_normalised_mean_of_its_members():
    embeddings = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], np.float32)
    pooled = pool(TokenEmbeddings(embeddings, np.array([7, 8, 9], np.int32)), 2)
    mean = np.array([1.8, 0.6, 0]) / np.sqrt(1.8**2 + 0.6**2)
    np.testing.assert_allclose(pooled.embeddings, [mean, [0, 0, 1]], rtol=1e-6)
    assert pooled.span_index[1] == 9
