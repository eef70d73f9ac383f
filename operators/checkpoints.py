"""Loads a model whole, or says what its checkpoint lacks.

transformers fills weights that a checkpoint lacks with random numbers and goes on. When a release renames a submodule that
can be the entire backbone: a reproducer of CLaMR got plausible figures from one (nDCG 0.224 where 0.585 was right). Here
any weight that is missing, unexpected or of another shape is an error, unless it is named as not needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from operators import weights
from operators.errors import ModelError


def load_whole(
    architecture: Any, model: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), **options: Any
) -> Any:
    """Return a transformers model in evaluation mode, every weight of which came from the checkpoint.

    Parameters
    ----------
    architecture
        A class with transformers' ``from_pretrained``.
    model
        As `weights.resolve` takes it.
    missing
        Regular expressions of names that a checkpoint may lack, because what they compute is not used.
    unexpected
        Regular expressions of names that it may have besides.
    options
        Of ``from_pretrained``.

    Raises
    ------
    ModelError
        If the checkpoint does not fit the architecture, or cannot be read.
    """
    path = weights.resolve(model)
    try:
        loaded, report = architecture.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"model {model} cannot be loaded as {architecture.__name__}: {error}") from error
    lacking = _others(report["missing_keys"], missing)
    surplus = _others(report["unexpected_keys"], unexpected)
    misshapen = sorted(str(key[0]) for key in report["mismatched_keys"])
    require_whole(model, architecture.__name__, lacking, surplus, misshapen)
    return loaded.eval()


@contextmanager
def whole_checkpoints(model: str, missing: Sequence[str] = ()) -> Iterator[None]:
    """Refuse, for as long as the block runs, what transformers loads with weights missing: for libraries that call it.

    Parameters
    ----------
    model
        What is being loaded, for the message.
    missing
        Regular expressions of names that a checkpoint may lack.

    Raises
    ------
    ModelError
        If weights are missing, or have another shape.
    """
    from transformers import PreTrainedModel

    theirs = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(architecture: Any, *arguments: Any, **options: Any) -> Any:
        wants_report = options.pop("output_loading_info", False)
        loaded, report = theirs.__func__(architecture, *arguments, output_loading_info=True, **options)
        misshapen = sorted(str(key[0]) for key in report["mismatched_keys"])
        require_whole(model, architecture.__name__, _others(report["missing_keys"], missing), (), misshapen)
        return (loaded, report) if wants_report else loaded

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = theirs


def require_whole(
    model: str, architecture: str, missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint that lacks weights, or has others.

    Raises
    ------
    ModelError
        Naming how many, and the first of each kind.
    """
    problems = [
        f"{len(names)} weights {what}, for example {sorted(names)[0]}"
        for names, what in (
            (missing, "are missing and would be random"),
            (unexpected, "have no place in it"),
            (misshapen, "have another shape"),
        )
        if names
    ]
    if problems:
        raise ModelError(
            f"model {model} does not fit {architecture}: {'; '.join(problems)}. Give a complete checkpoint of this "
            "architecture; if it is one, its names may be of another release of transformers"
        )


def read_tensors(folder: Path, pattern: str) -> dict[str, Any]:
    """Return the tensors of a folder's checkpoint whose whole name matches a regular expression, by name.

    Raises
    ------
    ModelError
        If the folder holds no ``*.safetensors``.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if re.fullmatch(pattern, name)]  # noqa: SIM118 (not a mapping)
            found |= {name: tensors.get_tensor(name) for name in names}
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's ``config.json``.

    Raises
    ------
    ModelError
        If there is none, or it is not a JSON object.
    """
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no config.json that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{folder / 'config.json'} must be a JSON object")
    return content


def _files(folder: Path) -> Iterator[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors; convert the checkpoint with save_pretrained")
    yield from files


def _others(names: Sequence[str], allowed: Sequence[str]) -> list[str]:
    return [name for name in names if not any(re.fullmatch(pattern, name) for pattern in allowed)]
