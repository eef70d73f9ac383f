"""Search over the compressed clips of an index, on a GPU; the same stages and plans as `operators.search`.

The codes lie in the device's memory. Queries go in batches: one table of the similarities of all query tokens and all
centroids serves probing, centroid interaction and, in the Triton kernels, the centroids' part of every similarity. All
pairs of a query and a clip, pruned or not, are scored by one function, of which there are two:

``torch``
    Decodes a block of tokens to float32 and multiplies: agrees with scores over `ResidualCodec.decode` but for the order
    of additions. Runs anywhere, and writes to memory what it decodes: 4 bytes a dimension.
``triton``
    `operators.triton_kernels`, which decode in registers. Codes are exact in float16, products are added up in float32,
    and the centroids' part is float32 throughout, so only the query is rounded: a similarity is wrong by at most
    ``2^-11 * |q| * |r|``, where r is the token's decoded residual. bfloat16 would cost 8 times that and save nothing.

Clips are never padded: maxima start at -inf. Queries are: a lane of zeros has similarity 0 to every token, and adds 0.
What lies in memory besides the index is bounded by a budget, unless one query alone needs more. Offsets are 64-bit.

References
----------
PLAID, arXiv:2205.09707, sec. 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from operators import kernels as cpu_kernels
from operators.codec import ResidualCodec
from operators.errors import ConfigError, ShapeError
from operators.maxsim import Scorer, blocks
from operators.search import Plan, Result
from operators.segment import Segment

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

SLOT = 16
"""Lanes of one query whose maxima are summed in a kernel; a query has as many slots as it needs."""

MAX_TILE = 64
"""Lanes that share one decoding of the codes in registers; more would spill."""

MAX_LANES = 4096
PIECE = 256
"""Tokens reduced by one thread in the torch path; long runs are cut so that threads have like work."""

CPU_BUDGET_BYTES = 256 << 20
UPLOAD_BYTES = 64 << 20
ORDINAL_MASK = 0xFFFFFFFF
LOWEST = torch.iinfo(torch.int64).min


@dataclass(frozen=True, eq=False)
class DeviceIndex:
    """Codes and codec on a device.

    Attributes
    ----------
    centroid_ids, scales, residuals : (T,) int32, (T,) uint8, (T, code_bytes) uint8
    centroids : (C, dim), float32
    scale_of_byte : (256,), float32
    levels_of_byte : (256, 8 / nbits), float32
        The levels of the fields of each byte.
    level_codes : (2^nbits,), float16
        Levels less 128, in steps; see `level_low`.
    level_low, level_step
        Levels are ``level_low + level_step * level_codes``.
    nbits, padded_dim
        See `ResidualCodec`.
    """

    centroid_ids: Tensor
    scales: Tensor
    residuals: Tensor
    centroids: Tensor
    scale_of_byte: Tensor
    levels_of_byte: Tensor
    level_codes: Tensor
    level_low: float
    level_step: float
    nbits: int
    padded_dim: int

    @classmethod
    def upload(cls, segments: Sequence[Segment], codec: ResidualCodec, device: torch.device) -> DeviceIndex:
        """Return the codes of several segments after one another."""
        shifts = np.arange(8 // codec.nbits) * codec.nbits
        fields = (np.arange(256)[:, None] >> shifts) & (2**codec.nbits - 1)
        return cls(
            _upload([segment.centroid_ids for segment in segments], np.int32, device),
            _upload([segment.scales for segment in segments], np.uint8, device),
            _upload([segment.residuals for segment in segments], np.uint8, device),
            _upload([codec.centroids.floats], np.float32, device),
            _upload([codec.scale_of_byte], np.float32, device),
            _upload([codec.levels[fields]], np.float32, device),
            _upload([codec.level_bytes.astype(np.int16) - 128], np.float16, device),
            codec.level_low + 128 * codec.level_step,
            codec.level_step,
            codec.nbits,
            codec.padded_dim,
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of some tokens, (N, dim), float32."""
        levels = self.levels_of_byte[self.residuals[tokens].int()].transpose(1, 2)
        levels = levels.reshape(len(tokens), self.padded_dim)[:, : self.centroids.shape[1]]
        scales = self.scale_of_byte[self.scales[tokens].int()]
        return torch.addcmul(self.centroids[self.centroid_ids[tokens]], scales[:, None], levels)


@dataclass(frozen=True, eq=False)
class Spans:
    """Stretches of tokens of one clip and one group: runs, joined where they touch, without empty ones.

    Attributes
    ----------
    offsets : (D * G + 1,), int64
        First span of each clip's groups; of group g of clip c at ``c * G + g``.
    first, last : (S,), int64
        Tokens [first, last) of each span; no span is empty.
    num_groups
        G.
    """

    offsets: Tensor
    first: Tensor
    last: Tensor
    num_groups: int

    @cached_property
    def mean_length(self) -> int:
        """Tokens of a span, at least 1."""
        return max(1, int((self.last - self.first).sum()) // max(1, len(self.first)))

    @classmethod
    def of(cls, segment: Segment, scorer: Scorer, device: torch.device) -> Spans:
        """Return the spans that a scorer looks at."""
        num_groups = len(scorer.weights)
        group = np.asarray(scorer.group_of, np.int64)[segment.run_modality]
        kept = np.flatnonzero((group >= 0) & (segment.run_lengths > 0))
        unit = segment.run_clip[kept] * num_groups + group[kept]
        first, last = segment.token_of_run[kept], segment.token_of_run[kept + 1]
        starts = np.ones(len(kept), dtype=np.bool_)
        starts[1:] = (unit[1:] != unit[:-1]) | (first[1:] != last[:-1])
        ends = np.ones(len(kept), dtype=np.bool_)
        ends[:-1] = starts[1:]
        order = np.argsort(unit[starts], kind="stable")
        offsets = np.searchsorted(unit[starts][order], np.arange(segment.num_clips * num_groups + 1))
        arrays = (offsets, first[starts][order], last[ends][order])
        on_device = [_upload([array], np.int64, device) for array in arrays]
        return cls(on_device[0], on_device[1], on_device[2], num_groups)


@dataclass(frozen=True, eq=False)
class Lanes:
    """Query tokens, each query from a slot or a tile of its own.

    Attributes
    ----------
    queries : (L, dim), float32
        Zero where no query token is.
    live : (L,), bool
        Where one is.
    query : (L,), int64
        Whose it is.
    table : (C, L), float32
        Similarities to the centroids.
    tile
        Lanes that a kernel scores together: a power of two from `SLOT` to `MAX_TILE` that divides L.
    num_queries
        Q.
    """

    queries: Tensor
    live: Tensor
    query: Tensor
    table: Tensor
    tile: int
    num_queries: int

    @classmethod
    def pack(cls, queries: Sequence[Floats], index: DeviceIndex, own_tiles: bool) -> Lanes:
        """Return lanes of queries that have tokens.

        Parameters
        ----------
        own_tiles
            Give all queries the same number of tiles of their own; else they share tiles, without whole slots empty
            between them.
        """
        longest = max(len(query) for query in queries)
        tile = _tile_for(longest)
        widths = [_round_up(longest, tile) if own_tiles else _round_up(len(query), SLOT) for query in queries]
        num_lanes = _round_up(sum(widths), tile)
        packed = np.zeros((num_lanes, index.centroids.shape[1]), dtype=np.float32)
        owner = np.full(num_lanes, -1, dtype=np.int64)
        for number, (query, end) in enumerate(zip(queries, np.cumsum(widths), strict=True)):
            lanes = slice(end - widths[number], end - widths[number] + len(query))
            packed[lanes], owner[lanes] = query, number
        device = index.centroids.device
        tokens, query_of = _upload([packed], np.float32, device), _upload([owner], np.int64, device)
        return cls(tokens, query_of >= 0, query_of, index.centroids @ tokens.T, tile, len(queries))


@dataclass(frozen=True, eq=False)
class Work:
    """Clips to be scored, each by some tiles.

    Attributes
    ----------
    clips : (W,), int64
    first_tile : (W,), int64
        Not falling.
    num_tiles
        Of each, from its first on.
    """

    clips: Tensor
    first_tile: Tensor
    num_tiles: int


Score = Callable[[DeviceIndex, Lanes, Spans, Work, bool, int], Tensor]
"""``score(index, lanes, spans, work, by_codes, budget_bytes)``: as `score_with_torch`."""


def score_with_torch(
    index: DeviceIndex, lanes: Lanes, spans: Spans, work: Work, by_codes: bool, budget_bytes: int
) -> Tensor:
    """Return the sums of maxima of every slot, (slots of a clip's tiles, W, G), float32; -inf where a group is absent.

    Parameters
    ----------
    by_codes
        Whether to score tokens by their codes; else by their centroids.
    """
    groups, slots = spans.num_groups, work.num_tiles * lanes.tile // SLOT
    sums = lanes.queries.new_empty((slots, len(work.clips), groups))
    tiles, counts = torch.unique_consecutive(work.first_tile, return_counts=True)
    first = 0
    for tile, count in zip(tiles.tolist(), counts.tolist(), strict=True):
        of_tile = slice(tile * lanes.tile, (tile + work.num_tiles) * lanes.tile)
        clips = work.clips[first : first + count]
        maxima = _maxima(index, lanes, of_tile, spans, clips, by_codes, budget_bytes)
        sums[:, first : first + count] = maxima.view(count, groups, slots, SLOT).sum(dim=-1).permute(2, 0, 1)
        first += count
    return sums


def _maxima(
    index: DeviceIndex,
    lanes: Lanes,
    of_tile: slice,
    spans: Spans,
    clips: Tensor,
    by_codes: bool,
    budget_bytes: int,
) -> Tensor:
    """Return the best similarity of each lane in each group of clips, (clips * G, lanes); -inf where there is none."""
    queries, table = lanes.queries[of_tile], lanes.table[:, of_tile]
    units = (clips[:, None] * spans.num_groups + torch.arange(spans.num_groups, device=clips.device)).flatten()
    maxima = queries.new_full((len(units), len(queries)), float("-inf"))
    num_spans = spans.offsets[units + 1] - spans.offsets[units]
    span = _ranges(spans.offsets[units], num_spans)
    lengths = spans.last[span] - spans.first[span]
    num_pieces = (lengths + PIECE - 1) // PIECE
    offset = _ranges(torch.zeros_like(lengths), num_pieces) * PIECE
    piece_first = spans.first[span].repeat_interleave(num_pieces) + offset
    piece_lengths = (lengths.repeat_interleave(num_pieces) - offset).clamp(max=PIECE)
    piece_unit = torch.arange(len(units), device=clips.device).repeat_interleave(num_spans)
    piece_unit = piece_unit.repeat_interleave(num_pieces)
    token_bytes = 4 * (3 * index.padded_dim + len(queries)) + 16
    for a, b in blocks(piece_lengths.cpu().numpy(), max(PIECE, budget_bytes // token_bytes)):
        tokens = _ranges(piece_first[a:b], piece_lengths[a:b])
        similarities = index.decode(tokens) @ queries.T if by_codes else table[index.centroid_ids[tokens]]
        best = torch.segment_reduce(similarities, "max", lengths=piece_lengths[a:b], initial=float("-inf"))
        maxima.scatter_reduce_(0, piece_unit[a:b, None].expand_as(best), best, "amax")
    return maxima


def find_device(name: str) -> torch.device:
    """Return a device of torch's.

    Raises
    ------
    ConfigError
        If it is a CUDA device, and there is none.
    """
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, but torch finds no CUDA device; use cpu")
    return device


class GpuSearcher:
    """Holds an index, or a part of it, on a device, ready to be searched. Interface and meaning as `Searcher`.

    Parameters
    ----------
    segments
        They become one; with their residual codes.
    device
        As torch names it; ``cpu`` is meant for tests.
    kernels
        ``triton``, ``torch``, or ``auto``: Triton's where there is a CUDA device and Triton is installed.
    budget_bytes
        What a search may hold besides the index; a quarter of the device's free memory if None.

    Raises
    ------
    ConfigError
        If there is no such device, or kernels.
    ShapeError
        If residual codes are missing.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        codec: ResidualCodec,
        device: str = "cuda",
        kernels: Literal["auto", "triton", "torch"] = "auto",
        budget_bytes: int | None = None,
    ) -> None:
        if any(len(segment.residuals) != len(segment.centroid_ids) for segment in segments):
            raise ShapeError("segments without residual codes; on a GPU all codes must be in memory")
        self._device = find_device(device)
        self._score = _find_kernels(kernels, self._device)
        self.codec = codec
        # The codes go straight to the device; only what is small is joined here.
        self.segment = Segment.join(segments, np.empty((0, codec.code_bytes), np.uint8))
        self._index = DeviceIndex.upload(segments, codec, self._device)
        self._list_offsets, self._lists = self._invert()
        self._spans: dict[tuple[tuple[int, ...], int], Spans] = {}
        self._budget_bytes = _free_bytes(self._device) if budget_bytes is None else budget_bytes

    def _invert(self) -> tuple[Tensor, Tensor]:
        """Return the clips that hold each centroid, rising: offsets (C + 1,) int64, and clips (N,) int32."""
        segment, count = self.segment, self.codec.num_centroids
        offsets = np.zeros(count + 1, dtype=np.int64)
        arrays = (segment.centroid_ids, count, segment.run_of_clip, segment.token_of_run, offsets)
        cpu_kernels.invert(*arrays, np.empty(0, np.uint32))
        lists = np.empty(offsets[-1], dtype=np.uint32)
        if len(lists):
            cpu_kernels.invert(*arrays, lists)
        return _upload([offsets], np.int64, self._device), _upload([lists], np.int32, self._device)

    def search(
        self,
        queries: Sequence[Floats],
        k: int,
        plan: Plan,
        scorer: Scorer,
        allowed: npt.NDArray[np.bool_] | None = None,
        num_threads: int = 1,
    ) -> list[Result]:
        """Return for each query the ordinals and scores of its best clips, at most ``k``, best first.

        Where a plan wants as many candidates as there are clips, every code is scored.

        Parameters
        ----------
        queries
            (Tq, dim) each.
        allowed : (D,)
            Clips that may be found; all if None.
        num_threads
            Ignored: there as in `Searcher.search`.

        Raises
        ------
        ShapeError
            If a query is of another width than the index, or ``allowed`` has not one entry a clip.
        """
        results: list[Result] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        self._check(queries, allowed)
        clips = np.arange(self.segment.num_clips) if allowed is None else np.flatnonzero(allowed)
        if not len(clips):
            return results
        spans = self._spans_of(scorer)
        scans = plan.probes == 0 or max(plan.candidates, 2 * k) >= len(clips)
        for batch in self._batches([len(query) for query in queries], 0 if scans else plan.probes):
            chosen = [queries[i] for i in batch]
            with torch.inference_mode():
                if scans:
                    keys = self._scan(chosen, k, scorer, spans, _upload([clips], np.int64, self._device))
                else:
                    mask = None if allowed is None else _upload([allowed], np.bool_, self._device)
                    keys = self._probe_and_score(chosen, k, plan, scorer, spans, mask)
                ordinals, scores = (part.cpu().numpy() for part in _from_keys(keys))
            for i, row, of_row in zip(batch, ordinals, scores, strict=True):
                found = np.isfinite(of_row)
                results[i] = (row[found], of_row[found])
        return results

    def _check(self, queries: Sequence[Floats], allowed: npt.NDArray[np.bool_] | None) -> None:
        dim, num_clips = self.codec.dim, self.segment.num_clips
        for query in queries:
            if query.ndim != 2 or query.shape[1] != dim:
                raise ShapeError(f"a query of shape {query.shape}; the index wants (Tq, {dim})")
        if allowed is not None and allowed.shape != (num_clips,):
            raise ShapeError(f"a filter of shape {allowed.shape}; the index wants ({num_clips},)")

    def _spans_of(self, scorer: Scorer) -> Spans:
        key = (scorer.group_of, len(scorer.weights))
        if key not in self._spans:
            self._spans[key] = Spans.of(self.segment, scorer, self._device)
        return self._spans[key]

    def _batches(self, lengths: Sequence[int], probes: int) -> Iterator[list[int]]:
        """Yield queries with tokens to be searched together, within the budget; to be probed, all of one width."""
        order = [i for i in np.argsort(lengths, kind="stable").tolist() if lengths[i]]
        num_clips, num_centroids = self.segment.num_clips, self.codec.num_centroids
        half = self._budget_bytes // 2
        # The table is there up to three times: as it is, and while the best are looked for.
        lane_bytes = max(12 * num_centroids, half // MAX_LANES)
        for width, of_width in groupby(order, lambda i: _width(lengths[i]) if probes else 0):
            alike = list(of_width)
            # Four times the mean: long lists are met more often than short ones. A pair takes some 64 bytes until scored.
            met = [min(num_clips, 4 * lengths[i] * probes * len(self._lists) // num_centroids) for i in alike]
            sizes = [
                lane_bytes * width + num_clips + num_centroids + 64 * count
                if probes
                else lane_bytes * _round_up(lengths[i], SLOT)
                for i, count in zip(alike, met, strict=True)
            ]
            for first, last in blocks(np.asarray(sizes, np.int64), half):
                yield alike[first:last]

    def _scan(self, queries: Sequence[Floats], k: int, scorer: Scorer, spans: Spans, clips: Tensor) -> Tensor:
        """Return the keys of each query's best clips, (Q, up to k), every code being scored."""
        lanes = Lanes.pack(queries, self._index, own_tiles=False)
        slots = torch.tensor([_round_up(len(query), SLOT) // SLOT for query in queries], device=self._device)
        used = int(slots.sum())
        best = torch.empty((len(queries), 0), dtype=torch.int64, device=self._device)
        for some in clips.split(self._clips_at_once(len(lanes.queries), spans)):
            work = Work(some, torch.zeros_like(some), len(lanes.queries) // lanes.tile)
            sums = self._score(self._index, lanes, spans, work, True, self._budget_bytes // 4)[:used]
            scores = _combine(torch.segment_reduce(sums, "sum", lengths=slots), scorer)
            keys = torch.cat([best, _to_keys(scores, some)], dim=1)
            best = keys.topk(min(k, keys.shape[1])).values
        return best

    def _probe_and_score(
        self, queries: Sequence[Floats], k: int, plan: Plan, scorer: Scorer, spans: Spans, allowed: Tensor | None
    ) -> Tensor:
        """Return the keys of each query's best clips, (Q, up to k)."""
        lanes = Lanes.pack(queries, self._index, own_tiles=True)
        query, clips = self._probe(lanes, plan.probes, allowed)
        limit = max(plan.candidates, 2 * k)
        counts = torch.bincount(query, minlength=len(queries))
        if int(counts.max()) > limit:
            approximate = self._score_pairs(lanes, query, clips, scorer, spans, by_codes=False)
            keys = _best_of_rows(_to_keys(approximate, clips), query, counts, limit)
            query = (keys != LOWEST).nonzero()[:, 0]
            clips = _from_keys(keys[keys != LOWEST])[0]
            counts = torch.bincount(query, minlength=len(queries))
        scores = self._score_pairs(lanes, query, clips, scorer, spans, by_codes=True)
        return _best_of_rows(_to_keys(scores, clips), query, counts, k)

    def _probe(self, lanes: Lanes, probes: int, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return pairs of a query and a clip that holds one of the best centroids of a query token, rising."""
        table, query = lanes.table[:, lanes.live], lanes.query[lanes.live]
        best = table.topk(min(probes, len(table)), dim=0, sorted=False).indices
        chosen = torch.zeros((lanes.num_queries, len(table)), dtype=torch.bool, device=self._device)
        chosen[query.expand_as(best), best] = True
        of_query, centroid = chosen.nonzero(as_tuple=True)
        lengths = self._list_offsets[centroid + 1] - self._list_offsets[centroid]
        met = torch.zeros((lanes.num_queries, self.segment.num_clips), dtype=torch.bool, device=self._device)
        for a, b in blocks(lengths.cpu().numpy(), max(1, self._budget_bytes // 4 // 64)):
            clips = self._lists[_ranges(self._list_offsets[centroid[a:b]], lengths[a:b])]
            met[of_query[a:b].repeat_interleave(lengths[a:b]), clips.long()] = True
        if allowed is not None:
            met &= allowed
        found, clips = met.nonzero(as_tuple=True)
        return found, clips

    def _score_pairs(
        self, lanes: Lanes, query: Tensor, clips: Tensor, scorer: Scorer, spans: Spans, by_codes: bool
    ) -> Tensor:
        """Return the score of each pair of a query and a clip, (W,), float32."""
        num_tiles = len(lanes.queries) // lanes.tile // lanes.num_queries
        at_once = self._clips_at_once(num_tiles * lanes.tile, spans)
        scores = [lanes.queries.new_empty(0)]
        for some, of_query in zip(clips.split(at_once), query.split(at_once), strict=True):
            work = Work(some, of_query * num_tiles, num_tiles)
            sums = self._score(self._index, lanes, spans, work, by_codes, self._budget_bytes // 4)
            scores.append(_combine(sums.sum(dim=0), scorer))
        return torch.cat(scores)

    def _clips_at_once(self, num_lanes: int, spans: Spans) -> int:
        return max(1, self._budget_bytes // (16 * num_lanes * spans.num_groups))


def _upload(arrays: Sequence[npt.NDArray[Any]], dtype: Any, device: torch.device) -> Tensor:
    """Return arrays after one another on a device, converted a block at a time."""
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    tensor = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=device)
    rows = max(1, UPLOAD_BYTES // max(1, 8 * int(np.prod(shape[1:]))))
    end = 0
    for array in arrays:
        for first in range(0, len(array), rows):
            # A copy: arrays may be read-only, and torch has no unsigned integers of 16 bits.
            block = torch.from_numpy(np.array(array[first : first + rows], dtype=dtype))
            tensor[end : end + len(block)] = block
            end += len(block)
    return tensor


def _ranges(first: Tensor, lengths: Tensor) -> Tensor:
    """Return the numbers of half-open ranges after one another."""
    ends = lengths.cumsum(0)
    numbers = (first - ends + lengths).repeat_interleave(lengths)
    return numbers + torch.arange(len(numbers), device=first.device)


def _combine(sums: Tensor, scorer: Scorer) -> Tensor:
    """Return scores, (...), of sums of groups, (..., G); see `Scorer.score`."""
    weighted = sums * torch.tensor(scorer.weights, dtype=torch.float32, device=sums.device)
    present = sums.isfinite()
    if scorer.combine == "max":
        return torch.where(present, weighted, float("-inf")).amax(dim=-1)
    added = torch.where(present, weighted, 0).sum(dim=-1)
    return torch.where(present.any(dim=-1), added, float("-inf"))


def _to_keys(scores: Tensor, clips: Tensor) -> Tensor:
    """Return int64 keys that rise with the score and, among equals, as ordinals fall; so no two are equal."""
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.long() << 32) | (ORDINAL_MASK - clips)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ordinals and scores of keys; the score of `LOWEST` is not a number."""
    ordered = (keys >> 32).int()
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return ORDINAL_MASK - (keys & ORDINAL_MASK), bits.view(torch.float32)


def _best_of_rows(keys: Tensor, row: Tensor, counts: Tensor, limit: int) -> Tensor:
    """Return the best keys of each row, best first, (R, up to limit), `LOWEST` where a row has no more.

    Parameters
    ----------
    keys, row : (W,)
        Rows do not fall.
    counts : (R,)
        Keys of each row.
    """
    width = int(counts.max())
    place = torch.arange(len(keys), device=keys.device) - (counts.cumsum(0) - counts)[row]
    dense = keys.new_full((len(counts), width), LOWEST)
    dense[row, place] = keys
    return dense.topk(min(limit, width)).values


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _tile_for(num_lanes: int) -> int:
    return min(MAX_TILE, max(SLOT, 1 << (num_lanes - 1).bit_length()))


def _width(num_lanes: int) -> int:
    """Return the lanes of a query's own tiles."""
    return _round_up(num_lanes, _tile_for(num_lanes))


def _find_kernels(name: str, device: torch.device) -> Score:
    if name not in ("auto", "triton", "torch"):
        raise ConfigError(f"kernels is {name}; allowed are auto, triton, torch")
    if name == "torch" or (name == "auto" and device.type != "cuda"):
        return score_with_torch
    try:
        from operators.triton_kernels import score_with_triton
    except ImportError as error:
        if name == "auto":
            return score_with_torch
        raise ConfigError("kernels is triton, but triton is not installed; use torch") from error
    return score_with_triton


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CPU_BUDGET_BYTES
