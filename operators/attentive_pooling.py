"""MIRe's vision: 16 global tokens, and 12 that pool the patches as the text of the query asks, without taking its words.

The text chooses where to look and leaves nothing of itself in the tokens: no residual. With one, or with the text's own
tokens beside them in training, the module learns to copy the text (59.8 falls to 58.3 and 49.5 in the paper).

The equation's mean is over the text's tokens. The released code masks the scores of padding before the softmax, so that
each padded token looks at all patches alike, and sums these too: its result depends on how far a query is padded.
``num_padding`` gives that result back.

References
----------
MIRe, arXiv:2411.08334, sec. 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from operators.mapping_network import MappingNetwork


class QueryGuidedPooling(nn.Module):
    """Patches pooled by attention from the text's token embeddings: one token a head.

    The query of the attention is the text's token embeddings as they are, the same for all heads. Attributes are named as
    in the released checkpoints.

    Parameters
    ----------
    vision_dim
        Width of a patch, V.
    dim
        Width of a token embedding, and of a head.
    num_heads
        Heads, which is tokens.
    """

    def __init__(self, vision_dim: int, dim: int, num_heads: int = 12) -> None:
        super().__init__()
        width = num_heads * dim
        self.proj = nn.Sequential(nn.LayerNorm(vision_dim), nn.Linear(vision_dim, 2 * width), nn.GELU())
        self.k_state = nn.Linear(2 * width, width, bias=False)
        self.v_state = nn.Linear(2 * width, width, bias=False)
        self.o_proj = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.dim, self.num_heads = dim, num_heads

    def forward(self, patches: Tensor, text: Tensor, text_mask: Tensor, num_padding: Tensor | None = None) -> Tensor:
        """Return (B, num_heads, dim) token embeddings, not normalised.

        Parameters
        ----------
        patches : (B, P, V), float32
            Of the vision tower's penultimate layer.
        text : (B, T, dim), float32
            Token embeddings, not normalised.
        text_mask : (B, T), bool
            True where a token is real; at least one a row is.
        num_padding : (B,), int
            Padded tokens that the released code sums with the real ones; none unless given.
        """
        states = self.proj(patches)
        keys, values = (self._heads(linear(states)) for linear in (self.k_state, self.v_state))  # (B, heads, P, dim)
        scores = text[:, None] @ keys.transpose(-2, -1) / self.dim**0.5  # (B, heads, T, P)
        of_token = scores.softmax(dim=-1) @ values  # (B, heads, T, dim)
        total = (of_token * text_mask[:, None, :, None]).sum(dim=2)
        if num_padding is not None:
            total = total + num_padding[:, None, None] * values.mean(dim=2)
        pooled: Tensor = self.o_proj(total / text_mask.sum(dim=1)[:, None, None])
        return pooled

    def _heads(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, self.dim).transpose(1, 2)


class MireVision(nn.Module):
    """MIRe's visual tokens: E_g of the picture's vector, then E_m of its patches.

    14.70 M parameters with CLIP ViT-B (768), 15.75 M with ViT-L (1,024).

    Parameters
    ----------
    vision_dim, dim
        Widths of the vision tower and of a token embedding.
    num_tokens
        Global tokens.
    num_heads
        Pooled tokens.
    """

    def __init__(self, vision_dim: int, dim: int, num_tokens: int = 16, num_heads: int = 12) -> None:
        super().__init__()
        self.split_mlp = MappingNetwork(vision_dim, dim, num_tokens)
        self.pooling = QueryGuidedPooling(vision_dim, dim, num_heads)

    def forward(
        self, vectors: Tensor, patches: Tensor, text: Tensor, text_mask: Tensor, num_padding: Tensor | None = None
    ) -> Tensor:
        """Return (B, num_tokens + num_heads, dim) token embeddings, not normalised.

        Parameters
        ----------
        vectors : (B, V), float32
            The pictures' own vectors.
        patches, text, text_mask, num_padding
            As of `QueryGuidedPooling.forward`.
        """
        return torch.cat([self.split_mlp(vectors), self.pooling(patches, text, text_mask, num_padding)], dim=1)
