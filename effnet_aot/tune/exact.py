"""A call in float64, and how far from it rounding may lead.

A right result is off by an ulp of its dtype, and by the roundings of the sum: as many as it has terms, each of at most an
ulp of float32 (TF32: 2^-10 once for a product) times what the terms add up to in absolute value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .calls import four, pair

ACTIVATIONS = {"none": lambda t: t, "relu": F.relu, "relu6": F.relu6}


class Exact(NamedTuple):
    value: torch.Tensor
    bound: torch.Tensor  # on the error of every element: the worst that roundings can do together
    rms_bound: float  # on the error's root mean square, where roundings go up as often as down

    def excess(self, out):
        """The error, as a multiple of what rounding explains; infinite where a number is missing."""
        if out.shape != self.value.shape:
            return float("inf")
        error = (out.double() - self.value).abs_()
        rms, worst = error.square().mean().sqrt() / self.rms_bound, (error / self.bound).max()
        excess = torch.maximum(rms, worst).item()
        return excess if excess == excess else float("inf")


def exact(op, arguments, tf32):
    """Of a folded op's call on tensors that are anywhere; None for an op whose float64 form is not known here."""
    if op not in SUMS:
        return None
    wide = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    absolute = {name: value.abs() if isinstance(value, torch.Tensor) else value for name, value in wide.items()}
    # Activations make no error larger, so the magnitudes pass by them.
    value, magnitude = SUMS[op](wide), SUMS[op]({**absolute, "activation": "none", "stem_activation": "none"})
    weights = [value for name, value in arguments.items() if name.endswith("weight") and value is not None]
    maps = len(weights) - 1  # that are rounded on the way
    terms = sum(weight[0].numel() + 8 for weight in weights) + (arguments["x"][0, 0].numel() if op == "pointwise_pool" else 0)
    info = torch.finfo(arguments["x"].dtype)
    rounding = terms * 2.0**-23 + (2.0**-10 * len(weights) if tf32 else 0.0) + maps * info.eps / 2
    bound = magnitude.mul_(rounding).add_(value.abs(), alpha=info.eps).add_(info.smallest_normal * info.eps)
    relative = (0.55 * info.eps + (2.0**-10 if tf32 else 0.0)) * (1 + maps) + terms**0.5 * 2.0**-24
    return Exact(value, bound, max(relative * value.square().mean().sqrt().item(), info.smallest_normal))


def activated(y, a):
    return ACTIVATIONS[a.get("activation", "none")](y)


def pointwise(a):
    y = (a["x"].permute(0, 2, 3, 1) @ a["weight"].flatten(1).T).permute(0, 3, 1, 2) + bias_of(a, (-1, 1, 1))
    return activated(y if a.get("residual") is None else y + a["residual"], a)


def pointwise_pool(a):
    return pointwise(a).mean((2, 3))


def depthwise(a):
    x, weight, (sy, sx) = F.pad(a["x"], four(a["padding"])), a["weight"], pair(a["stride"])
    rows, columns = ((size - kernel) // step + 1 for size, kernel, step in zip(x.shape[2:], weight.shape[2:], (sy, sx)))
    y = 0
    for i in range(weight.shape[2]):  # torch has no fast depthwise convolution in float64
        for j in range(weight.shape[3]):
            y = y + x[:, :, i : i + (rows - 1) * sy + 1 : sy, j : j + (columns - 1) * sx + 1 : sx] * weight[:, 0, i, j, None, None]
    return activated(y + bias_of(a, (-1, 1, 1)), a)


def conv(a):
    return activated(F.conv2d(F.pad(a["x"], four(a["padding"])), a["weight"], stride=pair(a["stride"])) + bias_of(a, (-1, 1, 1)), a)


def linear(a):
    return F.linear(a["x"], a["weight"]) + bias_of(a, (-1,))


def expand_depthwise(a):
    x, activation = a["x"], a.get("activation", "relu6")
    if a.get("expand_weight") is not None:
        x = pointwise({"x": x, "weight": a["expand_weight"], "bias": a["expand_bias"], "activation": activation})
    window = {"stride": a.get("stride", 1), "padding": a.get("padding", 1)}
    return depthwise({"x": x, "weight": a["depthwise_weight"], "bias": a["depthwise_bias"], "activation": activation, **window})


def mbconv(a):
    return pointwise({"x": expand_depthwise(a), "weight": a["project_weight"], "bias": a["project_bias"], "residual": a.get("residual")})


def stem_mbconv(a):
    stem = {"x": a["x"], "weight": a["stem_weight"], "bias": a["stem_bias"], "stride": a.get("stem_stride", 2), "padding": a.get("stem_padding", 1)}
    return mbconv(a | {"x": conv(stem | {"activation": a.get("stem_activation", "relu")})})


def bias_of(a, shape):
    return 0 if a.get("bias") is None else a["bias"].view(shape)


SUMS = {
    "pointwise": pointwise, "pointwise_pool": pointwise_pool, "depthwise": depthwise, "conv": conv, "linear": linear,
    "expand_depthwise": expand_depthwise, "mbconv": mbconv, "stem_mbconv": stem_mbconv,
}  # fmt: skip
