"""Arithmetic that the Gluon kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._tf32 import rounding, to_nearest

CLAMP = gl.constexpr("max.NaN.f32 $0, $1, $2; min.NaN.f32 $0, $0, $3;")
_ACTIVATE = """{{ .reg .b32 p;
cvt.rn.relu.{t}x2.f32 p, $2, $1;
min.NaN.{t}x2 $0, p, $3;
}}"""
ACTIVATE_FP16, ACTIVATE_BF16 = gl.constexpr(_ACTIVATE.format(t="f16")), gl.constexpr(_ACTIVATE.format(t="bf16"))


@gluon.constexpr_function
def bits(count, first=1):
    """first, 2 * first, 4 * first: what the bits of an index below `count` stand for."""
    return [first << i for i in range(count.bit_length() - 1)]


@gluon.jit
def to_tf32(x):
    """float32 as the tensor cores should see it: rounded where they would cut off. Other types as they are."""
    if x.dtype == gl.float32:
        return gl.inline_asm_elementwise(rounding(), "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
    else:
        return x


@gluon.jit
def nearest_tf32(x):
    """The TF32 that is nearest to a float32, to be computed with."""
    return gl.inline_asm_elementwise(to_nearest(), "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def clamp(x, low, high):
    """float32 between two bounds; NaN stays NaN, as in PyTorch."""
    return gl.inline_asm_elementwise(CLAMP, "=f,f,f,f", [x, low, high], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def activate(x, high):
    """x clamped to [0, high], in the type of `high`; NaN stays NaN."""
    return gl.inline_asm_elementwise(ACTIVATE_FP16 if high.dtype == gl.float16 else ACTIVATE_BF16, "=r,f,f,r", [x, high], dtype=high.dtype, is_pure=True, pack=2)


@gluon.jit
def on_diagonal(weight, diagonal):
    """The weight where `diagonal` has ones, in all bits; zero elsewhere."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [weight, diagonal], dtype=weight.dtype, is_pure=True, pack=2)
