"""The weight of a projection or a depthwise step in sixteen bits: each output channel's row times a power of two that takes its largest element to the upper end of
float16, and rounded; and the scale that takes sums of it and of a narrow map (_narrow.py) back.

    out[o] = round(weight[o] * 2^k);  scale[o] = 2^-k / 2^13

So rounded an element has the ten bits of mantissa that TF32 would leave it, unless it is 2^-29 of the row's largest one; and the
tensor cores multiply float16 twice as fast. A block does it on the way to its projection, where that has many pixels; of a network that is
held it is done once (csrc/network.h).
"""

import triton
import triton.language as tl

from ._launch import wait_for_maps
from ._narrow import SCALE
from ._variant import PRECISION_CODES, Variant

NARROW_SCALE = tl.constexpr(SCALE)


@triton.jit
def effnet_narrow_weight(weight, out, scale, rows, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAPS_FIRST: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    """TAPS_FIRST: both lie as (depth, rows)."""
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_N)
    exists = o < rows
    if TAPS_FIRST:
        row, column = o, rows
    else:
        row, column = o * depth, 1
    largest = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, depth, BLOCK_N):
        mask = exists[:, None] & (start + k < depth)[None, :]
        bits = tl.load(weight + row[:, None] + (start + k)[None, :] * column, mask=mask, other=0.0).to(tl.int32, bitcast=True)
        # Absolute values are in the order of their bits; infinity and NaN have no part in it, and stay what they are.
        bits &= 0x7FFFFFFF
        largest = tl.maximum(largest, tl.where(bits < 0x7F800000, bits, 0))
    # To [2^14, 2^15), where float16 still has room; within what float32 has normal numbers for, back and forth.
    exponent = tl.minimum(tl.maximum(127 + 14 - (tl.max(largest, axis=1) >> 23), -113), 113)
    by = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    back = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    wait_for_maps(DEPENDENT_LAUNCH)
    tl.store(scale + o, back / NARROW_SCALE, mask=exists)
    for start in range(0, depth, BLOCK_N):
        mask = exists[:, None] & (start + k < depth)[None, :]
        where = row[:, None] + (start + k)[None, :] * column
        w = tl.load(weight + where, mask=mask, other=0.0)
        tl.store(out + where, (w * by[:, None]).to(tl.float16), mask=mask)


def variants():
    yield variant(taps_first=False, m=4, n=256)
    yield variant(taps_first=True, m=128, n=16)


def variant(taps_first, m, n):
    return Variant(
        op="narrow_weight",
        name=f"fp32_to_fp16_{'taps_first_' if taps_first else ''}{m}x{n}",
        kernel=effnet_narrow_weight,
        parameters={"weight": "*fp32", "out": "*fp16", "scale": "*fp32", "rows": "i32", "depth": "i32"},
        constants={"BLOCK_M": m, "BLOCK_N": n, "TAPS_FIRST": taps_first},
        attributes={"precision": PRECISION_CODES["fp32"], "taps_first": taps_first, "block_m": m, "block_n": n},
        divisible={"weight": 16, "out": 16, "rows" if taps_first else "depth": 8},
    )
