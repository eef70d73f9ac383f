"""Aligning pictures with texts: their visual tokens, negatives of all workers, and how well pairs find each other.

FLMR's first stage and MIRe's alignment train only what lies between a vision tower and the token embeddings of a text tower.
Both towers are frozen, so what they give is computed once. The query is visual tokens alone: were the text's own tokens
beside them, the module would learn to leave the work to these (in MIRe 59.8 falls to 49.5).

References
----------
FLMR, arXiv:2309.17133, sec. 3.3; MIRe, arXiv:2411.08334, sec. 3.2 and 3.3.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from operators import losses

Array = npt.NDArray[np.float64]


class VisualTokens(nn.Module):
    """The token embeddings that a head gives pictures, L2-normalised.

    Parameters
    ----------
    head
        `MappingNetwork`, or `MireVision`, which pools patches as a text guides it.
    guided
        Whether the head takes patches and a guide.
    """

    def __init__(self, head: nn.Module, guided: bool) -> None:
        super().__init__()
        self.head, self.guided = head, guided

    def forward(
        self, vectors: Tensor, patches: Tensor | None, guide: Tensor | None, guide_mask: Tensor | None
    ) -> Tensor:
        """Return (B, n, dim) token embeddings; arguments as of `MireVision.forward`, None where it is not guided."""
        tokens = self.head(vectors, patches, guide, guide_mask) if self.guided else self.head(vectors)
        return nn.functional.normalize(tokens, dim=-1)


class _Gather(torch.autograd.Function):
    """All workers' rows, one after another; each gets the gradient of its own, summed over all workers' losses."""

    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def gathered(local: Tensor) -> Tensor:
    """Return the rows of all workers in the order of their ranks; without workers, the rows.

    All must have equally many. Where workers' gradients are averaged, as DDP does, the gradient is that of one worker which
    holds all rows; FLMR's code lets no gradient through to other workers' rows.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return local
    rows: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return rows


def alignment_loss(
    pictures: Tensor,
    passages: Tensor,
    passage_mask: Tensor,
    same: Tensor,
    owner: Tensor,
    first: int,
    system: str,
    temperature: float | None = None,
    both_ways: bool = False,
) -> Tensor:
    """Return the loss of a worker's pictures, those at ``first`` and after it, among all passages of the batch.

    Parameters
    ----------
    pictures : (B, n, dim)
        Visual tokens of this worker's pictures.
    passages : (D, Tp, dim)
        Of the whole batch: a positive for each of its pictures in order, then explicit negatives.
    passage_mask : (D, Tp), bool
        True where a token is real.
    same : (D, D), bool
        True where two passages are of one group: crops of one photograph are no negatives of one another.
    owner : (D,), int
        The picture, in order, that a passage was given for.
    first
        Place of this worker's first picture in the batch.
    system
        ``flmr`` or ``mire``.
    temperature
        The paper's unless given.
    both_ways
        Add the loss of each text among the pictures of the batch, scored as frames are when a text is searched for. That is
        ours: the papers ask with pictures only.
    """
    place = torch.arange(first, first + len(pictures), device=pictures.device)
    excluded = same[place] & (owner[None, :] != place[:, None])
    scores = losses.masked_maxsim(pictures, passages, passage_mask)
    loss = _loss(scores, place, owner, excluded, system, temperature)
    if both_ways:
        everyone = gathered(pictures)
        real = torch.ones(everyone.shape[:2], dtype=torch.bool, device=everyone.device)
        asked = losses.masked_maxsim(passages[place], everyone, real, passage_mask[place])
        num = len(everyone)
        loss = (loss + _loss(asked, place, owner[:num], same[place, :num], system, temperature)) / 2
    return loss


def _loss(
    scores: Tensor, positive: Tensor, owner: Tensor, excluded: Tensor, system: str, temperature: float | None
) -> Tensor:
    if system == "mire":
        temperature = temperature or losses.MIRE_ALIGNMENT_TEMPERATURE
        return losses.mire_loss(scores, positive, owner, temperature, excluded)
    return losses.flmr_loss(scores, positive, temperature or losses.FLMR_TEMPERATURE, excluded)


def hits_and_gains(scores: Array, relevant: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return R@1 and nDCG@10 of each query, (Q,) each, from scores and relevance, (Q, D).

    R@1 is 1 where the first document is relevant, however many others are.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    found = np.take_along_axis(relevant, order, axis=1)
    discounts = 1 / np.log2(np.arange(2, 12))
    best = np.cumsum(discounts)[np.minimum(relevant.sum(axis=1), 10) - 1]
    return found[:, 0].astype(np.float64), (found * discounts[: found.shape[1]]).sum(axis=1) / best
