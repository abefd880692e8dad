"""1x1 convolution and global average pool: out[n, o] = mean over p of activation(affine(sum_c x[n, p, c] weight[o, c])).

The network's head: its activation map is larger than anything around it and only its mean is wanted, so it never
leaves the registers. A program owns a tile of output channels and one image, over whose pixels it walks, or several small
images, each of which has the same part of the tile's rows: then the weights are read once for all of them.
"""

import triton
import triton.language as tl

from ._epilogue import PARAMETERS, activate, apply_affine, load_affine
from ._gemm import accumulate_planes, accumulate_rows
from ._launch import wait_for_maps
from ._variant import LARGE_TILES, PRECISION_CODES, PRECISIONS, SCHEDULES, Variant, tiles


@triton.jit
def effnet_pointwise_pool(x, weight, p0, p1, p2, p3, out, images, pixels, out_channels, in_channels, eps, low, high, flags,
                          CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IMAGES: tl.constexpr,
                          PRECISION: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    channel_tiles = tl.cdiv(out_channels, BLOCK_N)
    image = (tl.program_id(0) // channel_tiles) * IMAGES
    o = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = o < out_channels
    affine = load_affine(p0, p1, p2, p3, o, in_out, eps, flags)
    wait_for_maps(DEPENDENT_LAUNCH)
    x += image * pixels * in_channels
    if IMAGES > 1:
        SLOTS: tl.constexpr = BLOCK_M // IMAGES
        slot = tl.arange(0, BLOCK_M)
        i, p = slot // SLOTS, slot % SLOTS
        in_p = (p < pixels) & (image + i < images)
        y = accumulate_rows(x, weight, i * pixels + p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        y = activate(apply_affine(y, affine, 1, out.dtype.element_ty == tl.float32), low, high)
        mean = tl.sum(tl.reshape(tl.where(in_p[:, None], y, 0.0), (IMAGES, SLOTS, BLOCK_N)), axis=1) / pixels
        i = image + tl.arange(0, IMAGES)
        tl.store(out + i[:, None] * out_channels + o[None, :], mean.to(out.dtype.element_ty), mask=(i < images)[:, None] & in_out[None, :])
        return
    # Summed pixel by pixel of the tile and across the tile at the end: shorter sums lose fewer digits.
    total = tl.zeros((BLOCK_M, BLOCK_N) if CHANNELS_LAST else (BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, pixels, BLOCK_M):
        p = first + tl.arange(0, BLOCK_M)
        in_p = p < pixels
        if CHANNELS_LAST:
            y = accumulate_rows(x, weight, p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            y = activate(apply_affine(y, affine, 1, out.dtype.element_ty == tl.float32), low, high)
            total += tl.where(in_p[:, None], y, 0.0)
        else:
            y = accumulate_planes(x, weight, p, o, in_p, in_out, pixels, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            y = activate(apply_affine(y, affine, 0, out.dtype.element_ty == tl.float32), low, high)
            total += tl.where(in_p[None, :], y, 0.0)
    tl.store(out + image * out_channels + o, (tl.sum(total, axis=0 if CHANNELS_LAST else 1) / pixels).to(out.dtype.element_ty), mask=in_out)


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
TILES = {
    ("fp16", True): (64, 32, 64, 4, 3), ("fp16", False): (64, 32, 32, 4, 2),
    ("tf32", True): (64, 32, 32, 4, 3), ("tf32", False): (32, 32, 16, 4, 2),
    ("fp32", True): (64, 32, 16, 4, 2), ("fp32", False): (32, 32, 16, 4, 2),
}


# What tuning tries in channels_last, aligned.
TRIED = {
    "fp16": tiles((16, 32, 64), (16, 32, 64, 128), (64, 128), (512, 4096)),
    "tf32": tiles((16, 32, 64), (16, 32, 64, 128), (32, 64), (512, 4096)),
    "fp32": tiles((32, 64), (16, 32), (16, 32), (512, 2048)),
}


def variants():
    for precision in PRECISIONS:
        for layout, aligned in (("nhwc", True), ("nhwc", False), ("nchw", False)):
            yield variant(precision, layout, aligned, *TILES["fp16" if precision == "bf16" else precision, aligned])


def candidates():
    for precision in PRECISIONS:
        for m, n, k in TRIED["fp16" if precision == "bf16" else precision]:
            for warps, stages in SCHEDULES:
                yield variant(precision, "nhwc", True, m, n, k, warps, stages, f"w{warps}s{stages}_")
        for m, n, k, warps, stages in LARGE_TILES.get(precision, ()):
            yield variant(precision, "nhwc", True, m, n, k, warps, stages, f"w{warps}s{stages}_", images=m // 64)


def variant(precision, layout, aligned, m, n, k, warps, stages, schedule="", images=1):
    dtype, arithmetic = PRECISIONS[precision]
    kind = f"images{images}" if images > 1 else "aligned" if aligned else "generic"
    return Variant(
        op="pointwise_pool",
        name=f"{precision}_{layout}_{kind}_{schedule}{m}x{n}x{k}",
        kernel=effnet_pointwise_pool,
        parameters={**{q: f"*{dtype}" for q in ("x", "weight", "p0", "p1", "p2", "p3", "out")},
                    "images": "i32", "pixels": "i32", "out_channels": "i32", "in_channels": "i32", **PARAMETERS},
        constants={"CHANNELS_LAST": layout == "nhwc", "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "IMAGES": images, "PRECISION": arithmetic},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": aligned,
                    "block_m": m, "block_n": n, **({"images": images} if images > 1 else {})},
        divisible={"x": 16, "weight": 16, "in_channels": 8} if aligned else {},
        num_warps=warps,
        num_stages=stages,
        judged=images == 1,
    )
