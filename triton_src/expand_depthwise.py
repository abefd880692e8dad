"""The first two steps of an MBConv block in one kernel: out = activation(depthwise(activation(x * expand^T + b)) + b').

For maps of few pixels and many channels, where the expanded map would go through the caches twice. A program owns a band of
an image's rows, the whole image where it fits, and a chunk of the hidden channels. First the tensor cores compute the expanded
values of the band, with the rows that its windows reach into. Then they change hands through shared memory, in the map's type:
every thread gathers, 16 bytes of channels at a time, the windows of STEPS output rows of a pixel column, a row once for all the
windows that it lies in, and filters. A tap out of the image is zero whatever the bias.

Channels are renamed so that all that a thread loads or stores lies side by side in memory; the products do not care. Sums
are float32's: in the products of the tensor cores, whose operands are TF32 where the map is float32, and in the multiply-adds
of the filter. Those are no products with a diagonal matrix as in mbconv.py: NaN would reach the channels beside it, which stay
apart here, and an RTX 4090's tensor cores would need longer. In Gluon, for its control over register layouts and shared memory;
the compiler puts the barriers. Wants channels_last, float32 biases and the depthwise weight stored tap by tap. With float32 input
both maps may be narrow ones (_narrow.py).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from ._gluon import bits, clamp, to_tf32
from ._launch import wait_for_maps_gluon
from ._narrow import map_scale
from ._variant import PRECISION_CODES, Variant, pointers

# As Triton 3.8 and later call it, and as it is called before.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


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
def from_tiles(tile, WARPS_N: gl.constexpr):
    """(rows, chunk) with the hidden channels as they lie in memory again."""
    ROWS: gl.constexpr = tile.shape[0]
    CHUNK: gl.constexpr = tile.shape[1]
    return tile.reshape([ROWS, CHUNK // WARPS_N // 8, WARPS_N, 4, 2]).permute([0, 2, 3, 1, 4]).reshape([ROWS, CHUNK])


@gluon.constexpr_function
def taps_layout(taps, slots, chunk, vector, warps):
    """Of (chunk, taps * slots): a thread has `vector` channels of a slot, of all taps."""
    rows = 32 * vector // chunk
    return gl.DistributedLinearLayout([[b, 0] for b in bits(vector)] + [[0, b] for b in bits(taps, slots)], [[b, 0] for b in bits(chunk // vector, vector)] + [[0, b] for b in bits(rows)],
                                      [[0, b] for b in bits(warps, rows)], [], [chunk, taps * slots])


@gluon.jit
def split_taps(tile, TAPS: gl.constexpr):
    """(TAPS * slots, chunk) as a tuple of (slots, chunk)."""
    if TAPS == 1:
        return (tile,)
    else:
        first, second = tile.reshape([2, tile.shape[0] // 2, tile.shape[1]]).permute([1, 2, 0]).split()
        return split_taps(first, TAPS // 2) + split_taps(second, TAPS // 2)


@gluon.constexpr_function
def power_of_two(number):
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


@gluon.jit
def tap_of(place, i, kx, first_row, out_width, left, top, STRIDE: gl.constexpr, STEPS: gl.constexpr):
    """Row and column in the input of the tap in row i and column kx of the windows of a thread's STEPS output rows."""
    return (first_row + place // out_width * STEPS) * STRIDE - top + i, place % out_width * STRIDE - left + kx


@gluon.jit
def keep(value, inside):
    """The value inside, zero elsewhere, also instead of NaN: all of its bits or none."""
    if value.dtype == gl.float32:
        return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [value, gl.where(inside, -1, 0)], dtype=value.dtype, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [value, gl.where(inside, -1, 0).to(gl.int16)], dtype=value.dtype, is_pure=True, pack=2)


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
    stored: gl.constexpr = out.dtype.element_ty  # of both maps
    SCALE: gl.constexpr = map_scale(stored, dtype)
    WIDTH: gl.constexpr = 4 if stored == gl.float32 else 8  # channels of a slot
    SLOTS: gl.constexpr = 32 * WARPS * WIDTH // CHUNK
    FILTERS: gl.constexpr = 16 if KERNEL == 3 else 32  # a filter's taps, and a bias
    ROWS: gl.constexpr = (STEPS - 1) * STRIDE + KERNEL  # that a thread's windows reach into
    TAPS: gl.constexpr = power_of_two(ROWS * KERNEL)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_M, WARPS_N], [16, 8])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, mma, 1 if FP32 else 2)
    right_operand: gl.constexpr = gl.DotOperandLayout(1, mma, 1 if FP32 else 2)
    of_pixels: gl.constexpr = pixels_layout(PIXELS, DEPTH, WARPS_M, WARPS_N)
    of_weights: gl.constexpr = weights_layout(CHUNK, DEPTH, WARPS_M, WARPS_N)
    copies: gl.constexpr = gl.BlockedLayout([1, VECTOR], [8, 4], [WARPS, 1], [1, 0])
    vectors: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 * WIDTH // CHUNK, CHUNK // WIDTH], [WARPS, 1], [1, 0])
    transposed: gl.constexpr = taps_layout(TAPS, SLOTS, CHUNK, WIDTH, WARPS)
    ones: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(CHUNK, 32), min(CHUNK, 32)], [WARPS, 1], [1, 0])

    chunks = gl.cdiv(hidden, CHUNK)
    bands = gl.cdiv(out_height, band)
    first_channel = gl.program_id(0) % chunks * CHUNK
    image = gl.program_id(0) // chunks // bands
    first_row = gl.program_id(0) // chunks % bands * band
    end_row = gl.minimum(first_row + band, out_height)
    # The input rows that the band's windows reach into, of those that there are: pixels in a row in memory.
    begin = gl.maximum(first_row * STRIDE - top, 0)
    end = gl.minimum((end_row - 1) * STRIDE - top + KERNEL, height)
    pixels = (end - begin) * width

    weights_parts = ()  # one by one: the compiler would put a barrier between writes to parts of one allocation
    for _ in gl.static_range(PARTS):
        weights_parts = weights_parts + (gl.allocate_shared_memory(dtype, [CHUNK, DEPTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),)
    copy_weights(expand_weight, first_channel, 0, weights_parts, in_channels, hidden, copies)
    # The filters, and the bias below them, wait in shared memory, as float32.
    tap = gl.arange(0, FILTERS, layout=gl.SliceLayout(1, ones))
    h = first_channel + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, ones))
    filters = gl.load(depthwise_weight + tap[:, None] * hidden + h[None, :], mask=(tap < KERNEL * KERNEL)[:, None] & (h < hidden)[None, :], other=0.0).to(gl.float32)
    filters += gl.load(depthwise_bias + h[None, :] + gl.zeros_like(tap)[:, None], mask=(tap == KERNEL * KERNEL)[:, None] & (h < hidden)[None, :], other=0.0) * SCALE
    shared_filters = gl.allocate_shared_memory(gl.float32, [FILTERS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    shared_filters.store(filters)
    column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, mma))
    h = first_channel + column // 8 % WARPS_N * (CHUNK // WARPS_N) + column % 8 // 2 * (CHUNK // WARPS_N // 4) + column // (8 * WARPS_N) * 2 + column % 2
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

    # Read back by pixels: a gather lays its source out with the first dimension side by side, so channels are the first.
    expanded = from_tiles((clamp(value, low, high) * SCALE).to(stored), WARPS_N).permute([1, 0])
    item = gl.arange(0, TAPS * SLOTS, layout=gl.SliceLayout(0, transposed))
    slot = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, vectors))
    c = first_channel + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, vectors))
    columns = gl.cdiv(end_row - first_row, STEPS) * out_width
    for first in range(0, columns, SLOTS):
        iy, iz = tap_of(first + item % SLOTS, item // SLOTS // KERNEL, item // SLOTS % KERNEL, first_row, out_width, left, top, STRIDE, STEPS)
        # Masked, so that the compiler sees that it is a pixel, and loads all of a thread's channels at once.
        where = ((iy - begin) * width + iz) & (PIXELS - 1)
        taps = split_taps(gl.gather(expanded, (where[None, :] + gl.zeros([CHUNK, TAPS * SLOTS], gl.int32, layout=transposed)), 1).permute([1, 0]), TAPS)
        sums = ()
        for r in gl.static_range(STEPS):
            sums = sums + (shared_filters.slice(KERNEL * KERNEL, 1, 0).load(vectors) + gl.zeros([SLOTS, CHUNK], gl.float32, layout=vectors),)
        for kx in gl.static_range(KERNEL):
            weights = ()
            for ky in gl.static_range(KERNEL):
                weights = weights + (shared_filters.slice(ky * KERNEL + kx, 1, 0).load(vectors),)
            for i in gl.static_range(ROWS):
                iy, iz = tap_of(first + slot, i, kx, first_row, out_width, left, top, STRIDE, STEPS)
                inside = (iy >= begin) & (iy < end) & (iz >= 0) & (iz < width)
                v = keep(gl.convert_layout(taps[i * KERNEL + kx], vectors), inside[:, None]).to(gl.float32)
                added = ()
                for r in gl.static_range(STEPS):
                    if i >= r * STRIDE and i < r * STRIDE + KERNEL:
                        added = added + (sums[r] + v * weights[i - r * STRIDE],)
                    else:
                        added = added + (sums[r],)
                sums = added
        row = first_row + (first + slot) // out_width * STEPS
        z = (first + slot) % out_width
        for r in gl.static_range(STEPS):
            to = ((image * out_height + row + r) * out_width + z)[:, None] * hidden + c[None, :]
            gl.store(out + to, clamp(sums[r], low * SCALE, high * SCALE).to(stored), mask=(row + r < end_row)[:, None] & (c < hidden)[None, :])


# Kernel 3 alone: with 25 taps in shared memory it took longer than the two steps (at batch 1, 14x14x480, 5.7 us and 4.3 on an H200).
# By bytes of an element of x and of the maps: pixels of a band, hidden channels of a chunk, parts of 64 bytes of input channels,
# output rows a thread, and warps along pixels and along hidden channels. A 15x15 map is one band of 256 pixels; where that
# makes too few programs for all multiprocessors, smaller bands and chunks do.
SHIPPED = {
    (2, 2): [(256, 32, 3, 2, 8, 1), (64, 32, 6, 2, 4, 1), (64, 16, 6, 1, 4, 1)],
    (4, 4): [(256, 16, 3, 4, 8, 1), (64, 32, 4, 2, 4, 1), (64, 16, 6, 1, 4, 1)],
    (4, 2): [(256, 32, 3, 2, 8, 1), (64, 32, 4, 2, 4, 1), (64, 16, 6, 1, 4, 1)],
}
# What tuning tries besides.
TRIED = {
    (2, 2): [(256, 32, 2, 4, 8, 1), (256, 32, 2, 2, 8, 1), (256, 32, 3, 4, 8, 1), (256, 32, 4, 4, 8, 1), (256, 64, 2, 4, 8, 1), (256, 64, 3, 4, 8, 1), (256, 16, 3, 4, 8, 1), (256, 16, 4, 2, 8, 1),
        (128, 32, 3, 2, 4, 1), (128, 32, 4, 4, 8, 1), (128, 16, 3, 2, 8, 1), (128, 16, 3, 1, 4, 1), (128, 16, 4, 1, 8, 1),
        (64, 32, 3, 2, 4, 1), (64, 32, 6, 1, 4, 2), (64, 64, 3, 2, 4, 2), (64, 64, 6, 2, 4, 2), (64, 16, 3, 1, 4, 1), (64, 16, 6, 2, 2, 1)],
    (4, 4): [(256, 16, 2, 4, 8, 1), (256, 16, 5, 4, 8, 1), (256, 32, 2, 4, 8, 1), (256, 32, 3, 4, 8, 1),
        (128, 32, 4, 2, 8, 1), (128, 16, 5, 2, 8, 1), (128, 16, 5, 1, 4, 1),
        (64, 32, 6, 2, 4, 2), (64, 32, 4, 1, 4, 1), (64, 64, 4, 2, 4, 2), (64, 16, 4, 2, 4, 1), (64, 16, 6, 1, 2, 1)],
}  # fmt: skip
TRIED[4, 2] = [*TRIED[4, 4], (256, 16, 3, 4, 8, 1), (128, 32, 4, 4, 8, 1), (128, 16, 3, 2, 8, 1), (64, 32, 6, 2, 4, 1), (64, 64, 6, 2, 4, 2), (64, 16, 6, 2, 4, 1)]
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
    )
