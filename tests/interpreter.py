"""Runs kernels of triton_src/ through Triton's interpreter (numpy, no GPU) and compares them with float64.

A process of its own: triton reads TRITON_INTERPRET when it is imported. Cases come as JSON on stdin, what they gave goes
to stdout.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import math
import sys
import traceback
from fnmatch import fnmatch
from functools import cache
from importlib import import_module
from math import ceil, inf
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from narrow_maps import SCALE, narrow_weight
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).parents[1]))

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}
# Of x, the weight and the result, where a map is narrow: values times SCALE. All else is float32.
NARROW = {
    "narrowing": (torch.float32, torch.float32, torch.float16), "narrow": (torch.float16, torch.float32, torch.float16),
    "widening": (torch.float16, torch.float32, torch.float32), "widening16": (torch.float16, torch.float16, torch.float32),
}  # fmt: skip
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # half an ulp, of the output
SUMS = 1e-5  # of float32 sums of a few hundred products, against the largest result
HAS_BATCH_NORM, HAS_BIAS, VECTORS_ARE_FP32, HAS_RESIDUAL = 1, 2, 4, 8
GUARD = 64  # elements before and after every tensor
ACTIVATIONS = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0)}


def guarded(values):
    """A copy that lies between NaNs, which show up in the result when they are read."""
    buffer = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
    inner = buffer[GUARD:-GUARD]
    inner.copy_(values.reshape(-1))
    return inner


def nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


@cache
def variants(op):
    """Those in Triton: there is no interpreter of Gluon, whose layouts are the hardware's. test_variants_emulated.py
    executes their PTX.
    And of what only candidates have so far, one each: split products of every precision, height and number of splits, resident
    weights and several images of every precision."""
    module = import_module(f"triton_src.{op}")
    tried = {
        (v.precision, *((v.constants["BLOCK_M"], v.constants["SPLITS"]) if "SPLITS" in v.constants else ())): v
        for v in getattr(module, "candidates", list)()
        if v.constants.get("SPLITS", 1) > 1 or v.constants.get("IMAGES", 1) > 1 or v.attributes.get("residents")
    }  # fmt: skip
    return {v.name: v for v in [*module.variants(), *tried.values()] if not isinstance(v.kernel, GluonJITFunction)}


def to_tf32(values):
    """float32 rounded to ten bits of mantissa, ties away from zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.int32)
    return np.where(np.isfinite(values), ((bits + 0x1000) & ~0x1FFF).view(np.float32), values)


def complete_interpreter():
    """What the interpreter of triton 3.7 lacks: it multiplies the bit patterns of bfloat16, rounds to bfloat16 by cutting,
    rounds between the multiplication and the addition of a fused one, passes NaN on where a GPU's minimum and maximum drop it,
    and knows no inline assembly, of which the kernels use one instruction."""
    builder, convert_float = interpreter.InterpreterBuilder, interpreter._convert_float
    create_dot = builder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def convert(values, from_type, to_type, rounding):
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert_float(values, from_type, to_type, rounding)

    def create_inline_asm(self, asm, constraints, handles, types, is_pure, pack):
        assert asm == import_module("triton_src._tf32").TO_BE_CUT.value, f"unknown assembly: {asm}"
        result = interpreter.TensorHandle(to_tf32(handles[0].data), tl.float32)
        return type("Call", (), {"get_result": lambda self, index: result})()

    def create_fma(self, x, y, z):  # of float32: the product is exact in float64
        return interpreter.TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)

    builder.create_fma = create_fma
    builder.create_dot = lambda self, a, b, *others: create_dot(self, widened(a), widened(b), *others)
    builder.create_inline_asm = create_inline_asm
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    interpreter._convert_float = convert


class Case:
    def __init__(self, case):
        self.case = case
        self.variant = variants(case["op"])[case["variant"]]
        self.c = self.variant.constants
        precision = case["variant"].split("_")[0]
        self.narrow = precision in NARROW
        self.x_dtype, self.weight_dtype, self.dtype = NARROW[precision] if self.narrow else [DTYPES[precision]] * 3  # the last is the result's
        self.generator = torch.Generator().manual_seed(0)
        self.epilogue = case.get("epilogue", "bias")

    def random(self, *shape, dtype=None):
        values = torch.randn(shape, generator=self.generator)
        if self.narrow or self.variant.name.startswith("tf32"):  # numbers that TF32 holds, so that it loses nothing
            values = torch.from_numpy(to_tf32(values.numpy()))
        return values.to(dtype or (torch.float32 if self.narrow else self.dtype))

    def lying(self, x, weight):
        """Both as the kernel reads them, and p1 where it is the weight's: a narrow map's values are positive."""
        if self.x_dtype == self.dtype and not self.narrow:
            return x, weight, None
        scale = None
        if self.weight_dtype == torch.float16:
            weight, scale = narrow_weight(weight)
        return (x * SCALE).half() if self.x_dtype == torch.float16 else x, weight, scale

    def vectors(self, channels):
        """p0..p3, the flags, and the epilogue on float64 values (N, C, ...) up to the residual."""
        dtype = torch.float32 if self.narrow or self.case.get("fp32_vectors") else self.dtype
        flags = VECTORS_ARE_FP32 if dtype != self.weight_dtype else 0
        column = (1, -1) + (1,) * (0 if self.case["op"] == "linear" else 2)
        if self.epilogue == "none":
            unused = self.random(channels)
            return [unused] * 4, flags, lambda y: y
        if self.epilogue == "bias":
            bias = self.random(channels, dtype=dtype)
            return [bias] + [torch.full_like(bias, torch.nan)] * 3, flags | HAS_BIAS, lambda y: y + bias.double().view(column)
        weight, bias, mean = (self.random(channels, dtype=dtype) for _ in range(3))
        var = self.random(channels).abs().add(0.5).to(dtype)
        self.eps = 1e-3

        def batch_norm(y):
            w, b, m, v = (t.double().view(column) for t in (weight, bias, mean, var))
            return (y - m) / (v + self.eps).sqrt() * w + b

        return [weight, bias, mean, var], flags | HAS_BATCH_NORM, batch_norm

    def launch(self, grid, tensors, out_numel, numbers, flags, **more):
        """Runs the kernel with a poisoned output between guards; returns the output and what else was written."""
        low, high = ACTIVATIONS[self.case.get("activation", "none")]
        assert self.dtype != torch.float16 or not self.narrow or high == 6.0, "nothing else fits into a narrow map"
        buffer = torch.full((out_numel + 2 * GUARD,), 777.0, dtype=self.dtype)
        out = buffer[GUARD:-GUARD]
        tail = (getattr(self, "eps", 0.0), low, high, flags)
        self.variant.kernel[(grid,)](*tensors, *more.get("residual", ()), out, *numbers, *tail, **self.c, DEPENDENT_LAUNCH=False)
        assert (buffer[:GUARD] == 777).all() and (buffer[-GUARD:] == 777).all(), "wrote outside the output"
        return out.float() / SCALE if self.narrow and self.dtype == torch.float16 else out

    def activate(self, y):
        name = self.case.get("activation", "none")
        return y if name == "none" else F.relu(y) if name == "relu" else F.relu6(y)

    def compare(self, out, expected):
        expected = torch.where(expected.abs() > torch.finfo(self.dtype).max, expected.sign() * inf, expected)
        finite = expected[expected.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 1.0
        torch.testing.assert_close(out.double(), expected, rtol=1.01 * ROUNDING[self.dtype], atol=SUMS * max(1.0, largest), equal_nan=True)

    def image(self, shape):
        x = self.random(*shape)
        if self.narrow and self.x_dtype == torch.float16:
            x = x.abs().clamp(max=6)
        for value, place in self.case.get("special", []):
            x[tuple(place)] = float(value)
        return x


class Pointwise(Case):
    pooled = False

    def run(self):
        n, k, h, w, o = self.case["shape"]
        rows = self.c.get("CHANNELS_LAST", True)
        x, weight = self.image((n, k, h, w)), self.random(o, k)
        vectors, flags, affine = self.vectors(o)
        y = affine(torch.einsum("nkhw,ok->nohw", x.double(), weight.double()))
        residual = {}
        if not self.pooled:
            r = self.random(n, o, h, w)
            residual["residual"] = (guarded(nhwc(r) if rows else r),)
            if self.case.get("residual"):
                flags |= HAS_RESIDUAL
                y = y + r.double()
        y = self.activate(y)
        x, weight, scale = self.lying(x, weight)
        vectors[1] = vectors[1] if scale is None else scale
        tensors = [guarded(nhwc(x) if rows else x), guarded(weight), *map(guarded, vectors)]
        tiles_n = ceil(o / self.c["BLOCK_N"])
        if self.pooled:
            out = self.launch(ceil(n / self.c["IMAGES"]) * tiles_n, tensors, n * o, (n, h * w, o, k), flags)
            return self.compare(out.view(n, o), y.mean((2, 3)))
        pixels, images = (n * h * w, 1) if rows else (h * w, n)
        programs = 2 if self.variant.attributes.get("residents") else images * ceil(pixels / self.c["BLOCK_M"])  # for a tile of channels
        out = self.launch(programs * tiles_n, tensors, n * o * h * w, (pixels, o, k), flags, **residual)
        self.compare(out.view(n, h, w, o).permute(0, 3, 1, 2) if rows else out.view(n, o, h, w), y)


class PointwisePool(Pointwise):
    pooled = True


class Depthwise(Case):
    def run(self):
        n, c, h, w = self.case["shape"]
        kernel, (sy, sx), (left, right, top, bottom) = self.c["KERNEL"], self.case["stride"], self.case["padding"]
        rows = self.c.get("CHANNELS_LAST", True)
        x, weight = self.image((n, c, h, w)), self.random(c, 1, kernel, kernel)
        vectors, flags, affine = self.vectors(c)
        y = F.conv2d(F.pad(x.double(), (left, right, top, bottom)), weight.double(), stride=(sy, sx), groups=c)
        y = self.activate(affine(y))
        out_h, out_w = y.shape[2:]
        if "ROWS" in self.c:  # the kernel that walks down an image
            pixels, channels = n * ceil(out_h / self.c["ROWS"]) * ceil(out_w / self.c["BLOCK_P"]) * self.c["BLOCK_P"], c
        elif rows:
            pixels, channels = n * out_h * out_w, c
        else:
            pixels, channels = out_h * out_w, n * c
        grid = ceil(pixels / self.c["BLOCK_P"]) * ceil(channels / self.c["BLOCK_C"])
        taps_first = self.case.get("taps_first", False)
        x, *_ = self.lying(x, weight)
        lying, strides = (weight.flatten(1).t(), (1, c)) if taps_first else (weight, (kernel * kernel, 1))
        tensors = [guarded(nhwc(x) if rows else x), guarded(lying), *map(guarded, vectors)]
        out = self.launch(grid, tensors, y.numel(), (n, c, h, w, out_h, out_w, sy, sx, left, top, *strides), flags)
        self.compare(out.view(n, out_h, out_w, c).permute(0, 3, 1, 2) if rows else out.view(n, c, out_h, out_w), y)


class Conv(Case):
    def run(self):
        n, k, h, w, o = self.case["shape"]
        (ky, kx), (sy, sx), padding = self.case["kernel"], self.case["stride"], self.case["padding"]
        x, weight = self.image((n, k, h, w)), self.random(o, k, ky, kx)
        vectors, flags, affine = self.vectors(o)
        y = self.activate(affine(F.conv2d(F.pad(x.double(), padding), weight.double(), stride=(sy, sx))))
        out_h, out_w = y.shape[2:]
        lying, strides = self.lay(x)
        grid = n * ceil(out_h * out_w / self.c["BLOCK_M"]) * ceil(o / self.c["BLOCK_N"])
        numbers = (k, h, w, o, out_h, out_w, ky, kx, sy, sx, padding[0], padding[2], *strides, *weight.stride())
        out = self.launch(grid, [lying, guarded(weight), *map(guarded, vectors)], y.numel(), numbers, flags)
        self.compare(out.view(n, out_h, out_w, o).permute(0, 3, 1, 2) if self.c["CHANNELS_LAST"] else out.view(n, o, out_h, out_w), y)

    def lay(self, x):
        """The input in memory, and its strides: dense, or every second row and column of a larger picture of NaNs."""
        n, k, h, w = x.shape
        if self.case.get("x") == "nhwc":
            return guarded(nhwc(x)), (h * w * k, 1, w * k, k)
        if self.case.get("x") == "view":
            larger = torch.full((n, k, 2 * h, 2 * w), torch.nan, dtype=x.dtype)
            larger[:, :, ::2, ::2] = x
            return larger.view(-1), larger[:, :, ::2, ::2].stride()
        return guarded(x), x.stride()


class Linear(Case):
    def run(self):
        m, k, n = self.case["shape"]
        x, weight = self.image((m, k)), self.random(n, k)
        vectors, flags, affine = self.vectors(n)
        y = self.activate(affine(x.double() @ weight.double().T))
        grid = ceil(m / self.c["BLOCK_M"]) * ceil(n / self.c["BLOCK_N"])
        out = self.launch(grid, [guarded(x), guarded(weight), *map(guarded, vectors)], m * n, (m, n, k), flags)
        self.compare(out.view(m, n), y)


class NarrowWeight(Case):
    def run(self):
        rows, depth = self.case["shape"]
        weight = self.random(rows, depth, dtype=torch.float32) * torch.logspace(-30, 30, rows)[:, None]
        weight[0] = 0
        for value, place in self.case.get("special", []):
            weight[tuple(place)] = float(value)
        expected = narrow_weight(weight)
        buffers = [torch.full((count + 2 * GUARD,), 777.0, dtype=dtype) for count, dtype in ((rows * depth, torch.float16), (rows, torch.float32))]
        out, scale = (b[GUARD:-GUARD] for b in buffers)
        as_it_lies = weight.T.contiguous() if self.c["TAPS_FIRST"] else weight
        self.variant.kernel[(ceil(rows / self.c["BLOCK_M"]),)](guarded(as_it_lies), out, scale, rows, depth, **self.c, DEPENDENT_LAUNCH=False)
        for b in buffers:
            assert (b[:GUARD] == 777).all() and (b[-GUARD:] == 777).all(), "wrote outside the output"
        out = out.view(depth, rows).T if self.c["TAPS_FIRST"] else out.view(rows, depth)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(scale, expected[1], rtol=0, atol=0)


class FoldBatchNorm(Case):
    def run(self):
        shape, out_dtype = self.case["shape"], DTYPES[self.variant.name.split("_")[2]]
        channels, elements, taps_first = shape[0], math.prod(shape[1:]), self.case.get("taps_first", False)
        weight = self.image(shape)
        (gamma, beta, mean, var), flags, _ = self.vectors(channels)
        scale = gamma.double() / (var.double() + self.eps).sqrt()
        buffers = [torch.full((count + 2 * GUARD,), 777.0, dtype=dtype) for count, dtype in ((channels * elements, out_dtype), (channels, torch.float32))]
        out, bias = (b[GUARD:-GUARD] for b in buffers)
        lying, strides = (guarded(nhwc(weight)), nhwc(weight).permute(0, 3, 1, 2).stride()) if self.case.get("nhwc") else (guarded(weight), weight.stride())
        grid = ceil(channels / self.c["BLOCK_M"]) * ceil(elements / self.c["BLOCK_N"])
        numbers = (*shape, *strides, *((1, channels) if taps_first else (elements, 1)), self.eps, flags)
        self.variant.kernel[(grid,)](lying, *map(guarded, (gamma, beta, mean, var)), out, bias, *numbers, **self.c)
        for b in buffers:
            assert (b[:GUARD] == 777).all() and (b[-GUARD:] == 777).all(), "wrote outside the output"
        out = out.view(elements, channels).t() if taps_first else out.view(channels, elements)
        self.close(out, weight.double().flatten(1) * scale[:, None])
        self.close(bias, beta.double() - mean.double() * scale)

    def close(self, out, expected):
        """eps is no float32."""
        torch.testing.assert_close(out.double(), expected, rtol=1.01 * ROUNDING[out.dtype], atol=2.0**-24 * ROUNDING[torch.float32], equal_nan=True)


OPS = {"pointwise": Pointwise, "pointwise_pool": PointwisePool, "depthwise": Depthwise, "conv": Conv, "linear": Linear, "fold_batch_norm": FoldBatchNorm, "narrow_weight": NarrowWeight}


def attempt(case):
    """{variant: what was wrong, "" where nothing was} for the variants that a case's pattern names."""
    outcome = {}
    for name in variants(case["op"]):
        if fnmatch(name, case["variant"]) and (name.split("_")[0] in NARROW) == case.get("narrow", False):
            try:
                OPS[case["op"]](case | {"variant": name}).run()
                outcome[name] = ""
            except Exception:
                outcome[name] = traceback.format_exc()
    return outcome


if __name__ == "__main__":
    torch.set_num_threads(1)
    complete_interpreter()
    cases = json.load(sys.stdin)
    print(json.dumps({"outcomes": [attempt(case) for case in cases], "variants": {op: list(variants(op)) for op in OPS}}))
