"""Depthwise convolution, kernel 3 or 5: out[y, x, c] = activation(affine(sum_k x[y*s + ky - top, x*s + kx - left, c] w[c, ky, kx])).

Nothing but memory traffic: each output reads k*k neighbours, which the L1 cache holds. channels_last: a tile of pixels
(of the whole batch) by channels, vector loads along the channels. NCHW: a tile of planes by pixels of a plane.
Stride and padding are run-time numbers; the arithmetic is float32 in every precision.
"""

import triton
import triton.language as tl

from ._epilogue import PARAMETERS, activate, load_affine
from ._variant import PRECISION_CODES, Variant


@triton.jit
def effnet_depthwise(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                     stride_y, stride_x, left, top, eps, low, high, flags,
                     CHANNELS_LAST: tl.constexpr, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
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
    # Only the columns are unrolled: with all taps of a 5x5 kernel in flight the registers do not suffice.
    for ky in tl.range(KERNEL, loop_unroll_factor=1):
        for kx in tl.static_range(KERNEL):
            y = first_y + ky
            z = first_x + kx
            inside = in_p & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            w = tl.load(weight + c * (KERNEL * KERNEL) + (ky * KERNEL + kx), mask=in_c, other=0.0).to(tl.float32)
            if CHANNELS_LAST:
                neighbour = ((image * height + y) * width + z)[:, None] * channels + c[None, :]
                value = tl.load(x + neighbour, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
                # Outside the image the tap is absent, not 0 * w: an infinite weight must not make a NaN there.
                accumulator += tl.where(inside[:, None], value * w[None, :], 0.0)
            else:
                neighbour = planes[:, None] * (height * width) + (y * width + z)[None, :]
                value = tl.load(x + neighbour, mask=in_c[:, None] & inside[None, :], other=0.0).to(tl.float32)
                accumulator += tl.where(inside[None, :], value * w[:, None], 0.0)
    center, scale, shift = load_affine(p0, p1, p2, p3, c, in_c, eps, flags)
    if CHANNELS_LAST:
        y = (accumulator - center[None, :]) * scale[None, :] + shift[None, :]
    else:
        y = (accumulator - center[:, None]) * scale[:, None] + shift[:, None]
    tl.store(out + where, activate(y, low, high).to(out.dtype.element_ty), mask=mask)


# BLOCK_P, BLOCK_C
TILES = {("nhwc", True): (32, 32), ("nhwc", False): (32, 32), ("nchw", False): (128, 4)}


def variants():
    for precision, dtype in (("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32")):
        for (layout, aligned), (block_p, block_c) in TILES.items():
            for kernel in (3, 5):
                yield Variant(
                    op="depthwise",
                    name=f"{precision}_k{kernel}_{layout}_{'aligned' if aligned else 'generic'}_{block_p}x{block_c}",
                    kernel=effnet_depthwise,
                    parameters={**{q: f"*{dtype}" for q in ("x", "weight", "p0", "p1", "p2", "p3", "out")},
                                **{q: "i32" for q in ("batch", "channels", "height", "width", "out_height", "out_width",
                                                      "stride_y", "stride_x", "left", "top")}, **PARAMETERS},
                    constants={"CHANNELS_LAST": layout == "nhwc", "KERNEL": kernel, "BLOCK_P": block_p, "BLOCK_C": block_c},
                    attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": aligned,
                                "kernel": kernel, "block_p": block_p, "block_c": block_c},
                    divisible={"x": 16, "out": 16, "channels": 8} if aligned else {},
                )
