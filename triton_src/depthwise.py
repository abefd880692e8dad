"""Depthwise convolution, kernel 3 or 5: out[y, x, c] = activation(affine(sum_k x[y*s + ky - top, x*s + kx - left, c] w[c, ky, kx])).

Two ways to do it. `effnet_depthwise` computes a flat tile, every output from its k*k neighbours, which the L1 cache
holds: channels_last by pixels (of the whole batch) and channels, NCHW by planes and pixels of a plane; any stride.
`effnet_depthwise_rows` (channels_last, the same stride in both directions) walks down an image: it loads an input row
once for all the output rows that it touches, k loads an input row instead of k*k an output row.
`effnet_depthwise_walk` (the same, and a weight without batch norm, with a float32 bias or none) walks down a column in a loop.
Its taps lie in registers, and an input row is added to the sums of all the output rows that it touches: that is what a 5x5
kernel needs, whose 25 neighbours an output are too many loads.
Padding is a run-time number, and the weight is read through two strides: it may lie channel by channel or tap by tap. The arithmetic is float32 in every precision. A tap outside the image counts as 0 * w.
The last two also compute one narrow map (_narrow.py) from another, with a bias.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ._epilogue import HAS_BIAS, PARAMETERS, activate, apply_affine, load_affine, load_bias
from ._gluon import clamp
from ._launch import wait_for_maps, wait_for_maps_gluon
from ._narrow import map_scale
from ._variant import PRECISION_CODES, Variant, pointers


@triton.jit
def effnet_depthwise(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                     stride_y, stride_x, left, top, weight_channel, weight_tap, eps, low, high, flags,
                     CHANNELS_LAST: tl.constexpr, KERNEL: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    plane = out_height * out_width
    if CHANNELS_LAST:
        channel_tiles = tl.cdiv(channels, BLOCK_C)
        p = (tl.program_id(0) // channel_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        in_c = c < channels
        in_p = p < batch * plane
        image = p // plane
        p_in_plane = p % plane
        where = p[:, None] * channels + c[None, :]
        mask = in_p[:, None] & in_c[None, :]
        accumulator = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    else:
        pixel_tiles = tl.cdiv(plane, BLOCK_P)
        planes = (tl.program_id(0) // pixel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
        p_in_plane = (tl.program_id(0) % pixel_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
        in_c = planes < batch * channels
        in_p = p_in_plane < plane
        c = planes % channels
        where = planes[:, None] * plane + p_in_plane[None, :]
        mask = in_c[:, None] & in_p[None, :]
        accumulator = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    first_y = (p_in_plane // out_width) * stride_y - top
    first_x = (p_in_plane % out_width) * stride_x - left
    wait_for_maps(DEPENDENT_LAUNCH)
    # Only the columns are unrolled: with all taps of a 5x5 kernel in flight the registers do not suffice.
    for ky in tl.range(KERNEL, loop_unroll_factor=1):
        # A row's taps are summed for themselves: shorter sums lose fewer digits.
        row = tl.zeros_like(accumulator)
        for kx in tl.static_range(KERNEL):
            y = first_y + ky
            z = first_x + kx
            inside = in_p & (y >= 0) & (y < height) & (z >= 0) & (z < width)
            w = tl.load(weight + c * weight_channel + (ky * KERNEL + kx) * weight_tap, mask=in_c, other=0.0).to(tl.float32)
            if CHANNELS_LAST:
                neighbour = ((image * height + y) * width + z)[:, None] * channels + c[None, :]
                value = tl.load(x + neighbour, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
                row += value * w[None, :]
            else:
                neighbour = planes[:, None] * (height * width) + (y * width + z)[None, :]
                value = tl.load(x + neighbour, mask=in_c[:, None] & inside[None, :], other=0.0).to(tl.float32)
                row += value * w[:, None]
        accumulator += row
    affine = load_affine(p0, p1, p2, p3, c, in_c, eps, flags)
    if CHANNELS_LAST:
        y = apply_affine(accumulator, affine, 1, out.dtype.element_ty == tl.float32)
    else:
        y = apply_affine(accumulator, affine, 0, out.dtype.element_ty == tl.float32)
    tl.store(out + where, activate(y, low, high).to(out.dtype.element_ty), mask=mask)


@triton.jit
def effnet_depthwise_rows(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                          stride_y, stride_x, left, top, weight_channel, weight_tap, eps, low, high, flags,
                          KERNEL: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    SCALE: tl.constexpr = map_scale(out.dtype.element_ty, weight.dtype.element_ty)
    NARROW: tl.constexpr = SCALE != 1.0
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    column_tiles = tl.cdiv(out_width, BLOCK_P)
    row_tiles = tl.cdiv(out_height, ROWS)
    tile = tl.program_id(0) // channel_tiles
    c = (tl.program_id(0) % channel_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (tile % column_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    first_row = (tile // column_tiles % row_tiles) * ROWS
    image = tile // (column_tiles * row_tiles)
    in_c = c < channels
    taps = ()
    for k in tl.static_range(KERNEL * KERNEL):
        taps = taps + (tl.load(weight + c * weight_channel + k * weight_tap, mask=in_c, other=0.0).to(tl.float32),)
    wait_for_maps(DEPENDENT_LAUNCH)
    sums = ()
    for r in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),)
    for i in tl.static_range((ROWS - 1) * STRIDE + KERNEL):
        y = first_row * STRIDE - top + i
        for kx in tl.static_range(KERNEL):
            z = column * STRIDE - left + kx
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            neighbour = ((image * height + y) * width + z)[:, None] * channels + c[None, :]
            value = tl.load(x + neighbour, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
            added = ()
            for r in tl.static_range(ROWS):
                if (i >= r * STRIDE) and (i < r * STRIDE + KERNEL):
                    added = added + (sums[r] + value * taps[(i - r * STRIDE) * KERNEL + kx][None, :],)
                else:
                    added = added + (sums[r],)
            sums = added
    affine = load_bias(p0, c, in_c, flags, SCALE) if NARROW else load_affine(p0, p1, p2, p3, c, in_c, eps, flags)
    for r in tl.static_range(ROWS):
        y = activate(apply_affine(sums[r], affine, 1, out.dtype.element_ty == tl.float32, NARROW), low * SCALE, high * SCALE)
        where = ((image * out_height + first_row + r) * out_width + column)[:, None] * channels + c[None, :]
        mask = ((column < out_width) & (first_row + r < out_height))[:, None] & in_c[None, :]
        tl.store(out + where, y.to(out.dtype.element_ty), mask=mask)


# Two halves are one word, and stay one until they are added: the compiler would take them apart and keep two registers.
UNPACK_FP16 = gl.constexpr("{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }")
UNPACK_BF16 = gl.constexpr("{ .reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, 0xffff0000; mov.b32 $0, lo; mov.b32 $1, hi; }")
PACK_FP16, PACK_BF16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;"), gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")


@gluon.jit
def words_of(pointer):
    if pointer.dtype.element_ty == gl.float32:
        return pointer
    else:
        return pointer.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def unpacked(words, dtype: gl.constexpr):
    """The channels of words in float32, as a tuple. Here and now: elsewhere the compiler would keep words and channels."""
    if dtype == gl.float32:
        return (words,)
    elif dtype == gl.float16:
        return gl.inline_asm_elementwise(UNPACK_FP16, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=False, pack=1)
    else:
        return gl.inline_asm_elementwise(UNPACK_BF16, "=f,=f,r", [words], dtype=(gl.float32, gl.float32), is_pure=False, pack=1)


@gluon.jit
def packed(channels, dtype: gl.constexpr):
    if dtype == gl.float32:
        return channels[0]
    else:
        return gl.inline_asm_elementwise(PACK_FP16 if dtype == gl.float16 else PACK_BF16, "=r,f,f", [channels[0], channels[1]], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_taps(weight, word, weight_channel, weight_tap, tap_words, exists, KERNEL: gl.constexpr, PARTS: gl.constexpr):
    """The weights of a thread's channels in float32. Tap by tap, and stored as the map is, they are read in words, else one by one."""
    dtype: gl.constexpr = weight.dtype.element_ty
    taps = ()
    for k in gl.static_range(KERNEL * KERNEL * PARTS):
        taps = taps + (gl.zeros_like(word).to(gl.float32),)
    if dtype == gl.float32 and PARTS == 2:
        taps = load_single_taps(weight, word, weight_channel, weight_tap, exists, KERNEL, PARTS)
    elif weight_channel == 1:
        in_words = words_of(weight) + word
        several = ()
        for k in gl.static_range(KERNEL * KERNEL):
            several = several + unpacked(gl.load(in_words, mask=exists, other=0), dtype)
            in_words += tap_words
        taps = several
    else:
        taps = load_single_taps(weight, word, weight_channel, weight_tap, exists, KERNEL, PARTS)
    return taps


@gluon.jit
def load_single_taps(weight, word, weight_channel, weight_tap, exists, KERNEL: gl.constexpr, PARTS: gl.constexpr):
    own = weight + word * (PARTS * weight_channel)
    taps = ()
    for k in gl.static_range(KERNEL * KERNEL):
        for part in gl.static_range(PARTS):
            taps = taps + (gl.load(own + (k * weight_tap + part * weight_channel), mask=exists, other=0.0).to(gl.float32),)
    return taps


@gluon.jit
def load_row(near, iy, height, pitch, words, inside, TAKES: gl.constexpr):
    """Input row iy, or the nearest one of the image, of the columns that a thread takes."""
    pixel = near + gl.minimum(gl.maximum(iy, 0), height - 1) * pitch
    values = ()
    for kx in gl.static_range(TAKES):
        values = values + (gl.load(pixel, mask=inside[kx], other=0),)
        pixel += words
    return values


@gluon.jit
def effnet_depthwise_walk(x, weight, p0, p1, p2, p3, out, batch, channels, height, width, out_height, out_width,
                          stride_y, stride_x, left, top, weight_channel, weight_tap, eps, low, high, flags,
                          KERNEL: gl.constexpr, STRIDE: gl.constexpr, STEPS: gl.constexpr, COLUMNS: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr, DEPENDENT_LAUNCH: gl.constexpr):
    """A thread owns VECTOR words of COLUMNS output columns and STEPS rows of them. The columns of all images lie side by side,
    and words are numbered through all of them, so that no thread is idle whatever the width and the number of channels."""
    TAKES: gl.constexpr = (COLUMNS - 1) * STRIDE + KERNEL  # input columns
    BLOCK: gl.constexpr = 32 * WARPS * VECTOR
    SUMS: gl.constexpr = (KERNEL + STRIDE - 1) // STRIDE  # the output rows that an input row touches
    layout: gl.constexpr = gl.BlockedLayout([VECTOR], [32], [WARPS], [0])
    dtype: gl.constexpr = x.dtype.element_ty
    FP32: gl.constexpr = dtype == gl.float32
    PARTS: gl.constexpr = 1 if FP32 else 2  # channels of a word
    words = channels // PARTS  # of a pixel
    segments = gl.cdiv(out_height, STEPS)
    tile = gl.program_id(0) // segments
    first_row = (gl.program_id(0) - tile * segments) * STEPS
    i = tile * BLOCK + gl.arange(0, BLOCK, layout=layout)
    groups = gl.cdiv(out_width, COLUMNS)
    exists = i < batch * groups * words
    p = i // words
    word = i - p * words
    image = p // groups
    column = (p - image * groups) * COLUMNS
    z = column * STRIDE - left
    weights = load_taps(weight, word, weight_channel, weight_tap, words, exists, KERNEL, PARTS)
    SCALE: gl.constexpr = map_scale(dtype, weight.dtype.element_ty)
    bias = ()
    for part in gl.static_range(PARTS):
        bias = bias + (gl.load(p0 + (word * PARTS + part), mask=exists & ((flags & HAS_BIAS) != 0), other=0.0) * SCALE,)
    # What a row of taps adds above and below the image: nothing, unless a weight is not finite.
    outside = ()
    for ky in gl.static_range(KERNEL):
        for part in gl.static_range(PARTS):
            total = weights[ky * KERNEL * PARTS + part] * 0.0
            for kx in gl.static_range(1, KERNEL):
                total += weights[(ky * KERNEL + kx) * PARTS + part] * 0.0
            outside = outside + (total,)
    inside = ()
    for kx in gl.static_range(TAKES):
        inside = inside + (exists & (z + kx >= 0) & (z + kx < width),)
    pitch = width * words
    near = words_of(x) + ((image * height * width + z) * words + word)
    result = words_of(out) + ((image * out_height * out_width + column) * words + word)

    wait_for_maps_gluon(DEPENDENT_LAUNCH)
    iy = first_row * STRIDE - top
    ahead = ()
    for q in gl.static_range(STRIDE):
        ahead = ahead + (load_row(near, iy + q, height, pitch, words, inside, TAKES),)
    # Half precision starts from the bias. In float32 sums are kept short, which loses fewer digits: a row's taps are summed for
    # themselves, and the bias comes last.
    start = (gl.zeros_like(bias[0]),) if FP32 else bias
    sums = ()
    for j in gl.static_range(SUMS * COLUMNS):
        sums = sums + start
    row = first_row - (SUMS - 1)  # the one that is finished
    rows = gl.minimum(STEPS, out_height - first_row)
    for step in range(rows + (SUMS - 1)):
        following = ()
        for q in gl.static_range(STRIDE):
            values = ()
            for kx in gl.static_range(TAKES):
                values = values + unpacked(ahead[q][kx], dtype)
            # The next row is under way while this one is added.
            following = following + (load_row(near, iy + STRIDE, height, pitch, words, inside, TAKES),)
            if (iy >= 0) & (iy < height):
                several = ()
                for j in gl.static_range(SUMS):
                    for s in gl.static_range(COLUMNS * PARTS):
                        total = sums[j * COLUMNS * PARTS + s]
                        if (SUMS - 1 - j) * STRIDE + q < KERNEL:
                            added = gl.zeros_like(total) if FP32 else total
                            for kx in gl.static_range(KERNEL):
                                added += values[(s // PARTS * STRIDE + kx) * PARTS + s % PARTS] * weights[(((SUMS - 1 - j) * STRIDE + q) * KERNEL + kx) * PARTS + s % PARTS]
                            if FP32:
                                total += added
                            else:
                                total = added
                        several = several + (total,)
                sums = several
            else:
                single = ()
                for j in gl.static_range(SUMS):
                    for s in gl.static_range(COLUMNS * PARTS):
                        if (SUMS - 1 - j) * STRIDE + q < KERNEL:
                            single = single + (sums[j * COLUMNS * PARTS + s] + outside[((SUMS - 1 - j) * STRIDE + q) * PARTS + s % PARTS],)
                        else:
                            single = single + (sums[j * COLUMNS * PARTS + s],)
                sums = single
            iy += 1
        if row >= first_row:
            pixel = result + row * (out_width * words)
            for k in gl.static_range(COLUMNS):
                done = ()
                for part in gl.static_range(PARTS):
                    total = sums[k * PARTS + part]
                    if FP32:
                        total += bias[part]
                    done = done + (clamp(total, low * SCALE, high * SCALE),)
                gl.store(pixel, packed(done, dtype), mask=exists & (column + k < out_width))
                pixel += words
        row += 1
        ahead = following
        rest = ()
        for j in gl.static_range(COLUMNS * PARTS, SUMS * COLUMNS * PARTS):
            rest = rest + (sums[j],)
        for k in gl.static_range(COLUMNS):
            rest = rest + start
        sums = rest


# BLOCK_P, BLOCK_C, warps of the flat kernel
FLAT = {("nhwc", True): (32, 32, 2), ("nhwc", False): (32, 32, 4), ("nchw", False): (64, 2, 4)}
# By kernel size and bytes of an element: stride, then ROWS, BLOCK_P, BLOCK_C, warps of the walking one. Few rows for few
# pixels; many, which load less, where the registers hold them: a 5x5 kernel's 25 taps leave no room.
WALKING = {
    (3, 2): [(1, 8, 8, 64, 4), (1, 8, 8, 32, 2), (1, 4, 8, 32, 4), (2, 8, 8, 64, 4), (2, 4, 8, 32, 2), (2, 2, 8, 32, 4)],
    (3, 4): [(1, 8, 8, 32, 4), (1, 4, 8, 32, 4), (2, 8, 8, 32, 4), (2, 2, 8, 32, 4)],
    (5, 2): [],
    (5, 4): [],
}

# By kernel size: STEPS, COLUMNS, words of a thread, warps of the one that walks in a loop, for both strides. Little for few
# pixels; much, which loads the taps and the rows between two segments less often, for many.
FOLDED = {3: [], 5: [(4, 1, 1, 4), (14, 2, 1, 4)]}

# What tuning tries in channels_last, aligned: BLOCK_P, BLOCK_C, warps of the flat kernel, and ROWS, BLOCK_P, BLOCK_C, warps
# of the walking one, for a 3x3 and for a 5x5 kernel.
FLAT_TRIED = [(p, c, warps) for p in (8, 16, 32) for c in (32, 64) for warps in (4, 2) if 512 <= p * c <= 1024]
WALKING_TRIED = {
    3: [(rows, p, c, warps) for rows in (2, 4, 8) for p in (8, 16, 32) for c in (32, 64) for warps in (4, 2) if 256 <= p * c <= 1024],
    5: [(2, p, c, warps) for p in (4, 8) for c in (32, 64) for warps in (4, 2) if 128 <= p * c <= 512],
}
FOLDED_TRIED = {
    3: [(steps, columns, words, 4) for steps in (4, 14, 28) for columns in (1, 2) for words in (1, 2)],
    5: [(steps, columns, 1, warps) for steps in (2, 4, 7, 14, 28) for columns in (1, 2) for warps in (1, 2, 4) if steps <= 4 or warps > 1],
}


PRECISIONS = ("fp16", "bf16", "fp32", "narrow")  # TF32 is fp32 here


def variants():
    for precision in PRECISIONS:
        for kernel in (3, 5):
            for (layout, aligned), (block_p, block_c, warps) in FLAT.items() if precision != "narrow" else ():
                yield flat(precision, kernel, layout, aligned, block_p, block_c, warps)
            for stride, rows, block_p, block_c, warps in WALKING[kernel, 4 if precision == "fp32" else 2]:
                yield walking(precision, kernel, stride, rows, block_p, block_c, warps)
            for stride in (1, 2):
                for sizes in FOLDED[kernel]:
                    yield folded(precision, kernel, stride, *sizes)


def candidates():
    shipped = {v.name for v in variants()}
    for precision in PRECISIONS:
        for kernel in (3, 5):
            tried = [flat(precision, kernel, "nhwc", True, *sizes) for sizes in FLAT_TRIED if precision != "narrow"]
            tried += [walking(precision, kernel, stride, *sizes) for stride in (1, 2) for sizes in WALKING_TRIED[kernel]]
            tried += [folded(precision, kernel, stride, *sizes) for stride in (1, 2) for sizes in FOLDED_TRIED[kernel]]
            yield from (v for v in tried if v.name not in shipped)


def flat(precision, kernel, layout, aligned, block_p, block_c, warps):
    return Variant(
        op="depthwise",
        name=f"{precision}_k{kernel}_{layout}_{'aligned' if aligned else 'generic'}_w{warps}_{block_p}x{block_c}",
        kernel=effnet_depthwise,
        parameters=signature(precision),
        constants={"CHANNELS_LAST": layout == "nhwc", "KERNEL": kernel, "BLOCK_P": block_p, "BLOCK_C": block_c},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": layout == "nhwc", "aligned": aligned,
                    "kernel": kernel, "stride": 0, "rows": 1, "block_p": block_p, "block_c": block_c},
        divisible={"x": 16, "out": 16, "channels": 8} if aligned else {},
        num_warps=warps,
    )


def walking(precision, kernel, stride, rows, block_p, block_c, warps):
    return Variant(
        op="depthwise",
        name=f"{precision}_k{kernel}_s{stride}_rows_w{warps}_{rows}x{block_p}x{block_c}",
        kernel=effnet_depthwise_rows,
        parameters=signature(precision),
        constants={"KERNEL": kernel, "STRIDE": stride, "ROWS": rows, "BLOCK_P": block_p, "BLOCK_C": block_c},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": 1, "aligned": 1,
                    "kernel": kernel, "stride": stride, "rows": rows, "block_p": block_p, "block_c": block_c},
        divisible={"x": 16, "out": 16, "channels": 8},
        num_warps=warps,
    )


def folded(precision, kernel, stride, steps, columns, words, warps):
    channels = 32 * warps * words * (1 if precision == "fp32" else 2)
    return Variant(
        op="depthwise",
        name=f"{precision}_k{kernel}_s{stride}_folded_w{warps}_{steps}x{columns}x{channels}",
        kernel=effnet_depthwise_walk,
        parameters=signature(precision) | {"p0": "*fp32"},
        constants={"KERNEL": kernel, "STRIDE": stride, "STEPS": steps, "COLUMNS": columns, "VECTOR": words, "WARPS": warps},
        attributes={"precision": PRECISION_CODES[precision], "channels_last": 1, "aligned": 1, "folded": 1,
                    "kernel": kernel, "stride": stride, "rows": steps, "block_p": columns, "block_c": channels},
        divisible={"x": 16, "weight": 16, "out": 16, "channels": 8},
        num_warps=warps,
    )


def signature(precision):
    names = ("x", "weight", "p0", "p1", "p2", "p3", "out")
    numbers = ("batch", "channels", "height", "width", "out_height", "out_width", "stride_y", "stride_x", "left", "top", "weight_channel", "weight_tap")
    return {**pointers(precision, names), **{q: "i32" for q in numbers}, **PARAMETERS}
