"""How these networks begin, in one kernel: a dense 3x3 convolution with stride 2 on up to three channels (the stem), then an
MBConv block without expansion. The stem's map, the largest of the network, never leaves the registers.

project(depthwise(stem(x))): 32 channels between the steps, clamped to [0, stem_high] after the stem and to [0, high] after
the depthwise convolution, whose stride is 1.

A warp owns a strip of 14 columns of an image's output and walks down its rows; it shares nothing with other warps. Of each
row it computes 16 pixels of the stem, a column more on either side, as one product with the taps as its depth. That leaves a
pixel's channels in the lanes where the depthwise convolution wants them, as the left operand of products with diagonal
matrices; the neighbouring pixels are in neighbouring lanes and come by shuffles. A row enters three running sums, those of the
output rows of which it is the last, the middle and the first one; the sum that is complete is projected and stored.

The stem's operand is read straight from the picture. Two of the three taps of a row of taps are neighbours in memory, at an
even column: one load (PAIRED). The depth of 32 is, of each of nine rows of taps (channel, ky), the pair, then the nine single
taps, and then ones, which the bias meets. In float32 the stem is made of three bfloat16 products, of the factors' upper and lower
halves, which see more than TF32 does, and the depthwise sums of multiply-adds.

A row of 16 pixels takes 204 instructions in half precision, 512 in float32 (9.0). Two warps that shared pixels would need
barriers; these wait for nothing but their own loads, which are a row ahead.

Channels are renamed so that a thread has neighbours: columns 2t, 2t + 1 of the product's four tiles of 8 are eight channels
in a row, for thread t of four.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from ._gluon import activate, bits, clamp, on_diagonal, to_tf32
from ._launch import wait_for_maps_gluon
from ._variant import PRECISION_CODES, Variant

CHANNELS = gl.constexpr(32)  # of the stem
STRIP = gl.constexpr(14)  # columns of the output of the 16 that a warp computes
NOWHERE = gl.constexpr(1 << 29)  # a row that is in no picture

# Rows g and g + 8 of a tile of 16 pixels by 8 channels ($4, $5: two channels each; lane 4 * g + t) as their left ($0, $1) and
# right neighbours ($2, $3). $6 is the lane of g - 1, $10 of g + 1, both around the corner; $14 is g.
SHUFFLE_HALVES = gl.constexpr("""{ .reg .b32 a, b; .reg .pred p;
shfl.sync.idx.b32 $0, $4, $6, 31, 0xffffffff;
shfl.sync.idx.b32 b, $5, $6, 31, 0xffffffff;
setp.eq.s32 p, $14, 0;
selp.b32 $1, $0, b, p;
shfl.sync.idx.b32 a, $4, $10, 31, 0xffffffff;
shfl.sync.idx.b32 $3, $5, $10, 31, 0xffffffff;
setp.eq.s32 p, $14, 7;
selp.b32 $2, $3, a, p;
}""")
# One neighbour of the same in float32, a register a channel: $4..$7; $8 is the lane, $12 the row that takes from the other half.
SHUFFLE_LEFT = gl.constexpr("""{ .reg .b32 c, d; .reg .pred p;
setp.eq.s32 p, $12, 0;
shfl.sync.idx.b32 $0, $4, $8, 31, 0xffffffff;
shfl.sync.idx.b32 $1, $5, $8, 31, 0xffffffff;
shfl.sync.idx.b32 c, $6, $8, 31, 0xffffffff;
shfl.sync.idx.b32 d, $7, $8, 31, 0xffffffff;
selp.b32 $2, $0, c, p;
selp.b32 $3, $1, d, p;
}""")
SHUFFLE_RIGHT = gl.constexpr("""{ .reg .b32 a, b; .reg .pred p;
setp.eq.s32 p, $12, 7;
shfl.sync.idx.b32 $2, $6, $8, 31, 0xffffffff;
shfl.sync.idx.b32 $3, $7, $8, 31, 0xffffffff;
shfl.sync.idx.b32 a, $4, $8, 31, 0xffffffff;
shfl.sync.idx.b32 b, $5, $8, 31, 0xffffffff;
selp.b32 $0, $2, a, p;
selp.b32 $1, $3, b, p;
}""")

# A tile of 16 pixels by 8 channels, and its left and right neighbours ($4..$9), times the three weights of a row of taps as
# diagonal matrices ($10, $12, $14), two of them as one product, plus $16..$19.
_THREE_TAPS = """{{
mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{$6, $7, $4, $5}}, {{$10, $12}}, {{$16, $17, $18, $19}};
mma.sync.aligned.m16n8k8.row.col.f32.{t}.{t}.f32 {{$0, $1, $2, $3}}, {{$8, $9}}, {{$14}}, {{$0, $1, $2, $3}};
}}"""
THREE_TAPS_FP16, THREE_TAPS_BF16 = gl.constexpr(_THREE_TAPS.format(t="f16")), gl.constexpr(_THREE_TAPS.format(t="bf16"))


UPPER_HALF = gl.constexpr("prmt.b32 $0, $1, $2, 0x7632;")
LOWER_HALF = gl.constexpr("""{ .reg .f32 a, b;
and.b32 a, $1, 0xffff0000;
and.b32 b, $2, 0xffff0000;
sub.f32 a, $1, a;
sub.f32 b, $2, b;
cvt.rn.bf16x2.f32 $0, b, a;
}""")


@gluon.jit
def halves(x):
    """A float32 as two bfloat16s, cut off and what is left."""
    return (gl.inline_asm_elementwise(UPPER_HALF, "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2),
            gl.inline_asm_elementwise(LOWER_HALF, "=r,f,f", [x], dtype=gl.bfloat16, is_pure=True, pack=2))


@gluon.jit
def with_neighbours(tile, left_lane, right_lane, row):
    """(the pixels on the left, on the right) of a tile of 16-bit numbers."""
    return gl.inline_asm_elementwise(
        SHUFFLE_HALVES, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", [tile, left_lane, right_lane, row], dtype=(tile.dtype, tile.dtype), is_pure=True, pack=4)  # fmt: skip


@gluon.jit
def neighbours(tile, lane, row, ASM: gl.constexpr):
    """The pixels on one side, of a tile of float32."""
    return gl.inline_asm_elementwise(ASM, "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r,r,r,r,r", [tile, lane, row], dtype=gl.float32, is_pure=True, pack=4)


@gluon.jit
def add_three_taps(value, left, right, weight, left_weight, right_weight, total):
    return gl.inline_asm_elementwise(
        THREE_TAPS_FP16 if value.dtype == gl.float16 else THREE_TAPS_BF16, "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f",
        [value, left, right, left_weight, weight, right_weight, total], dtype=gl.float32, is_pure=True, pack=4)  # fmt: skip


@gluon.constexpr_function
def channels_layout(warps):
    return gl.DistributedLinearLayout([[1], [2], [4]], [[8], [16], [0], [0], [0]], [[0] for _ in bits(warps)], [], [32])


@gluon.constexpr_function
def taps_layout(warps):
    """Of (pixels, 16 taps): thread t of four has pairs t and t + 4 of two pixels."""
    return gl.DistributedLinearLayout([[0, 1], [0, 8], [8, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[b, 0] for b in bits(warps, 16)], [], [16 * warps, 16])


@gluon.constexpr_function
def stores_layout(each, warps):
    """Of (pixels, output channels): so many side by side a thread."""
    return gl.DistributedLinearLayout([[0, b] for b in bits(each)] + [[8, 0]], [[0, each], [0, 2 * each], [1, 0], [2, 0], [4, 0]], [[b, 0] for b in bits(warps, 16)], [], [16 * warps, 4 * each])


@gluon.constexpr_function
def lanes_layout(warps):
    """Of (lane, value)."""
    return gl.DistributedLinearLayout([[0, b] for b in bits(32)], [[b, 0] for b in bits(32)], [[0, 0] for _ in bits(warps)], [], [32, 32])


@gluon.jit
def load_channels(vector, layout: gl.constexpr):
    """A vector of the stem's channels as a row in the columns' order: thread t of four loads channels 8 * t to 8 * t + 7."""
    loads: gl.constexpr = channels_layout(gl.num_warps())
    values = gl.load(vector + gl.arange(0, 32, layout=loads)).reshape([4, 4, 2]).permute([1, 0, 2]).reshape([32])
    return gl.convert_layout(values, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def channel_of(column):
    return column % 8 // 2 * 8 + column // 8 * 2 + column % 2


@gluon.jit
def load_picture(x, first, count, step, stem_height, stem_top, x_row, height, pairs, singles, beyond, bias_taps, layout: gl.constexpr):
    """The taps under a row of 16 pixels of the stem a warp, as its left operand; zeros out of the picture and of the stem's map.
    `pairs` and `singles`: offsets, rows after the first one, and what there is in the columns."""
    ROWS: gl.constexpr = bias_taps.shape[0]
    row = first + step
    iy = 2 * row - stem_top
    x += iy * x_row
    iy = gl.where((row >= 0) & (row < stem_height) & (step < count + 2), iy, NOWHERE)
    # Unsigned, so that one comparison sees both borders.
    by_two = gl.load(x + pairs[0] + beyond, mask=((iy + pairs[1]).to(gl.uint32) < height.to(gl.uint32)) & pairs[2], other=0.0)
    by_one = gl.load(x + singles[0] + beyond, mask=((iy + singles[1]).to(gl.uint32) < height.to(gl.uint32)) & singles[2], other=bias_taps)
    return gl.convert_layout(gl.join(by_two, by_one).permute([0, 2, 1]).reshape([ROWS, 32]), layout)


@gluon.jit
def as_depth(tile):
    """Columns as a product's depth: in float32 a thread's two neighbours are four apart."""
    return tile.reshape([tile.shape[0], tile.shape[1] // 8, 4, 2]).permute([0, 1, 3, 2]).reshape([tile.shape[0], tile.shape[1]])


@gluon.jit
def stem_row(pixels, row, height, weights, highs, layout: gl.constexpr):
    """A row of the stem's map, activated; zero where there is no map."""
    highs = gl.where((row >= 0) & (row < height), highs, 0.0)
    zero = gl.zeros([pixels.shape[0], 32], gl.float32, layout=layout)
    if pixels.dtype == gl.float32:
        right_operand: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
        upper, lower = halves(pixels)
        upper_weights = by_column(weights[0], right_operand)
        result = mma_v2(lower, upper_weights, zero)
        result = mma_v2(upper, by_column(weights[1], right_operand), result)
        # What is left of infinity is NaN; the last product alone knows what becomes of it. A minimum drops NaN.
        result = gl.minimum(result, 3.4e38)
        return clamp(mma_v2(upper, upper_weights, result), 0.0, highs)
    else:
        return activate(mma_v2(pixels, weights[0], zero), highs)


@gluon.jit
def by_column(weights, layout: gl.constexpr):
    """The stem's weights from shared memory, lane by lane, as a right operand."""
    loads: gl.constexpr = lanes_layout(gl.num_warps())
    return gl.convert_layout(weights.load(loads).reshape([8, 4, 2, 4, 2, 2]).permute([2, 4, 1, 5, 3, 0]).reshape([32, 32]), layout)


@gluon.jit
def add_row(value, a, b, start, taps, left_lane, right_lane, g):
    """A row of the stem's map enters the sums of three output rows: (the complete one, the next two)."""
    layout: gl.constexpr = start.type.layout
    if value.dtype == gl.float32:
        c = start
        for kx in gl.static_range(3):
            if kx == 0:
                shifted = neighbours(value, left_lane, g, SHUFFLE_LEFT)
            elif kx == 1:
                shifted = value
            else:
                shifted = neighbours(value, right_lane, g, SHUFFLE_RIGHT)
            a += shifted * load_channels(taps + (6 + kx) * CHANNELS, layout)
            b += shifted * load_channels(taps + (3 + kx) * CHANNELS, layout)
            c += shifted * load_channels(taps + kx * CHANNELS, layout)
        return a, b, c
    else:
        left, right = with_neighbours(value, left_lane, right_lane, g)
        return (add_three_taps(value, left, right, taps[7], taps[6], taps[8], a), add_three_taps(value, left, right, taps[4], taps[3], taps[5], b),
                add_three_taps(value, left, right, taps[1], taps[0], taps[2], start))


@gluon.jit
def effnet_stem_mbconv(x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, out,
                       batch, in_channels, height, width, stem_height, stem_width, out_height, out_width, out_channels,
                       x_image, x_channel, x_row, x_column, weight_out, weight_in, weight_row, weight_column,
                       stem_left, stem_top, left, top, stem_high, high,
                       PAIRED: gl.constexpr, COLUMNS: gl.constexpr, STEPS: gl.constexpr, AT_ONCE: gl.constexpr, WARPS: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """STEPS output rows a program, AT_ONCE in one trip of the loop."""
    ROWS: gl.constexpr = 16 * WARPS
    dtype: gl.constexpr = x.dtype.element_ty
    FP32: gl.constexpr = dtype == gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    taps_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if FP32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if FP32 else 2)
    of_taps: gl.constexpr = taps_layout(WARPS)
    EACH: gl.constexpr = COLUMNS // 4  # output channels of a thread
    stores: gl.constexpr = stores_layout(EACH, WARPS)

    # Strips of all images lie side by side.
    strips = gl.cdiv(out_width, STRIP)
    segments = gl.cdiv(out_height, STEPS)
    first_strip = gl.program_id(0) // segments * WARPS
    first_y = gl.program_id(0) % segments * STEPS

    # ---- what the stem reads ----
    if PAIRED:
        x_column = 1
    shift = stem_left % 2  # the pair is taps 1 and 2 of a row of taps, else 0 and 1
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_taps))
    strip = first_strip + r // 16
    image = gl.minimum(strip // strips, batch - 1)
    z = strip % strips * STRIP + r % 8 - left  # a column of the stem's map, or the one eight before it
    column = 2 * (z - stem_left // 2)  # of the picture
    eight = r % 16 // 8 * 8
    beyond = 2 * eight * x_column  # added to addresses, where it is known
    in_map = ((z + eight).to(gl.uint32) < stem_width.to(gl.uint32))[:, None]
    k = gl.arange(0, 16, layout=gl.SliceLayout(0, of_taps))[None, :]
    c = k // 2 // 3
    ky = k // 2 % 3
    pair_offsets = (image * x_image + column * x_column)[:, None] + (c * x_channel + ky * x_row + k % 2 * x_column)
    pair_rows = gl.where(c < in_channels, ky, NOWHERE)
    if PAIRED:  # both of a pixel in the map are in the picture
        pair_exists = in_map & (k >= 0)
    else:
        pair_exists = in_map & (((2 * eight + column)[:, None] + k % 2).to(gl.uint32) < width.to(gl.uint32))
    # The other half of the depth: the ninth pair, nine single taps, ones for the bias.
    row_of_taps = gl.where(k // 2 == 0, 8, k - 2)
    c = row_of_taps // 3
    ky = row_of_taps % 3
    further = gl.where(k // 2 == 0, k, 2 - 3 * shift)  # columns after the pair's first one
    single_offsets = (image * x_image + column * x_column)[:, None] + (c * x_channel + ky * x_row + further * x_column)
    single_rows = gl.where((k < 11) & (c < in_channels), ky, NOWHERE)
    if PAIRED:
        single_exists = in_map & ((k // 2 == 0) | ((2 * eight + column + 2 - 3 * shift).to(gl.uint32) < width.to(gl.uint32))[:, None])
    else:
        single_exists = in_map & (((2 * eight + column)[:, None] + further).to(gl.uint32) < width.to(gl.uint32))
    bias_taps = gl.where((k == 11) | (k == (11 if FP32 else 12)), 1.0, 0.0).to(dtype) + gl.zeros([ROWS, 16], dtype, layout=of_taps)

    # ---- weights ----
    if FP32:
        # A thread's values side by side: in shared memory, as both parts do not fit into the registers. Of (lane, value):
        # the lane is (g, t), the value (step of the depth, tile of columns, half of the step, one of two neighbours).
        by_lane: gl.constexpr = lanes_layout(WARPS)
        lane = gl.arange(0, 32, layout=gl.SliceLayout(1, by_lane))[:, None]
        value = gl.arange(0, 32, layout=gl.SliceLayout(0, by_lane))[None, :]
        depth = value // 16 * 16 + value // 2 % 2 * 8 + lane % 4 * 2 + value % 2
        o = channel_of(value // 4 % 4 * 8 + lane // 4)
    else:
        depth = gl.arange(0, 32, layout=gl.SliceLayout(1, right_operand))[:, None]
        o = channel_of(gl.arange(0, 32, layout=gl.SliceLayout(0, right_operand)))[None, :]
    tap = depth % 16
    row_of_taps = gl.where(depth < 16, tap // 2, gl.where(tap < 2, 8, tap - 2))
    kx = gl.where((depth < 16) | (tap < 2), shift + tap % 2, 2 - 2 * shift)
    exists = (depth < 16) | (tap < 11)
    is_bias = depth == 27
    is_rest = depth == 28
    where = o * weight_out + row_of_taps // 3 * weight_in + row_of_taps % 3 * weight_row + kx * weight_column
    stem_weights = gl.load(stem_weight + where, mask=exists & (row_of_taps // 3 < in_channels) & (o >= 0), other=0.0)
    # The bias meets ones; in half precision in two parts, clamped, as what is left of infinity is NaN.
    bias = gl.load(stem_bias + o)
    if FP32:
        stem_weights = gl.where(is_bias, bias, stem_weights)
    else:
        limit: gl.constexpr = 65504.0 if dtype == gl.float16 else 3.3895e38
        coarse = clamp(bias, -limit, limit).to(dtype)
        rest = clamp(bias - coarse.to(gl.float32), -limit, limit).to(dtype)
        stem_weights = gl.where(is_bias, coarse, gl.where(is_rest, rest, stem_weights))
    if FP32:
        chunks: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [1, 0])
        upper, lower = halves(stem_weights)
        upper_weights = gl.allocate_shared_memory(gl.bfloat16, [32, 32], chunks, upper)
        lower_weights = gl.allocate_shared_memory(gl.bfloat16, [32, 32], chunks, lower)

    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    columns = gl.arange(0, 32, layout=gl.SliceLayout(0, mma))
    nought = gl.zeros([ROWS, 32], gl.float32, layout=mma)
    start = load_channels(depthwise_bias, mma) + nought
    taps = ()
    if not FP32:
        diagonal = gl.where((rows % 8)[:, None] == (columns % 8)[None, :], -1, 0).to(gl.int16)
        for t in gl.static_range(9):
            taps = taps + (on_diagonal(load_channels(depthwise_weight + t * CHANNELS, mma), diagonal),)
    k = gl.arange(0, 32, layout=gl.SliceLayout(1, right_operand))
    if FP32:
        project_channel = k % 4 * 8 + k // 8 * 2 + k % 8 // 4
    else:
        project_channel = channel_of(k)
    n = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, right_operand))
    o = n % 8 // 2 * EACH + n // 8 * 2 + n % 2
    project_weights = to_tf32(gl.load(project_weight + o[None, :] * CHANNELS + project_channel[:, None], mask=(o < out_channels)[None, :] & (k >= 0)[:, None], other=0.0))
    n = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, mma))
    o = n % 8 // 2 * EACH + n // 8 * 2 + n % 2
    project_start = gl.load(project_bias + o, mask=o < out_channels, other=0.0)[None, :] + gl.zeros([ROWS, COLUMNS], gl.float32, layout=mma)

    # ---- where the lanes' neighbours are, what is out of the map, where the result goes ----
    g = (rows % 8)[:, None] + (columns * 0)[None, :]
    t = (rows * 0)[:, None] + (columns % 8 // 2)[None, :]
    left_lane = (g + 7) % 8 * 4 + t
    right_lane = (g + 1) % 8 * 4 + t
    mma_z = (first_strip + rows // 16) % strips * STRIP + rows % 16 - left
    # A product with the zeros of a diagonal matrix would turn infinity into NaN for its neighbours: the largest number instead.
    largest: gl.constexpr = float("inf") if FP32 else 65504.0 if dtype == gl.float16 else 3.3895e38
    highs = gl.where((mma_z >= 0) & (mma_z < stem_width), gl.minimum(stem_high, largest), 0.0)[:, None]
    highest = gl.full([1, 1], high, gl.float32, layout=mma).to(dtype)

    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, stores))
    o = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, stores))
    strip = first_strip + r // 16
    z = strip % strips * STRIP + r % 16 - 1
    store_mask = ((strip < batch * strips) & (r % 16 > 0) & (r % 16 <= STRIP) & (z < out_width))[:, None] & (o < out_channels)[None, :]
    stored = ((strip // strips * out_height * out_width + z) * out_channels)[:, None] + o[None, :]

    if FP32:
        weights = (upper_weights, lower_weights)
        row_highs = highs
        taps = depthwise_weight
    else:
        weights = (stem_weights,)
        row_highs = highs.to(dtype)

    pairs = (pair_offsets, pair_rows, pair_exists)
    singles = (single_offsets, single_rows, single_exists)
    beyond = beyond[:, None]

    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    count = gl.minimum(out_height - first_y, STEPS)
    first = first_y - top  # row of the stem's map
    pixels = load_picture(x, first, count, 0, stem_height, stem_top, x_row, height, pairs, singles, beyond, bias_taps, taps_operand)
    a = start  # the sums of the output rows that this row of the stem's is the last and the middle one of
    b = start
    # Two rows before the first result, then a result a row.
    for early in gl.static_range(2):
        following = load_picture(x, first, count, early + 1, stem_height, stem_top, x_row, height, pairs, singles, beyond, bias_taps, taps_operand)
        mapped = stem_row(pixels, first + early, stem_height, weights, row_highs, mma)
        nothing, a, b = add_row(mapped, a, b, start, taps, left_lane, right_lane, g)
        pixels = following
    # Three at once, so that the sums change their roles by name alone.
    for begin in range(0, STEPS if STEPS <= AT_ONCE else count, AT_ONCE):
        for i in gl.static_range(AT_ONCE):
            row = begin + i
            pixels_after = load_picture(x, first, count, row + 3, stem_height, stem_top, x_row, height, pairs, singles, beyond, bias_taps, taps_operand)
            activated = stem_row(pixels, first + row + 2, stem_height, weights, row_highs, mma)
            total, a, b = add_row(activated, a, b, start, taps, left_lane, right_lane, g)
            pixels = pixels_after
            if FP32:
                filtered = as_depth(to_tf32(clamp(total, 0.0, high)))
            else:
                filtered = activate(total, highest)
            y = mma_v2(gl.convert_layout(filtered, left_operand), project_weights, project_start, input_precision="tf32")
            y = gl.convert_layout(y.reshape([ROWS, COLUMNS // 8, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, COLUMNS]), stores)
            gl.store(out + (stored + (first_y + row) * out_width * out_channels), y.to(dtype), mask=store_mask & (row < count))


# Output rows a program and warps: for few and for many pixels.
SHIPPED = [(1, 1), (15, 1)]
TRIED = [(steps, warps) for steps in (1, 2, 3, 6, 9, 12, 15, 30, 60) for warps in (1, 2, 4)]
POINTERS = ("x", "stem_weight", "stem_bias", "depthwise_weight", "depthwise_bias", "project_weight", "project_bias", "out")
NUMBERS = ("batch", "in_channels", "height", "width", "stem_height", "stem_width", "out_height", "out_width", "out_channels",
           "x_image", "x_channel", "x_row", "x_column", "weight_out", "weight_in", "weight_row", "weight_column", "stem_left", "stem_top", "left", "top")  # fmt: skip


def variants():
    for precision in ("fp16", "bf16", "tf32"):
        for steps, warps in SHIPPED:
            yield variant(precision, True, 16, steps, warps)
        if precision != "tf32":  # it computed wrong numbers on a GPU, as Triton 3.6 compiles it for 9.0
            yield variant(precision, False, 16, 6, 1)


def candidates():
    shipped = {v.name for v in variants()}
    tried = [variant(precision, paired, columns, *tile) for precision in ("fp16", "bf16") for paired in (True, False) for columns in (16, 32) for tile in TRIED]
    tried += [variant("tf32", True, 16, *tile) for tile in TRIED]  # those of 32 columns were wrong as the strided ones were
    # Fewer registers, and the sums are copied.
    tried += [variant(precision, True, columns, steps, warps, 1) for precision in ("fp16", "bf16") for columns in (16, 32) for steps in (3, 6, 12, 15, 30) for warps in (1, 2, 4)]
    yield from (v for v in tried if v.name not in shipped)


def variant(precision, paired, columns, steps, warps, at_once=None):
    """paired: the picture's columns are neighbours in memory, its width even, and so are all other strides."""
    most = 1 if precision == "tf32" else min(steps, 3)  # else the stem's weights, in registers, would push others out
    at_once = at_once or most
    return Variant(
        op="stem_mbconv",
        name=f"{precision}_{'paired' if paired else 'strided'}_{14 * warps}x{columns}_rows{steps}{'' if at_once == most else f'_by{at_once}'}",
        kernel=effnet_stem_mbconv,
        parameters={**{p: "*fp32" if p.endswith("bias") or precision == "tf32" else f"*{precision}" for p in POINTERS}, **{n: "i32" for n in NUMBERS}, "stem_high": "fp32", "high": "fp32"},
        constants={"PAIRED": paired, "COLUMNS": columns, "STEPS": steps, "AT_ONCE": at_once, "WARPS": warps},
        attributes={"precision": PRECISION_CODES[precision], "paired": paired, "columns": columns, "strips": warps, "steps": steps},
        divisible={**{p: 16 for p in POINTERS if p not in ("x", "stem_weight")}, "out_channels": 8,
                   **({"x": 8 if precision == "tf32" else 4, "x_image": 2, "x_channel": 2, "x_row": 2} if paired else {})},
        num_warps=warps,
    )
