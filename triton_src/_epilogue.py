"""What follows the accumulator: batch norm or bias, residual, activation. One code for every op and every case.

All choices but the data type are made at run time, by `flags` and the clamp bounds, because they cost a few scalar
branches on vectors of one channel tile and would otherwise multiply the number of kernels by 24. One exception: the compiler
computes batch norm and bias both and selects, so the kernels that networks spend their time in have variants without the norm.
"""

import triton
import triton.language as tl

HAS_BATCH_NORM = tl.constexpr(1)  # (p0, p1, p2, p3) are weight, bias, mean, var; otherwise p0 is the bias
HAS_BIAS = tl.constexpr(2)
VECTORS_ARE_FP32 = tl.constexpr(4)  # p0..p3 are float32 whatever the type of x
HAS_RESIDUAL = tl.constexpr(8)

# The run-time parameters that every kernel with this epilogue takes, after its data pointers and sizes.
PARAMETERS = {"eps": "fp32", "low": "fp32", "high": "fp32", "flags": "i32"}


@triton.jit
def load_vector(pointer, offsets, mask, flags):
    if (flags & VECTORS_ARE_FP32) != 0:
        values = tl.load(pointer.to(tl.pointer_type(tl.float32)) + offsets, mask=mask, other=0.0)
    else:
        values = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def load_affine(p0, p1, p2, p3, channels, mask, eps, flags):
    """(center, scale, rest, shift) with y = (accumulator - center) * (scale + rest) + shift.

    The mean is subtracted before scaling, as PyTorch does: folding it into the shift would lose digits where the mean
    is large against the deviation. `rest` is what the root and the division lost to rounding, which would be the same
    for all pixels of a channel and survive their average.
    """
    center = tl.zeros_like(channels).to(tl.float32)
    scale = center + 1.0
    rest = center
    shift = center
    if (flags & HAS_BATCH_NORM) != 0:
        center = load_vector(p2, channels, mask, flags)
        variance = load_vector(p3, channels, mask, flags) + eps
        weight = load_vector(p0, channels, mask, flags)
        shift = load_vector(p1, channels, mask, flags)
        deviation = tl.sqrt_rn(variance)
        scale = weight / deviation
        root_excess = tl.fma(deviation, deviation, -variance)
        division_rest = tl.fma(-scale, deviation, weight)
        rest = (division_rest + 0.5 * scale * root_excess / deviation) / deviation
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    elif (flags & HAS_BIAS) != 0:
        shift = load_vector(p0, channels, mask, flags)
    return center, scale, rest, shift


@triton.jit
def load_bias(p0, channels, mask, flags, OUT_SCALE: tl.constexpr = 1.0):
    """The same where there is no batch norm: only the shift counts (see FOLDED in apply_affine), here of a map with a scale."""
    shift = tl.zeros_like(channels).to(tl.float32)
    if (flags & HAS_BIAS) != 0:
        shift = load_vector(p0, channels, mask, flags)
    if OUT_SCALE != 1.0:
        shift *= OUT_SCALE
    return shift, shift, shift, shift


@triton.jit
def along(vector, AXIS: tl.constexpr):
    """The vector as a tile of one column (AXIS 0) or one row (AXIS 1), to be broadcast."""
    if AXIS == 0:
        return vector[:, None]
    else:
        return vector[None, :]


@triton.jit
def apply_affine(accumulator, affine, AXIS: tl.constexpr, EXACT: tl.constexpr, FOLDED: tl.constexpr = False, SCALE: tl.constexpr = 1.0):
    """The accumulator tile normalised; channels run along AXIS. EXACT where the output has float32's digits to lose.
    FOLDED: batch norm is in the weights already, and only the shift is added, to SCALE times the accumulator."""
    center, scale, rest, shift = affine
    if FOLDED and SCALE != 1.0:
        return accumulator * SCALE + along(shift, AXIS)
    if FOLDED:
        return accumulator + along(shift, AXIS)
    deviation = accumulator - along(center, AXIS)
    y = tl.fma(deviation, tl.broadcast_to(along(scale, AXIS), deviation.shape), tl.broadcast_to(along(shift, AXIS), deviation.shape))
    if EXACT:
        correction = deviation * along(rest, AXIS)
        y += tl.where(tl.abs(correction) < float("inf"), correction, 0.0)  # infinity is scaled already
    return y


@triton.jit
def activate(y, low, high):
    """none, relu and relu6 as a clamp; NaN stays NaN, as in PyTorch (plain min and max would drop it)."""
    y = tl.maximum(y, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)
