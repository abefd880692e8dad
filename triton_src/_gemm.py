"""The matrix product behind the 1x1 convolutions and the linear layer: an accumulator tile over the input channels.

Two things here are for accuracy alone. TF32: the tensor cores cut a float32 to ten bits of mantissa, so it is rounded
first (half the error, and no bias). Float32: one running sum over all of the depth would collect the rounding errors of
a thousand additions; each BLOCK_K is summed for itself and then added to the total.

Split: with few rows and a deep product a program's time is the latency of its trips, and its warps, side by side along
the columns, all read the same rows from shared memory. Instead each warp multiplies a depth of its own, for the whole tile.
"""

import triton
import triton.language as tl

from ._tf32 import rounding


@triton.jit
def rounded(tile, PRECISION: tl.constexpr):
    """The tile as the tensor cores should see it: float32 rounded to TF32 where they would truncate it."""
    if PRECISION == "tf32" and tile.dtype == tl.float32:
        return tl.inline_asm_elementwise(rounding(), "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tile


@triton.jit
def from_map(tile, weight, PRECISION: tl.constexpr):
    """The same of a tile of a map, which may be a narrow one (_narrow.py): its values are TF32's already."""
    if tile.dtype != weight.dtype:
        return tile.to(weight.dtype)
    else:
        return rounded(tile, PRECISION)


@triton.jit
def accumulate(accumulator, a, b, depth, PRECISION: tl.constexpr):
    if PRECISION == "ieee":
        # The compiler turns dot + accumulator into one long sum again; a factor that it does not know to be 1 forbids that.
        one = (depth > 0).to(tl.float32)
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), one, accumulator)
    else:
        return tl.dot(from_map(a, b, PRECISION), rounded(b, PRECISION), accumulator, input_precision=PRECISION)


@triton.jit
def accumulate_rows(x, weight, rows, columns, row_mask, column_mask, depth,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_M, BLOCK_N) tile of x @ weight^T; x (rows, depth) and weight (columns, depth), both row-major."""
    k = tl.arange(0, BLOCK_K)
    x_tile = x + rows[:, None] * depth + k[None, :]
    weight_tile = weight + columns[None, :] * depth + k[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        a = tl.load(x_tile + start, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(weight_tile + start, mask=column_mask[None, :] & inside[:, None], other=0.0)
        accumulator = accumulate(accumulator, a, b, depth, PRECISION)
    return accumulator


@triton.jit
def accumulate_split_rows(x, weight, rows, columns, row_mask, column_mask, depth,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    """accumulate_rows as a batch of SPLITS products, each over its own BLOCK_K of every SPLITS * BLOCK_K of the depth."""
    k = tl.arange(0, SPLITS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    # What the hint says of the splits is not so. It only ranks them before the rows, as loads are vectorized along the depth
    # alone: the lanes of a warp then run along depth and splits, a thread's loads differ by their rows and share one mask,
    # and shared memory is swizzled by rows. Ranked behind them, 16 rows are swizzled by splits: conflicts on all of the banks.
    x_tile = tl.max_contiguous(x + rows[None, :, None] * depth + k[:, None, :], (2, 1, BLOCK_K))
    weight_tile = tl.max_contiguous(weight + columns[None, None, :] * depth + k[:, :, None], (2, BLOCK_K, 1))
    accumulator = tl.zeros((SPLITS, BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, SPLITS * BLOCK_K):
        inside = start + k < depth
        a = tl.load(x_tile + start, mask=row_mask[None, :, None] & inside[:, None, :], other=0.0)
        b = tl.load(weight_tile + start, mask=column_mask[None, None, :] & inside[:, :, None], other=0.0)
        accumulator = accumulate(accumulator, a, b, depth, PRECISION)
    return sum_of_splits(tl.permute(accumulator, (1, 2, 0)), BLOCK_M, BLOCK_N, SPLITS)


@triton.jit
def sum_of_splits(parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """(BLOCK_M, BLOCK_N, SPLITS) summed over the splits, in pairs: tl.split wants a pair in one thread, so the parts change
    places once, to where the result is stored from. tl.sum leaves a copy of the result in every warp, by way of shuffles."""
    one, other = tl.split(tl.reshape(parts, (BLOCK_M, BLOCK_N, SPLITS // 2, 2)))
    if SPLITS == 2:
        return tl.reshape(one + other, (BLOCK_M, BLOCK_N))
    else:
        return sum_of_splits(one + other, BLOCK_M, BLOCK_N, SPLITS // 2)


@triton.jit
def accumulate_planes(x, weight, pixels, columns, pixel_mask, column_mask, plane, depth,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_N, BLOCK_M) tile of weight @ x; x (depth, plane): the channels of one NCHW image."""
    k = tl.arange(0, BLOCK_K)
    weight_tile = weight + columns[:, None] * depth + k[None, :]
    x_tile = x + k[:, None] * plane + pixels[None, :]
    accumulator = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = start + k < depth
        a = tl.load(weight_tile + start, mask=column_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(x_tile + start * plane, mask=inside[:, None] & pixel_mask[None, :], other=0.0)
        accumulator = accumulate(accumulator, a, b, depth, PRECISION)
    return accumulator
