"""float32 for the tensor cores, which cut it to TF32's ten bits of mantissa: rounded to them beforehand.

From 9.0 on that is one instruction. Before, the assembler makes three of cvt.rna.tf32.f32, whose last one cuts off what the
tensor cores ignore: the other two, which leave infinity and NaN alone, do where nothing else sees the number.
"""

import triton.language as tl

TO_NEAREST_90 = tl.constexpr("cvt.rn.tf32.f32 $0, $1;")
TO_NEAREST_80 = tl.constexpr("cvt.rna.tf32.f32 $0, $1;")
TO_BE_CUT = tl.constexpr("""{ .reg .pred p; .reg .b32 a;
abs.f32 a, $1;
setp.lt.f32 p, a, 0f7F800000;
mov.b32 $0, $1;
@p add.s32 $0, $0, 4096;
}""")


def is_90(semantic):
    """Whether the capability that is being compiled for is 9.0 or later; the interpreter has none."""
    return semantic is not None and int(semantic.builder.options.arch.removeprefix("sm").rstrip("af")) >= 90


def rounding(_semantic=None):
    """The assembly for operands of products."""
    return TO_NEAREST_90 if is_90(_semantic) else TO_BE_CUT


def to_nearest(_semantic=None):
    """The assembly for what is computed with besides."""
    return TO_NEAREST_90 if is_90(_semantic) else TO_NEAREST_80


rounding.__triton_builtin__ = to_nearest.__triton_builtin__ = True  # the compiler says what it compiles
