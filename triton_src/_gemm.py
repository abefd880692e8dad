"""The matrix product behind the 1x1 convolutions and the linear layer: an accumulator tile over the input channels."""

import triton
import triton.language as tl


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
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator


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
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator
