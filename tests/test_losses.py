"""The losses against a few lines of NumPy, written from the papers."""

import numpy as np
import pytest
import torch

from benchmarks import clamr_toy
from operators import losses
from operators.alignment import alignment_loss, hits_and_gains
from operators.errors import ConfigError, ShapeError

Q, M, DIM = 4, 3, 8
LENGTHS = [(3, 2, 1), (2, 0, 4), (1, 3, 0), (2, 2, 2)]  # tokens of each document in each modality
TAU = 0.5


def unit(*shape, seed):
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def batch():
    """Queries, documents padded with what must not count, the modality of each token, and which query tokens are real."""
    queries, documents = unit(Q, 5, DIM, seed=0), unit(len(LENGTHS), 9, DIM, seed=1)
    modality = np.full((len(LENGTHS), 9), -1)
    for row, lengths in enumerate(LENGTHS):
        modality[row, 1 : 1 + sum(lengths)] = np.repeat(np.arange(M), lengths)  # the first token is the template's
    mask = np.arange(5) < np.array([5, 3, 4, 1])[:, None]
    return queries, documents, modality, mask


def tensors(batch):
    queries, documents, modality, mask = (torch.from_numpy(array) for array in batch)
    return queries.requires_grad_(), documents.requires_grad_(), modality, mask


def by_hand(batch):
    """Return (Q, D, M) modality-wise scores and (Q, D) scores over all modalities, each divided by the query's length."""
    queries, documents, modality, mask = batch
    by_modality, total = np.full((Q, len(documents), M), -np.inf), np.full((Q, len(documents)), -np.inf)
    for q, query in enumerate(queries):
        for d, document in enumerate(documents):
            similar = query[mask[q]] @ document.T
            total[q, d] = similar[:, modality[d] >= 0].max(axis=1).mean()
            for m in np.unique(modality[d][modality[d] >= 0]):
                by_modality[q, d, m] = similar[:, modality[d] == m].max(axis=1).mean()
    return by_modality, total


def log_sum(values):
    return np.log(np.exp(values).sum())


GOLD = np.array([0, 2, 1, 0])
POSITIVE = torch.arange(Q)


def scores_of(batch, aggregation="modality_max"):
    queries, documents, modality, mask = tensors(batch)
    return (queries, documents), losses.modality_scores(queries, documents, modality, M, aggregation, mask)


def test_scores_are_masked_maxsim_in_each_modality(batch):
    by_modality, total = by_hand(batch)
    for aggregation, wanted in (("modality_max", by_modality.max(axis=2)), ("token_max", total)):
        _, scores = scores_of(batch, aggregation)
        np.testing.assert_allclose(scores.by_modality.detach().numpy(), by_modality, atol=1e-12)
        np.testing.assert_allclose(scores.total.detach().numpy(), wanted, atol=1e-12)


def test_padding_changes_no_score_even_where_all_similarities_are_negative():
    query = torch.tensor([[[1.0, 0.0]]])
    alone = torch.tensor([[[-1.0, 0.0]]])
    padded = torch.cat([alone, torch.zeros(1, 3, 2)], dim=1)
    mask = torch.tensor([[True, False, False, False]])
    assert losses.masked_maxsim(query, padded, mask).item() == -1.0
    assert losses.masked_maxsim(query, alone, mask[:, :1]).item() == -1.0
    nothing = losses.masked_maxsim(query, padded, torch.zeros_like(mask))
    assert nothing.item() == -np.inf


def expected(name, by_modality, total):
    rows = []
    for q in range(Q):
        logits = total[q] / TAU
        if name in ("contrastive_hard_positive", "contrastive_hard_negative"):
            logits = logits.copy()
            logits[q] = by_modality[q, q, GOLD[q]] / TAU
        others = np.delete(total[q], q)
        if name == "contrastive_hard_negative":
            extra = np.delete(by_modality[q].ravel(), q * M + GOLD[q]) / TAU
            rows.append(log_sum(np.concatenate([logits, extra])) - logits[q])
        elif name == "pairwise":
            rows.append(np.log1p(np.exp(others.max() - total[q, q])))
        else:
            rows.append(log_sum(logits) - logits[q])
    return np.mean(rows)


@pytest.mark.parametrize("aggregation", ["modality_max", "token_max"])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_loss_of_clamr_is_its_formula_and_its_gradient_is_finite_where_modalities_are_absent(
    batch, name, aggregation
):
    leaves, scores = scores_of(batch, aggregation)
    loss = losses.LOSSES[name](scores, POSITIVE, torch.from_numpy(GOLD), TAU)
    by_modality, total = by_hand(batch)
    wanted = expected(name, by_modality, by_modality.max(axis=2) if aggregation == "modality_max" else total)
    assert loss.item() == pytest.approx(wanted, abs=1e-10)
    loss.backward()
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_padding_and_absent_modalities_get_no_gradient(batch):
    (_, documents), scores = scores_of(batch)
    losses.contrastive_hard_negative(scores, POSITIVE, torch.from_numpy(GOLD), TAU).backward()
    of_token = documents.grad.abs().sum(dim=2).numpy()
    assert (of_token[batch[2] < 0] == 0).all()


def test_the_hard_positive_follows_the_gold_modality_and_not_the_best(batch):
    (_, documents), scores = scores_of(batch)
    best = scores.by_modality[0, 0].argmax().item()
    gold = torch.tensor([(best + 1) % M])
    of_query = losses.Scores(scores.total[:1], scores.by_modality[:1])
    losses.contrastive_hard_positive(of_query, POSITIVE[:1], gold, TAU).backward()
    taught = documents.grad[0].abs().sum(dim=1) > 0
    assert set(batch[2][0][taught.numpy()]) == {gold.item()}


@pytest.mark.parametrize("name", ["contrastive_hard_positive", "contrastive_hard_negative"])
def test_without_a_gold_modality_or_where_it_is_absent_the_loss_is_the_plain_one(batch, name):
    _, scores = scores_of(batch)
    plain = losses.contrastive(scores, POSITIVE, temperature=TAU)
    absent = torch.tensor([-1, 1, 2, -1])  # documents 1 and 2 lack these
    if name == "contrastive_hard_negative":  # its other documents' modalities still count
        assert losses.LOSSES[name](scores, POSITIVE, absent, TAU) > plain
        own_only = torch.ones(Q, Q, dtype=torch.bool)
        assert losses.LOSSES[name](scores, POSITIVE, absent, TAU, own_only).item() == pytest.approx(0.0, abs=1e-6)
    else:
        torch.testing.assert_close(losses.LOSSES[name](scores, POSITIVE, absent, TAU), plain)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_copy_of_the_positive_is_no_negative(batch, name):
    queries, documents, modality, mask = tensors(batch)
    alone = losses.modality_scores(queries, documents, modality, M, query_mask=mask)
    twice = losses.modality_scores(
        queries, torch.cat([documents, documents[:1]]), torch.cat([modality, modality[:1]]), M, query_mask=mask
    )
    copies = torch.zeros(Q, Q + 1, dtype=torch.bool)
    copies[0, 0] = copies[0, Q] = True
    rows = slice(0, 1)
    gold = torch.from_numpy(GOLD)[rows]
    first = losses.Scores(alone.total[rows], alone.by_modality[rows])
    again = losses.Scores(twice.total[rows], twice.by_modality[rows])
    wanted = losses.LOSSES[name](first, POSITIVE[rows], gold, TAU)
    torch.testing.assert_close(losses.LOSSES[name](again, POSITIVE[rows], gold, TAU, copies[rows]), wanted)


def test_a_query_whose_document_is_empty_is_left_out(batch):
    queries, documents, modality, mask = tensors(batch)
    emptied = modality.clone()
    emptied[1] = -1
    loss = losses.contrastive(losses.modality_scores(queries, documents, emptied, M, query_mask=mask), POSITIVE)
    loss.backward()
    assert torch.isfinite(loss)
    assert (queries.grad[1] == 0).all()
    assert queries.grad[0].abs().sum() > 0


def test_flmrs_loss_is_cross_entropy_over_positives_and_negatives_at_temperature_1():
    scores = np.random.default_rng(2).standard_normal((3, 6)) * 3
    wanted = np.mean([log_sum(row) - row[i] for i, row in enumerate(scores)])
    assert losses.flmr_loss(torch.from_numpy(scores), torch.arange(3)).item() == pytest.approx(wanted)


def test_mires_loss_adds_that_among_a_querys_own_documents():
    scores, owner = np.random.default_rng(3).standard_normal((2, 5)), np.array([0, 1, 0, 0, 1])
    wanted = np.mean(
        [log_sum(row[owner == i] / 0.3) + log_sum(row / 0.3) - 2 * row[i] / 0.3 for i, row in enumerate(scores)]
    )
    got = losses.mire_loss(torch.from_numpy(scores), torch.arange(2), torch.from_numpy(owner))
    assert got.item() == pytest.approx(wanted)


def test_alignment_leaves_out_passages_of_the_same_photograph_but_not_explicit_negatives():
    pictures, passages = torch.from_numpy(unit(2, 3, DIM, seed=4)), torch.from_numpy(unit(4, 5, DIM, seed=5))
    mask = torch.ones(4, 5, dtype=torch.bool)
    owner = torch.tensor([0, 1, 0, 1])
    same = torch.tensor([[i % 2 == 0 or j == i for j in range(4)] for i in range(4)])
    same = same | same.T  # the first picture's group is that of all passages
    scores = np.einsum("qid,cjd->qcij", pictures.numpy(), passages.numpy()).max(axis=3).sum(axis=2)
    first = log_sum(scores[0, [0, 2]]) - scores[0, 0]  # its own two
    second = log_sum(scores[1, [1, 3]]) - scores[1, 1]
    got = alignment_loss(pictures, passages, mask, same, owner, 0, "flmr")
    assert got.item() == pytest.approx((first + second) / 2)


def test_both_ways_a_text_finds_its_picture_too():
    pictures, passages = torch.from_numpy(unit(3, 2, DIM, seed=6)), torch.from_numpy(unit(3, 4, DIM, seed=7))
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    same, owner = torch.eye(3, dtype=torch.bool), torch.arange(3)
    one_way = alignment_loss(pictures, passages, mask, same, owner, 0, "flmr")
    both = alignment_loss(pictures, passages, mask, same, owner, 0, "flmr", both_ways=True)
    similar = np.einsum("tid,pjd->tpij", passages.numpy(), pictures.numpy()).max(axis=3)
    asked = np.array([[similar[t, p][mask.numpy()[t]].sum() for p in range(3)] for t in range(3)])
    back = np.mean([log_sum(row) - row[i] for i, row in enumerate(asked)])
    assert both.item() == pytest.approx((one_way.item() + back) / 2)


def test_hits_and_gains_count_every_relevant_document():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    relevant = np.array([[True, False, True], [True, False, False]])
    hits, gains = hits_and_gains(scores, relevant)
    assert hits.tolist() == [1, 0]
    assert gains == pytest.approx([(1 + 1 / 2) / (1 + 1 / np.log2(3)), 1 / 2])


def test_shapes_that_do_not_fit_and_unknown_aggregations_are_refused():
    queries, documents = torch.zeros(2, 3, DIM), torch.zeros(2, 4, DIM)
    with pytest.raises(ShapeError, match="must be"):
        losses.masked_maxsim(queries, documents, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="allowed are modality_max and token_max"):
        losses.modality_scores(queries, documents, torch.zeros(2, 4), M, "mean")


def test_with_the_gold_modality_the_toy_is_learned_and_without_it_is_not():
    torch.set_num_threads(1)
    assert clamr_toy.gold_modality(0, "contrastive_hard_positive", "modality_max") >= 0.95
    assert clamr_toy.gold_modality(0, "contrastive", "modality_max") < 0.5
