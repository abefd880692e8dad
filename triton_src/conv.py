"""Dense convolution with few input channels (a network's stem), as an implicit matrix product.

out[p, o] = activation(affine(sum_k x[pixel(p, k)] weight[o, k])), k = (c, ky, kx) flattened: 27 for a 3x3 stem on RGB,
padded to 32 for the tensor cores. x and weight are read through their strides, so that any layout is read where it
lies and the output's layout is free: the stem turns an NCHW picture into the channels_last maps of the network.
A program owns one image's tile of pixels and a tile of output channels.

effnet_conv_folded is the same product for what networks begin with: 3x3 on up to three channels, a bias at most. In Gluon,
because a thread there loads exactly the values that the tensor cores want of it: no shared memory, and the taps' offsets
are computed once.
"""

from dataclasses import replace

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._epilogue import HAS_BIAS, PARAMETERS, activate, apply_affine, load_affine
from ._gluon import clamp, nearest_tf32, to_tf32
from ._launch import wait_for_maps, wait_for_maps_gluon
from ._variant import PRECISION_CODES, PRECISIONS, Variant


@triton.jit
def effnet_conv(x, weight, p0, p1, p2, p3, out, in_channels, height, width, out_channels, out_height, out_width,
                kernel_y, kernel_x, stride_y, stride_x, left, top,
                x_image, x_channel, x_row, x_column, weight_out, weight_in, weight_row, weight_column,
                eps, low, high, flags,
                KERNEL: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                PRECISION: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    plane = out_height * out_width
    pixel_tiles = tl.cdiv(plane, BLOCK_M)
    channel_tiles = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0) // channel_tiles
    o = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tile // pixel_tiles
    p = (tile % pixel_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_out = o < out_channels
    in_p = p < plane
    first_y = (p // out_width) * stride_y - top
    first_x = (p % out_width) * stride_x - left
    x += image * x_image
    # Known where it can be, so that the divisions below are multiplications.
    row_taps = KERNEL if KERNEL > 0 else kernel_x
    taps = KERNEL * KERNEL if KERNEL > 0 else kernel_y * kernel_x
    wait_for_maps(DEPENDENT_LAUNCH)
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, in_channels * taps, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < in_channels * taps
        c = k // taps
        ky = (k % taps) // row_taps
        kx = (k % taps) % row_taps
        weights = o[:, None] * weight_out + (c * weight_in + ky * weight_row + kx * weight_column)[None, :]
        a = tl.load(weight + weights, mask=in_out[:, None] & in_k[None, :], other=0.0)
        # Pixels last: the threads of a warp then read neighbours in a row of the picture, not taps all over it. Unsigned,
        # so that one comparison sees both borders.
        inside_y = (first_y[None, :] + ky[:, None]).to(tl.uint32) < height.to(tl.uint32)
        inside_x = (first_x[None, :] + kx[:, None]).to(tl.uint32) < width.to(tl.uint32)
        offsets = (first_y * x_row + first_x * x_column)[None, :] + (c * x_channel + ky * x_row + kx * x_column)[:, None]
        b = tl.load(x + offsets, mask=inside_y & inside_x & in_k[:, None] & in_p[None, :], other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    affine = load_affine(p0, p1, p2, p3, o, in_out, eps, flags)
    y = activate(apply_affine(accumulator, affine, 0, out.dtype.element_ty == tl.float32), low, high)
    mask = in_out[:, None] & in_p[None, :]
    if CHANNELS_LAST:
        where = (image * plane + p)[None, :] * out_channels + o[:, None]
    else:
        where = (image * out_channels + o)[:, None] * plane + p[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def effnet_conv_folded(x, weight, p0, p1, p2, p3, out, in_channels, height, width, out_channels, out_height, out_width,
                       kernel_y, kernel_x, stride_y, stride_x, left, top,
                       x_image, x_channel, x_row, x_column, weight_out, weight_in, weight_row, weight_column,
                       eps, low, high, flags,
                       TILES: gl.constexpr, WARPS: gl.constexpr, BLOCK_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    BLOCK_M: gl.constexpr = 16 * TILES * WARPS
    dtype: gl.constexpr = x.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if dtype == gl.float32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if dtype == gl.float32 else 2)
    VECTOR: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # elements in 16 bytes
    rows_of_vectors: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // BLOCK_N, BLOCK_N // VECTOR], [WARPS, 1], [1, 0])

    plane = out_height * out_width
    pixel_tiles = gl.cdiv(plane, BLOCK_M)
    channel_tiles = gl.cdiv(out_channels, BLOCK_N)
    tile = gl.program_id(0) // channel_tiles
    first_channel = gl.program_id(0) % channel_tiles * BLOCK_N
    image = tile // pixel_tiles
    first = tile % pixel_tiles * BLOCK_M

    k = gl.arange(0, 32, layout=gl.SliceLayout(1, right_operand))
    o = first_channel + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, right_operand))
    weights = gl.load(weight + o[None, :] * weight_out + (k // 9 * weight_in + k % 9 // 3 * weight_row + k % 3 * weight_column)[:, None],
                      mask=(o < out_channels)[None, :] & (k < 9 * in_channels)[:, None], other=0.0)

    k = gl.arange(0, 32, layout=gl.SliceLayout(0, left_operand))
    p = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, left_operand))
    y = p // out_width * stride_y - top
    z = p % out_width * stride_x - left
    # Unsigned, so that one comparison sees both borders.
    inside = ((y[:, None] + (k % 9 // 3)[None, :]).to(gl.uint32) < height.to(gl.uint32)) & ((z[:, None] + (k % 3)[None, :]).to(gl.uint32) < width.to(gl.uint32))
    where = (y * x_row + z * x_column)[:, None] + (k // 9 * x_channel + k % 9 // 3 * x_row + k % 3 * x_column)[None, :]
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    pixels = gl.load(x + image * x_image + where, mask=inside & (p < plane)[:, None] & (k < 9 * in_channels)[None, :], other=0.0)

    result = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=mma)
    if dtype == gl.float32:
        # So little arithmetic that TF32 need not cost accuracy: three products instead of one.
        pixels_high = nearest_tf32(pixels)
        weights_high = nearest_tf32(weights)
        result = mma_v2(to_tf32(pixels - pixels_high), weights_high, result, input_precision="tf32")
        result = mma_v2(pixels_high, to_tf32(weights - weights_high), result, input_precision="tf32")
        # What is left of infinity is NaN; the last product alone knows what becomes of it.
        result = gl.where(result == result, result, 0.0)
        result = mma_v2(pixels_high, weights_high, result, input_precision="tf32")
    else:
        result = mma_v2(pixels, weights, result)

    o = first_channel + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, rows_of_vectors))
    p = first + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rows_of_vectors))
    result = gl.convert_layout(result, rows_of_vectors)
    if (flags & HAS_BIAS) != 0:
        result += gl.load(p0 + o, mask=o < out_channels, other=0.0)[None, :]
    gl.store(out + (image * plane + p)[:, None] * out_channels + o[None, :], clamp(result, low, high).to(dtype), mask=(p < plane)[:, None] & (o < out_channels)[None, :])


# BLOCK_M, BLOCK_N, BLOCK_K, warps
TILES = {"fp16": (64, 32, 32, 4), "tf32": (64, 32, 32, 4), "fp32": (32, 32, 32, 4)}
# Tiles of 16 pixels a warp, and warps.
FOLDED = {"fp16": [(2, 2), (4, 2)], "bf16": [(2, 2), (4, 2)], "tf32": [(2, 2)]}


# What tuning tries of the aligned 3x3 in channels_last: BLOCK_M, BLOCK_N, BLOCK_K, warps. 27 taps are one trip of the loop.
TRIED = [(m, n, 32, warps) for m in (32, 64, 128) for n in (16, 32) for warps in (4, 2, 8)]


def variants():
    for precision in PRECISIONS:
        m, n, k, warps = TILES["fp16" if precision == "bf16" else precision]
        for kernel, layout, aligned in ((3, "nhwc", True), (3, "nhwc", False), (3, "nchw", False), (0, "nhwc", False), (0, "nchw", False)):
            yield variant(precision, kernel, layout, aligned, m, n, k, warps)
        if precision != "fp32":
            for tiles, warps in FOLDED[precision]:
                yield folded(precision, tiles, warps)


def candidates():
    for precision in PRECISIONS:
        for m, n, k, warps in TRIED:
            yield variant(precision, 3, "nhwc", True, m, n, k, warps, f"w{warps}_")
        if precision != "fp32":
            for tiles, warps in ((1, 1), (1, 2), (2, 1), (1, 4), (4, 2), (2, 4), (4, 4)):
                if (tiles, warps) not in FOLDED[precision]:
                    yield folded(precision, tiles, warps, f"w{warps}_")


def folded(precision, tiles, warps, schedule=""):
    """3x3 on up to 3 channels, channels_last output, and no batch norm but a float32 bias at most."""
    like = variant(precision, 3, "nhwc", True, 16 * tiles * warps, 32, 32, warps, schedule)
    return replace(
        like,
        name=like.name.replace("aligned", "folded"),
        kernel=effnet_conv_folded,
        parameters={**like.parameters, **{p: "*fp32" for p in ("p0", "p1", "p2", "p3")}},
        constants={"TILES": tiles, "WARPS": warps, "BLOCK_N": 32},
        attributes={**like.attributes, "folded": 1},
        divisible={**like.divisible, "p0": 16},
    )


def variant(precision, kernel, layout, aligned, m, n, k, warps, schedule=""):
    dtype, arithmetic = PRECISIONS[precision]
    return Variant(
        op="conv",
        name=f"{precision}_{f'k{kernel}' if kernel else 'any'}_{layout}_{'aligned' if aligned else 'generic'}_{schedule}{m}x{n}x{k}",
        kernel=effnet_conv,
        parameters={**{q: f"*{dtype}" for q in ("x", "weight", "p0", "p1", "p2", "p3", "out")},
                    **{q: "i32" for q in ("in_channels", "height", "width", "out_channels", "out_height", "out_width",
                                          "kernel_y", "kernel_x", "stride_y", "stride_x", "left", "top",
                                          "x_image", "x_channel", "x_row", "x_column",
                                          "weight_out", "weight_in", "weight_row", "weight_column")}, **PARAMETERS},
        constants={"KERNEL": kernel, "CHANNELS_LAST": layout == "nhwc", "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k,
                   # So little arithmetic that TF32 need not cost accuracy: three products instead of one.
                   "PRECISION": "tf32x3" if arithmetic == "tf32" and dtype == "fp32" else arithmetic},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": aligned,
                    "kernel": kernel, "folded": 0, "block_m": m, "block_n": n},
        # Only the stores are vectors here: the pixels of a 3-channel picture are read one by one.
        divisible={"out": 16, "out_channels": 8} if aligned else {},
        num_warps=warps,
        num_stages=2,
    )
