"""Residual compression: a token is its nearest centroid plus a residual of 1, 2, 4 or 8 bits a dimension.

One scalar codebook serves all dimensions: cutoffs at the quantiles k / 2^b of held-out residuals, and for each bucket
the mean of the residuals that fall into it. (ColBERTv2 takes the middle quantile of a bucket; the mean is the level with
the least squared error.)

References
----------
ColBERTv2, arXiv:2112.01488, sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.errors import ConfigError, ShapeError
from operators.kmeans import assign, train_centroids

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

BLOCK_TOKENS = 65_536
ALLOWED_BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class ResidualCodec:
    """Encodes token embeddings as centroid ids and residual codes.

    Attributes
    ----------
    centroids : (C, dim), float32
    cutoffs : (2^nbits - 1,), float32
        Rising; a residual's bucket is how many of them it reaches.
    weights : (2^nbits,), float32
        What stands for each bucket.
    nbits
        Bits a dimension: 1, 2, 4 or 8.
    """

    centroids: Floats
    cutoffs: Floats
    weights: Floats
    nbits: int

    @classmethod
    def train(cls, sample: Floats, heldout: Floats, nbits: int, num_centroids: int, seed: int) -> ResidualCodec:
        """Return a codec: centroids from a sample, buckets from the residuals of held-out tokens.

        Raises
        ------
        ConfigError
            If nbits is not allowed, or there are fewer sampled tokens than centroids.
        """
        if nbits not in ALLOWED_BITS:
            raise ConfigError(f"nbits is {nbits}; allowed are {', '.join(map(str, ALLOWED_BITS))}")
        if len(sample) < num_centroids:
            raise ConfigError(f"{num_centroids} centroids need as many tokens; the sample has {len(sample)}")
        centroids = train_centroids(sample, num_centroids, seed)
        residuals = (heldout - centroids[assign(heldout, centroids)]).ravel()
        cutoffs = np.quantile(residuals, np.arange(1, 2**nbits) / 2**nbits).astype(np.float32)
        middles = np.quantile(residuals, (np.arange(2**nbits) + 0.5) / 2**nbits)
        buckets = np.searchsorted(cutoffs, residuals, side="right")
        counts = np.bincount(buckets, minlength=2**nbits)
        sums = np.bincount(buckets, weights=residuals, minlength=2**nbits)
        means = np.where(counts, sums / np.maximum(counts, 1), middles).astype(np.float32)
        return cls(centroids, cutoffs, means, nbits)

    @property
    def dim(self) -> int:
        """Width of a token embedding."""
        return int(self.centroids.shape[1])

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's residual code."""
        return -(-self.dim * self.nbits // 8)

    def encode(self, tokens: Floats) -> tuple[npt.NDArray[np.int32], Bytes]:
        """Return centroid ids, (T,) int32, and residual codes, (T, code_bytes) uint8.

        Raises
        ------
        ShapeError
            If the tokens are not (T, dim).
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.dim:
            raise ShapeError(f"tokens of shape {tokens.shape}; the codec wants (T, {self.dim})")
        ids = np.empty(len(tokens), dtype=np.int32)
        codes = np.empty((len(tokens), self.code_bytes), dtype=np.uint8)
        for first in range(0, len(tokens), BLOCK_TOKENS):
            block = slice(first, first + BLOCK_TOKENS)
            ids[block] = assign(tokens[block], self.centroids)
            residuals = tokens[block] - self.centroids[ids[block]]
            codes[block] = self._pack(np.searchsorted(self.cutoffs, residuals, side="right").astype(np.uint8))
        return ids, codes

    def decode(self, ids: npt.NDArray[np.int32], codes: Bytes) -> Floats:
        """Return L2-normalised token embeddings, (T, dim), float32."""
        tokens = self.centroids[ids] + self.weights[self._unpack(codes)]
        decoded: Floats = tokens / np.maximum(np.linalg.norm(tokens, axis=1, keepdims=True), 1e-12)
        return decoded

    def _pack(self, buckets: Bytes) -> Bytes:
        per_byte = 8 // self.nbits
        padded = np.pad(buckets, ((0, 0), (0, -self.dim % per_byte)))
        shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(self.nbits)
        packed: Bytes = np.bitwise_or.reduce(padded.reshape(len(buckets), -1, per_byte) << shifts, axis=2)
        return packed

    def _unpack(self, codes: Bytes) -> Bytes:
        shifts = np.arange(8 // self.nbits, dtype=np.uint8) * np.uint8(self.nbits)
        buckets = (codes[:, :, None] >> shifts) & np.uint8(2**self.nbits - 1)
        unpacked: Bytes = buckets.reshape(len(codes), -1)[:, : self.dim]
        return unpacked

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what `from_arrays` needs to make the codec again."""
        return {
            "centroids": self.centroids,
            "cutoffs": self.cutoffs,
            "weights": self.weights,
            "nbits": np.array(self.nbits),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ResidualCodec:
        """Return the codec that `to_arrays` took apart."""
        return cls(arrays["centroids"], arrays["cutoffs"], arrays["weights"], int(arrays["nbits"]))
