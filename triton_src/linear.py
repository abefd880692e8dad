"""Linear layer: out[m, n] = sum_k x[m, k] weight[n, k] + bias[n].

At the batch sizes of inference the weight is nearly all of the traffic, so tiles are narrow in n (many programs share
the reading of the weight) and deep in k (few trips round the loop's latency).
"""

from dataclasses import replace

import triton
import triton.language as tl

from ._epilogue import PARAMETERS, activate, apply_affine, load_affine
from ._gemm import accumulate_rows, accumulate_split_rows
from ._launch import wait_for_maps
from ._variant import PRECISION_CODES, PRECISIONS, Variant, split_schedules, tiles


@triton.jit
def effnet_linear(x, weight, p0, p1, p2, p3, out, rows, out_features, in_features, eps, low, high, flags,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
                  DEPENDENT_LAUNCH: tl.constexpr):
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    m = (tl.program_id(0) // column_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < rows
    in_n = n < out_features
    affine = load_affine(p0, p1, p2, p3, n, in_n, eps, flags)
    wait_for_maps(DEPENDENT_LAUNCH)
    if SPLITS == 1:
        y = accumulate_rows(x, weight, m, n, in_m, in_n, in_features, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    else:
        y = accumulate_split_rows(x, weight, m, n, in_m, in_n, in_features, BLOCK_M, BLOCK_N, BLOCK_K, SPLITS, PRECISION)
    y = activate(apply_affine(y, affine, 1, out.dtype.element_ty == tl.float32), low, high)
    tl.store(out + m[:, None] * out_features + n[None, :], y.to(out.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def effnet_linear_row(x, weight, p0, p1, p2, p3, out, rows, out_features, in_features, eps, low, high, flags,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, DEPENDENT_LAUNCH: tl.constexpr):
    """For one row, or a few: a program's part of the weight, all of its depth, is on its way to the registers before x is there. PARTS times
    BLOCK_K features at most. The sums are made of multiply-adds in float32, a thread's for itself and then all threads'."""
    column_tiles = tl.cdiv(out_features, BLOCK_N)
    m = tl.program_id(0) // column_tiles
    n = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < out_features
    k = tl.arange(0, BLOCK_K)
    weights = ()
    for part in tl.static_range(PARTS):
        inside = part * BLOCK_K + k < in_features
        weights = weights + (tl.load(weight + n[:, None] * in_features + (part * BLOCK_K + k)[None, :], mask=in_n[:, None] & inside[None, :], other=0.0),)
    affine = load_affine(p0, p1, p2, p3, n, in_n, eps, flags)
    wait_for_maps(DEPENDENT_LAUNCH)
    values = ()
    for part in tl.static_range(PARTS):
        values = values + (tl.load(x + m * in_features + part * BLOCK_K + k, mask=part * BLOCK_K + k < in_features, other=0.0),)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for part in tl.static_range(PARTS):
        total += weights[part].to(tl.float32) * values[part].to(tl.float32)[None, :]
    y = activate(apply_affine(tl.sum(total, axis=1)[None, :], affine, 1, out.dtype.element_ty == tl.float32), low, high)
    tl.store(out + m * out_features + n[None, :], y.to(out.dtype.element_ty), mask=in_n[None, :])


# BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
TILES = {
    ("fp16", True): [(16, 16, 256, 4, 3), (64, 64, 64, 4, 3)],
    ("fp16", False): [(32, 32, 64, 4, 2)],
    ("tf32", True): [(16, 16, 128, 4, 3), (64, 64, 32, 4, 3)],
    ("tf32", False): [(32, 32, 32, 4, 2)],
    ("fp32", True): [(16, 16, 128, 4, 2), (64, 64, 16, 8, 2)],
    ("fp32", False): [(32, 32, 16, 4, 2)],
}


# What tuning tries, aligned.
TRIED = {
    "fp16": tiles((16, 32, 64), (16, 32, 64), (64, 128, 256), (256, 4096)),
    "tf32": tiles((16, 32, 64), (16, 32, 64), (32, 64, 128), (256, 4096)),
    "fp32": tiles((16, 64), (16, 32), (16, 32, 64, 128), (256, 2048)),
}


def variants():
    for precision in PRECISIONS:
        for aligned in (True, False):
            for m, n, k, warps, stages in TILES["fp16" if precision == "bf16" else precision, aligned]:
                yield variant(precision, aligned, m, n, k, warps, stages)


def candidates():
    for precision in PRECISIONS:
        for m, n, k in TRIED["fp16" if precision == "bf16" else precision]:
            for warps, stages in ((4, 2), (4, 3), (4, 4)):
                yield variant(precision, True, m, n, k, warps, stages, f"w{warps}s{stages}_")
        for schedule in split_schedules(precision):
            yield variant(precision, True, **schedule)
        # Features out, in at once and at most, and warps.
        for n, part, deep, warps in ((4, 256, 1280, 4), (8, 256, 1280, 4), (8, 256, 1280, 8), (16, 256, 1280, 8), (4, 512, 1024, 4), (8, 512, 1024, 4), (8, 512, 2048, 8)):
            yield row(precision, n, part, deep, warps)


def row(precision, n, part, deep, warps):
    like = variant(precision, True, 1, n, part, warps, 1)
    return replace(
        like,
        name=f"{precision}_row_deep{deep}_w{warps}_1x{n}x{part}",
        kernel=effnet_linear_row,
        constants={"BLOCK_N": n, "BLOCK_K": part, "PARTS": deep // part},
        attributes=like.attributes | {"depth": deep},
        judged=False,  # its registers hold the weight
    )


def variant(precision, aligned, m, n, k, warps, stages, schedule="", splits=1):
    dtype, arithmetic = PRECISIONS[precision]
    return Variant(
        op="linear",
        name=f"{precision}_{'aligned' if aligned else 'generic'}_{schedule}{m}x{n}x{k}",
        kernel=effnet_linear,
        parameters={**{q: f"*{dtype}" for q in ("x", "weight", "p0", "p1", "p2", "p3", "out")},
                    "rows": "i32", "out_features": "i32", "in_features": "i32", **PARAMETERS},
        constants={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PRECISION": arithmetic, "SPLITS": splits},
        attributes={"precision": PRECISION_CODES[precision], "aligned": aligned, "block_m": m, "block_n": n, "depth": 0},
        divisible={"x": 16, "weight": 16, "out": 16, "in_features": 8, "out_features": 8} if aligned else {},
        num_warps=warps,
        num_stages=stages,
        base_warps=max(4, splits),
    )
