"""The loops in which an index spends its time, compiled by Numba and cached on disk.

One inner loop serves all: four rows of unsigned bytes (centroids, or decoded residuals) against 32 *lanes*, int8 vectors
that are query tokens in a search and document tokens while encoding. `operators.simd` holds the instructions.

Lanes are packed as ``[chunk of 32][half of 16][group of 4 dimensions][16 lanes][4 dimensions]``, in bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from operators.simd import (
    address,
    any_greater,
    broadcast4,
    broadcast4_half,
    dot4,
    dot4_half,
    doubled,
    fma,
    joined,
    load_f32,
    load_i16,
    load_i32,
    load_i32x8,
    load_u8x32,
    load_u8x64,
    lookup16,
    max_f32,
    max_u8x32,
    mul_f32,
    narrow,
    prefetch,
    select_greater,
    shift_and,
    splat_f32,
    splat_i32,
    store_f32,
    store_i16,
    store_i32,
    store_u8x32,
    store_u8x64,
    to_float,
    widen,
    zero_i32,
)

CHUNK = 32
"""Lanes that go through the inner loop together: two vectors."""

NEVER = np.float32(-3e38)
LEAST = -(2**31) + 1


def aligned(size: int, dtype: type) -> npt.NDArray[Any]:
    """Return an array of zeros that starts on a cache line: vectors that cross two cost half the speed."""
    item = np.dtype(dtype).itemsize
    raw = np.zeros(size * item + 64, dtype=np.uint8)
    first = -raw.ctypes.data % 64
    return raw[first : first + size * item].view(dtype)


def kernel(function: Any) -> Any:
    """Compile a kernel: without the interpreter lock, and cached on disk so that a worker starts warm."""
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # nowhere to write: neither beside this file nor at home; NUMBA_CACHE_DIR names another place
        return njit(**options)(function)


def inlined(function: Any) -> Any:
    """Compile a part of kernels."""
    return njit(nogil=True, error_model="numpy", boundscheck=False, inline="always")(function)


@inlined
def _dot_rows(r0, r1, r2, r3, lanes, half, start0, start1):
    """Return four rows, by address, times 32 lanes, added to what is given for the two halves."""
    a0 = start0
    b0 = start0
    c0 = start0
    d0 = start0
    a1 = start1
    b1 = start1
    c1 = start1
    d1 = start1
    for group in range(0, half, 64):
        low = load_i32(lanes + group)
        high = load_i32(lanes + half + group)
        dims = group >> 4
        u = broadcast4(r0 + dims)
        a0 = dot4(a0, u, low)
        a1 = dot4(a1, u, high)
        u = broadcast4(r1 + dims)
        b0 = dot4(b0, u, low)
        b1 = dot4(b1, u, high)
        u = broadcast4(r2 + dims)
        c0 = dot4(c0, u, low)
        c1 = dot4(c1, u, high)
        u = broadcast4(r3 + dims)
        d0 = dot4(d0, u, low)
        d1 = dot4(d1, u, high)
    return a0, a1, b0, b1, c0, c1, d0, d1


@inlined
def _dot_rows_24(r0, r1, r2, r3, lanes, half, start):
    """`_dot_rows` where only 24 lanes are in use: a quarter less work, in vectors of 8 lanes."""
    x = load_i32x8(start)
    y = load_i32x8(start + 32)
    z = load_i32x8(start + 64)
    a0 = x
    a1 = y
    a2 = z
    b0 = x
    b1 = y
    b2 = z
    c0 = x
    c1 = y
    c2 = z
    d0 = x
    d1 = y
    d2 = z
    for group in range(0, half, 64):
        x = load_i32x8(lanes + group)
        y = load_i32x8(lanes + group + 32)
        z = load_i32x8(lanes + half + group)
        dims = group >> 4
        u = broadcast4_half(r0 + dims)
        a0 = dot4_half(a0, u, x)
        a1 = dot4_half(a1, u, y)
        a2 = dot4_half(a2, u, z)
        u = broadcast4_half(r1 + dims)
        b0 = dot4_half(b0, u, x)
        b1 = dot4_half(b1, u, y)
        b2 = dot4_half(b2, u, z)
        u = broadcast4_half(r2 + dims)
        c0 = dot4_half(c0, u, x)
        c1 = dot4_half(c1, u, y)
        c2 = dot4_half(c2, u, z)
        u = broadcast4_half(r3 + dims)
        d0 = dot4_half(d0, u, x)
        d1 = dot4_half(d1, u, y)
        d2 = dot4_half(d2, u, z)
    return (
        joined(a0, a1),
        doubled(a2),
        joined(b0, b1),
        doubled(b2),
        joined(c0, c1),
        doubled(c2),
        joined(d0, d1),
        doubled(d2),
    )


@inlined
def _dot_rows_16(r0, r1, r2, r3, lanes, half, start0):
    """`_dot_rows` where only 16 lanes are in use: half the work."""
    a0 = start0
    b0 = start0
    c0 = start0
    d0 = start0
    for group in range(0, half, 64):
        low = load_i32(lanes + group)
        dims = group >> 4
        a0 = dot4(a0, broadcast4(r0 + dims), low)
        b0 = dot4(b0, broadcast4(r1 + dims), low)
        c0 = dot4(c0, broadcast4(r2 + dims), low)
        d0 = dot4(d0, broadcast4(r3 + dims), low)
    zero = zero_i32()
    return a0, zero, b0, zero, c0, zero, d0, zero


@inlined
def _dot_used(r0, r1, r2, r3, lanes, half, start, used):
    """Return four rows times as many lanes as are in use, added to ``start``."""
    if used > 24:
        sums = _dot_rows(r0, r1, r2, r3, lanes, half, load_i32(start), load_i32(start + 64))
    elif used > 16:
        sums = _dot_rows_24(r0, r1, r2, r3, lanes, half, start)
    else:
        sums = _dot_rows_16(r0, r1, r2, r3, lanes, half, load_i32(start))
    return sums


@kernel
def pack_lanes(tokens, first, last, padded_dim, lanes, steps, sums):
    """Pack float tokens [first, last) as lanes; per lane, the step of its int8 and the sum of its bytes."""
    dim = tokens.shape[1]
    lanes[:] = 0
    steps[:] = 0
    sums[:] = 0
    for t in range(first, last):
        lane = t - first
        peak = np.float32(0)
        for d in range(dim):
            peak = max(peak, abs(tokens[t, d]))
        step = peak / np.float32(127)
        inverse = np.float32(1) / step if peak > 0 else np.float32(0)
        at = (lane // 16) * 16 * padded_dim + (lane % 16) * 4
        total = 0
        for d in range(dim):
            value = np.int32(np.rint(tokens[t, d] * inverse))
            lanes[at + (d >> 2) * 64 + (d & 3)] = value
            total += value
        steps[lane] = step
        sums[lane] = total


@inlined
def _larger(products, best, row, winner):
    """Return the larger of two vectors lane by lane, and the row that it came from."""
    return (
        select_greater(products, best, products, best),
        select_greater(products, best, splat_i32(np.int32(row)), winner),
    )


@kernel
def assign_lanes(centroids, count, padded_dim, lanes, chunks, start, best, winner):
    """Update, for each lane, its largest product with the rows of ``centroids``, and which row that is.

    ``count`` is a multiple of 4. Blocks of centroids stay in the second-level cache while all chunks pass.
    """
    half = 16 * padded_dim
    rows_at, lanes_at, start_at = address(centroids), address(lanes), address(start)
    best_at, winner_at = address(best), address(winner)
    block = max(4, (1 << 18) // padded_dim & ~3)
    for first in range(0, count, block):
        last = min(count, first + block)
        for chunk in range(chunks):
            o = chunk * 128
            s0 = load_i32(start_at + o)
            s1 = load_i32(start_at + o + 64)
            m0 = load_i32(best_at + o)
            m1 = load_i32(best_at + o + 64)
            w0 = load_i32(winner_at + o)
            w1 = load_i32(winner_at + o + 64)
            for c in range(first, last, 4):
                r = rows_at + c * padded_dim
                a0, a1, b0, b1, c0, c1, d0, d1 = _dot_rows(
                    r,
                    r + padded_dim,
                    r + 2 * padded_dim,
                    r + 3 * padded_dim,
                    lanes_at + chunk * 2 * half,
                    half,
                    s0,
                    s1,
                )
                m0, w0 = _larger(a0, m0, c, w0)
                m1, w1 = _larger(a1, m1, c, w1)
                m0, w0 = _larger(b0, m0, c + 1, w0)
                m1, w1 = _larger(b1, m1, c + 1, w1)
                m0, w0 = _larger(c0, m0, c + 2, w0)
                m1, w1 = _larger(c1, m1, c + 2, w1)
                m0, w0 = _larger(d0, m0, c + 3, w0)
                m1, w1 = _larger(d1, m1, c + 3, w1)
            store_i32(best_at + o, m0)
            store_i32(best_at + o + 64, m1)
            store_i32(winner_at + o, w0)
            store_i32(winner_at + o + 64, w1)


@kernel
def centroid_table(centroids, count, padded_dim, lanes, start, used, scale, table, probes, cells, values, floors):
    """Fill ``table`` (count, 32) int16 with scaled products of centroids and one chunk of lanes; probe on the way.

    ``cells`` and ``values`` (32, probes) become the best centroids of each lane; ``floors`` (32,) their least value.
    """
    half = 16 * padded_dim
    factor = splat_f32(scale)
    cells[:] = -1
    values[:] = LEAST
    floors[:used] = LEAST
    floors[used:] = 2**31 - 1
    spill = np.empty(CHUNK, np.int32)
    spill_at, floors_at, table_at = address(spill), address(floors), address(table)
    rows_at, lanes_at, start_at = address(centroids), address(lanes), address(start)
    f0 = load_i32(floors_at)
    f1 = load_i32(floors_at + 64)
    for c in range(0, count, 4):
        r = rows_at + c * padded_dim
        a0, a1, b0, b1, c0, c1, d0, d1 = _dot_used(
            r, r + padded_dim, r + 2 * padded_dim, r + 3 * padded_dim, lanes_at, half, start_at, used
        )
        o = c * 64
        store_i16(table_at + o, narrow(mul_f32(to_float(a0), factor)))
        store_i16(table_at + o + 32, narrow(mul_f32(to_float(a1), factor)))
        store_i16(table_at + o + 64, narrow(mul_f32(to_float(b0), factor)))
        store_i16(table_at + o + 96, narrow(mul_f32(to_float(b1), factor)))
        store_i16(table_at + o + 128, narrow(mul_f32(to_float(c0), factor)))
        store_i16(table_at + o + 160, narrow(mul_f32(to_float(c1), factor)))
        store_i16(table_at + o + 192, narrow(mul_f32(to_float(d0), factor)))
        store_i16(table_at + o + 224, narrow(mul_f32(to_float(d1), factor)))
        if any_greater(a0, f0) or any_greater(a1, f1):
            store_i32(spill_at, a0)
            store_i32(spill_at + 64, a1)
            _probe(spill, c, used, cells, values, floors)
            f0 = load_i32(floors_at)
            f1 = load_i32(floors_at + 64)
        if any_greater(b0, f0) or any_greater(b1, f1):
            store_i32(spill_at, b0)
            store_i32(spill_at + 64, b1)
            _probe(spill, c + 1, used, cells, values, floors)
            f0 = load_i32(floors_at)
            f1 = load_i32(floors_at + 64)
        if any_greater(c0, f0) or any_greater(c1, f1):
            store_i32(spill_at, c0)
            store_i32(spill_at + 64, c1)
            _probe(spill, c + 2, used, cells, values, floors)
            f0 = load_i32(floors_at)
            f1 = load_i32(floors_at + 64)
        if any_greater(d0, f0) or any_greater(d1, f1):
            store_i32(spill_at, d0)
            store_i32(spill_at + 64, d1)
            _probe(spill, c + 3, used, cells, values, floors)
            f0 = load_i32(floors_at)
            f1 = load_i32(floors_at + 64)


@njit(nogil=True, error_model="numpy", boundscheck=False)
def _probe(products, centroid, used, cells, values, floors):
    """Put a centroid among the best of each lane that it belongs to."""
    probes = cells.shape[1]
    for lane in range(used):
        if products[lane] > floors[lane]:
            at = 0
            for p in range(1, probes):
                if values[lane, p] < values[lane, at]:
                    at = p
            values[lane, at] = products[lane]
            cells[lane, at] = centroid
            least = values[lane, 0]
            for p in range(1, probes):
                least = min(least, values[lane, p])
            floors[lane] = least


@kernel
def coarse_table(table, count, factors, low, scale, coarse):
    """Turn an int16 table of one chunk into bytes comparable over lanes: 0 at ``low``, unused lanes 0."""
    offsets = np.empty(CHUNK, np.float32)
    slopes = np.empty(CHUNK, np.float32)
    for lane in range(CHUNK):
        slopes[lane] = factors[lane] * scale
        offsets[lane] = np.float32(0.5) - low * scale if factors[lane] > 0 else np.float32(0)
    for c in range(count):
        for lane in range(CHUNK):
            value = np.float32(table[c, lane]) * slopes[lane] + offsets[lane]
            coarse[c, lane] = np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@kernel
def table_range(table, count, factors):
    """Return the least and the largest similarity in the used lanes of an int16 table of one chunk."""
    lows = np.full(CHUNK, 32767, np.int16)
    highs = np.full(CHUNK, -32768, np.int16)
    for c in range(count):
        for lane in range(CHUNK):
            lows[lane] = min(lows[lane], table[c, lane])
            highs[lane] = max(highs[lane], table[c, lane])
    low = np.float32(3e38)
    high = np.float32(-3e38)
    for lane in range(CHUNK):
        if factors[lane] > 0:
            low = min(low, lows[lane] * factors[lane])
            high = max(high, highs[lane] * factors[lane])
    return low, high


@kernel
def gather(cells, offsets, lists, allowed, marks, epoch, found):
    """Write to ``found`` the clips that hold one of the cells, each once, and return how many there are.

    ``allowed`` (D,) uint8 or empty: clips that may be found.
    """
    filtered = len(allowed) > 0
    count = 0
    for lane in range(cells.shape[0]):
        for p in range(cells.shape[1]):
            cell = cells[lane, p]
            if cell < 0:
                continue
            for i in range(offsets[cell], offsets[cell + 1]):
                clip = lists[i]
                if marks[clip] != epoch:
                    marks[clip] = epoch
                    if not filtered or allowed[clip]:
                        found[count] = clip
                        count += 1
    return count


@kernel
def score_centroids(clips, num, run_of_clip, token_of_run, run_modality, group_of, groups, ids, coarse, sums):
    """Add to ``sums`` (num, groups) int32 the sum over one chunk of lanes of the best byte in each group of modalities.

    A group that a clip lacks stays as it is.
    """
    best = np.zeros((groups, CHUNK), np.uint8)
    best_at, coarse_at = address(best), address(coarse)
    for i in range(num):
        clip = clips[i]
        best[:] = 0
        for run in range(run_of_clip[clip], run_of_clip[clip + 1]):
            group = group_of[run_modality[run]]
            if group < 0:
                continue
            m = load_u8x32(best_at + group * CHUNK)
            n = m
            first = token_of_run[run]
            last = token_of_run[run + 1]
            for t in range(first, last - 1, 2):
                m = max_u8x32(load_u8x32(coarse_at + np.intp(ids[t]) * CHUNK), m)
                n = max_u8x32(load_u8x32(coarse_at + np.intp(ids[t + 1]) * CHUNK), n)
            if (last - first) & 1:
                m = max_u8x32(load_u8x32(coarse_at + np.intp(ids[last - 1]) * CHUNK), m)
            store_u8x32(best_at + group * CHUNK, max_u8x32(m, n))
        for group in range(groups):
            total = np.int32(0)
            for lane in range(CHUNK):
                total += best[group, lane]
            sums[i, group] += total


@inlined
def _code(codes, tail, tail_from, token, code_bytes):
    """Return the address of a token's code."""
    return codes + token * code_bytes if token < tail_from else tail + (token - tail_from) * code_bytes


@inlined
def _decode(code, code_bytes, nbits, table, to):
    """Write the level bytes of a token, all by address: field p of code byte j is dimension p * code_bytes + j."""
    # The branches differ by constants only, which the compiler then keeps in registers. A store may reach beyond its
    # field; the next field's comes after it.
    if nbits == 8:
        for j in range(0, code_bytes, 64):
            store_u8x64(to + j, load_u8x64(code + j))
    elif nbits == 4:
        for field in range(2):
            for j in range(0, code_bytes, 64):
                levels = shift_and(load_u8x64(code + j), 4 * field, np.uint8(15))
                store_u8x64(to + field * code_bytes + j, lookup16(table, levels))
    elif nbits == 2:
        for field in range(4):
            for j in range(0, code_bytes, 64):
                levels = shift_and(load_u8x64(code + j), 2 * field, np.uint8(3))
                store_u8x64(to + field * code_bytes + j, lookup16(table, levels))
    else:
        for field in range(8):
            for j in range(0, code_bytes, 64):
                levels = shift_and(load_u8x64(code + j), field, np.uint8(1))
                store_u8x64(to + field * code_bytes + j, lookup16(table, levels))


@kernel
def score_residuals(
    clips,
    num,
    run_of_clip,
    token_of_run,
    run_modality,
    group_of,
    groups,
    ids,
    scales,
    codes,
    tail,
    tail_from,
    code_of_clip,
    code_bytes,
    nbits,
    levels,
    scale_of_byte,
    padded_dim,
    lanes,
    num_lanes,
    start,
    table,
    factors,
    query_of_lane,
    scores,
    scratch,
    best,
):
    """Fill ``scores`` (num, queries, groups) float32 with MaxSim of each group of modalities; NEVER where it is absent.

    A token's code is read once for all chunks of lanes and decoded into the first-level cache only.

    ``code_of_clip`` (num,): first token of each clip in ``codes``, which may hold just these clips. ``tail`` repeats the
    codes from token ``tail_from`` on, with room after them, because vectors read beyond a code's end.
    """
    half = 16 * padded_dim
    num_centroids = table.shape[1]
    chunks = (num_lanes + CHUNK - 1) // CHUNK
    codes_at, lanes_at, start_at, table_at = address(codes), address(lanes), address(start), address(table)
    best_at, decoded, tail_at = address(best), address(scratch), address(tail)
    lookup = load_u8x64(address(levels))
    row = padded_dim + 64
    for i in range(num):
        clip = clips[i]
        scores[i] = NEVER
        best[:] = NEVER
        shift = code_of_clip[i] - token_of_run[run_of_clip[clip]]
        for run in range(run_of_clip[clip], run_of_clip[clip + 1]):
            group = group_of[run_modality[run]]
            first = token_of_run[run]
            last = token_of_run[run + 1]
            if group < 0 or first == last:
                continue
            scores[i, :, group] = 0
            for t0 in range(first, last, 4):
                t1 = min(t0 + 1, last - 1)
                t2 = min(t0 + 2, last - 1)
                t3 = min(t0 + 3, last - 1)
                _decode(_code(codes_at, tail_at, tail_from, t0 + shift, code_bytes), code_bytes, nbits, lookup, decoded)
                _decode(
                    _code(codes_at, tail_at, tail_from, t1 + shift, code_bytes),
                    code_bytes,
                    nbits,
                    lookup,
                    decoded + row,
                )
                _decode(
                    _code(codes_at, tail_at, tail_from, t2 + shift, code_bytes),
                    code_bytes,
                    nbits,
                    lookup,
                    decoded + 2 * row,
                )
                _decode(
                    _code(codes_at, tail_at, tail_from, t3 + shift, code_bytes),
                    code_bytes,
                    nbits,
                    lookup,
                    decoded + 3 * row,
                )
                f0 = splat_f32(scale_of_byte[scales[t0]])
                f1 = splat_f32(scale_of_byte[scales[t1]])
                f2 = splat_f32(scale_of_byte[scales[t2]])
                f3 = splat_f32(scale_of_byte[scales[t3]])
                p0 = np.intp(ids[t0]) * 64
                p1 = np.intp(ids[t1]) * 64
                p2 = np.intp(ids[t2]) * 64
                p3 = np.intp(ids[t3]) * 64
                for line in range(4):  # what the next four tokens need, while these keep the arithmetic busy
                    prefetch(codes_at + (t0 + 4 + line + shift) * code_bytes)
                for chunk in range(chunks):
                    at = table_at + chunk * num_centroids * 64
                    i0 = at + p0
                    i1 = at + p1
                    i2 = at + p2
                    i3 = at + p3
                    prefetch(i0)
                    prefetch(i1)
                    prefetch(i2)
                    prefetch(i3)
                    a0, a1, b0, b1, c0, c1, d0, d1 = _dot_used(
                        decoded,
                        decoded + row,
                        decoded + 2 * row,
                        decoded + 3 * row,
                        lanes_at + chunk * 2 * half,
                        half,
                        start_at + chunk * 128,
                        num_lanes - chunk * CHUNK,
                    )
                    o = (chunk * groups + group) * 128
                    m = load_f32(best_at + o)
                    m = max_f32(fma(to_float(a0), f0, to_float(widen(load_i16(i0)))), m)
                    m = max_f32(fma(to_float(b0), f1, to_float(widen(load_i16(i1)))), m)
                    m = max_f32(fma(to_float(c0), f2, to_float(widen(load_i16(i2)))), m)
                    m = max_f32(fma(to_float(d0), f3, to_float(widen(load_i16(i3)))), m)
                    store_f32(best_at + o, m)
                    m = load_f32(best_at + o + 64)
                    m = max_f32(fma(to_float(a1), f0, to_float(widen(load_i16(i0 + 32)))), m)
                    m = max_f32(fma(to_float(b1), f1, to_float(widen(load_i16(i1 + 32)))), m)
                    m = max_f32(fma(to_float(c1), f2, to_float(widen(load_i16(i2 + 32)))), m)
                    m = max_f32(fma(to_float(d1), f3, to_float(widen(load_i16(i3 + 32)))), m)
                    store_f32(best_at + o + 64, m)
        for group in range(groups):
            if scores[i, 0, group] == NEVER:
                continue
            for chunk in range(chunks):
                for lane in range(CHUNK):
                    if factors[chunk * CHUNK + lane] > 0:
                        q = query_of_lane[chunk * CHUNK + lane]
                        scores[i, q, group] += best[chunk, group, lane] * factors[chunk * CHUNK + lane]


@kernel
def invert(ids, num_centroids, run_of_clip, token_of_run, offsets, lists):
    """Fill the inverted lists: for each centroid the clips that hold it, rising. ``lists`` empty only counts."""
    last = np.full(num_centroids, -1, np.int64)
    counts = np.zeros(num_centroids + 1, np.int64)
    num_clips = len(run_of_clip) - 1
    filling = len(lists) > 0
    for clip in range(num_clips):
        for t in range(token_of_run[run_of_clip[clip]], token_of_run[run_of_clip[clip + 1]]):
            c = ids[t]
            if last[c] != clip:
                last[c] = clip
                if filling:
                    lists[offsets[c] + counts[c]] = clip
                counts[c] += 1
    if not filling:
        total = 0
        for c in range(num_centroids):
            offsets[c] = total
            total += counts[c]
        offsets[num_centroids] = total


@kernel
def encode_residuals(tokens, centroids, ids, cutoffs, weights, code_bytes, nbits, scales, codes):
    """Write residual codes (T, code_bytes) and scales (T,) float32 of float32 tokens.

    The scale makes the coded residual's projection on the true one as long as that is: ``|r|^2 / <r, w>``.
    """
    dim = tokens.shape[1]
    buckets = np.zeros(code_bytes * 8 // nbits, np.uint8)
    residual = np.empty(dim, np.float32)
    num_cutoffs = len(cutoffs)
    for t in range(len(tokens)):
        norm = np.float32(0)
        c = ids[t]
        for d in range(dim):
            residual[d] = tokens[t, d] - centroids[c, d]
            norm += residual[d] * residual[d]
        if norm == 0:
            scales[t] = 0
            for j in range(code_bytes):
                codes[t, j] = 0
            continue
        unit = np.sqrt(np.float32(dim) / norm)
        buckets[:dim] = 0
        if nbits == 8:
            low = cutoffs[0]
            step = np.float32(254) / (cutoffs[num_cutoffs - 1] - low)
            for d in range(dim):
                buckets[d] = np.uint8(min(max((residual[d] * unit - low) * step + 1, np.float32(0)), np.float32(255)))
        else:
            for k in range(num_cutoffs):
                cutoff = cutoffs[k] / unit
                for d in range(dim):
                    buckets[d] += residual[d] >= cutoff
        along = np.float32(0)
        for d in range(dim):
            along += residual[d] * weights[buckets[d]]
        scales[t] = norm / along if along > 0 else 0
        for j in range(code_bytes):
            byte = 0
            for p in range(8 // nbits):
                byte |= buckets[p * code_bytes + j] << (p * nbits)
            codes[t, j] = byte


@kernel
def sum_by_centroid(tokens, ids, sums, counts):
    """Add tokens to the sums (C, dim) float64 and counts (C,) of their centroids."""
    for t in range(len(tokens)):
        c = ids[t]
        counts[c] += 1
        for d in range(tokens.shape[1]):
            sums[c, d] += tokens[t, d]


@kernel
def pack_ids(ids, bits, packed):
    """Write ids below 2^bits one after another into zeroed bytes, lowest bit first."""
    position = 0
    for i in range(len(ids)):
        value = np.uint64(ids[i]) << np.uint64(position & 7)
        at = position >> 3
        while value:
            packed[at] |= np.uint8(value & np.uint64(255))
            value >>= np.uint64(8)
            at += 1
        position += bits


@kernel
def unpack_ids(packed, bits, ids):
    """Read what `pack_ids` wrote; ``packed`` has 8 bytes more than it needs."""
    mask = np.uint64((1 << bits) - 1)
    position = 0
    for i in range(len(ids)):
        at = position >> 3
        value = np.uint64(0)
        for j in range(5):
            value |= np.uint64(packed[at + j]) << np.uint64(8 * j)
        ids[i] = (value >> np.uint64(position & 7)) & mask
        position += bits
