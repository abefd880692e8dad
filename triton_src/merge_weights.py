"""Two 1x1 convolutions with nothing between them as one:

    out = second @ first;  out_bias = second @ first_bias + second_bias

A block's projection has no activation, so it and the expansion behind it are one product of more numbers and one kernel less: for
few pixels that is faster. A network that is held is prepared so, once (csrc/network.cpp). Sums are float32's, and so is the result,
which narrow_weight.py takes to sixteen bits.
"""

import triton
import triton.language as tl

from ._variant import PRECISION_CODES, Variant


@triton.jit
def effnet_merge_weights(first, first_bias, second, second_bias, out, out_bias, rows, depth, columns,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    column_tiles = tl.cdiv(columns, BLOCK_N)
    o = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_o, in_n = o < rows, n < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # The bias is one column more, of float32; a product has it in all of its columns, where a sum's threads would meet in shared memory.
    bias = tl.load(second_bias + o, mask=in_o, other=0.0)[:, None] + total
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < depth
        a = tl.load(second + o[:, None] * depth + k[None, :], mask=in_o[:, None] & in_k[None, :], other=0.0)
        b = tl.load(first + k[:, None] * columns + n[None, :], mask=in_k[:, None] & in_n[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        column = tl.broadcast_to(tl.load(first_bias + k, mask=in_k, other=0.0)[:, None], (BLOCK_K, BLOCK_N))
        bias = tl.dot(a.to(tl.float32), column, bias, input_precision="ieee")
    tl.store(out + o[:, None] * columns + n[None, :], total, mask=in_o[:, None] & in_n[None, :])
    tl.store(out_bias + o[:, None] + 0 * n[None, :], bias, mask=in_o[:, None] & (n == 0)[None, :])


def variants():
    for precision in ("fp16", "fp32"):
        yield Variant(
            op="merge_weights",
            name=f"{precision}_to_fp32_16x32x16",
            kernel=effnet_merge_weights,
            parameters={"first": f"*{precision}", "first_bias": "*fp32", "second": f"*{precision}", "second_bias": "*fp32", "out": "*fp32", "out_bias": "*fp32",
                        "rows": "i32", "depth": "i32", "columns": "i32"},
            constants={"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16},
            attributes={"precision": PRECISION_CODES[precision], "block_m": 16, "block_n": 32},
        )
