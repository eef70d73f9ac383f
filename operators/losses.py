"""What encoders are trained with: masked MaxSim that has a gradient, and the contrastive losses of CLaMR, FLMR and MIRe.

Nothing is padded with zeros: a token that is not there scores -inf, as does a modality that a document lacks, and neither
gets a gradient. Each loss sees one row a query and one column a document: the columns are the positives of the batch, of
other workers too where they are gathered, and explicit negatives. A row whose positive scores -inf teaches nothing and is
left out.

All similarities of a batch are held at once, Q x D x Tq x Td of them, and once more for each modality: 32 queries of 74
tokens against 32 clips of 1,860 are 560 MB in float32.

References
----------
CLaMR, arXiv:2506.06144, sec. 3 and its released code; FLMR, arXiv:2309.17133, sec. 3.3; MIRe, arXiv:2411.08334, sec. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from operators.errors import ConfigError, ShapeError

Aggregation = Literal["modality_max", "token_max"]

CLAMR_TEMPERATURE = 0.02
FLMR_TEMPERATURE = 1.0
MIRE_ALIGNMENT_TEMPERATURE = 0.3
MIRE_TEMPERATURE = 0.8
"""In fine-tuning, after the alignment."""


@dataclass(frozen=True)
class Scores:
    """How well documents answer queries.

    Attributes
    ----------
    total : (Q, D)
        By the chosen aggregation; -inf where a document has no token.
    by_modality : (Q, D, M)
        MaxSim in one modality alone; -inf where a document lacks it.
    """

    total: Tensor
    by_modality: Tensor


def masked_maxsim(
    queries: Tensor, documents: Tensor, document_mask: Tensor, query_mask: Tensor | None = None
) -> Tensor:
    """Return the sum over query tokens of the best similarity in each document, (Q, D); -inf of a document without tokens.

    Parameters
    ----------
    queries : (Q, Tq, dim)
    documents : (D, Td, dim)
    document_mask : (D, Td), bool
        True where a token is real.
    query_mask : (Q, Tq), bool
        The same of queries; all are real if None.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    """
    _check(queries, documents, document_mask)
    best = _similarities(queries, documents).masked_fill(~document_mask[None, :, None, :], float("-inf")).amax(dim=-1)
    return _sum_over_query(best, query_mask)


def modality_scores(
    queries: Tensor,
    documents: Tensor,
    modality: Tensor,
    num_modalities: int,
    aggregation: Aggregation = "modality_max",
    query_mask: Tensor | None = None,
) -> Scores:
    """Return the scores of documents whose tokens belong to modalities, divided by the number of query tokens.

    ``modality_max`` is CLaMR's modality-wise interaction LI_mw, the best modality's own sum, with which it trains;
    ``token_max`` is LI, the best token of any modality, by which it ranks.

    Parameters
    ----------
    queries : (Q, Tq, dim)
    documents : (D, Td, dim)
    modality : (D, Td), int
        Modality of each token, in [0, M); -1 for padding and for what belongs to none, a chat template's tokens.
        The released code lets those compete as one more modality.
    num_modalities
        M.
    query_mask : (Q, Tq), bool
        True where a query token is real; all are if None.

    Raises
    ------
    ShapeError
        If shapes do not fit.
    ConfigError
        If there is no such aggregation.
    """
    _check(queries, documents, modality)
    if aggregation not in ("modality_max", "token_max"):
        raise ConfigError(f"no such aggregation: {aggregation}; allowed are modality_max and token_max")
    similarities = _similarities(queries, documents)
    of_each = [
        similarities.masked_fill((modality != number)[None, :, None, :], float("-inf")).amax(dim=-1)
        for number in range(num_modalities)
    ]
    maxima = torch.stack(of_each, dim=-1)  # (Q, D, Tq, M)
    real = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device) if query_mask is None else query_mask
    num_tokens = real.sum(dim=1).clamp(min=1)
    by_modality = _sum_over_query(maxima.transpose(2, 3), real) / num_tokens[:, None, None]
    if aggregation == "modality_max":
        return Scores(by_modality.amax(dim=-1), by_modality)
    return Scores(_sum_over_query(maxima.amax(dim=-1), real) / num_tokens[:, None], by_modality)


def contrastive(
    scores: Scores,
    positive: Tensor,
    gold: Tensor | None = None,
    temperature: float = CLAMR_TEMPERATURE,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of each query's positive among all documents; the gold modality is not used.

    Parameters
    ----------
    scores
        Of Q queries and D documents.
    positive : (Q,), int
        Column of each query's positive.
    gold : (Q,), int
        Modality that a query is about; -1 where that is not known.
    excluded : (Q, D), bool
        Documents that are no negatives of a query: copies of its positive. That one always counts.
    """
    return cross_entropy(scores.total / temperature, positive, excluded)


def contrastive_hard_positive(
    scores: Scores,
    positive: Tensor,
    gold: Tensor,
    temperature: float = CLAMR_TEMPERATURE,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return `contrastive` in which the positive has only the score of the gold modality: CLaMR's modality awareness.

    Where the gold modality is not known, or the positive lacks it, its aggregated score stays.
    """
    return cross_entropy(_with_gold(scores, positive, gold) / temperature, positive, excluded)


def contrastive_hard_negative(
    scores: Scores,
    positive: Tensor,
    gold: Tensor,
    temperature: float = CLAMR_TEMPERATURE,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return `contrastive_hard_positive` with the score of every other (document, modality) as one more negative.

    The positive's own other modalities are among them. Where the gold modality is not known, or absent, none of them is.

    Notes
    -----
    The released code computes the gold modality's scores, too, but then joins the columns to the scores without them.
    """
    num_queries, num_documents, num_modalities = scores.by_modality.shape
    rows = torch.arange(num_queries, device=positive.device)
    known = _has_gold(scores, positive, gold)
    is_positive = torch.zeros_like(scores.by_modality, dtype=torch.bool)
    is_positive[rows, positive] = ~known[:, None] | (
        torch.arange(num_modalities, device=gold.device) == gold.clamp(min=0)[:, None]
    )
    left_out = is_positive
    if excluded is not None:
        left_out = left_out | _others(excluded, positive)[:, :, None]
    extra = scores.by_modality.masked_fill(left_out, float("-inf")).reshape(num_queries, num_documents * num_modalities)
    fixed = _with_gold(scores, positive, gold)
    if excluded is not None:
        fixed = fixed.masked_fill(_others(excluded, positive), float("-inf"))
    return cross_entropy(torch.cat([fixed, extra], dim=1) / temperature, positive)


def pairwise(
    scores: Scores,
    positive: Tensor,
    gold: Tensor | None = None,
    temperature: float = CLAMR_TEMPERATURE,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return softplus(hardest negative of the batch - positive), its mean over queries; no temperature, no gold modality."""
    is_positive = F.one_hot(positive, scores.total.shape[1]).bool()
    hardest = scores.total.masked_fill(is_positive if excluded is None else is_positive | excluded, float("-inf"))
    gap = hardest.amax(dim=1) - scores.total.gather(1, positive[:, None])[:, 0]
    return _mean(F.softplus(gap.masked_fill(~gap.isfinite(), 0.0)), gap.isfinite())


LOSSES: dict[str, Callable[..., Tensor]] = {
    "contrastive": contrastive,
    "contrastive_hard_positive": contrastive_hard_positive,
    "contrastive_hard_negative": contrastive_hard_negative,
    "pairwise": pairwise,
}
"""CLaMR's, by the names of its code."""


def flmr_loss(
    scores: Tensor, positive: Tensor, temperature: float = FLMR_TEMPERATURE, excluded: Tensor | None = None
) -> Tensor:
    """Return FLMR's loss: cross-entropy of summed MaxSim, (Q, D), over all positives and negatives of the batch.

    Temperature 1: a sum of dozens of cosines is sharp as it is.
    """
    return cross_entropy(scores / temperature, positive, excluded)


def mire_loss(
    scores: Tensor,
    positive: Tensor,
    owner: Tensor,
    temperature: float = MIRE_ALIGNMENT_TEMPERATURE,
    excluded: Tensor | None = None,
) -> Tensor:
    """Return MIRe's loss: cross-entropy among a query's own documents, and among all of the batch, added.

    Parameters
    ----------
    scores : (Q, D)
        Summed MaxSim.
    positive : (Q,), int
        Column of each query's positive.
    owner : (D,), int
        The query whose positive or explicit negative a document is.
    """
    own = scores.masked_fill(owner[None, :] != owner[positive][:, None], float("-inf"))
    return cross_entropy(own / temperature, positive) + cross_entropy(scores / temperature, positive, excluded)


def cross_entropy(logits: Tensor, positive: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Return the mean cross-entropy of rows, (Q, D), whose positive has a finite score; 0 where no row has."""
    if excluded is not None:
        logits = logits.masked_fill(_others(excluded, positive), float("-inf"))
    taught = logits.gather(1, positive[:, None])[:, 0].isfinite()
    # Filled before, not dropped after: 0 x the gradient of an infinite loss is not a number.
    of_rows = F.cross_entropy(logits.masked_fill(~taught[:, None], 0.0), positive, reduction="none")
    return _mean(of_rows, taught)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def _others(excluded: Tensor, positive: Tensor) -> Tensor:
    """Return what is excluded, the positives aside."""
    return excluded & ~F.one_hot(positive, excluded.shape[1]).bool()


def _has_gold(scores: Scores, positive: Tensor, gold: Tensor) -> Tensor:
    rows = torch.arange(len(gold), device=gold.device)
    return (gold >= 0) & scores.by_modality[rows, positive, gold.clamp(min=0)].isfinite()


def _with_gold(scores: Scores, positive: Tensor, gold: Tensor) -> Tensor:
    """Return total scores in which each positive has its gold modality's, where it has one."""
    rows = torch.arange(len(gold), device=gold.device)
    of_gold = scores.by_modality[rows, positive, gold.clamp(min=0)]
    chosen = torch.where(_has_gold(scores, positive, gold), of_gold, scores.total[rows, positive])
    return scores.total.scatter(1, positive[:, None], chosen[:, None])


def _similarities(queries: Tensor, documents: Tensor) -> Tensor:
    """Return the similarity of each query token with each document token, (Q, D, Tq, Td)."""
    return torch.einsum("qid,cjd->qcij", queries, documents)


def _sum_over_query(best: Tensor, query_mask: Tensor | None) -> Tensor:
    """Return sums over query tokens of best similarities, (Q, D, Tq) or (Q, D, M, Tq); -inf of what is absent.

    A query without real tokens scores 0.
    """
    if query_mask is None:
        return best.sum(dim=-1)
    mask = query_mask.reshape(len(query_mask), *[1] * (best.dim() - 2), -1)
    return torch.where(mask, best, 0.0).sum(dim=-1)


def _check(queries: Tensor, documents: Tensor, of_documents: Tensor) -> None:
    fits = queries.dim() == documents.dim() == 3 and queries.shape[2] == documents.shape[2]
    if not fits or of_documents.shape != documents.shape[:2]:
        raise ShapeError(
            f"queries {tuple(queries.shape)}, documents {tuple(documents.shape)} and what masks them "
            f"{tuple(of_documents.shape)} must be (Q, Tq, dim), (D, Td, dim) and (D, Td)"
        )
