"""Residual compression: a token is its nearest centroid plus a residual of 1, 2, 4 or 8 bits a dimension.

Centroids are kept in 8 bits, ids in as many bits as they need. A residual is scaled to unit length; its dimensions go to
the nearest of 2^b levels, which are the same for all dimensions; and one byte holds a scale by which the levels' vector is
multiplied so that its projection on the residual is as long as the residual, as RaBitQ does. Levels are Lloyd's (least
squares) for 1, 2 and 4 bits, and evenly spaced for 8.

Against ColBERTv2's quantile buckets and normalised sum, with bucket means, at the same bytes: mean cosine to the original,
and shares of the exact top 10 and 100 found by scoring every code, on CACM (212,008 tokens, 4,096 centroids, 64 queries),
both computed in float from one set of centroids; `benchmarks/quality.py` measures the codec itself:

====  =====================  =====================  ============================
bits  128 d: quantiles       128 d: this scheme     384 d: quantiles; this
====  =====================  =====================  ============================
1     0.917; 0.812, 0.848    0.906; 0.827, 0.872    0.825, 0.872; 0.906, 0.935
2     0.963; 0.892, 0.916    0.975; 0.913, 0.940    0.905, 0.932; 0.959, 0.966
4     0.993; 0.955, 0.969    0.998; 0.966, 0.983    0.967, 0.979; 0.986, 0.990
====  =====================  =====================  ============================

Tried and left: a least-squares scale (better cosine, but 0.941 of the first 10 at 2 bits and 384 dimensions where this
finds 0.959), a second byte that normalises the sum (within 0.01), a scale for each dimension (the same at 128), and the
residuals' principal axes with 0 to 4 bits by variance: 0.861 and 0.933 of the first 10 at 1 and 2 bits and 128
dimensions, but no better at 384 (0.903, 0.958), which is not worth a decoder of mixed widths.

References
----------
ColBERTv2, arXiv:2112.01488, sec. 3.3; RaBitQ, arXiv:2405.12497.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from operators import kernels
from operators.errors import ConfigError, ShapeError
from operators.kmeans import Centroids, assign, in_threads, train_centroids

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.floating[Any]]
Bytes = npt.NDArray[np.uint8]

ALLOWED_BITS = (1, 2, 4, 8)
BLOCK_TOKENS = 4096
LLOYD_ITERATIONS = 100
LLOYD_VALUES = 1_000_000


@dataclass(frozen=True, eq=False)
class Codes:
    """Compressed tokens.

    Attributes
    ----------
    centroid_ids : (T,), int32
    scales : (T,), uint8
        Index into `ResidualCodec.scale_of_byte`.
    residuals : (T, code_bytes), uint8
        Field p of byte j is the level of dimension ``p * code_bytes + j``.
    """

    centroid_ids: npt.NDArray[np.int32]
    scales: Bytes
    residuals: Bytes


@dataclass(frozen=True, eq=False)
class ResidualCodec:
    """Encodes token embeddings as centroid ids, scales and residual codes.

    Attributes
    ----------
    centroids
        C of them, 8 bits a dimension.
    cutoffs : (2^nbits - 1,), float32
        Rising; the level of a dimension is how many of them it reaches.
    level_low, level_step, level_bytes : float, float, (2^nbits,) uint8
        Levels are ``low + step * byte``.
    scale_low, scale_high
        Byte 0 is scale 0; bytes 1 to 255 are spaced evenly in the logarithm between these.
    nbits
        Bits a dimension: 1, 2, 4 or 8.

    Raises
    ------
    ConfigError
        If nbits is not allowed.
    ShapeError
        If there are not 2^nbits - 1 cutoffs and 2^nbits levels.
    """

    centroids: Centroids
    cutoffs: Floats
    level_low: float
    level_step: float
    level_bytes: Bytes
    scale_low: float
    scale_high: float
    nbits: int

    def __post_init__(self) -> None:
        _check_bits(self.nbits)
        if self.cutoffs.shape != (2**self.nbits - 1,) or self.level_bytes.shape != (2**self.nbits,):
            raise ShapeError(
                f"cutoffs {self.cutoffs.shape} and levels {self.level_bytes.shape}; {self.nbits} bits want "
                f"({2**self.nbits - 1},) and ({2**self.nbits},)"
            )

    @classmethod
    def train(
        cls, sample: Tokens, heldout: Tokens, nbits: int, num_centroids: int, seed: int, num_threads: int = 1
    ) -> ResidualCodec:
        """Return a codec: centroids from a sample, levels and scales from the residuals of held-out tokens.

        Raises
        ------
        ConfigError
            If nbits is not allowed, no token is held out, or there are fewer sampled tokens than centroids.
        """
        _check_bits(nbits)  # before k-means, which takes minutes
        if len(heldout) == 0:
            raise ConfigError("no token is held out; the levels of a codec need at least one")
        return cls.fit(train_centroids(sample, num_centroids, seed, num_threads), heldout, nbits, seed, num_threads)

    @classmethod
    def fit(cls, centroids: Floats, heldout: Tokens, nbits: int, seed: int, num_threads: int = 1) -> ResidualCodec:
        """Return a codec of given centroids, (C, dim): levels and scales from held-out tokens, (T, dim)."""
        _check_bits(nbits)
        rounded = Centroids.round(centroids)
        residuals = heldout.astype(np.float32) - rounded.floats[assign(heldout, rounded, num_threads)]
        norms = np.linalg.norm(residuals, axis=1)
        # Tokens that are their centroid tell nothing of levels.
        residuals, norms = residuals[norms > 1e-6], norms[norms > 1e-6]
        if len(norms) == 0:
            residuals, norms = np.ones((1, heldout.shape[1]), np.float32), np.ones(1, np.float32)
        unit = residuals * (np.sqrt(heldout.shape[1]) / norms)[:, None]
        values = unit.ravel()
        if len(values) > LLOYD_VALUES:
            values = np.random.default_rng(seed).choice(values, LLOYD_VALUES, replace=False)
        levels = _even_levels(values) if nbits == 8 else _lloyd_levels(values, 2**nbits)
        low, step = float(levels[0]), float(np.float32(max(levels[-1] - levels[0], 1e-6) / 255))
        level_bytes = np.rint((levels - low) / step).astype(np.uint8)
        rounded_levels = (low + step * level_bytes).astype(np.float32)
        cutoffs = ((rounded_levels[1:] + rounded_levels[:-1]) / 2).astype(np.float32)
        buckets = np.searchsorted(cutoffs, unit, side="right")
        along = np.maximum(np.einsum("td,td->t", residuals, rounded_levels[buckets]), 1e-6)
        scales = norms.astype(np.float32) ** 2 / along
        scale_low, scale_high = np.quantile(scales, 0.01) / 10, scales.max() * 1.1
        return cls(rounded, cutoffs, low, step, level_bytes, float(scale_low), float(scale_high), nbits)

    @property
    def dim(self) -> int:
        """Width of a token embedding."""
        return int(self.centroids.codes.shape[1])

    @property
    def num_centroids(self) -> int:
        """C."""
        return len(self.centroids.codes)

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's residual code: a multiple of 4."""
        return -(-self.dim * self.nbits // 32) * 4

    @property
    def padded_dim(self) -> int:
        """Dimensions that a residual code has room for."""
        return self.code_bytes * 8 // self.nbits

    @cached_property
    def levels(self) -> Floats:
        """What stands for each level, (2^nbits,)."""
        return (self.level_low + self.level_step * self.level_bytes).astype(np.float32)

    @cached_property
    def scale_of_byte(self) -> Floats:
        """Scales, (256,); the first is 0."""
        return np.concatenate([[0], np.geomspace(self.scale_low, self.scale_high, 255)]).astype(np.float32)

    def encode(self, tokens: Tokens, num_threads: int = 1, ids: npt.NDArray[np.int32] | None = None) -> Codes:
        """Return compressed tokens.

        Parameters
        ----------
        tokens : (T, dim), float16 or float32
        ids : (T,), int32
            Their centroids, where known.

        Raises
        ------
        ShapeError
            If the tokens are of another width.
        """
        if ids is None:
            ids = assign(tokens, self.centroids, num_threads)
        elif tokens.shape != (len(ids), self.dim):
            raise ShapeError(f"tokens of shape {tokens.shape}; the codec wants (T, {self.dim}), and {len(ids)} ids")
        scales = np.empty(len(tokens), dtype=np.float32)
        residuals = np.empty((len(tokens), self.code_bytes), dtype=np.uint8)

        def work(first: int, last: int) -> None:
            block = slice(first, last)
            kernels.encode_residuals(
                np.ascontiguousarray(tokens[block], np.float32),
                self.centroids.floats,
                ids[block],
                self.cutoffs,
                self.levels,
                self.code_bytes,
                self.nbits,
                scales[block],
                residuals[block],
            )

        in_threads(len(tokens), BLOCK_TOKENS, num_threads, work)
        return Codes(ids, self._round_scales(scales), residuals)

    def _round_scales(self, scales: Floats) -> Bytes:
        steps = np.log(np.maximum(scales, 1e-30) / self.scale_low) * (254 / np.log(self.scale_high / self.scale_low))
        rounded = np.where(scales > 0, np.clip(np.rint(steps), 0, 254) + 1, 0)
        return rounded.astype(np.uint8)

    def decode(self, codes: Codes) -> Floats:
        """Return token embeddings, (T, dim), float32: near unit length, not normalised."""
        num_tokens, per_byte = len(codes.residuals), 8 // self.nbits
        shifts = np.arange(per_byte, dtype=np.uint8)[:, None] * np.uint8(self.nbits)
        fields = (codes.residuals[:, None, :] >> shifts) & np.uint8(2**self.nbits - 1)
        residuals = self.levels[fields.reshape(num_tokens, self.padded_dim)[:, : self.dim]]
        scaled = self.scale_of_byte[codes.scales][:, None] * residuals
        decoded: Floats = self.centroids.floats[codes.centroid_ids] + scaled
        return decoded

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return what `from_arrays` needs to make the codec again."""
        numbers = (self.centroids.low, self.centroids.step, self.level_low, self.level_step)
        return {
            "centroids": self.centroids.codes,
            "cutoffs": self.cutoffs,
            "level_bytes": self.level_bytes,
            "numbers": np.array([*numbers, self.scale_low, self.scale_high]),
            "nbits": np.array(self.nbits),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ResidualCodec:
        """Return the codec that `to_arrays` took apart."""
        low, step, level_low, level_step, scale_low, scale_high = arrays["numbers"].tolist()
        return cls(
            Centroids(arrays["centroids"], low, step),
            arrays["cutoffs"],
            level_low,
            level_step,
            arrays["level_bytes"],
            scale_low,
            scale_high,
            int(arrays["nbits"]),
        )


def _check_bits(nbits: int) -> None:
    if nbits not in ALLOWED_BITS:
        raise ConfigError(f"nbits is {nbits}; allowed are {', '.join(map(str, ALLOWED_BITS))}")


def _lloyd_levels(values: Floats, count: int) -> Floats:
    """Return the levels of least mean squared error, rising."""
    ordered = np.sort(values.astype(np.float64))
    before = np.concatenate([[0], np.cumsum(ordered)])
    levels: npt.NDArray[np.float64] = np.quantile(ordered, (np.arange(count) + 0.5) / count)
    for _ in range(LLOYD_ITERATIONS):
        bounds = np.concatenate([[0], np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2), [len(ordered)]])
        counts = np.diff(bounds)
        levels = np.where(counts > 0, np.diff(before[bounds]) / np.maximum(counts, 1), levels)
    return levels.astype(np.float32)


def _even_levels(values: Floats) -> Floats:
    low, high = np.quantile(values, [0.0001, 0.9999])
    return np.linspace(low, high, 256, dtype=np.float32)
