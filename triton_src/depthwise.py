"""Depthwise convolution, kernel 3 or 5: out[y, x, c] = activation(affine(sum_k x[y*s + ky - top, x*s + kx - left, c] w[c, ky, kx])).

Two ways to do it. `effnet_depthwise` computes a flat tile, every output from its k*k neighbours, which the L1 cache
holds: channels_last by pixels (of the whole batch) and channels, NCHW by planes and pixels of a plane; any stride.
`effnet_depthwise_rows` (channels_last, the same stride in both directions) walks down an image: it loads an input row
once for all the output rows that it touches, k loads an input row instead of k*k an output row.
Padding is a run-time number, and the weight is read through two strides: it may lie channel by channel or tap by tap. The arithmetic is float32 in every precision. A tap outside the image counts as 0 * w.
"""

import triton
import triton.language as tl

from ._epilogue import PARAMETERS, activate, apply_affine, load_affine
from ._launch import wait_for_maps
from ._variant import PRECISION_CODES, Variant


@triton.jit
def effnet_depthwise(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                     stride_y, stride_x, left, top, weight_channel, weight_tap, eps, low, high, flags,
                     CHANNELS_LAST: tl.constexpr, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    plane = out_height * out_width
    if CHANNELS_LAST:
        channel_tiles = tl.cdiv(channels, BLOCK_C)
        p = (tl.program_id(0) // channel_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = c < channels
        in_p = p < batch * plane
        image = p // plane
        p_in_plane = p % plane
        where = p[:, None] * channels + c[None, :]
        mask = in_p[:, None] & in_c[None, :]
        accumulator = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    else:
        pixel_tiles = tl.cdiv(plane, BLOCK_P)
        planes = (tl.program_id(0) // pixel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        p_in_plane = (tl.program_id(0) % pixel_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_c = planes < batch * channels
        in_p = p_in_plane < plane
        c = planes % channels
        where = planes[:, None] * plane + p_in_plane[None, :]
        mask = in_c[:, None] & in_p[None, :]
        accumulator = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    first_y = (p_in_plane // out_width) * stride_y - top
    first_x = (p_in_plane % out_width) * stride_x - left
    wait_for_maps(DEPENDENT_LAUNCH)
    # Only the columns are unrolled: with all taps of a 5x5 kernel in flight the registers do not suffice.
    for ky in tl.range(KERNEL, loop_unroll_factor=1):
        # A row's taps are summed for themselves: shorter sums lose fewer digits.
        row = tl.zeros_like(accumulator)
        for kx in tl.static_range(KERNEL):
            y = first_y + ky
            z = first_x + kx
            inside = in_p & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            w = tl.load(weight + c * weight_channel + (ky * KERNEL + kx) * weight_tap, mask=in_c, other=0.0).to(tl.float32)
            if CHANNELS_LAST:
                neighbour = ((image * height + y) * width + z)[:, None] * channels + c[None, :]
                value = tl.load(x + neighbour, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
                row += value * w[None, :]
            else:
                neighbour = planes[:, None] * (height * width) + (y * width + z)[None, :]
                value = tl.load(x + neighbour, mask=in_c[:, None] & inside[None, :], other=0.0).to(tl.float32)
                row += value * w[:, None]
        accumulator += row
    affine = load_affine(p0, p1, p2, p3, c, in_c, eps, flags)
    if CHANNELS_LAST:
        y = apply_affine(accumulator, affine, 1, out.dtype.element_ty == tl.float32)
    else:
        y = apply_affine(accumulator, affine, 0, out.dtype.element_ty == tl.float32)
    tl.store(out + where, activate(y, low, high).to(out.dtype.element_ty), mask=mask)


@triton.jit
def effnet_depthwise_rows(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                          stride_y, stride_x, left, top, weight_channel, weight_tap, eps, low, high, flags,
                          KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    column_tiles = tl.cdiv(out_width, BLOCK_P)
    row_tiles = tl.cdiv(out_height, ROWS)
    tile = tl.program_id(0) // channel_tiles
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (tile % column_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    first_row = (tile // column_tiles % row_tiles) * ROWS
    image = tile // (column_tiles * row_tiles)
    in_c = c < channels
    taps = ()
    for k in tl.static_range(KERNEL * KERNEL):
        taps = taps + (tl.load(weight + c * weight_channel + k * weight_tap, mask=in_c, other=0.0).to(tl.float32),)
    wait_for_maps(DEPENDENT_LAUNCH)
    sums = ()
    for r in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
        y = first_row * STRIDE - top + i
        for kx in tl.static_range(KERNEL):
            z = column * STRIDE - left + kx
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            neighbour = ((image * height + y) * width + z)[:, None] * channels + c[None, :]
            value = tl.load(x + neighbour, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
            added = ()
            for r in tl.static_range(ROWS):
                if (i >= r * STRIDE) and (i < r * STRIDE + KERNEL):
                    added = added + (sums[r] + value * taps[(i - r * STRIDE) * KERNEL + kx][None, :],)
                else:
                    added = added + (sums[r],)
            sums = added
    affine = load_affine(p0, p1, p2, p3, c, in_c, eps, flags)
    for r in tl.static_range(ROWS):
        y = activate(apply_affine(sums[r], affine, 1, out.dtype.element_ty == tl.float32), low, high)
        where = ((image * out_height + first_row + r) * out_width + column)[:, None] * channels + c[None, :]
        mask = ((column < out_width) & (first_row + r < out_height))[:, None] & in_c[None, :]
        tl.store(out + where, y.to(out.dtype.element_ty), mask=mask)


# BLOCK_P, BLOCK_C, warps of the flat kernel
FLAT = {("nhwc", True): (32, 32, 2), ("nhwc", False): (32, 32, 4), ("nchw", False): (64, 2, 4)}
# By kernel size and bytes of an element: stride, then ROWS, BLOCK_P, BLOCK_C, warps of the walking one. Few rows for few
# pixels; many, which load less, where the registers hold them: a 5x5 kernel's 25 taps leave no room.
WALKING = {
    (3, 2): [(1, 8, 8, 64, 4), (1, 8, 8, 32, 2), (1, 4, 8, 32, 4), (2, 8, 8, 64, 4), (2, 4, 8, 32, 2), (2, 2, 8, 32, 4)],
    (3, 4): [(1, 8, 8, 32, 4), (1, 4, 8, 32, 4), (2, 8, 8, 32, 4), (2, 2, 8, 32, 4)],
    (5, 2): [(1, 2, 8, 64, 4), (2, 2, 4, 64, 4)],
    (5, 4): [],
}


# What tuning tries in channels_last, aligned: BLOCK_P, BLOCK_C, warps of the flat kernel, and ROWS, BLOCK_P, BLOCK_C, warps
# of the walking one, for a 3x3 and for a 5x5 kernel.
FLAT_TRIED = [(p, c, warps) for p in (8, 16, 32) for c in (32, 64) for warps in (4, 2) if 512 <= p * c <= 1024]
WALKING_TRIED = {
    3: [(rows, p, c, warps) for rows in (2, 4, 8) for p in (8, 16, 32) for c in (32, 64) for warps in (4, 2) if 256 <= p * c <= 1024],
    5: [(2, p, c, warps) for p in (4, 8) for c in (32, 64) for warps in (4, 2) if 128 <= p * c <= 512],
}


def variants():
    for precision in ("fp16", "bf16", "fp32"):
        for kernel in (3, 5):
            for (layout, aligned), (block_p, block_c, warps) in FLAT.items():
                yield flat(precision, kernel, layout, aligned, block_p, block_c, warps)
            for stride, rows, block_p, block_c, warps in WALKING[kernel, 4 if precision == "fp32" else 2]:
                yield walking(precision, kernel, stride, rows, block_p, block_c, warps)


def candidates():
    shipped = {v.name for v in variants()}
    for precision in ("fp16", "bf16", "fp32"):
        for kernel in (3, 5):
            tried = [flat(precision, kernel, "nhwc", True, *sizes) for sizes in FLAT_TRIED]
            tried += [walking(precision, kernel, stride, *sizes) for stride in (1, 2) for sizes in WALKING_TRIED[kernel]]
            yield from (v for v in tried if v.name not in shipped)


def flat(precision, kernel, layout, aligned, block_p, block_c, warps):
    return Variant(
        op="depthwise",
        name=f"{precision}_k{kernel}_{layout}_{'aligned' if aligned else 'generic'}_w{warps}_{block_p}x{block_c}",
        kernel=effnet_depthwise,
        parameters=signature(precision),
        constants={"CHANNELS_LAST": layout == "nhwc", "KERNEL": kernel, "BLOCK_P": block_p, "BLOCK_C": block_c},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": aligned,
                    "kernel": kernel, "stride": 0, "rows": 1, "block_p": block_p, "block_c": block_c},
        divisible={"x": 16, "out": 16, "channels": 8} if aligned else {},
        num_warps=warps,
    )


def walking(precision, kernel, stride, rows, block_p, block_c, warps):
    return Variant(
        op="depthwise",
        name=f"{precision}_k{kernel}_s{stride}_rows_w{warps}_{rows}x{block_p}x{block_c}",
        kernel=effnet_depthwise_rows,
        parameters=signature(precision),
        constants={"KERNEL": kernel, "STRIDE": stride, "ROWS": rows, "BLOCK_P": block_p, "BLOCK_C": block_c},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": 1, "aligned": 1,
                    "kernel": kernel, "stride": stride, "rows": rows, "block_p": block_p, "block_c": block_c},
        divisible={"x": 16, "out": 16, "channels": 8},
        num_warps=warps,
    )


def signature(precision):
    pointers = ("x", "weight", "p0", "p1", "p2", "p3", "out")
    numbers = ("batch", "channels", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "left", "top", "weight_channel", "weight_tap")
    return {**{q: f"*{precision}" for q in pointers}, **{q: "i32" for q in numbers}, **PARAMETERS}
