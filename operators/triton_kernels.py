"""The Triton kernels of `operators.search_gpu`: MaxSim of query tokens and compressed tokens, decoded in registers.

A program scores one clip and group by one tile of query tokens: it walks through the group's spans a block of tokens at a
time, keeps each lane's best similarity, and writes the sums of slots; neither decoded tokens nor similarities reach memory.
A similarity is that of the centroid, looked up in the table that probing needs anyway, and that of the residual, a product
of the query tile and the levels. Levels enter it as whole numbers from -128 to 127, which float16 holds exactly.

The product is cut into the fields of a byte: field p of byte j is dimension ``p * code_bytes + j``, so a block of bytes
gives one block of neighbouring dimensions a field, and no dimension is moved. Widths that are no powers of two (96, 384)
cost masked lanes in the last block of bytes only.

Compiled for sm_90, variants spill 48 bytes of registers at most: a tile of 64 lanes takes 8 warps, and the loop over blocks
of bytes is not unrolled. A clip of a million tokens is one program a tile: correct, but a batch waits for it.

References
----------
ColBERT, arXiv:2004.12832, sec. 3.3 (MaxSim); FlashAttention, arXiv:2205.14135 (a running maximum over blocks).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from operators.search_gpu import DeviceIndex, Lanes, Spans, Work

SLOT: tl.constexpr = tl.constexpr(16)
MAX_TOKENS = 64
MAX_BYTES = 64


def score_with_triton(
    index: DeviceIndex, lanes: Lanes, spans: Spans, work: Work, by_codes: bool, budget_bytes: int
) -> torch.Tensor:
    """Return the sums of maxima of every slot, (slots of a clip's tiles, W, G), float32; -inf where a group is absent.

    See `operators.search_gpu.score_with_torch`; the budget is not needed, as nothing but the sums is written.
    """
    num_clips, groups = len(work.clips), spans.num_groups
    sums = lanes.table.new_empty((work.num_tiles * lanes.tile // SLOT.value, num_clips, groups))
    if not sums.numel():
        return sums
    grid = (num_clips * work.num_tiles, groups)
    shared = (work.clips, work.first_tile, spans.offsets, spans.first, spans.last, index.centroid_ids)
    ends = (lanes.table, sums, num_clips, work.num_tiles, lanes.table.shape[1], groups)
    # With few tokens a span, a large block would be mostly masked.
    block_tokens = min(MAX_TOKENS, max(16, int(triton.next_power_of_2(spans.mean_length))))
    options = {"num_warps": 4 if lanes.tile < 64 else 8, "enable_fp_fusion": True}
    with torch.cuda.device_of(sums):
        if not by_codes:
            _score_centroids[grid](*shared, *ends, TILE=lanes.tile, BLOCK_TOKENS=block_tokens, **options)
            return sums
        code_bytes = index.residuals.shape[1]
        _score_codes[grid](
            *shared,
            index.scales,
            index.residuals,
            index.scale_of_byte,
            index.level_codes,
            *_round_queries(index, lanes),
            *ends,
            NBITS=index.nbits,
            CODE_BYTES=code_bytes,
            TILE=lanes.tile,
            BLOCK_TOKENS=block_tokens,
            BLOCK_BYTES=min(MAX_BYTES, max(16, triton.next_power_of_2(code_bytes))),
            **options,
        )
    return sums


def _round_queries(index: DeviceIndex, lanes: Lanes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries (padded_dim, L) float16, at most 1, and what turns products with levels into similarities.

    Those are a factor of the product and a start, (L,) each; the start holds `DeviceIndex.level_low`.
    """
    largest = lanes.queries.abs().amax(dim=1).clamp(min=1e-30)
    rounded = (lanes.queries / largest[:, None]).half()
    queries = rounded.new_zeros((index.padded_dim, len(rounded)))
    queries[: rounded.shape[1]] = rounded.T
    return queries, largest * index.level_step, largest * rounded.float().sum(dim=1) * index.level_low


@triton.jit
def _score_codes(
    clips, first_tiles, span_offsets, span_first, span_last, centroid_ids,
    scales, codes, scale_of_byte, level_codes, queries, factors, starts, table, sums,
    num_clips, num_tiles, num_lanes, num_groups,
    NBITS: tl.constexpr, CODE_BYTES: tl.constexpr, TILE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_BYTES: tl.constexpr,
):  # fmt: skip
    """Score clips on their codes; grid (clips * tiles, groups)."""
    item = tl.program_id(0).to(tl.int64) // num_tiles
    part = tl.program_id(0).to(tl.int64) % num_tiles
    lanes = (tl.load(first_tiles + item) + part) * TILE + tl.arange(0, TILE)
    unit = tl.load(clips + item) * num_groups + tl.program_id(1)
    factor, start = tl.load(factors + lanes), tl.load(starts + lanes)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for span in range(tl.load(span_offsets + unit), tl.load(span_offsets + unit + 1)):
        last = tl.load(span_last + span)
        for first in range(tl.load(span_first + span), last, BLOCK_TOKENS):
            tokens = first + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
            inside = tokens < last
            products = tl.zeros((BLOCK_TOKENS, TILE), tl.float32)
            for block in range(0, CODE_BYTES, BLOCK_BYTES):
                places = block + tl.arange(0, BLOCK_BYTES)
                filled = places < CODE_BYTES
                packed = tl.load(
                    codes + tokens[:, None] * CODE_BYTES + places[None, :],
                    mask=inside[:, None] & filled[None, :],
                    other=0,
                ).to(tl.int32)
                for plane in tl.static_range(0, 8 // NBITS):
                    field = (packed >> (plane * NBITS)) & ((1 << NBITS) - 1)
                    levels = (field - 128).to(tl.float16) if NBITS == 8 else tl.load(level_codes + field)
                    # Masked places have some level, but no query.
                    dims = plane * CODE_BYTES + places
                    query = tl.load(
                        queries + dims[:, None] * num_lanes + lanes[None, :], mask=filled[:, None], other=0.0
                    )
                    products = tl.dot(levels, query, acc=products)
            scale = tl.load(scale_of_byte + tl.load(scales + tokens, mask=inside, other=0).to(tl.int32))
            ids = tl.load(centroid_ids + tokens, mask=inside, other=0).to(tl.int64)
            similarities = tl.load(table + ids[:, None] * num_lanes + lanes[None, :])
            similarities += scale[:, None] * (products * factor[None, :] + start[None, :])
            best = tl.maximum(best, tl.max(tl.where(inside[:, None], similarities, float("-inf")), axis=0))
    _store_sums(best, sums, part, item, num_clips, num_groups, TILE)


@triton.jit
def _score_centroids(
    clips, first_tiles, span_offsets, span_first, span_last, centroid_ids, table, sums,
    num_clips, num_tiles, num_lanes, num_groups,
    TILE: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Score clips with each token replaced by its centroid; grid (clips * tiles, groups)."""
    item = tl.program_id(0).to(tl.int64) // num_tiles
    part = tl.program_id(0).to(tl.int64) % num_tiles
    lanes = (tl.load(first_tiles + item) + part) * TILE + tl.arange(0, TILE)
    unit = tl.load(clips + item) * num_groups + tl.program_id(1)
    best = tl.full((TILE,), float("-inf"), tl.float32)
    for span in range(tl.load(span_offsets + unit), tl.load(span_offsets + unit + 1)):
        last = tl.load(span_last + span)
        for first in range(tl.load(span_first + span), last, BLOCK_TOKENS):
            tokens = first + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
            inside = tokens < last
            ids = tl.load(centroid_ids + tokens, mask=inside, other=0).to(tl.int64)
            similarities = tl.load(table + ids[:, None] * num_lanes + lanes[None, :])
            best = tl.maximum(best, tl.max(tl.where(inside[:, None], similarities, float("-inf")), axis=0))
    _store_sums(best, sums, part, item, num_clips, num_groups, TILE)


@triton.jit
def _store_sums(best, sums, part, item, num_clips, num_groups, TILE: tl.constexpr):
    """Write the sums of slots."""
    of_slot = tl.sum(tl.reshape(best, (TILE // SLOT, SLOT)), axis=1)
    slots = part * (TILE // SLOT) + tl.arange(0, TILE // SLOT)
    tl.store(sums + (slots * num_clips + item) * num_groups + tl.program_id(1), of_slot)
