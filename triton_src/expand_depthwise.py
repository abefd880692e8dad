"""The first two steps of an MBConv block in one kernel: out = activation(depthwise(activation(x * expand^T + b)) + b').

For maps of few pixels and many channels, where the expanded map would go through the caches twice. A program owns a band of
an image's rows, the whole image where it fits, and a chunk of the hidden channels. First the tensor cores compute the expanded
values of the band, with the rows that its windows reach into; then it is filtered (_band.py).

Channels are renamed so that all that a thread loads or stores lies side by side in memory; the products do not care. Sums
are float32's: in the products of the tensor cores, whose operands are TF32 where the map is float32, and in the multiply-adds
of the filter. In Gluon, for its control over register layouts and shared memory; the compiler puts the barriers. Wants channels_last,
float32 biases and the depthwise weight stored tap by tap. With float32 input both maps may be narrow ones (_narrow.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ._band import async_load, band_of_program, channel_of_column, filter_band, load_filters
from ._gluon import bits, to_tf32
from ._launch import wait_for_maps_gluon
from ._narrow import map_scale
from ._variant import PRECISION_CODES, Variant, pointers


@gluon.constexpr_function
def pixels_layout(rows, depth, warps_m, warps_n):
    """Of (rows, depth): four threads share a pixel's channels, and a thread has pixels 8 apart, as the left operand does."""
    across = depth // 4
    own = bits(warps_m, 16) if warps_m * 16 <= rows else [0] * len(bits(warps_m))
    return gl.DistributedLinearLayout([[0, b] for b in bits(across)] + [[8, 0]] + [[b, 0] for b in bits(rows // (16 * warps_m), 16 * warps_m)],
                                      [[0, across], [0, 2 * across], [1, 0], [2, 0], [4, 0]], [[0, 0] for _ in bits(warps_n)] + [[b, 0] for b in own], [], [rows, depth])


@gluon.constexpr_function
def weights_layout(chunk, depth, warps_m, warps_n):
    """Of (chunk, depth): the right operand's columns are hidden channels, 2 * t + e of tile i being (t, i, e) of a warp's."""
    across, each = depth // 4, chunk // warps_n
    lanes = [[0, across], [0, 2 * across], [1, 0], [each // 4, 0], [each // 2, 0]]
    return gl.DistributedLinearLayout([[0, b] for b in bits(across)] + [[b, 0] for b in bits(each // 8, 2)], lanes, [[b, 0] for b in bits(warps_n, each)] + [[0, 0] for _ in bits(warps_m)], [], [chunk, depth])


@gluon.jit
def as_depth(tile):
    """(rows, channels), of which each of four threads has a quarter in a row, in the order of a product's depth."""
    ROWS: gl.constexpr = tile.shape[0]
    DEPTH: gl.constexpr = tile.shape[1]
    if tile.dtype == gl.float32:
        return tile.reshape([ROWS, 4, DEPTH // 8, 2]).permute([0, 2, 3, 1]).reshape([ROWS, DEPTH])
    else:
        return tile.reshape([ROWS, 4, DEPTH // 16, 2, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, DEPTH])


@gluon.jit
def by_tile(tile, WARPS_N: gl.constexpr):
    """(chunk, depth) with the hidden channels, as they lie in memory, in the order of the tiles: (warp, t, i, e) to (i, warp, t, e)."""
    CHUNK: gl.constexpr = tile.shape[0]
    return tile.reshape([WARPS_N, 4, CHUNK // WARPS_N // 8, 2, tile.shape[1]]).permute([2, 0, 1, 3, 4]).reshape([CHUNK, tile.shape[1]])


@gluon.jit
def load_pixels(pixels, exists, first, in_channels, PARTS: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """PARTS left operands: the pixels' channels from `first` on."""
    parts = ()
    for part in gl.static_range(PARTS):
        c = first + part * loads.shape[1] + gl.arange(0, loads.shape[1], layout=gl.SliceLayout(0, loads))
        v = gl.load(pixels[:, None] + c[None, :], mask=exists[:, None] & (c < in_channels)[None, :], other=0.0)
        parts = parts + (gl.convert_layout(as_depth(to_tf32(v)), layout),)
    return parts


@gluon.jit
def copy_weights(weight, first_row, first, shared, in_channels, hidden, loads: gl.constexpr):
    """The input channels from `first` on of a chunk of hidden channels, on their way into the parts of shared memory."""
    h = first_row + gl.arange(0, shared[0].shape[0], layout=gl.SliceLayout(1, loads))
    for part in gl.static_range(len(shared)):
        c = first + part * shared[0].shape[1] + gl.arange(0, shared[0].shape[1], layout=gl.SliceLayout(0, loads))
        async_load(shared[part], weight + h[:, None] * in_channels + c[None, :], mask=(h < hidden)[:, None] & (c < in_channels)[None, :])
    async_copy.commit_group()


@gluon.jit
def add_products(value, pixels, shared, WARPS_N: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    for part in gl.static_range(len(shared)):
        w = by_tile(as_depth(to_tf32(shared[part].load(loads))), WARPS_N).permute([1, 0])
        value = mma_v2(pixels[part], gl.convert_layout(w, layout), value, input_precision="tf32")
    return value


@gluon.jit
def effnet_expand_depthwise(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, out,
                            in_channels, hidden, height, width, out_height, out_width, band, left, top, low, high,
                            KERNEL: gl.constexpr, STRIDE: gl.constexpr, PIXELS: gl.constexpr, CHUNK: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr,
                            WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """`band` output rows a program, whose windows have PIXELS pixels at most. PARTS times 64 bytes of input channels at a time."""
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    dtype: gl.constexpr = x.dtype.element_ty
    FP32: gl.constexpr = dtype == gl.float32
    VECTOR: gl.constexpr = 4 if FP32 else 8
    DEPTH: gl.constexpr = 4 * VECTOR
    SCALE: gl.constexpr = map_scale(out.dtype.element_ty, dtype)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if FP32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if FP32 else 2)
    of_pixels: gl.constexpr = pixels_layout(PIXELS, DEPTH, WARPS_M, WARPS_N)
    of_weights: gl.constexpr = weights_layout(CHUNK, DEPTH, WARPS_M, WARPS_N)
    copies: gl.constexpr = gl.BlockedLayout([1, VECTOR], [8, 4], [WARPS, 1], [1, 0])

    first_channel, image, first_row, end_row, begin, end = band_of_program(hidden, height, out_height, band, top, KERNEL, STRIDE, CHUNK)
    pixels = (end - begin) * width

    weights_parts = ()  # one by one: the compiler would put a barrier between writes to parts of one allocation
    for _ in gl.static_range(PARTS):
        weights_parts = weights_parts + (gl.allocate_shared_memory(dtype, [CHUNK, DEPTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),)
    copy_weights(expand_weight, first_channel, 0, weights_parts, in_channels, hidden, copies)
    shared_filters = load_filters(depthwise_weight, depthwise_bias, first_channel, hidden, KERNEL, CHUNK, SCALE, WARPS)
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma))
    h = first_channel + channel_of_column(column, CHUNK, WARPS_N)
    value = gl.load(expand_bias + h, mask=h < hidden, other=0.0)[None, :] + gl.zeros([PIXELS, CHUNK], gl.float32, layout=mma)

    p = gl.arange(0, PIXELS, layout=gl.SliceLayout(1, of_pixels))
    near = x + ((image * height + begin) * width + p) * in_channels
    exists = p < pixels
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    channels = load_pixels(near, exists, 0, in_channels, PARTS, of_pixels, left_operand)
    async_copy.wait_group(0)
    value = add_products(value, channels, weights_parts, WARPS_N, of_weights, right_operand)
    for first in range(PARTS * DEPTH, in_channels, PARTS * DEPTH):
        copy_weights(expand_weight, first_channel, first, weights_parts, in_channels, hidden, copies)
        channels = load_pixels(near, exists, first, in_channels, PARTS, of_pixels, left_operand)
        async_copy.wait_group(0)
        value = add_products(value, channels, weights_parts, WARPS_N, of_weights, right_operand)

    filter_band(value, shared_filters, out, image, first_channel, hidden, begin, end, width, first_row, end_row, out_height, out_width, left, top, low, high,
                KERNEL, STRIDE, STEPS, SCALE, WARPS, WARPS_N)


# Kernel 3 alone: with 25 taps in shared memory it took longer than the two steps (at batch 1, 14x14x480, 5.7 us and 4.3 on an H200).
# By bytes of an element of x and of the maps: pixels of a band, hidden channels of a chunk, parts of 64 bytes of input channels,
# output rows a thread, and warps along pixels and along hidden channels. A 15x15 map is one band of 256 pixels; where that
# makes too few programs for all multiprocessors, smaller bands and chunks do. One for maps of float32: behind ReLU6
# they are narrow.
SHIPPED = {
    (2, 2): [(256, 32, 3, 2, 8, 1), (64, 32, 6, 2, 4, 1), (64, 16, 6, 1, 4, 1)],
    (4, 4): [(64, 32, 4, 2, 4, 1)],
    (4, 2): [(256, 32, 3, 2, 8, 1), (64, 32, 4, 2, 4, 1), (64, 16, 6, 1, 4, 1)],
}
# What tuning tries besides.
TRIED = {
    (2, 2): [(256, 32, 2, 4, 8, 1), (256, 32, 2, 2, 8, 1), (256, 32, 3, 4, 8, 1), (256, 32, 4, 4, 8, 1), (256, 64, 2, 4, 8, 1), (256, 64, 3, 4, 8, 1), (256, 16, 3, 4, 8, 1), (256, 16, 4, 2, 8, 1),
        (128, 32, 3, 2, 4, 1), (128, 32, 4, 4, 8, 1), (128, 16, 3, 2, 8, 1), (128, 16, 3, 1, 4, 1), (128, 16, 4, 1, 8, 1),
        (64, 32, 3, 2, 4, 1), (64, 32, 6, 1, 4, 2), (64, 64, 3, 2, 4, 2), (64, 64, 6, 2, 4, 2), (64, 16, 3, 1, 4, 1), (64, 16, 6, 2, 2, 1)],
    (4, 4): [(256, 16, 2, 4, 8, 1), (256, 16, 3, 4, 8, 1), (256, 16, 5, 4, 8, 1), (256, 32, 2, 4, 8, 1), (256, 32, 3, 4, 8, 1),
        (128, 32, 4, 2, 8, 1), (128, 16, 5, 2, 8, 1), (128, 16, 5, 1, 4, 1),
        (64, 32, 6, 2, 4, 2), (64, 32, 4, 1, 4, 1), (64, 64, 4, 2, 4, 2), (64, 16, 4, 2, 4, 1), (64, 16, 6, 1, 4, 1), (64, 16, 6, 1, 2, 1)],
}  # fmt: skip
TRIED[4, 2] = [*TRIED[4, 4], (128, 32, 4, 4, 8, 1), (128, 16, 3, 2, 8, 1), (64, 32, 6, 2, 4, 1), (64, 64, 6, 2, 4, 2), (64, 16, 6, 2, 4, 1)]
PRECISIONS = {"fp16": (2, 2), "bf16": (2, 2), "tf32": (4, 4), "narrowing": (4, 2)}


def variants():
    for precision, stored in PRECISIONS.items():
        for stride in (1, 2):
            for pixels, chunk, parts, steps, *warps in SHIPPED[stored]:
                # Stride 2 leaves a quarter of the pixels: a row a thread, so that all threads have one.
                yield variant(precision, 3, stride, pixels, chunk, parts, steps if stride == 1 else 1, *warps)


def candidates():
    seen = {v.name for v in variants()}
    for precision, stored in PRECISIONS.items():
        for stride in (1, 2):
            for pixels, chunk, parts, steps, *warps in TRIED[stored]:
                most = 4 if stride == 1 else 2  # more windows leave threads idle
                v = variant(precision, 3, stride, pixels, chunk, parts, min(steps, most), *warps)
                if v.name not in seen:
                    yield v
                seen.add(v.name)


def variant(precision, kernel, stride, pixels, chunk, parts, steps, warps_m, warps_n):
    names = ("x", "expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "out")
    numbers = ("in_channels", "hidden", "height", "width", "out_height", "out_width", "band", "left", "top")
    return Variant(
        op="expand_depthwise",
        name=f"{precision}_k{kernel}_s{stride}_w{warps_m}x{warps_n}_{pixels}x{chunk}x{parts}_rows{steps}",
        kernel=effnet_expand_depthwise,
        parameters={**pointers(precision, names), "expand_bias": "*fp32", "depthwise_bias": "*fp32", **{n: "i32" for n in numbers}, "low": "fp32", "high": "fp32"},
        constants={"KERNEL": kernel, "STRIDE": stride, "PIXELS": pixels, "CHUNK": chunk, "PARTS": parts, "STEPS": steps, "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "kernel": kernel, "stride": stride, "pixels": pixels, "chunk": chunk, "parts": parts, "steps": steps},
        divisible={**dict.fromkeys(names, 16), "in_channels": 8, "hidden": 8},
        num_warps=warps_m * warps_n,
        judged=False,  # its warps are part of the tile
    )
