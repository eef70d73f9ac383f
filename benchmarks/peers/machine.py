"""What the machine can do: bytes read a second, and int8 operations a second.

A multiplication or an addition is an operation. The limit of arithmetic is measured on registers alone: a row of
independent `dot4`, the instruction that every kernel of ours is made of, and nothing else. The clock would allow two a
cycle, and processors that halve 512-bit vectors do one.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch

from operators.simd import address, dot4, load_i32, store_i32

READ_BYTES = 256 << 20
GEMM = 2048
REPEATS = 20
CHAIN = 200_000
CLOCKS_OF_STEP = 4  # an integer multiplication takes 3, an addition 1
OPS_A_CLOCK = 2 * 64 * 2
DOT_STEPS = 200_000


def measure(threads):
    torch.set_num_threads(threads)
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        read = fastest(lambda: list(pool.map(np.max, parts)))
        copied = fastest(lambda: list(pool.map(np.copy, parts)))
    left = torch.randint(-127, 127, (GEMM, GEMM), dtype=torch.int8)
    multiply = fastest(lambda: torch._int_mm(left, left))
    chain(1, 3)
    clock = CHAIN * CLOCKS_OF_STEP / fastest(lambda: chain(CHAIN, 3))
    out = np.arange(12 * 16, dtype=np.int32)
    dots(1, out)
    return {
        "read_bytes_per_second": READ_BYTES / read,
        "copied_bytes_per_second": READ_BYTES / copied,
        "int8_product_ops_per_second": 2 * GEMM**3 / multiply,
        "clock_hertz": clock,
        "int8_ops_of_clock": threads * clock * OPS_A_CLOCK,
        "int8_ops_per_second": threads * DOT_STEPS * 12 * 128 / fastest(lambda: dots(DOT_STEPS, out)),
    }


@numba.njit
def dots(steps, out):
    """Add products into twelve vectors, in registers."""
    at = address(out)
    x = load_i32(at)
    a = load_i32(at + 0)
    b = load_i32(at + 64)
    c = load_i32(at + 128)
    d = load_i32(at + 192)
    e = load_i32(at + 256)
    f = load_i32(at + 320)
    g = load_i32(at + 384)
    h = load_i32(at + 448)
    i = load_i32(at + 512)
    j = load_i32(at + 576)
    k = load_i32(at + 640)
    m = load_i32(at + 704)
    for _ in range(steps):
        a = dot4(a, x, x)
        b = dot4(b, x, x)
        c = dot4(c, x, x)
        d = dot4(d, x, x)
        e = dot4(e, x, x)
        f = dot4(f, x, x)
        g = dot4(g, x, x)
        h = dot4(h, x, x)
        i = dot4(i, x, x)
        j = dot4(j, x, x)
        k = dot4(k, x, x)
        m = dot4(m, x, x)
    store_i32(at + 0, a)
    store_i32(at + 64, b)
    store_i32(at + 128, c)
    store_i32(at + 192, d)
    store_i32(at + 256, e)
    store_i32(at + 320, f)
    store_i32(at + 384, g)
    store_i32(at + 448, h)
    store_i32(at + 512, i)
    store_i32(at + 576, j)
    store_i32(at + 640, k)
    store_i32(at + 704, m)


@numba.njit
def chain(steps, value):
    """Return the end of a row of steps each of which waits for the one before."""
    for _ in range(steps):
        value = value * value + 1
    return value


def fastest(work):
    """Return the seconds of the fastest of several runs: other load on the machine only adds to them."""
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
