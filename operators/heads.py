"""A trained head on disk: the small module between a vision tower and the token embeddings of a text tower.

A folder with ``config.json`` and ``head.safetensors``. The configuration names the system, gives its module's widths, and
may name the towers that it was trained between, by fingerprint: between others its tokens mean nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from operators import weights
from operators.checkpoints import read_config, read_tensors
from operators.errors import ModelError
from operators.towers import load_module

SYSTEMS = ("flmr", "preflmr", "mire")
TRAINED_BETWEEN = "trained_between"
"""Of a head's configuration: fingerprints of its text tower and its vision tower."""


def build_head(config: Mapping[str, Any]) -> Any:
    """Return a head's module, not yet trained.

    Parameters
    ----------
    config
        ``system``, and the parameters of its module: `MappingNetwork`, `PreflmrVision` or `MireVision`.

    Raises
    ------
    ModelError
        If the system is none of `SYSTEMS`, or the parameters are not its module's.
    """
    from operators.attentive_pooling import MireVision
    from operators.mapping_network import MappingNetwork, PreflmrVision

    modules = dict(zip(SYSTEMS, (MappingNetwork, PreflmrVision, MireVision), strict=True))
    system = config.get("system")
    if system not in modules:
        raise ModelError(f"a head of system {system}; there are {', '.join(SYSTEMS)}")
    shape = {name: value for name, value in config.items() if name not in ("system", TRAINED_BETWEEN)}
    try:
        return modules[system](**shape)
    except TypeError as error:
        raise ModelError(f"the configuration of a {system} head does not fit its module: {error}") from error


def save_head(folder: Path, config: Mapping[str, Any], module: Any) -> None:
    """Write a head: its configuration, from which `build_head` makes its module again, and its weights.

    Raises
    ------
    ModelError
        If the module is not what its configuration makes.
    """
    from safetensors.torch import save_file

    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in module.state_dict().items()}
    load_module(build_head(config), state, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "head.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1), encoding="utf-8")


def load_head(folder: Path, system: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a head's configuration and its weights by name.

    Raises
    ------
    ModelError
        If it is a head of another system, or its weights are not those of its module.
    """
    config = read_config(folder)
    if config.get("system") != system:
        raise ModelError(f"{folder} is a head of {config.get('system')}, but the encoder is {system}")
    state = read_tensors(folder, ".*")
    load_module(build_head(config), state, str(folder))
    return config, state


def open_head(model: str, system: str) -> tuple[dict[str, Any], Any]:
    """Return the configuration and the module, in evaluation mode, of a head that `weights.resolve` finds.

    Raises
    ------
    ModelError
        As `load_head`.
    """
    folder = Path(weights.resolve(model))
    config, state = load_head(folder, system)
    return config, load_module(build_head(config), state, model)


def trained_between(text_model: str, vision_model: str) -> dict[str, str]:
    """Return what a head's configuration says of the towers that it was trained between, as `TRAINED_BETWEEN`."""
    return {"text_model": weights.fingerprint(text_model), "vision_model": weights.fingerprint(vision_model)}


def check_towers(config: Mapping[str, Any], head: str, text_model: str, vision_model: str) -> None:
    """Refuse towers that are not those that a head was trained between.

    Raises
    ------
    ModelError
        Naming which of them is another. A head that does not say what it was trained between is taken as it is.
    """
    wanted = config.get(TRAINED_BETWEEN, {})
    got = trained_between(text_model, vision_model) if wanted else {}
    for name, model in (("text_model", text_model), ("vision_model", vision_model)):
        if wanted.get(name, got.get(name)) != got.get(name):
            raise ModelError(
                f"head {head} was trained with another {name} than {model}: its tokens would mean nothing to it. Give "
                "the one it was trained with, or train a head for this one with `maxreel train`"
            )
