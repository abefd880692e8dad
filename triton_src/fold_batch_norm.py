"""Batch norm folded into a convolution's weight and a bias:

    scale = bn_weight / sqrt(bn_var + eps);  out = weight * scale;  out_bias = bn_bias - bn_mean * scale

Networks fold at their first call. PyTorch's kernels for it would have to be loaded then, one by one, which takes longer than
the call. Pairs of float32, what was rounded and what the rounding lost, stand in for float64: results are rounded once.

A channel's elements lie side by side in a tile. The weight is read through its strides, so that none has to be copied.
"""

import triton
import triton.language as tl

from ._epilogue import along, load_affine, load_vector
from ._variant import PRECISION_CODES, Variant


@triton.jit
def multiply(x, y):
    """The product, and what rounding lost of it. As a fused operation, which no later addition can be drawn into."""
    product = tl.fma(x, y, tl.zeros_like(x))
    return product, tl.fma(x, y, -product)


@triton.jit
def add(x, y):
    """The sum, and what rounding lost of it."""
    total = x + y
    back = total - x
    return total, (x - (total - back)) + (y - back)


@triton.jit
def corrected(x, correction):
    """The correction of an infinity is NaN, and none."""
    return x + tl.where(tl.abs(correction) < float("inf"), correction, 0.0)


@triton.jit
def effnet_fold_batch_norm(weight, p0, p1, p2, p3, out, out_bias, out_channels, in_channels, kernel_y, kernel_x,
                           weight_out, weight_in, weight_row, weight_column, out_channel, out_element, eps, flags,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    taps = kernel_y * kernel_x
    elements = in_channels * taps
    element_tiles = tl.cdiv(elements, BLOCK_N)
    o = tl.program_id(0) // element_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % element_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o = o < out_channels

    mean, scale, rest, shift = load_affine(p0, p1, p2, p3, o, in_o, eps, flags)
    variance, lost = add(load_vector(p3, o, in_o, flags), eps)
    rest = corrected(rest, -0.5 * scale * (lost / variance))

    mask = in_o[:, None] & (k < elements)[None, :]
    places = k // taps * weight_in + k % taps // kernel_x * weight_row + k % kernel_x * weight_column
    w = tl.load(weight + o[:, None] * weight_out + places[None, :], mask=mask, other=0.0).to(tl.float32)
    product, lost = multiply(w, tl.broadcast_to(along(scale, 0), w.shape))
    y = corrected(product, lost + w * along(rest, 0))
    tl.store(out + o[:, None] * out_channel + k[None, :] * out_element, y.to(out.dtype.element_ty), mask=mask)

    product, lost = multiply(mean, scale)
    bias, lost_of_sum = add(shift, -product)
    tl.store(out_bias + o, corrected(bias, lost_of_sum - (lost + mean * rest)), mask=in_o & (tl.program_id(0) % element_tiles == 0))


# Storage of the weight, storage of the folded one.
TYPES = {"fp16": ["fp16"], "bf16": ["bf16"], "fp32": ["fp32", "fp16", "bf16"]}


def variants():
    for weight, folded in TYPES.items():
        for out in folded:
            yield Variant(
                op="fold_batch_norm",
                name=f"{weight}_to_{out}_16x64",
                kernel=effnet_fold_batch_norm,
                parameters={**{q: f"*{weight}" for q in ("weight", "p0", "p1", "p2", "p3")}, "out": f"*{out}", "out_bias": "*fp32",
                            **{q: "i32" for q in ("out_channels", "in_channels", "kernel_y", "kernel_x", "weight_out", "weight_in", "weight_row", "weight_column",
                                                  "out_channel", "out_element")}, "eps": "fp32", "flags": "i32"},
                constants={"BLOCK_M": 16, "BLOCK_N": 64},
                attributes={"precision": PRECISION_CODES[weight], "out_precision": PRECISION_CODES[out], "block_m": 16, "block_n": 64},
            )
