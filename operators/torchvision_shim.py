"""Lets torchvision be imported beside a torch build that its compiled operators do not fit.

The package index has torchvision wheels for CUDA builds of torch only. Beside a CPU build their shared library cannot
load, and then ``import torchvision`` fails, and with it EasyOCR and even ``transformers.AutoModel``. Declaring the three
operator schemas that torchvision registers fake kernels for is enough; none of them is called here. Where the library
does load (a GPU install), nothing is declared.

Installed as an import hook, so that every process that imports ``operators`` has it (each Ray worker does when it
unpickles an operator) and one that never imports torchvision does not pay for torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)

_declared: list[Any] = []  # torch drops the schemas when the library object is collected


def install() -> None:
    """Put the hook first in ``sys.meta_path``, once."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def is_active() -> bool:
    """Return whether schemas were declared because torchvision's own library did not load."""
    return bool(_declared)


class _BeforeTorchvision:
    """Declares the schemas just before torchvision is first imported; finds nothing itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision" and not _declared:
            _declare_where_missing()
        return None


def _declare_where_missing() -> None:
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or importlib.util.find_spec("torch") is None:
        return
    import torch

    libraries = sorted(Path(spec.origin).parent.glob("_C*.so")) + sorted(Path(spec.origin).parent.glob("_C*.pyd"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            declared.define(schema)
        _declared.append(declared)
