"""1x1 convolution: out[p, o] = activation(affine(sum_c x[p, c] weight[o, c]) + residual[p, o]).

channels_last: one matrix product over all batch * height * width pixels, x row-major; its depth may be split across warps.
NCHW: a product an image, weight @ x, so that the pixels stay the fastest axis of loads and stores.
A program computes one tile of pixels by output channels; neighbouring programs share the pixels.

With narrow maps (_narrow.py) on either side, of float32 and TF32, in channels_last with a bias.

With few input channels and many pixels, the weights of a tile of output channels fit into shared memory at their whole depth:
a program of effnet_pointwise_resident keeps them there and walks over the pixels, so that only these are read again.
"""

from dataclasses import replace

import triton
import triton.language as tl

from ._epilogue import HAS_RESIDUAL, PARAMETERS, activate, apply_affine, load_affine, load_bias, load_vector
from ._gemm import accumulate_planes, accumulate_rows, accumulate_split_rows, from_map, rounded
from ._launch import wait_for_maps
from ._narrow import map_scale
from ._variant import LARGE_TILES, NARROW, PRECISION_CODES, PRECISIONS, SCHEDULES, Variant, pointers, split_schedules, tiles


@triton.jit
def effnet_pointwise(x, weight, p0, p1, p2, p3, residual, out, pixels, out_channels, in_channels, eps, low, high, flags,
                     CHANNELS_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     PRECISION: tl.constexpr, FOLDED: tl.constexpr, SPLITS: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    # `pixels` counts those of the whole batch (channels_last) or of one image (NCHW).
    OUT_SCALE: tl.constexpr = map_scale(out.dtype.element_ty, weight.dtype.element_ty)
    SCALE: tl.constexpr = OUT_SCALE / map_scale(x.dtype.element_ty, weight.dtype.element_ty)
    SCALED: tl.constexpr = weight.dtype.element_ty == tl.float16 and out.dtype.element_ty == tl.float32  # a narrow weight, by p1
    channel_tiles = tl.cdiv(out_channels, BLOCK_N)
    tile = tl.program_id(0) // channel_tiles
    o = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = o < out_channels
    affine = load_bias(p0, o, in_out, flags, OUT_SCALE) if FOLDED else load_affine(p0, p1, p2, p3, o, in_out, eps, flags)
    wait_for_maps(DEPENDENT_LAUNCH)
    if CHANNELS_LAST:
        p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_p = p < pixels
        if SPLITS == 1:
            y = accumulate_rows(x, weight, p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        else:
            y = accumulate_split_rows(x, weight, p, o, in_p, in_out, in_channels, BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, PRECISION)
        if SCALED:  # of this network's own making, so not loaded before
            y *= load_vector(p1, o, in_out, flags)[None, :]
        y = apply_affine(y, affine, 1, out.dtype.element_ty == tl.float32, FOLDED, SCALE)
        where = p[:, None] * out_channels + o[None, :]
        mask = in_p[:, None] & in_out[None, :]
    else:
        pixel_tiles = tl.cdiv(pixels, BLOCK_M)
        image = tile // pixel_tiles
        p = (tile % pixel_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_p = p < pixels
        y = accumulate_planes(x + image * in_channels * pixels, weight, p, o, in_p, in_out, pixels, in_channels,
                              BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        y = apply_affine(y, affine, 0, out.dtype.element_ty == tl.float32, FOLDED)
        where = image * out_channels * pixels + o[:, None] * pixels + p[None, :]
        mask = in_out[:, None] & in_p[None, :]
    if (flags & HAS_RESIDUAL) != 0:
        y += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where, activate(y, low * OUT_SCALE, high * OUT_SCALE).to(out.dtype.element_ty), mask=mask)


@triton.jit
def effnet_pointwise_resident(x, weight, p0, p1, p2, p3, residual, out, pixels, out_channels, in_channels, eps, low, high, flags,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
                              PRECISION: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    """channels_last with a bias, at most BLOCK_K input channels. As many programs as the GPU holds, a multiple of the tiles of channels."""
    OUT_SCALE: tl.constexpr = map_scale(out.dtype.element_ty, weight.dtype.element_ty)
    SCALE: tl.constexpr = OUT_SCALE / map_scale(x.dtype.element_ty, weight.dtype.element_ty)
    channel_tiles = tl.cdiv(out_channels, BLOCK_N)
    o = (tl.program_id(0) % channel_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_out = o < out_channels
    bias = load_bias(p0, o, in_out, flags, OUT_SCALE)
    k = tl.arange(0, BLOCK_K)
    in_depth = k < in_channels
    b = rounded(tl.load(weight + o[None, :] * in_channels + k[:, None], mask=in_out[None, :] & in_depth[:, None], other=0.0), PRECISION)
    wait_for_maps(DEPENDENT_LAUNCH)
    for tile in tl.range(tl.program_id(0) // channel_tiles, tl.cdiv(pixels, BLOCK_M), tl.num_programs(0) // channel_tiles, num_stages=STAGES):
        p = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        in_p = p < pixels
        a = tl.load(x + p[:, None] * in_channels + k[None, :], mask=in_p[:, None] & in_depth[None, :], other=0.0)
        y = apply_affine(tl.dot(from_map(a, b, PRECISION), b, input_precision=PRECISION), bias, 1, out.dtype.element_ty == tl.float32, FOLDED=True, SCALE=SCALE)
        where = p[:, None] * out_channels + o[None, :]
        mask = in_p[:, None] & in_out[None, :]
        if (flags & HAS_RESIDUAL) != 0:
            y += tl.load(residual + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + where, activate(y, low * OUT_SCALE, high * OUT_SCALE).to(out.dtype.element_ty), mask=mask)


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages. "folded": aligned, and for a bias alone: what networks run on.
TILES = {
    ("fp16", "nhwc", "folded"): [(16, 32, 128, 4, 3), (32, 32, 64, 4, 2), (64, 64, 32, 4, 3), (128, 64, 32, 4, 3)],
    ("fp16", "nhwc", "aligned"): [(32, 32, 64, 4, 2), (64, 64, 32, 4, 3)],
    ("fp16", "nhwc", "generic"): [(64, 64, 32, 4, 2)],
    ("fp16", "nchw", "aligned"): [(64, 64, 32, 4, 3)],
    ("fp16", "nchw", "generic"): [(64, 64, 32, 4, 2)],
    ("tf32", "nhwc", "folded"): [(16, 32, 64, 4, 3), (32, 32, 32, 4, 2), (64, 64, 32, 4, 3)],
    ("tf32", "nhwc", "aligned"): [(32, 32, 32, 4, 2), (64, 64, 32, 4, 3)],
    ("tf32", "nhwc", "generic"): [(64, 64, 32, 8, 2)],
    ("tf32", "nchw", "aligned"): [(64, 64, 32, 4, 2)],
    ("tf32", "nchw", "generic"): [(64, 64, 32, 4, 2)],
    ("narrowing", "nhwc", "folded"): [(32, 32, 32, 4, 2), (64, 64, 32, 4, 3)],
    ("widening16", "nhwc", "folded"): [(64, 64, 32, 4, 3), (128, 64, 32, 4, 3)],
    ("widening", "nhwc", "folded"): [(16, 32, 64, 4, 3), (32, 32, 32, 4, 2), (64, 64, 32, 4, 3)],
    ("fp32", "nhwc", "aligned"): [(32, 32, 16, 4, 2), (64, 64, 16, 8, 2)],
    ("fp32", "nhwc", "generic"): [(64, 64, 16, 8, 2)],
    ("fp32", "nchw", "aligned"): [(64, 64, 16, 8, 2)],
    ("fp32", "nchw", "generic"): [(64, 64, 16, 8, 2)],
}


# What tuning tries in channels_last, aligned: rows, columns and depths of the tile.
TRIED = {
    "fp16": tiles((16, 32, 64, 128), (16, 32, 64, 128), (16, 32, 64, 128)),
    "tf32": tiles((16, 32, 64, 128), (16, 32, 64, 128), (16, 32, 64)),
    "fp32": tiles((32, 64, 128), (32, 64), (16, 32), (1024, 4096)),
}
TRIED |= {"narrowing": TRIED["tf32"], "widening": TRIED["tf32"], "widening16": tiles((64, 128), (32, 64, 128), (32, 64, 128), (2048, 8192))}
# Of products with resident weights: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, programs a multiprocessor.
RESIDENT = {
    "fp16": [(64, 128, 64, 4, 3, 2), (64, 128, 64, 8, 3, 2), (128, 128, 64, 4, 2, 2), (64, 64, 128, 4, 3, 2), (64, 128, 128, 4, 3, 2), (64, 128, 128, 8, 3, 2),
             (64, 64, 256, 4, 2, 2), (64, 128, 256, 8, 3, 1)],
    "tf32": [(64, 128, 64, 4, 3, 2), (64, 128, 64, 8, 3, 2), (64, 64, 128, 4, 2, 2), (64, 64, 128, 4, 3, 1), (64, 128, 128, 8, 3, 1), (64, 64, 256, 4, 2, 1)],
}  # fmt: skip
RESIDENT["narrowing"] = RESIDENT["tf32"]
POINTWISE = [*PRECISIONS, *(precision for precision in NARROW if precision != "narrow")]


def variants():
    for precision in POINTWISE:
        for (storage, layout, kind), shapes in TILES.items():
            if storage == ("fp16" if precision == "bf16" else precision):
                for shape in shapes:
                    yield variant(precision, layout, kind, *shape)


def candidates():
    for precision in POINTWISE:
        for m, n, k in TRIED["fp16" if precision == "bf16" else precision]:
            # Small tiles are for few pixels and many channels: only more loads in flight shorten their loop.
            for warps, stages in (*SCHEDULES, *(((4, 4), (4, 5)) if m * n <= 2048 else ())):
                yield variant(precision, "nhwc", "aligned" if precision == "fp32" else "folded", m, n, k, warps, stages, f"w{warps}s{stages}_")
        for schedule in split_schedules(precision):
            yield variant(precision, "nhwc", "folded", **schedule)
        for m, n, k, warps, stages in LARGE_TILES.get(precision, ()):
            yield variant(precision, "nhwc", "folded", m, n, k, warps, stages, f"w{warps}s{stages}_", judged=False)
        for shape in RESIDENT.get("fp16" if precision == "bf16" else precision, ()):
            yield resident(precision, *shape)


def variant(precision, layout, kind, m, n, k, warps, stages, schedule="", splits=1, judged=True):
    arithmetic = "tf32" if precision in NARROW else PRECISIONS[precision][1]
    # 16-byte loads run along the channels in NHWC, along the pixels in NCHW; the weight's always along the channels.
    multiples = {"x": 16, "weight": 16, "residual": 16, "out": 16, "in_channels": 8}
    multiples["out_channels" if layout == "nhwc" else "pixels"] = 8
    return Variant(
        op="pointwise",
        name=f"{precision}_{layout}_{kind}_{schedule}{m}x{n}x{k}",
        kernel=effnet_pointwise,
        parameters={**pointers(precision, ("x", "weight", "p0", "p1", "p2", "p3", "residual", "out")),
                    "pixels": "i32", "out_channels": "i32", "in_channels": "i32", **PARAMETERS},
        constants={"CHANNELS_LAST": layout == "nhwc", "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": arithmetic,
                   "FOLDED": kind == "folded", "SPLITS": splits},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": kind != "generic", "folded": kind == "folded",
                    "block_m": m, "block_n": n},
        divisible=multiples if kind != "generic" else {},
        num_warps=warps,
        num_stages=stages,
        base_warps=max(4, splits),
        judged=judged,
    )


def resident(precision, m, n, k, warps, stages, programs):
    like = variant(precision, "nhwc", "folded", m, n, k, warps, stages, judged=False)
    constants = {name: like.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PRECISION")}
    return replace(
        like,
        name=f"{precision}_nhwc_resident{programs}_w{warps}s{stages}_{m}x{n}x{k}",
        kernel=effnet_pointwise_resident,
        constants={**constants, "STAGES": stages},
        attributes={**like.attributes, "resident_depth": k, "residents": programs},
    )
