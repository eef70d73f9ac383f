"""What the two operations that are lowered by hand become on a processor that is not here: looked at, not run."""

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from operators import simd


def assembly(lower, arguments, triple, processor, features):
    """Compile one operation for another processor."""
    module = ir.Module()
    module.triple = triple
    result = arguments[0]
    function = ir.Function(module, ir.FunctionType(result, arguments), "operation")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(lower(builder, *function.args))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features, opt=3)
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    return machine.emit_assembly(parsed)


@pytest.mark.parametrize(
    ("lower", "triple", "processor", "features", "instruction", "count"),
    [
        (simd._dot4_neon, "aarch64-linux-gnu", "neoverse-v1", "+i8mm", "usdot", 4),
        (simd._dot4_generic, "aarch64-linux-gnu", "neoverse-n1", "", "mla", 16),
        (simd._dot4_avx2, "x86_64-linux-gnu", "haswell", "+avx2", "vpmaddwd", 4),
    ],
)
def test_a_product_of_bytes_is_made_of_vector_instructions(lower, triple, processor, features, instruction, count):
    made = assembly(lower, [simd.i32x16.ir] * 3, triple, processor, features)
    assert made.count(f"\t{instruction}\t") == count, made
