"""Vectors inside Numba: 512-bit types and the few instructions that the search kernels are made of.

LLVM splits 512-bit vectors where the machine has narrower ones, so there is one set of kernels; only two operations are
lowered by hand: `dot4`, four products of bytes added into each 32-bit lane, and `lookup16`, a table of 16 bytes. Each is
one instruction on AVX-512 VNNI and on NEON with i8mm, some on AVX2, and plain arithmetic elsewhere. All are exact in
integers, so that every machine computes the same scores.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` choose another machine's path, which is how the tests run all of them here.
Numba's cache looks at the file of a kernel only: after a change to this one, touch ``kernels.py``.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
"""Of 32 bits in a vector."""

I1, I8, I16, I32, F32 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def _features() -> set[str]:
    """Return the features that Numba compiles for."""
    if config.CPU_FEATURES is not None:
        return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}
    if config.CPU_NAME not in (None, "host"):
        return set()
    return {name for name, there in llvm.get_host_cpu_features().items() if there}


def _instruction_set() -> str:
    features = _features()
    if {"avx512f", "avx512bw", "avx512vnni"} <= features:
        return "avx512vnni"
    if "avx2" in features:
        return "avx2"
    return "neon" if {"neon", "i8mm"} <= features else "generic"


INSTRUCTION_SET = _instruction_set()
"""Which lowering is in use: avx512vnni, avx2, neon or generic."""


class Vector(types.Type):  # type: ignore[misc]
    """A vector type that Numba passes by value."""

    def __init__(self, name: str, element: ir.Type, length: int) -> None:
        super().__init__(name=name)
        self.ir = ir.VectorType(element, length)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, vector.ir)


u8x64 = Vector("u8x64", I8, 64)
i32x16 = Vector("i32x16", I32, LANES)
f32x16 = Vector("f32x16", F32, LANES)
i16x16 = Vector("i16x16", I16, LANES)
u8x32 = Vector("u8x32", I8, 32)
i32x8 = Vector("i32x8", I32, 8)


@intrinsic
def address(typing: Any, array: Any) -> Any:
    """Return where an array's data lies. Kernels work on addresses: an array in a loop is counted as a reference."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.intp))

    return types.intp(array), generate


def _splat(builder: Any, vector: ir.VectorType, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, first, zeros)


def _call(builder: Any, name: str, result: ir.Type, arguments: list[Any]) -> Any:
    function = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _loader(vector: Vector) -> Any:
    @intrinsic
    def load(typing: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], vector.ir.as_pointer()), align=1)

        return vector(types.intp), generate

    return load


def _storer(vector: Vector) -> Any:
    @intrinsic
    def store(typing: Any, at: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], vector.ir.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, vector), generate

    return store


# Loads and stores take an address; nothing is checked.
load_u8x64, load_i32, load_f32, load_i16, load_u8x32, load_i32x8 = (
    _loader(v) for v in (u8x64, i32x16, f32x16, i16x16, u8x32, i32x8)
)
store_u8x64, store_i32, store_f32, store_i16, store_u8x32 = (_storer(v) for v in (u8x64, i32x16, f32x16, i16x16, u8x32))


def _elementwise(result: Vector, operation: Any) -> Any:
    """Make an intrinsic of vectors from ``operation(builder, *values)``."""

    @intrinsic
    def unary(typing: Any, a: Any) -> Any:
        return result(a), lambda context, builder, signature, args: operation(builder, *args)

    @intrinsic
    def binary(typing: Any, a: Any, b: Any) -> Any:
        return result(a, b), lambda context, builder, signature, args: operation(builder, *args)

    @intrinsic
    def ternary(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return result(a, b, c), lambda context, builder, signature, args: operation(builder, *args)

    return {2: unary, 3: binary, 4: ternary}[operation.__code__.co_argcount]


def _larger(builder: Any, a: Any, b: Any, compare: str) -> Any:
    above = getattr(builder, compare)(">", a, b)
    return builder.select(above, a, b)


to_float = _elementwise(f32x16, lambda b, x: b.sitofp(x, f32x16.ir))
widen = _elementwise(i32x16, lambda b, x: b.sext(x, i32x16.ir))
add_i32 = _elementwise(i32x16, lambda b, x, y: b.add(x, y))
max_f32 = _elementwise(f32x16, lambda b, x, y: _larger(b, x, y, "fcmp_ordered"))
max_u8x32 = _elementwise(u8x32, lambda b, x, y: _larger(b, x, y, "icmp_unsigned"))
fma = _elementwise(f32x16, lambda b, x, y, z: _call(b, "llvm.fma.v16f32", f32x16.ir, [x, y, z]))
mul_f32 = _elementwise(f32x16, lambda b, x, y: b.fmul(x, y))
narrow = _elementwise(i16x16, lambda b, x: b.trunc(b.fptosi(x, i32x16.ir), i16x16.ir))


@intrinsic
def splat_f32(typing: Any, x: Any) -> Any:
    """Return a number in all lanes."""
    return f32x16(types.float32), lambda context, builder, signature, args: _splat(builder, f32x16.ir, args[0])


@intrinsic
def splat_i32(typing: Any, x: Any) -> Any:
    """Return a number in all lanes."""
    return i32x16(types.int32), lambda context, builder, signature, args: _splat(builder, i32x16.ir, args[0])


@intrinsic
def zero_i32(typing: Any) -> Any:
    """Return zeros."""
    return i32x16(), lambda context, builder, signature, args: ir.Constant(i32x16.ir, [0] * LANES)


def _broadcaster(vector: Vector) -> Any:
    @intrinsic
    def broadcast(typing: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], I32.as_pointer()), align=1)
            return _splat(builder, vector.ir, value)

        return vector(types.intp), generate

    return broadcast


# The four bytes at an address in every lane, of sixteen or of eight.
broadcast4, broadcast4_half = _broadcaster(i32x16), _broadcaster(i32x8)


@intrinsic
def prefetch(typing: Any, at: Any) -> Any:
    """Ask for the cache line at an address; it need not exist."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = builder.inttoptr(args[0], I8.as_pointer())
        function = ir.FunctionType(ir.VoidType(), [line.type, I32, I32, I32])
        read, keep, data = (ir.Constant(I32, value) for value in (0, 3, 1))
        callee = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
        builder.call(callee, [line, read, keep, data])
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def any_greater(typing: Any, a: Any, b: Any) -> Any:
    """Return whether any lane of ``a`` is greater than that of ``b``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = builder.bitcast(builder.icmp_signed(">", *args), I16)
        return builder.icmp_unsigned("!=", mask, ir.Constant(I16, 0))

    return types.boolean(i32x16, i32x16), generate


@intrinsic
def select_greater(typing: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Return ``x`` in lanes where ``a > b``, else ``y``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *args[:2]), *args[2:])

    return i32x16(i32x16, i32x16, i32x16, i32x16), generate


@intrinsic
def shift_and(typing: Any, x: Any, shift: Any, mask: Any) -> Any:
    """Return ``(byte >> shift) & mask`` of each byte, where the mask drops what the shift brings in from a neighbour."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = ir.VectorType(I16, 32)  # bytes cannot be shifted on x86
        by = _splat(builder, words, builder.trunc(args[1], I16))
        shifted = builder.bitcast(builder.lshr(builder.bitcast(args[0], words), by), u8x64.ir)
        return builder.and_(shifted, _splat(builder, u8x64.ir, args[2]))

    return u8x64(u8x64, types.intp, types.uint8), generate


def _parts(builder: Any, value: Any, length: int) -> list[Any]:
    """Return a vector cut into vectors of ``length`` elements."""
    indices = [
        ir.Constant(ir.VectorType(I32, length), list(range(first, first + length)))
        for first in range(0, value.type.count, length)
    ]
    return [builder.shuffle_vector(value, value, index) for index in indices]


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Return vectors of one length after one another."""
    while len(parts) > 1:
        length = 2 * parts[0].type.count
        index = ir.Constant(ir.VectorType(I32, length), list(range(length)))
        parts = [builder.shuffle_vector(a, b, index) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _bytes_as(builder: Any, value: Any, element: ir.Type, byte: int, signed: bool, bits: int) -> Any:
    """Return byte number ``byte`` of every ``element`` of a vector, extended to that element."""
    vector = ir.VectorType(element, value.type.count * 32 // bits)
    value = builder.bitcast(value, vector)
    left = ir.Constant(vector, [bits - 8 - 8 * byte] * vector.count)
    right = ir.Constant(vector, [bits - 8] * vector.count)
    shift = builder.ashr if signed else builder.lshr
    return shift(builder.shl(value, left), right)


def _dot4_avx2(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Keep clear of vpmaddubsw, which saturates: even and odd bytes widened to 16 bits go through vpmaddwd instead."""
    parts = []
    words = ir.VectorType(I16, 16)
    for t, u, s in zip(*(_parts(builder, v, 8) for v in (total, unsigned, signed)), strict=True):
        for byte in (0, 1):
            wide_u = _bytes_as(builder, u, I16, byte, False, 16)
            wide_s = _bytes_as(builder, s, I16, byte, True, 16)
            assert wide_u.type == words
            t = builder.add(t, _call(builder, "llvm.x86.avx2.pmadd.wd", t.type, [wide_u, wide_s]))
        parts.append(t)
    return _joined(builder, parts)


def _dot4_neon(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    quarter, sixteen = ir.VectorType(I32, 4), ir.VectorType(I8, 16)
    parts = []
    for t, u, s in zip(*(_parts(builder, v, 4) for v in (total, unsigned, signed)), strict=True):
        operands = [t, builder.bitcast(u, sixteen), builder.bitcast(s, sixteen)]
        parts.append(_call(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", quarter, operands))
    return _joined(builder, parts)


def _dot4_generic(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    for byte in range(4):
        u = _bytes_as(builder, unsigned, I32, byte, False, 32)
        s = _bytes_as(builder, signed, I32, byte, True, 32)
        total = builder.add(total, builder.mul(u, s))
    return total


LOWERINGS = {"avx2": _dot4_avx2, "neon": _dot4_neon, "generic": _dot4_generic}


@intrinsic
def joined(typing: Any, x: Any, y: Any) -> Any:
    """Return two times eight lanes as sixteen."""
    return i32x16(i32x8, i32x8), lambda context, builder, signature, args: _joined(builder, list(args))


@intrinsic
def doubled(typing: Any, x: Any) -> Any:
    """Return eight lanes and eight zeros after them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _joined(builder, [args[0], ir.Constant(i32x8.ir, [0] * 8)])

    return i32x16(i32x8), generate


@intrinsic
def dot4_half(typing: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """`dot4` of eight lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        operands = list(args)
        if INSTRUCTION_SET == "avx512vnni":
            operands[1:] = [builder.bitcast(a, u8x32.ir) for a in operands[1:]]
            return _call(builder, "llvm.x86.avx512.vpdpbusd.256", i32x8.ir, operands)
        return LOWERINGS[INSTRUCTION_SET](builder, *operands)

    return i32x8(i32x8, i32x8, i32x8), generate


@intrinsic
def dot4(typing: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    """Return, in each lane, the total plus the products of four unsigned with four signed bytes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if INSTRUCTION_SET == "avx512vnni":
            operands = [args[0], *(builder.bitcast(a, u8x64.ir) for a in args[1:])]
            return _call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.ir, operands)
        return LOWERINGS[INSTRUCTION_SET](builder, *args)

    return i32x16(i32x16, i32x16, i32x16), generate


WIDTH_OF_LOOKUP = {"avx2": ("llvm.x86.avx2.pshuf.b", 32), "neon": ("llvm.aarch64.neon.tbl1.v16i8", 16)}


@intrinsic
def lookup16(typing: Any, table: Any, index: Any) -> Any:
    """Return for each index below 16 that byte of the table, whose 16 bytes are repeated four times."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if INSTRUCTION_SET == "avx512vnni":
            return _call(builder, "llvm.x86.avx512.pshuf.b.512", u8x64.ir, list(args))
        if INSTRUCTION_SET in WIDTH_OF_LOOKUP:
            name, width = WIDTH_OF_LOOKUP[INSTRUCTION_SET]
            pairs = zip(*(_parts(builder, a, width) for a in args), strict=True)
            part = ir.VectorType(I8, width)
            return _joined(builder, [_call(builder, name, part, [t, i]) for t, i in pairs])
        result = ir.Constant(u8x64.ir, ir.Undefined)
        for lane in range(64):
            at = ir.Constant(I32, lane)
            entry = builder.extract_element(args[0], builder.zext(builder.extract_element(args[1], at), I32))
            result = builder.insert_element(result, entry, at)
        return result

    return u8x64(u8x64, u8x64), generate
