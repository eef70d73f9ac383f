"""Where the parts of a CLaMR model lie: its backbone, the adapter on it, its head.

A trap of the released adapter (``meetdavidwan/clamr``): of the head it holds LoRA factors only. The head itself was drawn at
random when training began, and was not saved. On plain Qwen2.5-VL, which has none, it cannot be loaded faithfully; here that
is an error, unless the base (like ``vidore/colqwen2.5-base``) or ``head`` brings the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from operators import weights
from operators.adapters import ADAPTER_CONFIG, read_adapter_config
from operators.checkpoints import read_config
from operators.errors import ConfigError, ModelError

SYSTEM = "clamr"
"""What ``config.json`` of a folder that training wrote names as its ``system``; ``base`` is its backbone."""

HEAD_FILE = "head.safetensors"
HEAD = r"(.*\.)?custom_text_proj\.(weight|bias)"


@dataclass(frozen=True)
class Family:
    """What differs between the backbones.

    Attributes
    ----------
    architecture, processor
        Names of transformers' classes.
    seconds_per_patch
        Time that a patch of two frames stands for, as the released code has it: one frame a second, or for Omni, where it
        sets none, the processor's own two. Frames are sampled all over a clip, so this is a convention and not their time.
    system
        The turn's system text; empty for the template's own.
    video_label, audio_label
        Text before the frames and the sound; without the latter it cannot hear.
    """

    architecture: str
    processor: str
    seconds_per_patch: float
    system: str = ""
    video_label: str = ""
    audio_label: str = ""


VL = Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor", seconds_per_patch=2.0)
OMNI = Family(
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniProcessor",
    seconds_per_patch=1.0,
    system="You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech.",
    video_label="Video: ",
    audio_label="Audio: ",
)
FAMILIES = {"qwen2_5_vl": VL, "qwen2_5_omni": OMNI, "qwen2_5_omni_thinker": OMNI}
"""By ``model_type`` of ``config.json``."""


@dataclass(frozen=True)
class Checkpoint:
    """Model ids, as `weights.resolve` takes them.

    Attributes
    ----------
    backbone
        Of the backbone and its processor.
    adapters
        Of LoRA adapters to be merged into it, in this order.
    heads
        Where the head may be; the first that has one.
    """

    backbone: str
    adapters: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def family(self) -> Family:
        """The backbone's family.

        Raises
        ------
        ModelError
            If it is of none.
        """
        model_type = read_config(Path(weights.resolve(self.backbone))).get("model_type")
        if model_type not in FAMILIES:
            raise ModelError(
                f"model {self.backbone} is of type {model_type}; the encoder clamr takes {', '.join(FAMILIES)}"
            )
        return FAMILIES[model_type]

    def fingerprints(self) -> list[str]:
        """Return what identifies the weights of every part."""
        return [weights.fingerprint(model) for model in (self.backbone, *self.adapters, *self.heads)]

    def head_dim(self) -> int:
        """Return the width of an embedding, reading no weights.

        Raises
        ------
        ModelError
            As `read_head`.
        """
        with _open(self._head()["weight"][0]) as tensors:
            dim, _ = tensors.get_slice(self._head()["weight"][1]).get_shape()
        return int(dim)

    def read_head(self) -> dict[str, Any]:
        """Return the head's ``weight`` (dim, hidden) and, where it has one, ``bias`` (dim,).

        Raises
        ------
        ModelError
            If no part has a head.
        """
        found = {}
        for kind, (file, name) in self._head().items():
            with _open(file) as tensors:
                found[kind] = tensors.get_tensor(name)
        return found

    def _head(self) -> dict[str, tuple[Path, str]]:
        """Return the file and the name of each of the head's tensors."""
        for model in self.heads:
            found = {
                name.rpartition(".")[2]: (file, name) for file, name in _head_tensors(Path(weights.resolve(model)))
            }
            if "weight" in found:
                return found
        raise ModelError(
            f"none of {', '.join(dict.fromkeys(self.heads))} holds custom_text_proj.weight: the head would be random, and "
            "every score noise (of its head, CLaMR's released adapter holds LoRA factors only). Give a base that brings a "
            "head, as vidore/colqwen2.5-base does, or with encode.clamr.head a folder that holds head.safetensors"
        )


def find_checkpoint(model: str, base: str | None = None, head: str | None = None) -> Checkpoint:
    """Return where a model's parts are.

    Parameters
    ----------
    model
        A whole checkpoint; an adapter that peft saved; or what training wrote: ``head.safetensors`` with such an adapter, or
        with a ``config.json`` that says ``{"system": "clamr", "base": ...}``.
    base
        What an adapter or a head was trained on, itself any such model; by default the one that they name.
    head
        Folder of a head, in place of the model's or the base's.

    Raises
    ------
    ConfigError
        If a base is given for a model that is whole.
    ModelError
        If a base is needed and none is named.
    """
    folder = Path(weights.resolve(model))
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    config = read_config(folder) if (folder / "config.json").exists() or not is_adapter else {}
    if not is_adapter and config.get("system") != SYSTEM:
        if base is not None:
            raise ConfigError(f"encode.clamr.base is {base}, but {model} is a whole model; leave it out")
        return Checkpoint(model, (), (head,) if head else (model,))
    named = base or config.get("base")
    if is_adapter and not named:
        named = read_adapter_config(folder).get("base_model_name_or_path")
    if not named:
        raise ModelError(f"{model} does not name the model that it was trained on; set encode.clamr.base")
    below = find_checkpoint(named)
    adapters = (*below.adapters, model) if is_adapter else below.adapters
    return Checkpoint(below.backbone, adapters, (head,) if head else (model, *below.heads))


def open_processor(checkpoint: Checkpoint) -> Any:
    """Return the processor of transformers that belongs to the backbone.

    Raises
    ------
    ModelError
        If its folder holds none.
    """
    import transformers

    try:
        return getattr(transformers, checkpoint.family.processor).from_pretrained(weights.resolve(checkpoint.backbone))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"model {checkpoint.backbone} holds no whole processor: {error}") from error


def _head_tensors(folder: Path) -> Iterator[tuple[Path, str]]:
    own = folder / HEAD_FILE
    for file in [own] if own.exists() else sorted(folder.glob("*.safetensors")):
        with _open(file) as tensors:
            yield from ((file, name) for name in tensors.keys() if re.fullmatch(HEAD, name))  # noqa: SIM118


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")
