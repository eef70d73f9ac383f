"""LoRA adapters of Qwen2.5 backbones: found under the names of any release, and merged whole or not at all.

transformers moved the language model and the towers in its release 4.52 (``model.layers`` became
``model.language_model.layers``, ``visual`` became ``model.visual``), and libraries prefix names each in their way. An
adapter whose names find no module is dropped without a word by most loaders, and then the base model answers. Here every
tensor must find its module, and every module that the adapter's own config selects must find its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from operators.checkpoints import read_tensors
from operators.errors import ModelError

ADAPTER_CONFIG = "adapter_config.json"

WRAPPERS = r"(base_model\.model\.)*"
"""What peft puts before names, once for each wrapper."""

_TENSOR = re.compile(rf"{WRAPPERS}(?P<module>.+)\.(?P<kind>lora_[A-Za-z_]+)(\.default)?(?P<weight>\.weight)?")


def _bare(name: str) -> str:
    return name.removeprefix("model.")


def _before_4_52(name: str) -> str:
    return name.replace("model.language_model.", "model.", 1) if ".language_model." in name else _bare(name)


NAMINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    _before_4_52,
    _bare,  # where the class with the head is the backbone itself (colpali-engine since 0.3.11)
    lambda name: name if name == "custom_text_proj" else f"thinker.{_before_4_52(name)}",
    lambda name: name if name == "custom_text_proj" else f"thinker.{name}",
)
"""From a module's name here to what it is called in adapters."""


def merge_adapter(model: Any, folder: Path) -> Any:
    """Return the model with an adapter added to its weights: W + (alpha / r)·B·A (LoRA, arXiv:2106.09685, sec. 4.1).

    Weights are changed in place, in their own precision.

    Parameters
    ----------
    model
        A ``torch.nn.Module`` whose modules are named ``model.language_model``, ``model.visual``, ``model.audio_tower`` and
        ``custom_text_proj``.
    folder
        What peft saved: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises
    ------
    ModelError
        If a tensor finds no module, a module that the adapter's config selects finds no tensors, or shapes differ.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    read_adapter_config(folder)
    config = LoraConfig.from_pretrained(str(folder))
    tensors = _split_names(folder)
    found = _find_modules(model, config, {module for module, _ in tensors}, folder)
    state = {f"base_model.model.{found[module]}.{kind}": tensor for (module, kind), tensor in tensors.items()}
    try:
        wrapped = get_peft_model(model, _renamed(config, found), low_cpu_mem_usage=True)
        report = set_peft_model_state_dict(wrapped, state, low_cpu_mem_usage=True)
        lacking = [name for name in report.missing_keys if ".lora_" in name]
        if lacking or report.unexpected_keys:
            raise ModelError(
                f"adapter {folder}: {len(lacking)} of its modules' tensors are missing and {len(report.unexpected_keys)} "
                f"have no place, for example {sorted([*lacking, *report.unexpected_keys])[0]}"
            )
        return wrapped.merge_and_unload()
    except (RuntimeError, ValueError) as error:  # of other shapes
        raise ModelError(f"adapter {folder} does not fit its base model: {' '.join(str(error).split())}") from error


def _renamed(config: Any, found: Mapping[str, str]) -> Any:
    """Return an adapter's config that selects these modules and no other, by their names here."""
    patterns = {
        field: {found.get(name, name): value for name, value in (getattr(config, field) or {}).items()}
        for field in ("rank_pattern", "alpha_pattern")
    }
    unset = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type")
    return replace(
        config,
        target_modules=sorted(found.values()),
        inference_mode=True,
        base_model_name_or_path=None,
        **patterns,
        **dict.fromkeys(unset),
    )


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's ``adapter_config.json``.

    Raises
    ------
    ModelError
        If it cannot be read, or is not of a LoRA adapter.
    """
    try:
        content: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter {folder}: {ADAPTER_CONFIG} cannot be read: {error}") from error
    if content.get("peft_type") != "LORA":
        raise ModelError(f"adapter {folder} is of type {content.get('peft_type')}; only LORA can be merged")
    return content


def _split_names(folder: Path) -> Mapping[tuple[str, str], Any]:
    """Return an adapter's tensors by the name of their module there and what they are of it; a whole head is left out."""
    tensors: dict[tuple[str, str], Any] = {}
    for name, tensor in read_tensors(folder, r"(?!(.*\.)?custom_text_proj\.(weight|bias)$).*").items():
        parsed = _TENSOR.fullmatch(name)
        if parsed is None:
            raise ModelError(f"adapter {folder} holds {name}, which is no LoRA factor; give one that peft saved")
        tensors[parsed["module"], parsed["kind"] + (parsed["weight"] or "")] = tensor
    if not tensors:
        raise ModelError(f"adapter {folder} holds no LoRA factors")
    return tensors


def _find_modules(model: Any, config: Any, modules: set[str], folder: Path) -> dict[str, str]:
    """Return the name here of each of an adapter's modules.

    Raises
    ------
    ModelError
        Naming how many have no place, or lack their tensors, and one of them.
    """
    here = [name for name, module in model.named_modules() if name and not list(module.children())]
    namings = [{naming(name): name for name in here} for naming in NAMINGS]
    known = max(namings, key=lambda names: len(modules & names.keys()))
    if lost := sorted(modules - known.keys()):
        raise ModelError(
            f"adapter {folder}: {len(lost)} of {len(modules)} adapted modules have no place in the base model, for "
            f"example {lost[0]}; was it trained on another model?"
        )
    if lacking := sorted(_selected(model, config, known) - modules):
        raise ModelError(
            f"adapter {folder}: {len(lacking)} modules that its {ADAPTER_CONFIG} adapts have no tensors, for example "
            f"{lacking[0]}; the file is incomplete"
        )
    return {name: known[name] for name in modules}


def _selected(model: Any, config: Any, known: Mapping[str, str]) -> set[str]:
    """Return what an adapter's config selects among names of its own release."""
    from peft.tuners.tuners_utils import check_target_module_exists

    kinds = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")  # what LoRA adapts
    able = [name for name, here in known.items() if type(model.get_submodule(here)).__name__ in kinds]
    return {name for name in able if check_target_module_exists(config, name)}
