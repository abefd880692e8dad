"""A block's projection and the network's head in one kernel: out[n, o] = mean over p of activation(sum_c x[n, p, c] weight[o, c] * scale[o] + bias[o]).

Between a block's projection and the 1x1 convolution behind it is no activation, so they are one product (merge_weights.py), of more
numbers and in a kernel less. A program owns a chunk of output channels, whose weights it has before the map is there, and all pixels of a
small image, or of a few, one after the other (_deep.py): x is the map that the block has filtered, of all its hidden channels.

The weight is narrow_weight.py's, float16 with a scale for each row; x is float16, too, in a network of float32 and TF32 a narrow map
(_narrow.py). channels_last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._deep import copies_layout, fetch_map, fetch_rows, multiply, products_layout
from ._gluon import clamp
from ._launch import wait_for_maps_gluon
from ._narrow import SCALE
from ._variant import PRECISION_CODES, Variant

NARROW_SCALE = gl.constexpr(SCALE)


@gluon.jit
def store_mean(value, scale, bias, out, image, pixels, o, out_channels, low, high):
    p = gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, value.type.layout))
    y = clamp(value * scale[None, :] + bias[None, :], low, high)
    mean = gl.sum(gl.where((p < pixels)[:, None], y, 0.0), axis=0) / pixels
    gl.store(out + image * out_channels + o, mean.to(out.dtype.element_ty), mask=o < out_channels)


@gluon.jit
def effnet_merged_pool(x, weight, scale, bias, out, batch, pixels, out_channels, in_channels, low, high,
                       PIXELS: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, IMAGES: gl.constexpr,
                       WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """PARTS times 64 input channels and PIXELS pixels an image at most."""
    mma: gl.constexpr = products_layout(WARPS_M, WARPS_N)
    copies: gl.constexpr = copies_layout(WARPS_M * WARPS_N)
    chunks = gl.cdiv(out_channels, CHUNK)
    first_channel = gl.program_id(0) % chunks * CHUNK
    o = first_channel + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, copies))
    weights = fetch_rows(weight, o, o < out_channels, in_channels, PARTS, copies)
    o = first_channel + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma))
    by = gl.load(scale + o, mask=o < out_channels, other=0.0)
    if out.dtype.element_ty == gl.float16:  # the scale is one for a narrow map, and here is none
        by *= NARROW_SCALE
    shift = gl.load(bias + o, mask=o < out_channels, other=0.0)

    image = gl.program_id(0) // chunks * IMAGES
    size = pixels * in_channels
    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, copies))
    rows = x + image * size + p * in_channels
    exists = p < pixels
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    slots = fetch_map(rows, exists, in_channels, PARTS, STAGES, copies)
    if IMAGES == 1:
        value = multiply(slots, weights, rows, exists, None, None, in_channels, mma, copies)
        store_mean(value, by, shift, out, image, pixels, o, out_channels, low, high)
    else:
        last = gl.minimum(image + IMAGES, batch) - 1
        for i in range(image, last + 1):
            value = multiply(slots, weights, rows, exists, rows + size, i < last, in_channels, mma, copies)
            store_mean(value, by, shift, out, i, pixels, o, out_channels, low, high)
            rows += size


# Depths over 64, output channels, stages, warps along pixels and along channels, and images, of tiles of 64 pixels.
TRIED = [
    *((18, chunk, stages, *warps, 1) for chunk, warps in ((16, (4, 1)), (32, (4, 1)), (32, (4, 2)), (64, (4, 2))) for stages in (3, 4, 6)),
    *((18, chunk, stages, *warps, 1) for chunk, warps in ((16, (4, 1)), (16, (4, 2)), (32, (4, 2))) for stages in (9, 18)),
    *((18, chunk, stages, *warps, images) for chunk, warps in ((32, (4, 1)), (32, (4, 2)), (64, (4, 2))) for stages in (3, 6) for images in (2, 3, 5)),
]  # fmt: skip


def variants():
    """None: two products become one where tuning says so."""
    return []


def candidates():
    for precision in ("fp16", "tf32"):
        for parts, *tile in TRIED:
            yield variant(precision, 64 * parts, *tile)


def variant(precision, depth, chunk, stages, warps_m, warps_n, images):
    types = {"x": "*fp16", "weight": "*fp16", "scale": "*fp32", "bias": "*fp32", "out": "*fp16" if precision == "fp16" else "*fp32"}
    return Variant(
        op="merged_pool",
        name=f"{precision}_deep{depth}_w{warps_m}x{warps_n}s{stages}_64x{chunk}{f'_images{images}' if images > 1 else ''}",
        kernel=effnet_merged_pool,
        parameters={**types, "batch": "i32", "pixels": "i32", "out_channels": "i32", "in_channels": "i32", "low": "fp32", "high": "fp32"},
        constants={"PIXELS": 64, "CHUNK": chunk, "PARTS": depth // 64, "STAGES": stages, "IMAGES": images, "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "pixels": 64, "chunk": chunk, "depth": depth, "images": images},
        divisible={"x": 16, "weight": 16, "in_channels": 8},
        num_warps=warps_m * warps_n,
        judged=False,  # its warps are part of the tile
    )
