"""The first two steps of an MBConv block with batch norm folded in: expand and depthwise, which belong together where the map is
small and wide."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import expand_depthwise_backward, expanded_map
from .registration import call, register
from .rules import ExpandDepthwise, check_depthwise, check_expand_depthwise, empty_image


def expand_depthwise(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: str = "relu6",
) -> Tensor:
    """depthwise(pointwise(x, expand_weight, expand_bias, None, activation), depthwise_weight, depthwise_bias, stride, padding,
    activation). The border that padding adds is zero after the activation.

    x (N, C_in, H, W); expand_weight (C, C_in, 1, 1) or (C, C_in); depthwise_weight (C, 1, k, k), k = 3 or 5, fastest when
    taps_first() arranged it; biases (C,) or None, of one dtype; stride 1 or 2, or (vertical, horizontal); padding
    (left, right, top, bottom). Returns (N, C, H', W'), H' = (H + top + bottom - k) // stride + 1. Dtypes, layouts and
    errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.expand_depthwise, x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride, padding, activation)


def decomposed(x, expand_weight, expand_bias, depthwise_weight, depthwise_bias, stride=1, padding=1, activation="relu6"):
    """The same by the ops of the two steps."""
    ops = torch.ops.effnet
    return ops.depthwise(ops.pointwise(x, expand_weight, expand_bias, None, activation), depthwise_weight, depthwise_bias, stride, padding, activation)


def _fake(*args):
    depthwise = check_expand_depthwise(ExpandDepthwise("expand_depthwise", *args))
    return empty_image(depthwise, check_depthwise(depthwise))


def _setup_context(ctx, inputs, output):
    c = ExpandDepthwise("expand_depthwise", *inputs)
    ctx.save_for_backward(*c[1:6], output)
    ctx.call = c._replace(**dict.fromkeys(c._fields[1:6]))


def _backward(ctx, grad, wanted):
    *tensors, out = ctx.saved_tensors
    c = ctx.call._replace(**dict(zip(ExpandDepthwise._fields[1:6], tensors)))
    return expand_depthwise_backward(c, grad, expanded_map(c), out, wanted)


register("expand_depthwise", fake=_fake, setup_context=_setup_context, backward=_backward)
