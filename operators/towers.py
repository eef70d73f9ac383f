"""What text and vision towers share: their weights out of any checkpoint's layout, and the way to a device.

A tower is rarely a checkpoint of its own: FLMR's file holds a BERT and a CLIP under names of its own, a CLIP's file holds
a text model besides. So weights are read by name, renamed, and every one of them must find its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from operators.checkpoints import read_tensors, require_whole
from operators.errors import ModelError


def read_weights(folder: Path) -> dict[str, Any]:
    """Return every tensor of a model's folder: of its ``*.safetensors``, or where it has none its ``*.bin``.

    Raises
    ------
    ModelError
        If it has neither, or they cannot be read.
    """
    import torch

    if any(folder.glob("*.safetensors")):
        return read_tensors(folder, ".*")
    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.bin")):
        try:
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 (torch raises what pickle and zipfile raise)
            raise ModelError(f"{file} cannot be read as weights: {error}") from error
    if not tensors:
        raise ModelError(f"{folder} holds no weights (*.safetensors or *.bin)")
    return tensors


def load_tower(
    architecture: Any, config: Any, tensors: Mapping[str, Any], model: str, precision: str, **options: Any
) -> Any:
    """Return a transformers model in evaluation mode, made of these tensors and of all of them.

    Parameters
    ----------
    architecture
        A class with transformers' ``from_pretrained``.
    config
        Its configuration.
    tensors
        Its weights, by its own names.
    model
        Where they are from, for the message.
    precision
        ``float32`` or ``bfloat16``.
    options
        Of ``from_pretrained``.

    Raises
    ------
    ModelError
        If a weight is missing, has no place, or another shape.
    """
    import torch

    try:
        loaded, report = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=getattr(torch, precision),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {model} cannot be loaded as {architecture.__name__}: {error}") from error
    misshapen = sorted(str(key[0]) for key in report["mismatched_keys"])
    require_whole(
        model, architecture.__name__, sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), misshapen
    )
    return loaded.eval()


def load_module(module: Any, tensors: Mapping[str, Any], model: str) -> Any:
    """Return a module of ours in evaluation mode, filled with these float32 tensors and with all of them.

    Raises
    ------
    ModelError
        If a weight is missing, has no place, or another shape.
    """
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    require_whole(
        model,
        type(module).__name__,
        sorted(wanted.keys() - tensors.keys()),
        sorted(tensors.keys() - wanted.keys()),
        sorted(name for name in wanted.keys() & tensors.keys() if wanted[name] != tensors[name].shape),
    )
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return module.eval()


def renamed(tensors: Mapping[str, Any], prefix: str, to: str = "") -> dict[str, Any]:
    """Return the tensors whose names start with a prefix, with another in its place."""
    return {to + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def pad_rows(rows: Sequence[Any]) -> tuple[Any, Any]:
    """Return (T_i, H) tensors as one (B, T, H), zeros after their ends, and the (B, T) mask of what is real."""
    import torch

    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
