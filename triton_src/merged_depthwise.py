"""A block's projection, and the first two steps of the block behind it, in one kernel: out = activation(depthwise(activation(x * expand^T * scale + b)) + b').

Between a block's projection and the next block's expansion is no activation, so they are one product (merge_weights.py), of more numbers
and in a kernel less. As in expand_depthwise.py a program owns a band of an image's rows and a chunk of the hidden channels. But the
products are deep: x is the map that the block before has filtered, of all its hidden channels. So the chunk's weights are fetched
before that map is there, and stay for a few images (_deep.py). Then the band is filtered (_band.py).

The weight is narrow_weight.py's, float16 with a scale for each row; both maps are float16, too, in a network of float32 and TF32
narrow ones (_narrow.py). Wants channels_last, float32 biases and the depthwise weight stored tap by tap.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._band import band_of_program, channel_of_column, filter_band, load_filters
from ._deep import copies_layout, fetch_map, fetch_rows, multiply, products_layout
from ._launch import wait_for_maps_gluon
from ._narrow import SCALE, map_scale
from ._variant import PRECISION_CODES, Variant

NARROW_SCALE = gl.constexpr(SCALE)


@gluon.jit
def effnet_merged_depthwise(x, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_bias, out,
                            batch, in_channels, hidden, height, width, out_height, out_width, band, left, top, low, high,
                            KERNEL: gl.constexpr, STRIDE: gl.constexpr, PIXELS: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
                            STEPS: gl.constexpr, IMAGES: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """PARTS times 64 input channels at most. `band` output rows of IMAGES images a program, whose windows have PIXELS pixels at most."""
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    SCALE: gl.constexpr = map_scale(out.dtype.element_ty, depthwise_weight.dtype.element_ty)  # of both maps, and in the weight's
    mma: gl.constexpr = products_layout(WARPS_M, WARPS_N)
    copies: gl.constexpr = copies_layout(WARPS)

    first_channel, group, first_row, end_row, begin, end = band_of_program(hidden, height, out_height, band, top, KERNEL, STRIDE, CHUNK)
    h = first_channel + channel_of_column(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, copies)), CHUNK, WARPS_N)
    weights = fetch_rows(expand_weight, h, h < hidden, in_channels, PARTS, copies)
    shared_filters = load_filters(depthwise_weight, depthwise_bias, first_channel, hidden, KERNEL, CHUNK, SCALE, WARPS)
    h = first_channel + channel_of_column(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma)), CHUNK, WARPS_N)
    scale = gl.load(expand_scale + h, mask=h < hidden, other=0.0) * (NARROW_SCALE / SCALE)
    bias = gl.load(expand_bias + h, mask=h < hidden, other=0.0)

    image = group * IMAGES
    size = height * width * in_channels
    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, copies))
    pixels = x + image * size + (begin * width + p) * in_channels
    exists = p < (end - begin) * width
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    slots = fetch_map(pixels, exists, in_channels, PARTS, STAGES, copies)
    if IMAGES == 1:
        value = multiply(slots, weights, pixels, exists, None, None, in_channels, mma, copies)
        filter_band(value * scale[None, :] + bias[None, :], shared_filters, out, image, first_channel, hidden, begin, end, width, first_row, end_row, out_height, out_width,
                    left, top, low, high, KERNEL, STRIDE, STEPS, SCALE, WARPS, WARPS_N)
    else:
        last = gl.minimum(image + IMAGES, batch) - 1
        for i in range(image, last + 1):
            value = multiply(slots, weights, pixels, exists, pixels + size, i < last, in_channels, mma, copies)
            filter_band(value * scale[None, :] + bias[None, :], shared_filters, out, i, first_channel, hidden, begin, end, width, first_row, end_row, out_height, out_width,
                        left, top, low, high, KERNEL, STRIDE, STEPS, SCALE, WARPS, WARPS_N)
            pixels += size


# Depths over 64, pixels, hidden channels, stages, output rows a thread, warps along pixels and along hidden channels, and images.
TRIED = [
    *((parts, 64, chunk, stages, steps, 4, 1) for parts in (4, 8, 11) for chunk in (16, 32) for stages in (3, 4, 6) for steps in (1, 2)),
    *((parts, 128, chunk, stages, 2, warps, 1) for parts in (4, 8, 11) for chunk in (16, 32) for stages in (3, 4) for warps in (4, 8)),
    *((parts, 64, 64, stages, 2, 4, 2) for parts in (4, 8, 11) for stages in (3, 4)),
    *((parts, 256, chunk, stages, 2, 8, 1) for parts in (4, 8) for chunk in (16, 32, 64) for stages in (2, 3)),
    *((parts, 64, 32, stages, 1, 4, 2) for parts in (8, 11) for stages in (4, 6)),
    *((parts, 128, 64, 3, 2, 4, 2) for parts in (4, 8, 11)),
    # With the memory of 9.0: all parts under way.
    *((parts, 64, chunk, parts, steps, 4, 1) for parts in (8, 11) for chunk in (16, 32) for steps in (1, 2)),
    *((parts, 128, chunk, parts, 2, 8, 1) for parts in (4, 8) for chunk in (16, 32)),
    # Fewer programs read the weight.
    *((8, 64, chunk, 4, 2, 4, chunk // 32, images) for chunk in (32, 64) for images in (2, 3, 5)),
    *((12, 64, chunk, stages, 2, 4, chunk // 32, images) for chunk in (32, 64) for stages in (3, 4, 6) for images in (2, 3, 5)),
    *((parts, 128, chunk, 4, 2, 4, 1, images) for parts in (4, 8) for chunk in (32, 64) for images in (2, 3)),
    *((parts, 256, chunk, 2, 2, 8, 1, images) for parts in (4, 8) for chunk in (32, 64) for images in (2, 3)),
]  # fmt: skip


def variants():
    """None: two products become one where tuning says so."""
    return []


def candidates():
    for precision in ("fp16", "tf32"):
        for stride in (1, 2):
            for parts, *tile in dict.fromkeys(TRIED):
                yield variant(precision, stride, 64 * parts, *tile)


def variant(precision, stride, depth, pixels, chunk, stages, steps, warps_m, warps_n, images=1):
    names = ("x", "expand_weight", "expand_scale", "expand_bias", "depthwise_weight", "depthwise_bias", "out")
    numbers = ("batch", "in_channels", "hidden", "height", "width", "out_height", "out_width", "band", "left", "top")
    types = dict.fromkeys(names, "*fp16") | dict.fromkeys(("expand_scale", "expand_bias", "depthwise_bias"), "*fp32")
    return Variant(
        op="merged_depthwise",
        name=f"{precision}_k3_s{stride}_deep{depth}_w{warps_m}x{warps_n}s{stages}_{pixels}x{chunk}_rows{steps}{f'_images{images}' if images > 1 else ''}",
        kernel=effnet_merged_depthwise,
        parameters={**types, "depthwise_weight": "*fp16" if precision == "fp16" else "*fp32", **dict.fromkeys(numbers, "i32"), "low": "fp32", "high": "fp32"},
        constants={"KERNEL": 3, "STRIDE": stride, "PIXELS": pixels, "CHUNK": chunk, "PARTS": depth // 64, "STAGES": stages, "STEPS": steps, "IMAGES": images, "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "stride": stride, "pixels": pixels, "chunk": chunk, "depth": depth, "images": images},
        divisible={**dict.fromkeys(names, 16), "in_channels": 8, "hidden": 8},
        num_warps=warps_m * warps_n,
        judged=False,  # its warps are part of the tile
    )
