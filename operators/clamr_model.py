"""CLaMR as a module: a Qwen2.5 backbone, a linear head on its last hidden state, an L2 norm.

Training and encoding use the same module and the same batches::

    model = load_model("vidore/colqwen2.5-base")
    turns = ChatTurns("vidore/colqwen2.5-base")  # of operators.encoder_clamr
    batch = model.collate([turn for clip in clips for turn in turns.documents(clip)])
    embeddings = model(batch)          # (B, L, dim); of tokens where batch["modality"] >= 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from operators import weights
from operators.adapters import merge_adapter
from operators.chat_turn import NONE, Turn
from operators.checkpoints import load_whole
from operators.clamr_checkpoint import HEAD, OMNI, Family, find_checkpoint
from operators.errors import ModelError

SOUND = ("input_features", "feature_attention_mask")
"""Inputs whose last axis is time."""

INPUTS = ("input_ids", "attention_mask", "position_ids", "pixel_values", "image_grid_thw") + (
    "pixel_values_videos",
    "video_grid_thw",
    *SOUND,
)
"""What of a batch the backbone takes."""


class ClamrModel(nn.Module):
    """A backbone and its head; names of its modules are those of the released checkpoints.

    Parameters
    ----------
    backbone
        transformers' ``Qwen2_5_VLModel`` or ``Qwen2_5OmniThinkerModel``.
    head
        From its hidden states to embeddings.
    family
        Of the backbone.

    Attributes
    ----------
    name_or_path
        Model id that it was loaded from: peft writes it as the base of adapters that are trained on it.
    """

    name_or_path: str | None = None

    def __init__(self, backbone: Any, head: nn.Linear, family: Family) -> None:
        super().__init__()
        self.model = backbone
        self.custom_text_proj = head
        self.family = family

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (B, L, dim) L2-normalised float32 embeddings of what `collate` gave; those of padding mean nothing."""
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        hidden = self.model(**inputs, use_cache=False).last_hidden_state
        projected = self.custom_text_proj(hidden.to(self.custom_text_proj.weight.dtype))
        return nn.functional.normalize(projected.float(), dim=-1)

    def collate(self, turns: Sequence[Turn]) -> dict[str, Tensor]:
        """Return turns as a batch, padded on the left, with positions of the backbone's own making.

        ``modality`` (B, L), int8, is that of `Turn`, and ``chat_turn.NONE`` on padding too.
        """
        shape = (len(turns), max(map(len, turns)))
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),  # masked, so any id that is no placeholder
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "modality": torch.full(shape, NONE, dtype=torch.int8),
        }
        for row, turn in enumerate(turns):
            batch["input_ids"][row, -len(turn) :] = torch.from_numpy(turn.ids)
            batch["attention_mask"][row, -len(turn) :] = 1
            batch["modality"][row, -len(turn) :] = torch.from_numpy(turn.modality)
        for name in sorted({name for turn in turns for name in turn.media}):
            parts = [turn.media[name] for turn in turns if name in turn.media]
            batch[name] = torch.cat(_same_length(parts) if name in SOUND else parts)
        return batch | {"position_ids": self._positions(batch)}

    def _positions(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return (3, B, L) positions in time, rows and columns; padding shifts none."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        grids = {name: batch.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        num_videos = len(batch.get("video_grid_thw", ()))
        seconds = torch.full((num_videos,), self.family.seconds_per_patch)
        if self.family is OMNI:
            heard = batch["feature_attention_mask"].sum(-1) if "feature_attention_mask" in batch else None
            positions, _ = self.model.get_rope_index(
                ids, **grids, attention_mask=mask, audio_seqlens=heard, second_per_grids=seconds
            )
        else:
            config = self.model.config
            kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
            positions, _ = self.model.get_rope_index(
                ids, kinds, **grids, second_per_grid_ts=seconds.tolist(), attention_mask=mask
            )
        return torch.as_tensor(positions)


def load_model(
    model: str,
    base: str | None = None,
    head: str | None = None,
    precision: Literal["float32", "bfloat16"] = "bfloat16",
    attention: str = "sdpa",
) -> ClamrModel:
    """Return a model on the CPU, in evaluation mode, with its adapter merged.

    Weights are read once, in the precision they are kept in: those of 3 billion parameters in bfloat16 are 6 GB.

    Parameters
    ----------
    model, base, head
        As `find_checkpoint` takes them.
    precision, attention
        Of the backbone's weights; which implementation of attention transformers uses.

    Raises
    ------
    ModelError
        If any weight of backbone, adapter or head is missing, or has no place.
    """
    import transformers

    checkpoint = find_checkpoint(model, base, head)
    family, dtype, tensors = checkpoint.family, getattr(torch, precision), checkpoint.read_head()
    whole = load_whole(
        getattr(transformers, family.architecture),
        checkpoint.backbone,
        missing=[r"lm_head\.weight"],
        unexpected=[r"(thinker\.)?lm_head\.weight", r"(talker|token2wav)\..*", HEAD],
        dtype=dtype,
        attn_implementation=attention,
    )
    loaded = ClamrModel(whole.model, _linear(tensors, whole.model), family)
    for adapter in checkpoint.adapters:
        loaded = merge_adapter(loaded, Path(weights.resolve(adapter)))
    loaded.name_or_path = model
    return loaded.eval()


def _linear(tensors: Mapping[str, Tensor], backbone: Any) -> nn.Linear:
    """Return the head, in float32: it is small, and so it stays as it was trained."""
    dim, hidden = tensors["weight"].shape
    wanted = backbone.get_input_embeddings().embedding_dim
    if hidden != wanted:
        raise ModelError(f"the head takes hidden states of width {hidden}, but the backbone's are {wanted} wide")
    head = nn.Linear(hidden, dim, bias="bias" in tensors)
    head.load_state_dict(dict(tensors))
    return head


def _same_length(parts: Sequence[Tensor]) -> list[Tensor]:
    longest = max(part.shape[-1] for part in parts)
    return [nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts]
