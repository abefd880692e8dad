"""A whole MBConv block with batch norm folded in: expand, depthwise, project, residual."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import mbconv_backward
from .registration import call, register
from .rules import Mbconv, check_mbconv, check_pointwise, empty_image


def mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: str = "relu6",
) -> Tensor:
    """pointwise(depthwise(pointwise(x, expand_weight, expand_bias, None, activation), depthwise_weight, depthwise_bias, stride,
    padding, activation), project_weight, project_bias, residual), without the first where expand_weight is None. The border
    that padding adds is zero after the activation.

    x (N, C_in, H, W); expand_weight (C, C_in, 1, 1) or (C, C_in) or None, where C = C_in; depthwise_weight (C, 1, k, k),
    k = 3 or 5, fastest when taps_first() arranged it; project_weight (C_out, C, 1, 1) or (C_out, C); biases (C,), (C,),
    (C_out,) or None, of one dtype; residual like the result or None; stride 1 or 2, or (vertical, horizontal); padding
    (left, right, top, bottom). Returns (N, C_out, H', W'), H' = (H + top + bottom - k) // stride + 1. Dtypes, layouts and
    errors: see effnet_aot.ops.
    """
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    return call(torch.ops.effnet.mbconv, x, *weights, residual, stride, padding, activation)


def taps_first(weight: Tensor) -> Tensor:
    """The depthwise weight (C, 1, k, k) with the same values, in memory tap by tap: the order in which the kernels read it
    fastest. All ops take it in any order."""
    channels = weight.shape[0]
    return weight.reshape(channels, -1).t().contiguous().t().view(weight.shape)


def decomposed(
    x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, residual=None, stride=1, padding=1, activation="relu6"
):
    """The same by the ops of the three steps."""
    ops = torch.ops.effnet
    if expand_weight is not None:
        x = ops.pointwise(x, expand_weight, expand_bias, None, activation)
    x = ops.depthwise(x, depthwise_weight, depthwise_bias, stride, padding, activation)
    return ops.pointwise(x, project_weight, project_bias, residual)


def _fake(*args):
    project = check_mbconv(Mbconv("mbconv", *args))
    return empty_image(project, check_pointwise(project))


def _setup_context(ctx, inputs, output):
    c = Mbconv("mbconv", *inputs)
    ctx.save_for_backward(*c[1:8])
    ctx.call = c._replace(**dict.fromkeys(c._fields[1:9]))


def _backward(ctx, grad, wanted):
    c = ctx.call._replace(**dict(zip(Mbconv._fields[1:8], ctx.saved_tensors)))
    return mbconv_backward(c, grad, wanted)


register("mbconv", fake=_fake, setup_context=_setup_context, backward=_backward)
