"""Assignment of tokens to centroids on a GPU; the same meaning as `operators.kmeans`, which compares bytes.

On CUDA both sides of the comparison are float16, which rounds similarities to 5e-4; elsewhere float32. Every token is
compared with every centroid, however many there are, and the similarities of a block are written to memory: against a
fused kernel that costs about half the speed at 2^18 centroids (calculated, not measured), and no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from operators.errors import ShapeError
from operators.kmeans import Centroids
from operators.search_gpu import find_device

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.floating[Any]]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]

CUDA_BLOCK_BYTES, CPU_BLOCK_BYTES = 2 << 30, 64 << 20
"""Of similarities, and of tokens in double precision while they are summed."""


def assign_on(tokens: Tokens, centroids: Centroids, device: str) -> Ids:
    """Return each token's most similar centroid, (T,), int32.

    Parameters
    ----------
    tokens : (T, dim), float16 or float32
    device
        As torch names it.

    Raises
    ------
    ConfigError
        If there is no such device.
    ShapeError
        If tokens and centroids are not of one width.
    """
    ids = [np.empty(0, np.int32)]
    ids += [nearest.int().cpu().numpy() for _, nearest in _nearest(tokens, centroids, find_device(device))]
    return np.concatenate(ids)


def cluster_sums_on(tokens: Tokens, centroids: Floats, device: str) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Return the sum, (C, dim), and the number, (C,), of the tokens nearest to each centroid.

    Tokens are added in their order, so a second call returns the same.

    Parameters
    ----------
    tokens : (T, dim), float16 or float32
    centroids : (C, dim), float32
        Rounded to bytes for the comparison, as `kmeans.cluster_sums` does.

    Raises
    ------
    ConfigError, ShapeError
        As `assign_on`.
    """
    on = find_device(device)
    sums = torch.zeros(centroids.shape, dtype=torch.float64, device=on)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=on)
    for block, nearest in _nearest(tokens, Centroids.round(centroids), on):
        present, order, lengths = _by_centroid(nearest)
        # Not index_add_: on CUDA the order of its additions is left to chance.
        sums[present] += torch.segment_reduce(block.double()[order], "sum", lengths=lengths)
        counts[present] += lengths
    return sums.cpu().numpy(), counts.cpu().numpy()


def _by_centroid(nearest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the centroids that occur, the tokens ordered by them, and how many each has."""
    ordered, order = nearest.sort(stable=True)
    present, lengths = torch.unique_consecutive(ordered, return_counts=True)
    return present, order, lengths


@torch.inference_mode()
def _nearest(tokens: Tokens, centroids: Centroids, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of tokens, (N, dim), and the most similar centroid of each, (N,), int64."""
    count, dim = centroids.codes.shape
    if tokens.ndim != 2 or tokens.shape[1] != dim:
        raise ShapeError(f"tokens of shape {tokens.shape}; the centroids want (T, {dim})")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    table = torch.from_numpy(centroids.floats).to(device, dtype)
    block_bytes = CUDA_BLOCK_BYTES if device.type == "cuda" else CPU_BLOCK_BYTES
    block_tokens = max(1, block_bytes // (table.element_size() * count + 16 * dim))
    for first in range(0, len(tokens), block_tokens):
        block = torch.from_numpy(np.array(tokens[first : first + block_tokens])).to(device)
        # At most 1, so that tokens of any length fit float16; the nearest centroid stays the same.
        scaled = block.float() / block.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-30)
        yield block, (scaled.to(dtype) @ table.T).argmax(dim=1)
