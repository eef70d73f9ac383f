"""From a picture's features to token embeddings: FLMR's mapping network, and the transformer that PreFLMR adds to it.

Attributes are named as in the released checkpoints, so that these load by prefix.

References
----------
FLMR, arXiv:2309.17133, sec. 3.1; PreFLMR, arXiv:2402.08327, sec. 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MappingNetwork(nn.Module):
    """Linear, tanh, linear: one vector of a picture becomes ``num_tokens`` token embeddings.

    With CLIP ViT-B/32 (768) and 32 tokens of 128 it has 9.97 M parameters.

    Parameters
    ----------
    vision_dim
        Width of a picture's vector, V.
    dim
        Width of a token embedding.
    num_tokens
        Token embeddings a picture becomes.
    """

    def __init__(self, vision_dim: int, dim: int, num_tokens: int = 32) -> None:
        super().__init__()
        hidden = dim * num_tokens // 2
        self.model = nn.Sequential(
            nn.Linear(vision_dim, hidden), nn.Tanh(), nn.Linear(hidden, dim * num_tokens)
        )  # fmt: skip
        self.dim, self.num_tokens = dim, num_tokens

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (B, num_tokens, dim) token embeddings, not normalised, of (B, V) vectors."""
        tokens: Tensor = self.model(vectors).view(-1, self.num_tokens, self.dim)
        return tokens


class TransformerMapping(nn.Module):
    """A shallow BERT whose patches attend to one another and then to the query's text.

    Parameters
    ----------
    vision_dim
        Width of a patch, V.
    hidden
        Width of the text tower's hidden states, H, which is that of the transformer too.
    dim
        Width of a token embedding.
    layers, heads, intermediate
        Of the transformer; PreFLMR has one layer of BERT-base. ``intermediate`` is 4 H unless given.
    cross_attention_length
        Text hidden states that are attended to: the first ones.
    """

    def __init__(
        self,
        vision_dim: int,
        hidden: int,
        dim: int,
        layers: int = 1,
        heads: int = 12,
        intermediate: int | None = None,
        cross_attention_length: int = 32,
    ) -> None:
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertEncoder

        super().__init__()
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate or 4 * hidden,
            is_decoder=True,
            add_cross_attention=True,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        self.input_linear = nn.Linear(vision_dim, hidden)
        self.network = BertEncoder(config)
        self.output_linear = nn.Linear(hidden, dim)
        self._length = cross_attention_length

    def forward(self, patches: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return (B, P, dim) token embeddings, not normalised.

        Parameters
        ----------
        patches : (B, P, V), float32
            Of the vision tower's penultimate layer.
        text : (B, T, H), float32
            Hidden states of the text tower.
        text_mask : (B, T), bool
            True where a hidden state is there.
        """
        text, text_mask = text[:, : self._length], text_mask[:, : self._length]
        states = self.input_linear(patches)
        # Without a mask of their own, transformers would let a decoder's patches see only those before them; in the
        # release that PreFLMR was trained with they saw all.
        every_patch = states.new_zeros(1, 1, 1, states.shape[1])
        hidden = self.network(
            states,
            attention_mask=every_patch,
            encoder_hidden_states=text,
            encoder_attention_mask=_additive(text_mask, states.dtype),
        ).last_hidden_state
        tokens: Tensor = self.output_linear(hidden)
        return tokens


class PreflmrVision(nn.Module):
    """PreFLMR's visual tokens: those of the mapping network, then one a patch of the transformer.

    Parameters
    ----------
    vision_dim, dim, num_tokens
        Of the `MappingNetwork`.
    hidden, layers, heads, intermediate, cross_attention_length
        Of the `TransformerMapping`.
    """

    def __init__(
        self,
        vision_dim: int,
        dim: int,
        hidden: int,
        num_tokens: int = 32,
        layers: int = 1,
        heads: int = 12,
        intermediate: int | None = None,
        cross_attention_length: int = 32,
    ) -> None:
        super().__init__()
        self.mapping = MappingNetwork(vision_dim, dim, num_tokens)
        self.transformer = TransformerMapping(
            vision_dim, hidden, dim, layers, heads, intermediate, cross_attention_length
        )

    def forward(self, vectors: Tensor, patches: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Return (B, num_tokens + P, dim) token embeddings, not normalised; arguments as of the two modules."""
        return torch.cat([self.mapping(vectors), self.transformer(patches, text, text_mask)], dim=1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a (B, T) mask is True and the lowest number where it is not, as (B, 1, 1, T)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[
        :, None, None
    ]
