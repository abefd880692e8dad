"""A block's projection and the network's head in one kernel: out[n, o] = mean over p of activation(sum_c x[n, p, c] weight[o, c] * scale[o] + bias[o]).

Between a block's projection and the 1x1 convolution behind it is no activation, so they are one product (merge_weights.py), of more
numbers and in a kernel less. As in pointwise_pool.py a program owns a tile of output channels and one image, over whose pixels it
walks; but the product is deep, for x is the map that the block has filtered, of all its hidden channels, so its depth may be split
across the warps (_gemm.py).

The weight is narrow_weight.py's, float16 with a scale for each row; x is float16, too, in a network of float32 and TF32 a narrow map
(_narrow.py). channels_last.
"""

import triton
import triton.language as tl

from ._epilogue import activate
from ._gemm import accumulate_rows, accumulate_split_rows
from ._launch import wait_for_maps
from ._narrow import SCALE
from ._variant import PRECISION_CODES, SCHEDULES, Variant, tiles

NARROW_SCALE = tl.constexpr(SCALE)


@triton.jit
def effnet_merged_pool(x, weight, scale, bias, out, pixels, out_channels, in_channels, low, high,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    channel_tiles = tl.cdiv(out_channels, BLOCK_N)
    image = tl.program_id(0) // channel_tiles
    o = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = o < out_channels
    by = tl.load(scale + o, mask=in_out, other=0.0)
    if out.dtype.element_ty == tl.float16:  # the scale is one for a narrow map, and here is none
        by *= NARROW_SCALE
    shift = tl.load(bias + o, mask=in_out, other=0.0)
    wait_for_maps(DEPENDENT_LAUNCH)
    x += image * pixels * in_channels
    # Summed pixel by pixel of the tile and across the tile at the end: shorter sums lose fewer digits.
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, pixels, BLOCK_M):
        p = first + tl.arange(0, BLOCK_M)
        in_p = p < pixels
        if SPLITS == 1:
            y = accumulate_rows(x, weight, p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, "tf32")
        else:
            y = accumulate_split_rows(x, weight, p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, "tf32")
        total += tl.where(in_p[:, None], activate(y * by[None, :] + shift[None, :], low, high), 0.0)
    tl.store(out + image * out_channels + o, (tl.sum(total, axis=0) / pixels).to(out.dtype.element_ty), mask=in_out)


TRIED = tiles((16, 32, 64), (16, 32, 64, 128), (64, 128), (512, 4096))
# BLOCK_N, BLOCK_K, splits, stages of tiles of 64 pixels, a small image.
SPLIT = [(n, k, splits, stages) for n in (16, 32) for k in (32, 64) for splits in (4, 8) for stages in (2, 3, 4) if k * splits <= 256]


def variants():
    """None: two products become one where tuning says so."""
    return []


def candidates():
    for precision in ("fp16", "tf32"):
        for m, n, k in TRIED:
            for warps, stages in SCHEDULES:
                yield variant(precision, m, n, k, warps, stages, f"w{warps}s{stages}")
        for n, k, splits, stages in SPLIT:
            yield variant(precision, 64, n, k, splits, stages, f"w{splits}s{stages}_k{splits}", splits)


def variant(precision, m, n, k, warps, stages, schedule, splits=1):
    types = {"x": "*fp16", "weight": "*fp16", "scale": "*fp32", "bias": "*fp32", "out": "*fp16" if precision == "fp16" else "*fp32"}
    return Variant(
        op="merged_pool",
        name=f"{precision}_{schedule}_{m}x{n}x{k}",
        kernel=effnet_merged_pool,
        parameters={**types, "pixels": "i32", "out_channels": "i32", "in_channels": "i32", "low": "fp32", "high": "fp32"},
        constants={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLITS": splits},
        attributes={"precision": PRECISION_CODES[precision], "block_m": m, "block_n": n},
        divisible={"x": 16, "weight": 16, "in_channels": 8},
        num_warps=warps,
        num_stages=stages,
        base_warps=max(4, splits),
    )
