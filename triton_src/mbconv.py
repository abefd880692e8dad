"""Whole MBConv blocks: project(depthwise(expand(x))) + residual in one kernel; the hidden map never leaves the registers.

effnet_mbconv: a program owns a tile of output pixels and walks over the hidden channels, a chunk at a time. For each of the
nine taps it computes the hidden values under that tap anew (the tensor cores have time for it) and adds them, weighted, to
the depthwise sum; the finished chunk is at once one step of the projection. The depthwise sum is a matrix product too: the
hidden tile times a diagonal matrix, because its operand layout is the layout in which the expansion leaves its result.
Out of the image a hidden value is zero whatever the bias: its upper clamp is lowered to 0 there, at no cost.

effnet_depthwise_project: blocks without expansion. A program owns a column of pixels and walks down the rows.

In Gluon, for its control over register layouts. Both want channels_last, ReLU6 (or any clamp to [0, high]), float32 biases
and the depthwise weight stored tap by tap.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._epilogue import HAS_RESIDUAL
from ._launch import begin_gluon
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

_ACTIVATE = """{{ .reg .b32 p;
cvt.rn.relu.{t}x2.f32 p, $2, $1;
min.NaN.{t}x2 $0, p, $3;
}}"""
ACTIVATE_FP16, ACTIVATE_BF16 = gl.constexpr(_ACTIVATE.format(t="f16")), gl.constexpr(_ACTIVATE.format(t="bf16"))


@gluon.jit
def add_tap(hidden, total, weight, high):
    """total + clamp(hidden, 0, high) * weight, channel by channel; `weight` is masked to a diagonal."""
    return gl.inline_asm_elementwise(
        TAP_FP16 if weight.dtype == gl.float16 else TAP_BF16, "=f,=f,=f,=f,f,f,f,f,f,f,f,f,r,r,r,r",
        [hidden, total, weight, high], dtype=gl.float32, is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def add_three_taps(value, a, b, c, weight_a, weight_b, weight_c, largest, lowest):
    return gl.inline_asm_elementwise(
        THREE_TAPS_FP16 if value.dtype == gl.float16 else THREE_TAPS_BF16,
        "=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,=f,r,r,f,f,f,f,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r,r,r",
        [value, a, b, c, weight_a, weight_b, weight_c, largest, lowest],
        dtype=(gl.float32, gl.float32, gl.float32), is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def on_diagonal(weight, diagonal):
    """The weight where `diagonal` has ones, in all bits; zero elsewhere."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [weight, diagonal], dtype=weight.dtype, is_pure=True, pack=2)


@gluon.jit
def diagonal_mask(rows, columns):
    """All bits set where a thread's first row of a tile meets its own column: the second operand of an m16n8k8 product."""
    return gl.where((rows % 8)[:, None] == (columns % 8)[None, :], -1, 0).to(gl.int16)


@gluon.jit
def activate(x, high):
    """x clamped to [0, high], in the type of `high`; NaN stays NaN."""
    return gl.inline_asm_elementwise(ACTIVATE_FP16 if high.dtype == gl.float16 else ACTIVATE_BF16, "=r,f,f,r", [x, high], dtype=high.dtype, is_pure=True, pack=2)


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
def project(filtered, weight, out, h, first, HIDDEN: gl.constexpr, out_channels, FIRST: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """out + filtered @ weight^T for output channels FIRST to FIRST + COLUMNS, and hidden channels from `first` on."""
    o = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    w = gl.load(weight + o[None, :] * HIDDEN + h[:, None], mask=(o < out_channels)[None, :] & (h >= first)[:, None], other=0.0)
    return mma_v2(filtered, w, out)


@gluon.jit
def store_tile(tile, bias, residual, out, first, pixels, out_channels, flags, FIRST: gl.constexpr, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Writes a tile of `pixels` in a row in memory; every thread eight channels."""
    o = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    p = first + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, layout))
    where = p[:, None] * out_channels + o[None, :]
    mask = (p < pixels)[:, None] & (o < out_channels)[None, :]
    y = gl.convert_layout(tile, layout) + gl.load(bias + o, mask=o < out_channels, other=0.0)[None, :]
    if (flags & HAS_RESIDUAL) != 0:
        y += gl.load(residual + where, mask=mask, other=0.0).to(gl.float32)
    gl.store(out + where, y.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def effnet_mbconv(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                  batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                  STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, DEPTH: gl.constexpr, DEPTH2: gl.constexpr,
                  COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    begin_gluon(DEPENDENT_LAUNCH)
    ROWS: gl.constexpr = 16 * WARPS_M
    CHUNK: gl.constexpr = 16 * WARPS_N
    PADDED: gl.constexpr = DEPTH + DEPTH2 >= IN_CHANNELS + 2
    dtype: gl.constexpr = x.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 2)

    pixels = batch * out_height * out_width
    first = gl.program_id(0) * ROWS
    exists = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left_operand)) < pixels
    p = gl.minimum(first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, left_operand)), pixels - 1)
    image = p // (out_height * out_width)
    y = STRIDE * (p // out_width % out_height) - top
    z = STRIDE * (p % out_width) - left
    # The same once more, as the accumulators are laid out.
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    mma_y = STRIDE * ((first + rows) // out_width % out_height) - top
    mma_z = STRIDE * ((first + rows) % out_width) - left

    # All that the tile reads, in registers: nine operands.
    taps = ()
    highest = gl.full([1, 1], high, gl.float32, layout=mma).to(dtype)
    highs = ()
    for t in gl.static_range(9):
        iy = y + t // 3
        iz = z + t % 3
        inside = exists & (iy >= 0) & (iy < height) & (iz >= 0) & (iz < width)
        # Out of the image any pixel of the window serves: its hidden values are clamped to 0.
        near = x + ((image * height + gl.minimum(gl.maximum(iy, 0), height - 1)) * width + gl.minimum(gl.maximum(iz, 0), width - 1)) * IN_CHANNELS
        taps = taps + (load_pixels(near, exists, 0, DEPTH, IN_CHANNELS, inside, PADDED, left_operand),)
        if DEPTH2 > 0:
            taps = taps + (load_pixels(near, exists, DEPTH, DEPTH2, IN_CHANNELS, inside, PADDED, left_operand),)
        mma_inside = (mma_y + t // 3 >= 0) & (mma_y + t // 3 < height) & (mma_z + t % 3 >= 0) & (mma_z + t % 3 < width)
        if PADDED:
            highs = highs + (highest,)
        else:
            highs = highs + (gl.where(mma_inside, high, 0.0).to(dtype)[:, None],)
    PARTS: gl.constexpr = 2 if DEPTH2 > 0 else 1

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
        for t in gl.static_range(9):
            value = mma_v2(taps[t * PARTS], w, bias)
            if DEPTH2 > 0:
                value = mma_v2(taps[t * PARTS + 1], w2, value)
            tap = gl.load(depthwise_weight + t * HIDDEN + channel)[None, :]
            total = add_tap(value, total, on_diagonal(tap, diagonal), highs[t])
        filtered = gl.convert_layout(activate(total, highest), left_operand)
        k = start + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, right_operand))
        result = project(filtered, project_weight, result, k, begin, HIDDEN, out_channels, 0, COLUMNS, right_operand)
        if COLUMNS2 > 0:
            result2 = project(filtered, project_weight, result2, k, begin, HIDDEN, out_channels, COLUMNS, COLUMNS2, right_operand)
    eights: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS_M * WARPS_N, 1], [1, 0])
    store_tile(result, project_bias, residual, out, first, pixels, out_channels, flags, 0, COLUMNS, eights)
    if COLUMNS2 > 0:
        eights2: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS2, COLUMNS2 // 8], [WARPS_M * WARPS_N, 1], [1, 0])
        store_tile(result2, project_bias, residual, out, first, pixels, out_channels, flags, COLUMNS, COLUMNS2, eights2)


@gluon.jit
def effnet_depthwise_project(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                             batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                             CHANNELS: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, WARPS: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """Stride 1. STEPS output rows a program; CHANNELS is 32. In float32 the depthwise sum is made of multiply-adds."""
    begin_gluon(DEPENDENT_LAUNCH)
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
                filtered = to_tf32(activate_fp32(a, high))
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


# ---- float32 with TF32 products ----

# Here the depthwise sum is made of multiply-adds, in float32, as PyTorch makes it. The tensor cores take float32 operands
# one by one along the channels, so the channels are renamed until what a thread needs is what lies side by side in memory:
# of every 8 in a product's depth, column e * 4 + t is channel 2 * t + e (of every 16, s * 8 + e * 4 + t is 4 * t + 2 * s + e).
_ADD_TAP_FP32 = """{ .reg .f32 v;
max.NaN.f32 v, $1, 0f00000000;
min.NaN.f32 v, v, $4;
fma.rn.f32 $0, v, $3, $2;
}"""
ADD_TAP_FP32 = gl.constexpr(_ADD_TAP_FP32)
ACTIVATE_FP32 = gl.constexpr("max.NaN.f32 $0, $1, 0f00000000; min.NaN.f32 $0, $0, $2;")
ROUND_TO_TF32 = gl.constexpr("cvt.rna.tf32.f32 $0, $1;")


@gluon.jit
def add_tap_fp32(hidden, total, weight, high):
    """total + clamp(hidden, 0, high) * weight."""
    return gl.inline_asm_elementwise(ADD_TAP_FP32, "=f,f,f,f,f", [hidden, total, weight, high], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def activate_fp32(x, high):
    return gl.inline_asm_elementwise(ACTIVATE_FP32, "=f,f,f", [x, high], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def to_tf32(x):
    return gl.inline_asm_elementwise(ROUND_TO_TF32, "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def depth_last(tile, PER_THREAD: gl.constexpr):
    """(rows, channels) with the channels renamed for a product's depth; PER_THREAD lie side by side in one."""
    ROWS: gl.constexpr = tile.shape[0]
    DEPTH: gl.constexpr = tile.shape[1]
    if PER_THREAD == 4:
        return tile.reshape([ROWS, DEPTH // 16, 4, 2, 2]).permute([0, 1, 3, 4, 2]).reshape([ROWS, DEPTH])
    else:
        return tile.reshape([ROWS, DEPTH // 8, 4, 2]).permute([0, 1, 3, 2]).reshape([ROWS, DEPTH])


@gluon.jit
def sixteen_deep(tile):
    """A tile of 8 channels beside zeros: Triton makes no product that is less deep."""
    if tile.shape[1] == 8:
        return gl.join(tile, gl.zeros_like(tile)).permute([0, 2, 1]).reshape([tile.shape[0], 16])
    else:
        return tile


@gluon.constexpr_function
def operand_layout(rows, depth, per_thread, warps, spread):
    """The layout in which a warp loads an operand's (rows, depth) tile: `per_thread` neighbouring channels by each of 4
    threads, 8 rows at a time. `spread`: warps have rows of their own, `spread` apart from one to the next; 0: all load all."""
    channels = [[0, 1], [0, 2]][: per_thread // 2]
    lanes = [[0, per_thread], [0, 2 * per_thread], [1, 0], [2, 0], [4, 0]]
    of_warps = [[spread << i if spread << i < rows else 0, 0] for i in range(warps.bit_length() - 1)]
    taken = {1, 2, 4} | {basis[0] for basis in of_warps}
    further = [[0, 1 << i] for i in range(depth.bit_length() - 1) if 1 << i >= 4 * per_thread]
    further += [[1 << i, 0] for i in range(rows.bit_length() - 1) if 1 << i not in taken]
    return gl.DistributedLinearLayout(channels + further, lanes, of_warps, [], [rows, depth])


@gluon.jit
def load_pixels_fp32(pixels, FIRST: gl.constexpr, PER_THREAD: gl.constexpr, loads: gl.constexpr, layout: gl.constexpr):
    """4 * PER_THREAD channels of the pixels, from FIRST on, as a left operand."""
    c = FIRST + gl.arange(0, 4 * PER_THREAD, layout=gl.SliceLayout(0, loads))
    return gl.convert_layout(sixteen_deep(depth_last(to_tf32(gl.load(pixels[:, None] + c[None, :])), PER_THREAD)), layout)


@gluon.jit
def load_weights_fp32(weight, pitch: gl.constexpr, first, ROWS: gl.constexpr, rows, begin, columns, DEPTH: gl.constexpr, PER_THREAD: gl.constexpr,
                      loads: gl.constexpr, layout: gl.constexpr):
    """Rows `first` to first + ROWS and columns `columns` to columns + DEPTH of a weight, as a right operand. Zero from row
    `rows` on and before column `begin`."""
    r = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, loads))
    c = columns + gl.arange(0, DEPTH, layout=gl.SliceLayout(0, loads))
    w = gl.load(weight + r[:, None] * pitch + c[None, :], mask=(r < rows)[:, None] & (c >= begin)[None, :], other=0.0)
    return gl.convert_layout(sixteen_deep(depth_last(to_tf32(w), PER_THREAD)).permute([1, 0]), layout)


@gluon.jit
def effnet_mbconv_fp32(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual, out,
                       batch, height, width, out_height, out_width, out_channels, left, top, high, flags,
                       STRIDE: gl.constexpr, IN_CHANNELS: gl.constexpr, HIDDEN: gl.constexpr, CHUNK: gl.constexpr,
                       COLUMNS: gl.constexpr, COLUMNS2: gl.constexpr, WARPS_M: gl.constexpr, WARPS_N: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """16 input channels, or 24."""
    begin_gluon(DEPENDENT_LAUNCH)
    ROWS: gl.constexpr = 16 * WARPS_M
    WARPS: gl.constexpr = WARPS_M * WARPS_N
    PARTS: gl.constexpr = 2 if IN_CHANNELS == 24 else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1)
    # Warps either share pixels and split channels, or the other way round.
    APART: gl.constexpr = 16 if WARPS_M > 1 else 0
    SPLIT: gl.constexpr = 8 if WARPS_N > 1 else 0
    fours: gl.constexpr = operand_layout(ROWS, 16, 4, WARPS, APART)
    twos: gl.constexpr = operand_layout(ROWS, 8, 2, WARPS, APART)
    expand_fours: gl.constexpr = operand_layout(CHUNK, 16, 4, WARPS, SPLIT)
    expand_twos: gl.constexpr = operand_layout(CHUNK, 8, 2, WARPS, SPLIT)
    project_twos: gl.constexpr = operand_layout(COLUMNS, CHUNK, 2, WARPS, SPLIT)

    pixels = batch * out_height * out_width
    first = gl.program_id(0) * ROWS
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    mma_y = STRIDE * ((first + rows) // out_width % out_height) - top
    mma_z = STRIDE * ((first + rows) % out_width) - left
    p = gl.minimum(first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, fours)), pixels - 1)
    image = p // (out_height * out_width)
    y = STRIDE * (p // out_width % out_height) - top
    z = STRIDE * (p % out_width) - left
    taps = ()
    highs = ()
    for t in gl.static_range(9):
        iy = gl.minimum(gl.maximum(y + t // 3, 0), height - 1)
        iz = gl.minimum(gl.maximum(z + t % 3, 0), width - 1)
        near = x + ((image * height + iy) * width + iz) * IN_CHANNELS
        taps = taps + (load_pixels_fp32(near, 0, 4, fours, left_operand),)
        if PARTS == 2:
            taps = taps + (load_pixels_fp32(gl.convert_layout(near, gl.SliceLayout(1, twos)), 16, 2, twos, left_operand),)
        inside = (mma_y + t // 3 >= 0) & (mma_y + t // 3 < height) & (mma_z + t % 3 >= 0) & (mma_z + t % 3 < width)
        highs = highs + (gl.where(inside, high, 0.0)[:, None],)

    columns = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma))
    zero = gl.zeros([ROWS, CHUNK], gl.float32, layout=mma)
    # A zero that the compiler does not see through: it would keep one register for the bias of several rows, and copy it into
    # the four that a product starts from, again and again.
    nought = (mma_z.to(gl.float32) * 0.0)[:, None]
    result = gl.zeros([ROWS, COLUMNS], gl.float32, layout=mma)
    if COLUMNS2 > 0:
        result2 = gl.zeros([ROWS, COLUMNS2], gl.float32, layout=mma)
        project_twos2: gl.constexpr = operand_layout(COLUMNS2, CHUNK, 2, WARPS, SPLIT)
    for begin in range(0, HIDDEN, CHUNK):
        start = begin
        if HIDDEN % CHUNK != 0:  # see effnet_mbconv
            start = gl.multiple_of(gl.minimum(begin, HIDDEN - CHUNK), 16)
        w = load_weights_fp32(expand_weight, IN_CHANNELS, start, CHUNK, HIDDEN, 0, 0, 16, 4, expand_fours, right_operand)
        if PARTS == 2:
            w2 = load_weights_fp32(expand_weight, IN_CHANNELS, start, CHUNK, HIDDEN, 0, 16, 8, 2, expand_twos, right_operand)
        bias = gl.load(expand_bias + start + columns)[None, :] + nought
        total = gl.load(depthwise_bias + start + columns)[None, :] + zero
        for t in gl.static_range(9):
            value = mma_v2(taps[t * PARTS], w, bias, input_precision="tf32")
            if PARTS == 2:
                value = mma_v2(taps[t * PARTS + 1], w2, value, input_precision="tf32")
            total = add_tap_fp32(value, total, gl.load(depthwise_weight + t * HIDDEN + start + columns)[None, :], highs[t])
        filtered = gl.convert_layout(depth_last(to_tf32(activate_fp32(total, high)), 2), left_operand)
        project = load_weights_fp32(project_weight, HIDDEN, 0, COLUMNS, out_channels, begin, start, CHUNK, 2, project_twos, right_operand)
        result = mma_v2(filtered, project, result, input_precision="tf32")
        if COLUMNS2 > 0:
            project2 = load_weights_fp32(project_weight, HIDDEN, COLUMNS, COLUMNS2, out_channels, begin, start, CHUNK, 2, project_twos2, right_operand)
            result2 = mma_v2(filtered, project2, result2, input_precision="tf32")
    eights: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLUMNS, COLUMNS // 4], [WARPS, 1], [1, 0])
    store_tile(result, project_bias, residual, out, first, pixels, out_channels, flags, 0, COLUMNS, eights)
    if COLUMNS2 > 0:
        eights2: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLUMNS2, COLUMNS2 // 4], [WARPS, 1], [1, 0])
        store_tile(result2, project_bias, residual, out, first, pixels, out_channels, flags, COLUMNS, COLUMNS2, eights2)


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
            for steps, warps in ((2, 1), (8, 1), (16, 1)):
                yield without_expansion(precision, columns, steps, warps)


# The same in float32, and (warps along pixels, along hidden channels, hidden channels in a chunk).
BLOCKS_FP32 = [(16, 16, 0, 1), (16, 16, 8, 1), (16, 16, 0, 2), (16, 16, 8, 2), (24, 32, 0, 1), (24, 32, 0, 2), (24, 32, 8, 2)]
WARPS_FP32 = [(1, 1, 16), (2, 1, 16), (4, 1, 16), (1, 1, 32), (2, 1, 32), (1, 2, 16), (1, 2, 32), (1, 4, 32)]


def candidates():
    shipped = {v.name for v in variants()}
    tried = [expanding_fp32(*block, *warps) for block in BLOCKS_FP32 for warps in WARPS_FP32]
    for precision in ("fp16", "bf16"):
        tried += [expanding(precision, *block, *warps) for block in BLOCKS for warps in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4))]
    for precision in ("fp16", "bf16", "tf32"):
        tried += [without_expansion(precision, columns, steps, warps) for columns in (16, 32) for steps in (2, 4, 8, 16, 32) for warps in (1, 2, 4)]
    yield from (v for v in tried if v.name not in shipped)


def parameters(precision):
    types = {p: "*fp32" if p.endswith("bias") else f"*{precision}" for p in POINTERS}
    return {**types, **{n: "i32" for n in NUMBERS}, "high": "fp32", "flags": "i32"}


DIVISIBLE = {**{p: 16 for p in POINTERS}, "out_channels": 8}


def expanding(precision, in_channels, columns, columns2, stride, warps_m, warps_n):
    depth, depth2 = DEPTHS[in_channels]
    return Variant(
        op="mbconv",
        name=f"{precision}_c{in_channels}_s{stride}_{16 * warps_m}x{columns + columns2}x{16 * warps_n}",
        kernel=effnet_mbconv,
        parameters=parameters(precision),
        constants={"STRIDE": stride, "IN_CHANNELS": in_channels, "HIDDEN": EXPANSION * in_channels, "DEPTH": depth, "DEPTH2": depth2, "COLUMNS": columns, "COLUMNS2": columns2,
                   "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES[precision], "expand": 1, "in_channels": in_channels, "stride": stride, "columns": columns + columns2,
                    "block_m": 16 * warps_m, "chunk": 16 * warps_n, "steps": 1},
        divisible=DIVISIBLE,
        num_warps=warps_m * warps_n,
    )


def expanding_fp32(in_channels, columns, columns2, stride, warps_m, warps_n, chunk):
    return Variant(
        op="mbconv",
        name=f"tf32_c{in_channels}_s{stride}_{16 * warps_m}x{columns + columns2}x{chunk}" + (f"_w{warps_n}" if warps_n > 1 else ""),
        kernel=effnet_mbconv_fp32,
        parameters=parameters("fp32"),
        constants={"STRIDE": stride, "IN_CHANNELS": in_channels, "HIDDEN": EXPANSION * in_channels, "CHUNK": chunk, "COLUMNS": columns, "COLUMNS2": columns2,
                   "WARPS_M": warps_m, "WARPS_N": warps_n},
        attributes={"precision": PRECISION_CODES["tf32"], "expand": 1, "in_channels": in_channels, "stride": stride, "columns": columns + columns2,
                    "block_m": 16 * warps_m, "chunk": chunk, "steps": 1},
        divisible=DIVISIBLE,
        num_warps=warps_m * warps_n,
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
