"""Arithmetic that the Gluon kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROUND_TO_TF32 = gl.constexpr("cvt.rna.tf32.f32 $0, $1;")
CLAMP = gl.constexpr("max.NaN.f32 $0, $1, $2; min.NaN.f32 $0, $0, $3;")


@gluon.jit
def to_tf32(x):
    """float32 as the tensor cores should see it: rounded where they would cut off. Other types as they are."""
    if x.dtype == gl.float32:
        return gl.inline_asm_elementwise(ROUND_TO_TF32, "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)
    else:
        return x


@gluon.jit
def clamp(x, low, high):
    """float32 between two bounds; NaN stays NaN, as in PyTorch."""
    return gl.inline_asm_elementwise(CLAMP, "=f,f,f,f", [x, low, high], dtype=gl.float32, is_pure=True, pack=1)
