"""Whole MBConv blocks: project(depthwise(expand(x))) + residual in one kernel; the hidden map never leaves the registers.

effnet_mbconv: a program owns a tile of output pixels and walks over the hidden channels, a chunk at a time. For each of the
nine taps it computes the hidden values under that tap anew (the tensor cores have time for it) and adds them, weighted, to
the depthwise sum; the finished chunk is at once one step of the projection. The depthwise sum is a matrix product too: the
hidden tile times a diagonal matrix, because its operand layout is the layout in which the expansion leaves its result.
Out of the image a hidden value is zero whatever the bias: its upper clamp is lowered to 0 there, at no cost.

effnet_mbconv_wide: the same with channels renamed, so that a thread loads 8 or 16 bytes at a time, and for float32, too.

effnet_depthwise_project: blocks without expansion. A program owns a column of pixels and walks down the rows.

In Gluon, for its control over register layouts. All want channels_last, ReLU6 (or any clamp to [0, high]), float32 biases
and the depthwise weight stored tap by tap.
"""

from dataclasses import replace
from functools import partial

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._epilogue import HAS_RESIDUAL
from ._gluon import activate, bits, clamp, on_diagonal, to_tf32
from ._launch import wait_for_maps_gluon
from ._narrow import map_scale
from ._variant import PRECISION_CODES, Variant

# One 16x8 tile of pixels by channels, in the layout of the accumulators: $4..$7 hidden values before the activation,
# $8..$11 the sum, $12 the tap's weights as a diagonal matrix, $14 and $15 the upper clamps of its two pixels a thread.
_TAP = """{{ .reg .b32 p0, p1;
cvt.rn.relu.{t}x2.f32 p0, $5, $4;
cvt.rn.relu.{t}x2.f32 p1, $7, $6;
min.NaN.{t}x2 p0, p0, $14;
min.NaN.{t}x2 p1, p1, $15;
mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{p0, p1}}, {{$12}}, {{$8, $9, $10, $11}};
}}"""
TAP_FP16, TAP_BF16 = gl.constexpr(_TAP.format(t="f16")), gl.constexpr(_TAP.format(t="bf16"))

# The sum goes from product to product, one waiting for the other: two taps ($4..$7, $8..$11) are the halves of one product's depth.
_TWO_TAPS = """{{ .reg .b32 p0, p1, q0, q1;
cvt.rn.relu.{t}x2.f32 p0, $5, $4;
cvt.rn.relu.{t}x2.f32 p1, $7, $6;
cvt.rn.relu.{t}x2.f32 q0, $9, $8;
cvt.rn.relu.{t}x2.f32 q1, $11, $10;
min.NaN.{t}x2 p0, p0, $20;
min.NaN.{t}x2 p1, p1, $21;
min.NaN.{t}x2 q0, q0, $22;
min.NaN.{t}x2 q1, q1, $23;
mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{p0, p1, q0, q1}}, {{$16, $18}}, {{$12, $13, $14, $15}};
}}"""
TWO_TAPS_FP16, TWO_TAPS_BF16 = gl.constexpr(_TWO_TAPS.format(t="f16")), gl.constexpr(_TWO_TAPS.format(t="bf16"))

# The same for values that are there already ($12, $13), and three sums: the tap's three rows. A product with the zeros of
# the diagonal matrix would turn infinity into NaN for its neighbours, so it is clamped ($32 and $34, a half each).
_THREE_TAPS = """{{ .reg .b32 p0, p1;
min.NaN.{t}x2 p0, $12, $32;
min.NaN.{t}x2 p1, $13, $33;
max.NaN.{t}x2 p0, p0, $34;
max.NaN.{t}x2 p1, p1, $35;
mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{p0, p1}}, {{$26}}, {{$14, $15, $16, $17}};
mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$4, $5, $6, $7}}, {{p0, p1}}, {{$28}}, {{$18, $19, $20, $21}};
mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$8, $9, $10, $11}}, {{p0, p1}}, {{$30}}, {{$22, $23, $24, $25}};
}}"""
THREE_TAPS_FP16, THREE_TAPS_BF16 = gl.constexpr(_THREE_TAPS.format(t="f16")), gl.constexpr(_THREE_TAPS.format(t="bf16"))


@gluon.jit
def add_tap(hidden, total, weight, high):
    """total + clamp(hidden, 0, high) * weight, channel by channel; `weight` is masked to a diagonal."""
    return gl.inline_asm_elementwise(
        TAP_FP16 if weight.dtype == gl.float16 else TAP_BF16, "=f,=f,=f,=f,f,f,f,f,f,f,f,f,r,r,r,r",
        [hidden, total, weight, high], dtype=gl.float32, is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def add_two_taps(hidden_a, hidden_b, total, weight_a, weight_b, high_a, high_b):
    return gl.inline_asm_elementwise(
        TWO_TAPS_FP16 if weight_a.dtype == gl.float16 else TWO_TAPS_BF16, "=f,=f,=f,=f,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r",
        [hidden_a, hidden_b, total, weight_a, weight_b, high_a, high_b], dtype=gl.float32, is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def add_three_taps(value, a, b, c, weight_a, weight_b, weight_c, largest, lowest):
    return gl.inline_asm_elementwise(
        THREE_TAPS_FP16 if value.dtype == gl.float16 else THREE_TAPS_BF16,
        "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,r,r,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r,r,r",
        [value, a, b, c, weight_a, weight_b, weight_c, largest, lowest],
        dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def diagonal_mask(rows, columns):
    """All bits set where a thread's first row of a tile meets its own column: the second operand of an m16n8k8 product."""
    return gl.where((rows % 8)[:, None] == (columns % 8)[None, :], -1, 0).to(gl.int16)


@gluon.jit
def load_pixels(pixels, exists, FIRST: gl.constexpr, DEPTH: gl.constexpr, IN_CHANNELS: gl.constexpr, inside, PADDED: gl.constexpr, layout: gl.constexpr):
    """Channels FIRST to FIRST + DEPTH of the pixels, as an operand. PADDED: they are zero out of the image, and two channels
    beyond the last are one inside it: the bias comes in through them."""
    k = FIRST + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, layout))
    if PADDED:
        x = gl.load(pixels[:, None] + k[None, :], mask=inside[:, None] & (k < IN_CHANNELS)[None, :], other=0.0)
        if FIRST + DEPTH > IN_CHANNELS:
            x = gl.where(((k == IN_CHANNELS) | (k == IN_CHANNELS + 1))[None, :], gl.where(inside, 1.0, 0.0).to(x.dtype)[:, None], x)
        return x
    elif FIRST + DEPTH <= IN_CHANNELS:
        return gl.load(pixels[:, None] + k[None, :])
    else:
        return gl.load(pixels[:, None] + k[None, :], mask=exists[:, None] & (k < IN_CHANNELS)[None, :], other=0.0)


@gluon.jit
def load_expansion(weight, bias, h, FIRST: gl.constexpr, DEPTH: gl.constexpr, IN_CHANNELS: gl.constexpr, PADDED: gl.constexpr, layout: gl.constexpr):
    """The other operand: (DEPTH, chunk) of the expansion's weight; PADDED: the bias in two parts below it."""
    k = FIRST + gl.arange(0, DEPTH, layout=gl.SliceLayout(1, layout))
    w = gl.load(weight + h[None, :] * IN_CHANNELS + k[:, None], mask=(k < IN_CHANNELS)[:, None] & (h >= 0)[None, :], other=0.0)
    if PADDED and FIRST + DEPTH > IN_CHANNELS:
        whole = gl.load(bias + h)
        coarse = whole.to(w.dtype)
        fine = (whole - coarse.to(gl.float32)).to(w.dtype)
        w = gl.where((k == IN_CHANNELS)[:, None], coarse[None, :], gl.where((k == IN_CHANNELS + 1)[:, None], fine[None, :], w))
    return w


@gluon.jit
def expanded(taps, t, weights, bias):
    """The hidden values under tap t; `taps` has its operands, as many as there are weights."""
    value = bias
    for part in gl.static_range(len(weights)):
        value = mma_v2(taps[t * len(weights) + part], weights[part], value, input_precision="tf32")
    return value


@gluon.jit
def project(filtered, weight, out, h, first, HIDDEN: gl.constexpr, out_channels, FIRST: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """out + filtered @ weight^T for output channels FIRST to FIRST + COLUMNS, and hidden channels from `first` on."""
    o = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    w = gl.load(weight + o[None, :] * HIDDEN + h[:, None], mask=(o < out_channels)[None, :] & (h >= first)[:, None], other=0.0)
    return mma_v2(filtered, w, out)


@gluon.jit
def load_affine(scale, bias, FIRST: gl.constexpr, COLUMNS: gl.constexpr, out_channels, layout: gl.constexpr):
    """(the scales of the projection's rows, if they have some; bias) for output channels from FIRST on."""
    o = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    scales = ()
    if scale is not None:
        scales = (gl.load(scale + o, mask=o < out_channels, other=0.0)[None, :],)
    return scales, gl.load(bias + o, mask=o < out_channels, other=0.0)[None, :]


@gluon.jit
def store_tile(tile, affine, residual, out, first, pixels, out_channels, flags, FIRST: gl.constexpr, layout: gl.constexpr):
    """Writes a tile of `pixels` in a row in memory, with its output channels from FIRST on; `affine` has the layout of the stores."""
    scales, bias = affine
    o = FIRST + gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, layout))
    p = first + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    where = p[:, None] * out_channels + o[None, :]
    mask = (p < pixels)[:, None] & (o < out_channels)[None, :]
    y = gl.convert_layout(tile, layout)
    if len(scales) > 0:
        y *= scales[0]
    y += bias
    if (flags & HAS_RESIDUAL) != 0:
        y += gl.load(residual + where, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + where, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def place_windows(first, pixels, height, width, out_height, out_width, left, top, STRIDE: gl.constexpr, ROWS: gl.constexpr):
    """Where the nine pixels under each of ROWS output pixels are, in shared memory: so they are computed before the kernel waits for
    its map. Out of the image any pixel of the window serves: its hidden values are clamped to 0."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    p = gl.minimum(first + gl.arange(0, ROWS, layout=layout), pixels - 1)
    image = p // (out_height * out_width)
    y = STRIDE * (p // out_width % out_height) - top
    z = STRIDE * (p % out_width) - left
    places = ()
    for t in gl.static_range(9):
        iy = gl.minimum(gl.maximum(y + t // 3, 0), height - 1)
        iz = gl.minimum(gl.maximum(z + t % 3, 0), width - 1)
        places = places + (gl.allocate_shared_memory(gl.int32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]), (image * height + iy) * width + iz),)
    return places


@gluon.jit
def effnet_mbconv(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                  batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                  STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, DEPTH: gl.constexpr, DEPTH2: gl.constexpr,
                  COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr, CHUNK: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    ROWS: gl.constexpr = 16 * WARPS_M
    PADDED: gl.constexpr = DEPTH + DEPTH2 >= IN_CHANNELS + 2
    dtype: gl.constexpr = x.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)

    pixels = batch * out_height * out_width
    first = gl.program_id(0) * ROWS
    exists = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left_operand)) < pixels
    p = gl.minimum(first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left_operand)), pixels - 1)
    y = STRIDE * (p // out_width % out_height) - top
    z = STRIDE * (p % out_width) - left
    # The same once more, as the accumulators are laid out.
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    mma_y = STRIDE * ((first + rows) // out_width % out_height) - top
    mma_z = STRIDE * ((first + rows) % out_width) - left

    places = place_windows(first, pixels, height, width, out_height, out_width, left, top, STRIDE, ROWS)
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    # All that the tile reads, in registers: nine operands.
    taps = ()
    highest = gl.full([1, 1], high, gl.float32, layout=mma).to(dtype)
    highs = ()
    for t in gl.static_range(9):
        iy = y + t // 3
        iz = z + t % 3
        inside = exists & (iy >= 0) & (iy < height) & (iz >= 0) & (iz < width)
        near = x + places[t].load(gl.SliceLayout(1, left_operand)) * IN_CHANNELS
        taps = taps + (load_pixels(near, exists, 0, DEPTH, IN_CHANNELS, inside, PADDED, left_operand),)
        if DEPTH2 > 0:
            taps = taps + (load_pixels(near, exists, DEPTH, DEPTH2, IN_CHANNELS, inside, PADDED, left_operand),)
        mma_inside = (mma_y + t // 3 >= 0) & (mma_y + t // 3 < height) & (mma_z + t % 3 >= 0) & (mma_z + t % 3 < width)
        if PADDED:
            highs = highs + (highest,)
        else:
            highs = highs + (gl.where(mma_inside, high, 0.0).to(dtype)[:, None],)

    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma))
    diagonal = diagonal_mask(rows, columns)
    zero = gl.zeros([ROWS, CHUNK], gl.float32, layout=mma)
    result = gl.zeros([ROWS, COLUMNS], gl.float32, layout=mma)
    if COLUMNS2 > 0:
        result2 = gl.zeros([ROWS, COLUMNS2], gl.float32, layout=mma)
    for begin in range(0, HIDDEN, CHUNK):
        # The last chunk overlaps the one before where chunks do not divide the channels. It is projected from `begin` on.
        start = begin
        if HIDDEN % CHUNK != 0:
            start = gl.multiple_of(gl.minimum(begin, HIDDEN - CHUNK), 16)
        h = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, right_operand))
        w = load_expansion(expand_weight, expand_bias, h, 0, DEPTH, IN_CHANNELS, PADDED, right_operand)
        if DEPTH2 > 0:
            w2 = load_expansion(expand_weight, expand_bias, h, DEPTH, DEPTH2, IN_CHANNELS, PADDED, right_operand)
        channel = start + columns
        if PADDED:
            bias = zero
        else:
            bias = gl.load(expand_bias + channel)[None, :] + zero
        total = gl.load(depthwise_bias + channel)[None, :] + zero
        weights = (w,)
        if DEPTH2 > 0:
            weights = (w, w2)
        for t in gl.static_range(0, 8, 2):
            tap = on_diagonal(gl.load(depthwise_weight + t * HIDDEN + channel)[None, :], diagonal)
            next_tap = on_diagonal(gl.load(depthwise_weight + (t + 1) * HIDDEN + channel)[None, :], diagonal)
            total = add_two_taps(expanded(taps, t, weights, bias), expanded(taps, t + 1, weights, bias), total, tap, next_tap, highs[t], highs[t + 1])
        tap = on_diagonal(gl.load(depthwise_weight + 8 * HIDDEN + channel)[None, :], diagonal)
        total = add_tap(expanded(taps, 8, weights, bias), total, tap, highs[8])
        filtered = gl.convert_layout(activate(total, highest), left_operand)
        k = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, right_operand))
        result = project(filtered, project_weight, result, k, begin, HIDDEN, out_channels, 0, COLUMNS, right_operand)
        if COLUMNS2 > 0:
            result2 = project(filtered, project_weight, result2, k, begin, HIDDEN, out_channels, COLUMNS, COLUMNS2, right_operand)
    eights: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS_M * WARPS_N, 1], [1, 0])
    store_tile(result, load_affine(None, project_bias, 0, COLUMNS, out_channels, eights), residual, out, first, pixels, out_channels, flags, 0, eights)
    if COLUMNS2 > 0:
        eights2: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS2, COLUMNS2 // 8], [WARPS_M * WARPS_N, 1], [1, 0])
        store_tile(result2, load_affine(None, project_bias, COLUMNS, COLUMNS2, out_channels, eights2), residual, out, first, pixels, out_channels, flags, COLUMNS, eights2)


@gluon.jit
def effnet_depthwise_project(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                             batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                             CHANNELS: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """Stride 1. STEPS output rows a program; CHANNELS is 32. In float32 the depthwise sum is made of multiply-adds."""
    ROWS: gl.constexpr = 16 * WARPS
    dtype: gl.constexpr = x.dtype.element_ty
    FP32: gl.constexpr = dtype == gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if FP32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if FP32 else 2)
    # A thread loads eight neighbouring channels of a pixel, 16 bytes, and calls them columns 2t, 2t + 1 of four tiles: the
    # order of channels is free as long as the weights follow it.
    warp_bases: gl.constexpr = [] if WARPS == 1 else [[16, 0]] if WARPS == 2 else [[16, 0], [32, 0]]
    eights_of_pixels: gl.constexpr = gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], warp_bases, [], [ROWS, CHANNELS])
    fours_of_pixels: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    loads: gl.constexpr = fours_of_pixels if FP32 else eights_of_pixels
    VECTOR: gl.constexpr = 4 if FP32 else 8
    stores: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 * VECTOR // COLUMNS, COLUMNS // VECTOR], [WARPS, 1], [1, 0])

    # A column is an image's pixel column; columns of all images lie side by side.
    count = batch * out_width
    segments = gl.cdiv(out_height, STEPS)
    first = gl.program_id(0) // segments * ROWS
    first_y = gl.program_id(0) % segments * STEPS
    p = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, loads))
    exists = p < count
    image = p // out_width
    z = p % out_width - left
    c = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, loads))

    k = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, right_operand))
    o = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, right_operand))
    weights = ()
    if FP32:
        for t in gl.static_range(9):
            weights = weights + (gl.load(depthwise_weight + t * CHANNELS + c)[None, :],)
        bias = gl.load(depthwise_bias + c)[None, :] + gl.zeros([ROWS, CHANNELS], gl.float32, layout=loads)
        project_channel = k
    else:
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
        columns = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, mma))
        diagonal = diagonal_mask(rows, columns)
        channel = columns % 8 // 2 * 8 + columns // 8 * 2 + columns % 2
        for t in gl.static_range(9):
            weights = weights + (on_diagonal(gl.load(depthwise_weight + t * CHANNELS + channel)[None, :], diagonal),)
        bias = gl.load(depthwise_bias + channel)[None, :] + gl.zeros([ROWS, CHANNELS], gl.float32, layout=mma)
        project_channel = k % 8 // 2 * 8 + k // 8 * 2 + k % 2
        highest = gl.full([1, 1], high, gl.float32, layout=mma).to(dtype)
        largest = gl.full([1, 1], (65504.0 if dtype == gl.float16 else 3.3895e38), gl.float32, layout=mma).to(dtype)
    project_weights = gl.load(project_weight + o[None, :] * CHANNELS + project_channel[:, None], mask=(o < out_channels)[None, :] & (k >= 0)[:, None], other=0.0)
    if FP32:
        project_weights = to_tf32(project_weights)

    store_p = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, stores))
    store_o = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, stores))
    store_bias = gl.load(project_bias + store_o, mask=store_o < out_channels, other=0.0)[None, :]
    store_pixel = store_p // out_width * out_height * out_width + store_p % out_width
    store_mask = (store_p < count)[:, None] & (store_o < out_channels)[None, :]

    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    a = bias  # the sums of the output rows that this input row is the last, middle and first one of
    b = bias
    for step in range(STEPS + 2):
        iy = first_y - top + step
        d = bias
        for kx in gl.static_range(3):
            inside = exists & (iy >= 0) & (iy < height) & (z + kx >= 0) & (z + kx < width)
            v = gl.load(x + ((image * height + iy) * width + z + kx)[:, None] * CHANNELS + c[None, :], mask=inside[:, None] & (c >= 0)[None, :], other=0.0)
            if FP32:
                a += v * weights[6 + kx]
                b += v * weights[3 + kx]
                d += v * weights[kx]
            else:
                v = gl.convert_layout(v.reshape([ROWS, 4, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, CHANNELS]), mma)
                a, b, d = add_three_taps(v, a, b, d, weights[6 + kx], weights[3 + kx], weights[kx], largest, -largest)
        row = first_y + step - 2
        if (step >= 2) & (row < out_height):
            if FP32:
                filtered = to_tf32(clamp(a, 0.0, high))
            else:
                filtered = activate(a, highest)
            result = mma_v2(gl.convert_layout(filtered, left_operand), project_weights, gl.zeros([ROWS, COLUMNS], gl.float32, layout=mma), input_precision="tf32")
            y = gl.convert_layout(result, stores) + store_bias
            where = (store_pixel + row * out_width)[:, None] * out_channels + store_o[None, :]
            if (flags & HAS_RESIDUAL) != 0:
                y += gl.load(residual + where, mask=store_mask, other=0.0).to(gl.float32)
            gl.store(out + where, y.to(dtype), mask=store_mask)
        a = b
        b = d


# ---- wide loads, and float32 ----

# The same block, with all that a thread needs lying side by side in memory: the products do not care in which order channels
# come, so channels are renamed. Of CHUNK hidden channels that a warp computes, thread t of four has CHUNK / 4 in a row, two
# in each tile of 8 columns. Of 16 input channels it has four in a row.
# In float32 the products are TF32's and the depthwise sum is made of multiply-adds, in float32, as PyTorch makes it.
ADD_TAP_FP32 = gl.constexpr("{ .reg .f32 v; max.NaN.f32 v, $1, 0f00000000; min.NaN.f32 v, v, $4; fma.rn.f32 $0, v, $3, $2; }")


@gluon.jit
def add_tap_fp32(hidden, total, weight, high):
    """total + clamp(hidden, 0, high) * weight."""
    return gl.inline_asm_elementwise(ADD_TAP_FP32, "=f,f,f,f,f", [hidden, total, weight, high], dtype=gl.float32, is_pure=True, pack=1)


@gluon.constexpr_function
def pixels_layout(rows, depth, warps, tiles):
    """Of (rows, depth): four threads share a pixel's channels; warps have pixels of their own, so many tiles of 16, or all the same ones."""
    across, alone = depth // 4, rows == 16 * tiles
    own = [0] * len(bits(warps)) if alone else bits(warps, 16)
    return gl.DistributedLinearLayout([[0, b] for b in bits(across)] + [[8, 0]] + [[b, 0] for b in bits(tiles, rows // tiles)], [[0, across], [0, 2 * across], [1, 0], [2, 0], [4, 0]], [[b, 0] for b in own], [], [rows, depth])


@gluon.constexpr_function
def expansion_layout(chunk, depth, warps_m, warps_n):
    """Of (chunk, depth): the right operand's columns are hidden channels, 2 * t + e of tile i being (t, i, e) of a warp's."""
    across, each = depth // 4, chunk // warps_n
    lanes = [[0, across], [0, 2 * across], [1, 0], [each // 4, 0], [each // 2, 0]]
    return gl.DistributedLinearLayout([[0, b] for b in bits(across)] + [[b, 0] for b in bits(each // 8, 2)], lanes, [[0, 0] for _ in bits(warps_m)] + [[b, 0] for b in bits(warps_n, each)], [], [chunk, depth])


@gluon.constexpr_function
def vector_layout(chunk, warps_m, warps_n):
    """Of (chunk,) hidden channels."""
    each = chunk // warps_n
    return gl.DistributedLinearLayout([[b] for b in bits(each // 4)], [[each // 4], [each // 2], [0], [0], [0]], [[0] for _ in bits(warps_m)] + [[b] for b in bits(warps_n, each)], [], [chunk])


@gluon.constexpr_function
def projection_layout(columns, chunk, warps_m, warps_n):
    """Of (columns, chunk): the right operand's rows are the hidden channels of all warps."""
    each = chunk // warps_n
    own = [b if b < columns else 0 for b in bits(warps_n, 8)]
    further = [b for b in bits(columns // 8, 8) if b not in own]
    return gl.DistributedLinearLayout([[0, b] for b in bits(each // 4)] + [[0, b] for b in bits(warps_n, each)] + [[b, 0] for b in further],
                                      [[0, each // 4], [0, each // 2], [1, 0], [2, 0], [4, 0]], [[0, 0] for _ in bits(warps_m)] + [[b, 0] for b in own], [], [columns, chunk])


@gluon.jit
def as_depth(tile):
    """(rows, 8 or 16 input channels), 16 of them as a product's depth; 8 are followed by zeros."""
    ROWS: gl.constexpr = tile.shape[0]
    if tile.shape[1] == 16:
        fours = tile.reshape([ROWS, 4, 2, 2])  # thread, tile, column of the thread
        if tile.dtype == gl.float32:
            return fours.permute([0, 2, 3, 1]).reshape([ROWS, 16])
        else:
            return fours.permute([0, 2, 1, 3]).reshape([ROWS, 16])
    else:
        if tile.dtype == gl.float32:
            tile = tile.reshape([ROWS, 4, 2]).permute([0, 2, 1]).reshape([ROWS, 8])
        return gl.join(tile, gl.zeros_like(tile)).permute([0, 2, 1]).reshape([ROWS, 16])


@gluon.jit
def by_tile(tile, WARPS_N: gl.constexpr):
    """(chunk, columns) with the hidden channels, as they lie in memory, in the order of the tiles: (warp, t, i, e) to (i, warp, t, e)."""
    CHUNK: gl.constexpr = tile.shape[0]
    TILES: gl.constexpr = CHUNK // WARPS_N // 8
    return tile.reshape([WARPS_N, 4, TILES, 2, tile.shape[1]]).permute([2, 0, 1, 3, 4]).reshape([CHUNK, tile.shape[1]])


@gluon.jit
def load_hidden(vector, first, WARPS_N: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """A chunk of a vector of the hidden channels as a row."""
    CHUNK: gl.constexpr = loads.shape[0]
    values = gl.load(vector + first + gl.arange(0, CHUNK, layout=loads))
    values = values.reshape([WARPS_N, 4, CHUNK // WARPS_N // 8, 2]).permute([2, 0, 1, 3]).reshape([CHUNK])
    return gl.convert_layout(values, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def load_channels(pixels, FIRST: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """8 or 16 channels of the pixels, from FIRST on, as a left operand."""
    c = FIRST + gl.arange(0, loads.shape[1], layout=gl.SliceLayout(0, loads))
    return gl.convert_layout(as_depth(to_tf32(gl.load(gl.convert_layout(pixels, gl.SliceLayout(1, loads))[:, None] + c[None, :]))), layout)


@gluon.jit
def load_expand_weight(weight, PITCH: gl.constexpr, first, FIRST: gl.constexpr, SCALE: gl.constexpr, WARPS_N: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """8 or 16 of the input channels, from FIRST on, of a chunk of hidden channels, as a right operand; times SCALE in float32."""
    h = first + gl.arange(0, loads.shape[0], layout=gl.SliceLayout(1, loads))
    c = FIRST + gl.arange(0, loads.shape[1], layout=gl.SliceLayout(0, loads))
    w = gl.load(weight + h[:, None] * PITCH + c[None, :])
    if w.dtype == gl.float32:
        w *= SCALE
    w = by_tile(as_depth(to_tf32(w)), WARPS_N)
    return gl.convert_layout(w.permute([1, 0]), layout)


@gluon.jit
def load_chunk(expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, first, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, SCALE: gl.constexpr,
               WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, CHUNK: gl.constexpr, mma: gl.constexpr, right_operand: gl.constexpr):
    """(expand weight in parts, its bias, nine taps, their scale if they have one, bias) of the hidden channels from `first` on."""
    vectors: gl.constexpr = vector_layout(CHUNK, WARPS_M, WARPS_N)
    weights = ()
    for part in gl.static_range((IN_CHANNELS + 15) // 16):
        weights = weights + (load_expand_weight(expand_weight, IN_CHANNELS, first, 16 * part, SCALE, WARPS_N,
                                                expansion_layout(CHUNK, 16 if 16 * part + 16 <= IN_CHANNELS else 8, WARPS_M, WARPS_N), right_operand),)
    taps = ()
    for t in gl.static_range(9):
        taps = taps + (load_hidden(depthwise_weight + t * HIDDEN, first, WARPS_N, vectors, mma),)
    scale = ()
    if depthwise_scale is not None:
        scale = (load_hidden(depthwise_scale, first, WARPS_N, vectors, mma),)
    return weights, load_hidden(expand_bias, first, WARPS_N, vectors, mma), taps, scale, load_hidden(depthwise_bias, first, WARPS_N, vectors, mma)


@gluon.jit
def filter_chunk(chunk, taps, highs, nought, zero, diagonal, highest, high, SCALE: gl.constexpr):
    """What the depthwise step makes of the pixels under nine taps, activated, in the type of the hidden map."""
    weights, expand_bias, filters, scale, depthwise_bias = chunk
    bias = expand_bias * SCALE + nought
    total = zero
    if len(scale) == 0:
        total = depthwise_bias + zero
    if highest.dtype == gl.float32:
        for t in gl.static_range(9):
            total = add_tap_fp32(expanded(taps, t, weights, bias), total, filters[t], highs[t])
        return tile_depth(to_tf32(clamp(total, 0.0, high)))
    else:
        for t in gl.static_range(0, 8, 2):
            tap = on_diagonal(filters[t], diagonal)
            next_tap = on_diagonal(filters[t + 1], diagonal)
            total = add_two_taps(expanded(taps, t, weights, bias), expanded(taps, t + 1, weights, bias), total, tap, next_tap, highs[t], highs[t + 1])
        total = add_tap(expanded(taps, 8, weights, bias), total, on_diagonal(filters[8], diagonal), highs[8])
        if len(scale) > 0:
            total = total * (scale[0] * SCALE) + depthwise_bias * SCALE
        return activate(total, highest)


@gluon.jit
def load_projections(weight, HIDDEN: gl.constexpr, begin, first, out_channels, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr,
                     CHUNK: gl.constexpr, layout: gl.constexpr):
    found = (load_projection(weight, HIDDEN, begin, first, 0, out_channels, WARPS_N, projection_layout(COLUMNS, CHUNK, WARPS_M, WARPS_N), layout),)
    if COLUMNS2 > 0:
        found = found + (load_projection(weight, HIDDEN, begin, first, COLUMNS, out_channels, WARPS_N, projection_layout(COLUMNS2, CHUNK, WARPS_M, WARPS_N), layout),)
    return found


@gluon.jit
def add_projections(filtered, projections, results):
    found = ()
    for part in gl.static_range(len(projections)):
        found = found + (mma_v2(filtered, projections[part], results[part], input_precision="tf32"),)
    return found


@gluon.jit
def load_projection(weight, PITCH: gl.constexpr, begin, first, FIRST: gl.constexpr, out_channels, WARPS_N: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """The weight for output channels from FIRST on, as a right operand; hidden channels count from `begin` on."""
    o = FIRST + gl.arange(0, loads.shape[0], layout=gl.SliceLayout(1, loads))
    h = first + gl.arange(0, loads.shape[1], layout=gl.SliceLayout(0, loads))
    w = to_tf32(gl.load(weight + o[:, None] * PITCH + h[None, :], mask=(o < out_channels)[:, None] & (h >= begin)[None, :], other=0.0))
    w = tile_depth(by_tile(w.permute([1, 0]), WARPS_N).permute([1, 0])).permute([1, 0])
    return gl.convert_layout(w, layout)


@gluon.jit
def tile_depth(tile):
    """(rows, hidden channels by tile) as a product's depth: in float32 a thread's two columns are four apart."""
    if tile.dtype == gl.float32:
        return tile.reshape([tile.shape[0], tile.shape[1] // 8, 4, 2]).permute([0, 1, 3, 2]).reshape([tile.shape[0], tile.shape[1]])
    else:
        return tile


@gluon.jit
def effnet_mbconv_wide(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                       batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                       STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr,
                       CHUNK: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, TILES: gl.constexpr, EAGER: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """Warps share pixels and split hidden channels (WARPS_N), or the other way round. TILES of 16 pixels a warp share what is loaded
    for them all. IN_CHANNELS is a multiple of 8 up to 40. EAGER: a chunk's weights are fetched while the one before is computed, the
    first's before the map is there."""
    compute_block(x, expand_weight, expand_bias, depthwise_weight, None, depthwise_bias, project_weight, None, project_bias, residual, out,
                  batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                  STRIDE, IN_CHANNELS, HIDDEN, COLUMNS, COLUMNS2, CHUNK, WARPS_M, WARPS_N, TILES, EAGER, DEPENDENT_LAUNCH)


@gluon.jit
def effnet_mbconv_narrow(x, expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, project_weight, project_scale, project_bias, residual, out,
                         batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                         STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr,
                         CHUNK: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, TILES: gl.constexpr, EAGER: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """The same in float32 with narrow hidden maps: the depthwise and the project weight are narrow_weight.py's."""
    compute_block(x, expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, project_weight, project_scale, project_bias, residual, out,
                  batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                  STRIDE, IN_CHANNELS, HIDDEN, COLUMNS, COLUMNS2, CHUNK, WARPS_M, WARPS_N, TILES, EAGER, DEPENDENT_LAUNCH)


@gluon.jit
def compute_block(x, expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, project_weight, project_scale, project_bias, residual, out,
                  batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                  STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr,
                  CHUNK: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, TILES: gl.constexpr, EAGER: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    ROWS: gl.constexpr = 16 * WARPS_M * TILES
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    PARTS: gl.constexpr = (IN_CHANNELS + 15) // 16  # as load_chunk has them
    dtype: gl.constexpr = x.dtype.element_ty
    FP32: gl.constexpr = dtype == gl.float32
    hidden_dtype: gl.constexpr = depthwise_weight.dtype.element_ty
    SCALE: gl.constexpr = map_scale(hidden_dtype, dtype)  # of the hidden maps
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if FP32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if FP32 else 2)
    left_hidden: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if hidden_dtype == gl.float32 else 2)
    right_hidden: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if hidden_dtype == gl.float32 else 2)
    sixteen_of_pixels: gl.constexpr = pixels_layout(ROWS, 16, WARPS, TILES)
    eight_of_pixels: gl.constexpr = pixels_layout(ROWS, 8, WARPS, TILES)

    pixels = batch * out_height * out_width
    first = gl.program_id(0) * ROWS
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    mma_y = STRIDE * ((first + rows) // out_width % out_height) - top
    mma_z = STRIDE * ((first + rows) % out_width) - left
    places = place_windows(first, pixels, height, width, out_height, out_width, left, top, STRIDE, ROWS)
    if EAGER:
        chunk = load_chunk(expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, 0, IN_CHANNELS, HIDDEN, SCALE, WARPS_M, WARPS_N, CHUNK, mma, right_operand)
        projections = load_projections(project_weight, HIDDEN, 0, 0, out_channels, WARPS_M, WARPS_N, COLUMNS, COLUMNS2, CHUNK, right_hidden)
        affine = load_affine(project_scale, project_bias, 0, COLUMNS, out_channels, mma)
        if COLUMNS2 > 0:
            affine2 = load_affine(project_scale, project_bias, COLUMNS, COLUMNS2, out_channels, mma)
    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    # All that the tile reads, in registers.
    taps = ()
    highs = ()
    for t in gl.static_range(9):
        near = x + places[t].load(gl.SliceLayout(1, sixteen_of_pixels)) * IN_CHANNELS
        for part in gl.static_range(PARTS):
            taps = taps + (load_channels(near, 16 * part, sixteen_of_pixels if 16 * part + 16 <= IN_CHANNELS else eight_of_pixels, left_operand),)
        inside = (mma_y + t // 3 >= 0) & (mma_y + t // 3 < height) & (mma_z + t % 3 >= 0) & (mma_z + t % 3 < width)
        highs = highs + (gl.where(inside, high * SCALE, 0.0).to(hidden_dtype)[:, None],)

    zero = gl.zeros([ROWS, CHUNK], gl.float32, layout=mma)
    # A zero that the compiler does not see through: it would keep one register for the bias of several rows, and copy it into
    # the four that a product starts from, again and again.
    nought = (mma_z.to(gl.float32) * 0.0)[:, None]
    diagonal = diagonal_mask(rows, gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma)))
    highest = gl.full([1, 1], high * SCALE, gl.float32, layout=mma).to(hidden_dtype)
    results = (gl.zeros([ROWS, COLUMNS], gl.float32, layout=mma),)
    if COLUMNS2 > 0:
        results = results + (gl.zeros([ROWS, COLUMNS2], gl.float32, layout=mma),)
    if EAGER:
        for begin in gl.static_range(0, HIDDEN, CHUNK):
            present = chunk
            present_projections = projections
            if begin + CHUNK < HIDDEN:  # on its way while this one is computed
                chunk = load_chunk(expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, min(begin + CHUNK, HIDDEN - CHUNK), IN_CHANNELS, HIDDEN, SCALE, WARPS_M, WARPS_N, CHUNK, mma, right_operand)
                projections = load_projections(project_weight, HIDDEN, begin + CHUNK, min(begin + CHUNK, HIDDEN - CHUNK), out_channels, WARPS_M, WARPS_N, COLUMNS, COLUMNS2, CHUNK, right_hidden)
            filtered = gl.convert_layout(filter_chunk(present, taps, highs, nought, zero, diagonal, highest, high, SCALE), left_hidden)
            results = add_projections(filtered, present_projections, results)
    else:
        for begin in range(0, HIDDEN, CHUNK):
            start = begin
            if HIDDEN % CHUNK != 0:  # see effnet_mbconv
                start = gl.multiple_of(gl.minimum(begin, HIDDEN - CHUNK), 16)
            chunk = load_chunk(expand_weight, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias, start, IN_CHANNELS, HIDDEN, SCALE, WARPS_M, WARPS_N, CHUNK, mma, right_operand)
            filtered = gl.convert_layout(filter_chunk(chunk, taps, highs, nought, zero, diagonal, highest, high, SCALE), left_hidden)
            projections = load_projections(project_weight, HIDDEN, begin, start, out_channels, WARPS_M, WARPS_N, COLUMNS, COLUMNS2, CHUNK, right_hidden)
            results = add_projections(filtered, projections, results)
    # 16 bytes a store, through shared memory; where the last step of a chain counts, as they are.
    VECTOR: gl.constexpr = 4 if FP32 else 8
    stores: gl.constexpr = mma if EAGER else gl.BlockedLayout([1, VECTOR], [32 * VECTOR // COLUMNS, COLUMNS // VECTOR], [WARPS, 1], [1, 0])
    if not EAGER:
        affine = load_affine(project_scale, project_bias, 0, COLUMNS, out_channels, stores)
    store_tile(results[0], affine, residual, out, first, pixels, out_channels, flags, 0, stores)
    if COLUMNS2 > 0:
        stores2: gl.constexpr = mma if EAGER else gl.BlockedLayout([1, VECTOR], [32 * VECTOR // COLUMNS2, COLUMNS2 // VECTOR], [WARPS, 1], [1, 0])
        if not EAGER:
            affine2 = load_affine(project_scale, project_bias, COLUMNS, COLUMNS2, out_channels, stores2)
        store_tile(results[1], affine2, residual, out, first, pixels, out_channels, flags, COLUMNS, stores2)


# (input channels, columns of the projection in two parts, stride): the blocks of ModelNew, MobileNetV2 and EfficientNet-Lite
# whose hidden maps are large. Fewer output channels than columns are masked.
BLOCKS = [
    (16, 16, 0, 1), (16, 32, 0, 1), (16, 16, 0, 2), (16, 32, 0, 2), (24, 32, 0, 1), (24, 32, 0, 2), (24, 32, 8, 2),
    (32, 32, 0, 1), (32, 32, 16, 1), (32, 64, 0, 2), (40, 64, 16, 2),
]  # fmt: skip
EXPANSION = 6
# How the tensor cores take the input channels: in steps of 16, no more than 32 operands' worth of registers a tap.
DEPTHS = {16: (16, 0), 24: (32, 0), 32: (32, 0), 40: (32, 16)}
# Warps along pixels and along hidden channels: the second where there are too few pixels for all multiprocessors.
WARPS = [(2, 1), (1, 4)]
WARPS_OF = {
    **{block: [(2, 1), (1, 2)] for block in BLOCKS if block[0] == 16},  # their 96 hidden channels are no multiple of 64
    (32, 64, 0, 2): [(1, 2), (1, 4)],  # the registers of the wide projection have to be shared
}
POINTERS = ("x", "expand_weight", "expand_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias", "residual", "out")
NUMBERS = ("batch", "height", "width", "out_height", "out_width", "out_channels", "left", "top")


def variants():
    for precision in ("fp16", "bf16"):
        for block in BLOCKS:
            for warps in WARPS_OF.get(block, WARPS):
                yield expanding(precision, *block, *warps)
        for columns in (16, 32):
            for steps, warps in ((2, 1), (16, 1)):
                yield without_expansion(precision, columns, steps, warps)


# With wide loads; in float32 the operands of more channels do not fit into the registers.
BLOCKS_FP32 = [(16, 16, 0, 1), (16, 16, 8, 1), (16, 16, 0, 2), (16, 16, 8, 2), (24, 32, 0, 1), (24, 32, 0, 2), (24, 32, 8, 2)]
# Warps along pixels, along hidden channels, and hidden channels in a chunk.
WARPS_EAGER = [(1, 2, 32), (1, 4, 64)]
WARPS_WIDE = [(1, 1, 16), (2, 1, 16), (4, 1, 16), (1, 1, 32), (2, 1, 32), (4, 1, 32), (1, 2, 32), (1, 4, 64)]


def candidates():
    shipped = {v.name for v in variants()}
    tried = [wide(precision, *block, *warps) for precision in ("fp16", "bf16", "tf32") for block in (BLOCKS_FP32 if precision == "tf32" else BLOCKS) for warps in WARPS_WIDE]
    for precision in ("fp16", "bf16"):
        tried += [wide(precision, *block, warps_m, 1, chunk, 2) for block in BLOCKS if block[0] == 16 for warps_m in (1, 2, 4) for chunk in (16, 32)]
        tried += [expanding(precision, *block, *warps) for block in BLOCKS for warps in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (1, 1, 32), (2, 1, 32), (4, 1, 32))]
    for precision in ("fp16", "bf16", "tf32"):
        tried += [without_expansion(precision, columns, steps, warps) for columns in (16, 32) for steps in (2, 4, 8, 16, 32) for warps in (1, 2, 4)]
    tried += [narrow(*block, *warps) for block in BLOCKS_FP32 for warps in WARPS_WIDE]
    for block in BLOCKS_FP32:
        tried += [make(*block, *warps, 1, True) for make in (narrow, partial(wide, "fp16")) for warps in WARPS_EAGER]
    tried += [narrow(*block, warps_m, 1, chunk, 2) for block in BLOCKS_FP32 if block[0] == 16 for warps_m in (1, 2, 4) for chunk in (16, 32)]
    yield from (v for v in tried if v.name not in shipped)


def parameters(precision):
    types = {p: "*fp32" if p.endswith("bias") else f"*{precision}" for p in POINTERS}
    return {**types, **{n: "i32" for n in NUMBERS}, "high": "fp32", "flags": "i32"}


DIVISIBLE = {**{p: 16 for p in POINTERS}, "out_channels": 8}


def expanding(precision, in_channels, columns, columns2, stride, warps_m, warps_n, chunk=None):
    """chunk: hidden channels at a time, 16 a warp unless told."""
    depth, depth2 = DEPTHS[in_channels]
    own = f"_w{warps_n}" if chunk else ""
    chunk = chunk or 16 * warps_n
    return Variant(
        op="mbconv",
        name=f"{precision}_c{in_channels}_s{stride}_{16 * warps_m}x{columns + columns2}x{chunk}{own}",
        kernel=effnet_mbconv,
        parameters=parameters("fp32" if precision == "tf32" else precision),
        constants={"STRIDE": stride, "IN_CHANNELS": in_channels, "HIDDEN": EXPANSION * in_channels, "DEPTH": depth, "DEPTH2": depth2, "COLUMNS": columns, "COLUMNS2": columns2,
                   "CHUNK": chunk, "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "expand": 1, "in_channels": in_channels, "stride": stride, "columns": columns + columns2,
                    "block_m": 16 * warps_m, "chunk": chunk, "steps": 1},
        divisible=DIVISIBLE,
        num_warps=warps_m * warps_n,
    )


def narrow(*block_and_tile):
    """A wide one of float32 with narrow hidden maps: narrow_weight.py's weights of the last two steps, each followed by its scale."""
    like, types = wide("tf32", *block_and_tile), {}
    for name, kind in like.parameters.items():
        types |= {name: "*fp16", name.replace("weight", "scale"): "*fp32"} if name in ("depthwise_weight", "project_weight") else {name: kind}
    return replace(
        like,
        name=like.name.replace("tf32_wide_", "narrow_"),
        kernel=effnet_mbconv_narrow,
        parameters=types,
        attributes=like.attributes | {"precision": PRECISION_CODES["narrow"]},
        divisible=like.divisible | {"depthwise_scale": 16, "project_scale": 16},
    )


def wide(precision, in_channels, columns, columns2, stride, warps_m, warps_n, chunk, tiles=1, eager=False):
    like = expanding(precision, in_channels, columns, columns2, stride, warps_m, warps_n, chunk)
    return replace(
        like,
        name=like.name.replace(f"{precision}_", f"{precision}_wide_") + (f"_tiles{tiles}" if tiles > 1 else "") + ("_eager" if eager else ""),
        kernel=effnet_mbconv_wide,
        constants={name: value for name, value in like.constants.items() if not name.startswith("DEPTH")} | {"TILES": tiles, "EAGER": eager},
        attributes=like.attributes | {"block_m": 16 * warps_m * tiles},
    )


def without_expansion(precision, columns, steps, warps):
    return Variant(
        op="mbconv",
        name=f"{precision}_unexpanded_c32_s1_{16 * warps}x{columns}_rows{steps}",
        kernel=effnet_depthwise_project,
        parameters=parameters("fp32" if precision == "tf32" else precision),
        constants={"CHANNELS": 32, "COLUMNS": columns, "STEPS": steps, "WARPS": warps},
        attributes={"precision": PRECISION_CODES[precision], "expand": 0, "in_channels": 32, "stride": 1, "columns": columns,
                    "block_m": 16 * warps, "chunk": 32, "steps": steps},
        divisible=DIVISIBLE,
        num_warps=warps,
    )
