"""Narrow maps: values of [0, 6] in sixteen bits that lose nothing to TF32.

The hidden maps of a float32 network lie behind ReLU6, and the TF32 product that reads the last of them cuts it to ten bits of
mantissa anyway. Times 2^13 a float16 holds those ten bits of every value down to 7e-9, and 6 is 49152. So such maps take half of
the bytes between the kernels of a block whose weights, sums and ends are float32. In a kernel, a map of float16 beside a weight
of float32 is a narrow one. A product that reads one may have its weight in float16, too: see narrow_weight.py.
"""

import triton
import triton.language as tl

SCALE = 2.0**13


@triton.constexpr_function
def map_scale(stored, weight):
    """By what the values of a map are multiplied, given how it and the kernel's weight are stored."""
    return SCALE if stored == tl.float16 and weight == tl.float32 else 1.0
