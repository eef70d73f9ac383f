"""Reads MIRe as its authors' training saves it: a folder with BERT's configuration, a tokenizer and one file of weights.

The file holds the text tower (``model.*``), the vision tower (``vision_tower.*``) and the module between them
(``query_fusion.*``), but not the vision tower's configuration: that is read from the CLIP it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import weights
from operators.checkpoints import read_config, read_tensors, require_whole
from operators.errors import ModelError
from operators.text_tower import UNUSED, TextCheckpoint, read_colbert_settings
from operators.towers import renamed
from operators.vision_tower import VisionCheckpoint, read_vision_config, without_positions

OF_CLIP = re.compile(r"vision_tower\.(?:vision_tower|vision_model)\.(?:vision_model\.)*")
OF_FUSION = {"query_fusion.split_mlp.": "split_mlp.model."} | {
    f"query_fusion.{name}.": f"pooling.{name}." for name in ("proj", "k_state", "v_state", "o_proj")
}


@dataclass(frozen=True)
class MireCheckpoint:
    """The parts of a checkpoint: towers, the head's configuration as `heads.build_head` takes it, and its weights."""

    text: TextCheckpoint
    vision: VisionCheckpoint
    head: dict[str, Any]
    head_tensors: dict[str, Any]


def read_mire(model: str, vision_model: str) -> MireCheckpoint:
    """Return the parts of a checkpoint of MIRe.

    Parameters
    ----------
    model
        Its folder, as `weights.resolve` takes it.
    vision_model
        The CLIP that its vision tower was made from: its configuration and processor are used, not its weights.

    Raises
    ------
    ModelError
        If it is not one, or holds weights that have no place.
    """
    from transformers import BertConfig

    folder = Path(weights.resolve(model))
    tensors = without_positions(_read(folder))
    text = {name: tensor for name, tensor in renamed(tensors, "model.bert.").items() if not UNUSED.fullmatch(name)}
    linear = tensors.get("model.linear.weight")
    if linear is None:
        raise ModelError(f"model {model} holds no model.linear.weight, so it is no MIRe")
    clip = {name[match.end() :]: tensor for name, tensor in tensors.items() if (match := OF_CLIP.match(name))}
    fusion: dict[str, Any] = {}
    for prefix, to in OF_FUSION.items():
        fusion |= renamed(tensors, prefix, to)
    known = ("model.bert.", "model.linear.weight", *OF_FUSION)
    others = [name for name in tensors if not name.startswith(known) and not OF_CLIP.match(name)]
    require_whole(model, "MIRe", [], others)
    settings = read_colbert_settings(folder)
    vision_folder = Path(weights.resolve(vision_model))
    return MireCheckpoint(
        TextCheckpoint(
            model,
            BertConfig.from_dict(read_config(folder)),
            text,
            linear,
            folder,
            int(settings.get("query_maxlen", 64)),
            int(settings.get("doc_maxlen", 384)),
        ),
        VisionCheckpoint(model, read_vision_config(vision_model, vision_folder), clip, vision_folder),
        mire_head_config(folder, vision_model),
        fusion,
    )


def mire_head_config(folder: Path, vision_model: str) -> dict[str, Any]:
    """Return the configuration of the head, as `heads.build_head` takes it."""
    config = read_config(folder)
    vision = read_vision_config(vision_model, Path(weights.resolve(vision_model)))
    return {
        "system": "mire",
        "vision_dim": vision.hidden_size,
        "dim": int(read_colbert_settings(folder).get("dim", 128)),
        "num_tokens": config.get("num_tokens", 16),
        "num_heads": config.get("num_heads", 12),
    }


def _read(folder: Path) -> Mapping[str, Any]:
    """Return the weights: of ``*.safetensors``, or of the one ``*.pth`` that the training wrote under ``model``."""
    import torch

    if any(folder.glob("*.safetensors")):
        return read_tensors(folder, ".*")
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise ModelError(f"{folder} must hold *.safetensors or one *.pth, found {len(files)} of the latter")
    try:
        content = torch.load(files[0], map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch raises what pickle and zipfile raise)
        raise ModelError(
            f"{files[0]} cannot be read without running code that it brings; save its 'model' alone with torch.save "
            f"({{'model': ...}}) or as safetensors: {error}"
        ) from error
    found: Mapping[str, Any] = content.get("model", content)
    return found
