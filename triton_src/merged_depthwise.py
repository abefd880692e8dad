"""A block's projection, and the first two steps of the block behind it, in one kernel: out = activation(depthwise(activation(x * expand^T * scale + b)) + b').

Between a block's projection and the next block's expansion is no activation, so they are one product (merge_weights.py), of more numbers
and in a kernel less. As in expand_depthwise.py a program owns a band of an image's rows and a chunk of the hidden channels. But the
products are deep: x is the map that the block before has filtered, of all its hidden channels. So the chunk's weights are fetched
before that map is there, all of them, and its pixels then come in parts of 64 channels through shared memory, STAGES - 1 of them
under way. Then the band is filtered (_band.py).

The weight is narrow_weight.py's, float16 with a scale for each row; both maps are float16, too, in a network of float32 and TF32
narrow ones (_narrow.py). Wants channels_last, float32 biases and the depthwise weight stored tap by tap.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ._band import async_load, band_of_program, channel_of_column, filter_band, load_filters
from ._launch import wait_for_maps_gluon
from ._narrow import SCALE, map_scale
from ._variant import PRECISION_CODES, Variant

NARROW_SCALE = gl.constexpr(SCALE)


@gluon.jit
def copy_part(rows, exists, first, in_channels, shared, loads: gl.constexpr):
    """The channels from `first` on of rows (pixels, or a weight's channels), on their way into shared memory, as one group."""
    c = first + gl.arange(0, shared.shape[1], layout=gl.SliceLayout(0, loads))
    async_load(shared, rows[:, None] + c[None, :], mask=exists[:, None] & (c < in_channels)[None, :])
    async_copy.commit_group()


@gluon.jit
def effnet_merged_depthwise(x, expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_bias, out,
                            in_channels, hidden, height, width, out_height, out_width, band, left, top, low, high,
                            KERNEL: gl.constexpr, STRIDE: gl.constexpr, PIXELS: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
                            STEPS: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """PARTS times 64 input channels at most. `band` output rows a program, whose windows have PIXELS pixels at most."""
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    DEPTH: gl.constexpr = 64
    SCALE: gl.constexpr = map_scale(out.dtype.element_ty, depthwise_weight.dtype.element_ty)  # of both maps, and in the weight's
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])

    first_channel, image, first_row, end_row, begin, end = band_of_program(hidden, height, out_height, band, top, KERNEL, STRIDE, CHUNK)

    weights, slots = (), ()
    for _ in gl.static_range(PARTS):
        weights = weights + (gl.allocate_shared_memory(gl.float16, [CHUNK, DEPTH], swizzled),)
    for _ in gl.static_range(min(STAGES, PARTS)):
        slots = slots + (gl.allocate_shared_memory(gl.float16, [PIXELS, DEPTH], swizzled),)
    h = first_channel + channel_of_column(gl.arange(0, CHUNK, layout=gl.SliceLayout(1, copies)), CHUNK, WARPS_N)
    for part in gl.static_range(PARTS):
        copy_part(expand_weight + h * in_channels, h < hidden, part * DEPTH, in_channels, weights[part], copies)
    shared_filters = load_filters(depthwise_weight, depthwise_bias, first_channel, hidden, KERNEL, CHUNK, SCALE, WARPS)
    h = first_channel + channel_of_column(gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma)), CHUNK, WARPS_N)
    scale = gl.load(expand_scale + h, mask=h < hidden, other=0.0) * (NARROW_SCALE / SCALE)
    bias = gl.load(expand_bias + h, mask=h < hidden, other=0.0)

    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, copies))
    pixels = x + ((image * height + begin) * width + p) * in_channels
    exists = p < (end - begin) * width
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    for part in gl.static_range(min(STAGES - 1, PARTS)):
        copy_part(pixels, exists, part * DEPTH, in_channels, slots[part], copies)
    value = gl.zeros([PIXELS, CHUNK], gl.float32, layout=mma)
    for part in gl.static_range(PARTS):
        async_copy.wait_group(min(STAGES - 2, PARTS - 1 - part))
        if part + STAGES - 1 < PARTS:
            copy_part(pixels, exists, (part + STAGES - 1) * DEPTH, in_channels, slots[(part + STAGES - 1) % STAGES], copies)
        value = mma_v2(slots[part % STAGES].load(left_operand), weights[part].permute((1, 0)).load(right_operand), value)
    value = value * scale[None, :] + bias[None, :]
    filter_band(value, shared_filters, out, image, first_channel, hidden, begin, end, width, first_row, end_row, out_height, out_width, left, top, low, high,
                KERNEL, STRIDE, STEPS, SCALE, WARPS, WARPS_N)


# Depths over 64, pixels, hidden channels, stages, output rows a thread and warps along pixels and along hidden channels.
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
]  # fmt: skip


def variants():
    """None: two products become one where tuning says so."""
    return []


def candidates():
    for precision in ("fp16", "tf32"):
        for stride in (1, 2):
            for parts, pixels, chunk, stages, steps, *warps in dict.fromkeys(TRIED):
                yield variant(precision, stride, 64 * parts, pixels, chunk, stages, steps, *warps)


def variant(precision, stride, depth, pixels, chunk, stages, steps, warps_m, warps_n):
    names = ("x", "expand_weight", "expand_scale", "expand_bias", "depthwise_weight", "depthwise_bias", "out")
    numbers = ("in_channels", "hidden", "height", "width", "out_height", "out_width", "band", "left", "top")
    types = dict.fromkeys(names, "*fp16") | dict.fromkeys(("expand_scale", "expand_bias", "depthwise_bias"), "*fp32")
    return Variant(
        op="merged_depthwise",
        name=f"{precision}_k3_s{stride}_deep{depth}_w{warps_m}x{warps_n}s{stages}_{pixels}x{chunk}_rows{steps}",
        kernel=effnet_merged_depthwise,
        parameters={**types, "depthwise_weight": "*fp16" if precision == "fp16" else "*fp32", **dict.fromkeys(numbers, "i32"), "low": "fp32", "high": "fp32"},
        constants={"KERNEL": 3, "STRIDE": stride, "PIXELS": pixels, "CHUNK": chunk, "PARTS": depth // 64, "STAGES": stages, "STEPS": steps, "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "stride": stride, "pixels": pixels, "chunk": chunk, "depth": depth},
        divisible={**dict.fromkeys(names, 16), "in_channels": 8, "hidden": 8},
        num_warps=warps_m * warps_n,
        judged=False,  # its warps are part of the tile
    )
