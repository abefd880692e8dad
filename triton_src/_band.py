"""The filter of a band of an image's rows, whose pixels a kernel has just computed: the end of expand_depthwise.py and merged_depthwise.py.

A program owns a band of rows and a chunk of the hidden channels. The tensor cores have computed the values of the rows that the
band's windows reach into. They change hands through shared memory, in the map's type: every thread gathers, 16 bytes of channels at a
time, the windows of STEPS output rows of a pixel column, a row once for all the windows that it lies in, and filters. A tap out of
the image is zero whatever the bias. Those are no products with a diagonal matrix as in mbconv.py: NaN would reach the channels beside
it, which stay apart here, and an RTX 4090's tensor cores would need longer.

Channels are renamed so that all that a thread loads or stores lies side by side in memory; the products do not care.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ._gluon import bits, clamp

# As Triton 3.8 and later call it, and as it is called before.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def band_of_program(hidden, height, out_height, band, top, KERNEL: gl.constexpr, STRIDE: gl.constexpr, CHUNK: gl.constexpr):
    """(first of the chunk's channels, image, the band's output rows from and to, the input rows from and to that its windows reach into,
    of those that there are: pixels in a row in memory)."""
    chunks = gl.cdiv(hidden, CHUNK)
    bands = gl.cdiv(out_height, band)
    first_row = gl.program_id(0) // chunks % bands * band
    end_row = gl.minimum(first_row + band, out_height)
    begin = gl.maximum(first_row * STRIDE - top, 0)
    end = gl.minimum((end_row - 1) * STRIDE - top + KERNEL, height)
    return gl.program_id(0) % chunks * CHUNK, gl.program_id(0) // chunks // bands, first_row, end_row, begin, end


@gluon.jit
def from_tiles(tile, WARPS_N: gl.constexpr):
    """(rows, chunk) with the hidden channels, which lie as channel_of_column says, as they lie in memory."""
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
def load_filters(depthwise_weight, depthwise_bias, first_channel, hidden, KERNEL: gl.constexpr, CHUNK: gl.constexpr, SCALE: gl.constexpr, WARPS: gl.constexpr):
    """The filters, and the bias below them, in shared memory, as float32."""
    FILTERS: gl.constexpr = 16 if KERNEL == 3 else 32  # a filter's taps, and a bias
    ones: gl.constexpr = gl.BlockedLayout([1, 1], [32 // min(CHUNK, 32), min(CHUNK, 32)], [WARPS, 1], [1, 0])
    tap = gl.arange(0, FILTERS, layout=gl.SliceLayout(1, ones))
    h = first_channel + gl.arange(0, CHUNK, layout=gl.SliceLayout(0, ones))
    filters = gl.load(depthwise_weight + tap[:, None] * hidden + h[None, :], mask=(tap < KERNEL * KERNEL)[:, None] & (h < hidden)[None, :], other=0.0).to(gl.float32)
    filters += gl.load(depthwise_bias + h[None, :] + gl.zeros_like(tap)[:, None], mask=(tap == KERNEL * KERNEL)[:, None] & (h < hidden)[None, :], other=0.0) * SCALE
    shared_filters = gl.allocate_shared_memory(gl.float32, [FILTERS, CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    shared_filters.store(filters)
    return shared_filters


@gluon.jit
def channel_of_column(column, CHUNK: gl.constexpr, WARPS_N: gl.constexpr):
    """Which of a chunk's channels a column of the products is: as by_tile of expand_depthwise.py orders them."""
    return column // 8 % WARPS_N * (CHUNK // WARPS_N) + column % 8 // 2 * (CHUNK // WARPS_N // 4) + column // (8 * WARPS_N) * 2 + column % 2


@gluon.jit
def filter_band(value, shared_filters, out, image, first_channel, hidden, begin, end, width, first_row, end_row, out_height, out_width, left, top, low, high,
                KERNEL: gl.constexpr, STRIDE: gl.constexpr, STEPS: gl.constexpr, SCALE: gl.constexpr, WARPS: gl.constexpr, WARPS_N: gl.constexpr):
    """Activates the expanded values (pixels of the rows from `begin` to `end`, channels), filters them and stores the output rows."""
    PIXELS: gl.constexpr = value.shape[0]
    CHUNK: gl.constexpr = value.shape[1]
    stored: gl.constexpr = out.dtype.element_ty  # of both maps
    WIDTH: gl.constexpr = 4 if stored == gl.float32 else 8  # channels of a slot
    SLOTS: gl.constexpr = 32 * WARPS * WIDTH // CHUNK
    ROWS: gl.constexpr = (STEPS - 1) * STRIDE + KERNEL  # that a thread's windows reach into
    TAPS: gl.constexpr = power_of_two(ROWS * KERNEL)
    vectors: gl.constexpr = gl.BlockedLayout([1, WIDTH], [32 * WIDTH // CHUNK, CHUNK // WIDTH], [WARPS, 1], [1, 0])
    transposed: gl.constexpr = taps_layout(TAPS, SLOTS, CHUNK, WIDTH, WARPS)

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
