"""What an op should return, in float64, and how far from it a right computation may end up."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from op_cases import ACTIVATIONS, numbers
from torch import Tensor



class Exact(NamedTuple):
    value: Tensor
    magnitude: Tensor  # what the terms of an element add up to in absolute value
    terms: int  # products that an element's sum is made of
    maps: int = 0  # that are rounded on the way to the result

    def bound(self, dtype: torch.dtype, tf32: bool) -> Tensor:
        """The classical bound of a rounded sum, for every element: an ulp of the result, and of each addition and product
        an ulp of float32 times what the terms add up to. TF32 rounds both factors of a product, by 2^-11 each."""
        arithmetic = (self.terms + 8) * 2.0**-23 + (2.0**-10 if tf32 else 0.0)
        arithmetic += self.maps * torch.finfo(dtype).eps
        bound = torch.finfo(dtype).eps * self.value.abs() + arithmetic * self.magnitude
        bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # what subnormal numbers are multiples of
        return bound.nan_to_num(nan=torch.inf)  # 0 * inf: an infinite term that an activation hid


def exact(
    x, weight, *, bias=None, batch_norm=None, eps=0.0, residual=None, activation="none",
    stride=(1, 1), padding=(0, 0, 0, 0), depthwise=False, pool=False,
) -> Exact:  # fmt: skip
    """activation(batch_norm(conv(x, weight)) + bias + residual), averaged over the image with `pool`; of matrices the product
    x @ weight.T. `batch_norm` is (weight, bias, mean, var). Computed on the CPU."""

    def wide(t):
        return t.detach().cpu().double()

    def product(x, weight):
        if x.dim() == 2:
            return F.linear(x, weight)
        padded = F.pad(x, tuple(padding))
        if not depthwise:
            return F.conv2d(padded, weight, stride=tuple(stride))
        rows, columns = ((size - kernel) // step + 1 for size, kernel, step in zip(padded.shape[2:], weight.shape[2:], stride))
        value = torch.zeros(*x.shape[:2], rows, columns, dtype=x.dtype)
        for y in range(weight.shape[2]):  # torch has no fast depthwise convolution in float64
            for z in range(weight.shape[3]):
                taps = padded[:, :, y : y + (rows - 1) * stride[0] + 1 : stride[0], z : z + (columns - 1) * stride[1] + 1 : stride[1]]
                value += taps * weight[:, 0, y, z, None, None]
        return value

    def channels(vector):
        return wide(vector) if x.dim() == 2 else wide(vector)[:, None, None]

    x, weight = wide(x), wide(weight)
    if x.dim() == 4 and weight.dim() == 2:
        weight = weight[:, :, None, None]
    value, magnitude = product(x, weight), product(x.abs(), weight.abs())
    if batch_norm is not None:
        gamma, beta, mean, var = map(channels, batch_norm)
        scale = gamma / (var + eps).sqrt()
        value, magnitude = (value - mean) * scale + beta, (magnitude + mean.abs()) * scale.abs() + beta.abs()
    if bias is not None:
        value, magnitude = value + channels(bias), magnitude + channels(bias).abs()
    if residual is not None:
        value, magnitude = value + wide(residual), magnitude + wide(residual).abs()
    value = ACTIVATIONS[activation](value)
    terms = weight[0].numel()
    if pool:
        terms += value.shape[2] * value.shape[3]
        value, magnitude = value.mean((2, 3)), magnitude.mean((2, 3))
    return Exact(value, magnitude, terms)


def exact_chain(args: dict) -> Exact:
    """mbconv, expand_depthwise and stem_mbconv: a chain of those of the steps that have a weight. Activations and residual do not make errors larger,
    convolutions as their weights' magnitudes do."""
    x, activation = args["x"], args.get("activation", "relu6")
    window = {name: numbers(args.get(name, 1), count) for name, count in (("stride", 2), ("padding", 4))}
    steps = [("expand", {"activation": activation}), ("depthwise", {"depthwise": True, "activation": activation, **window}), ("project", {"residual": args.get("residual")})]
    stem_window = {"stride": numbers(args.get("stem_stride", 2), 2), "padding": numbers(args.get("stem_padding", 1), 4)}
    steps.insert(0, ("stem", {"activation": args.get("stem_activation", "relu"), **stem_window}))
    steps = [(name, options) for name, options in steps if args.get(f"{name}_weight") is not None]
    value = magnitude = x
    terms = 0
    for name, options in steps:
        weight, bias = args[f"{name}_weight"], args.get(f"{name}_bias")
        step = exact(value, weight, bias=bias, **options)
        above = {key: options[key].abs() if key == "residual" and options[key] is not None else options[key] for key in options if key != "activation"}
        magnitude = exact(magnitude.abs(), weight.abs(), bias=None if bias is None else bias.abs(), **above).value
        value, terms = step.value, terms + step.terms + 8
    return Exact(value, magnitude, terms, maps=len(steps) - 1)


def exact_call(op: str, args: dict) -> Exact:
    """The same for a call of torch.ops.effnet.<op>, with its arguments by name."""
    if op in ("mbconv", "expand_depthwise", "stem_mbconv"):
        return exact_chain(args)
    options = {name: args[name] for name in ("bias", "residual", "activation", "eps") if args.get(name) is not None}
    for name in ("stride", "padding"):
        if name in args:
            options[name] = numbers(args[name], 2 if name == "stride" else 4)
    if "bn_weight" in args:
        options["batch_norm"] = [args[f"bn_{name}"] for name in ("weight", "bias", "mean", "var")]
        options["activation"] = next((name for name in ("relu6", "relu") if name in op), "none")
    return exact(args["x"], args["weight"], depthwise=op.startswith("depthwise"), pool=op.endswith("_pool"), **options)


def assert_exact(actual: Tensor, expected: Exact, tf32: bool = False) -> None:
    """NaN and infinity where they belong, and no element further from the truth than rounding explains."""
    actual = actual.detach().cpu()
    rounded = expected.value.to(actual.dtype)
    assert actual.shape == rounded.shape, f"shape {tuple(actual.shape)}, expected {tuple(rounded.shape)}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        found, wanted = kind(actual), kind(rounded)
        assert torch.equal(found, wanted), f"{kind.__name__} of {int(found.sum())} elements, expected of {int(wanted.sum())}"
    finite = rounded.isfinite()
    if not finite.any():
        return
    difference = (actual.double() - expected.value).abs()[finite]
    excess = difference / expected.bound(actual.dtype, tf32)[finite]
    wrong = f"{int((excess > 1).sum())} of {excess.numel()} elements are off, by up to {difference.max():.2e}"
    assert excess.max() <= 1, f"{wrong} ({excess.max():.1f} times what rounding explains)"
