"""The head: pointwise convolution, activation and global average pool in one op."""

import torch
from torch import Tensor

from .gradients import convolution_backward
from .registration import call, register
from .rules import Convolution, check_pointwise


def pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(conv2d(x, weight, bias)).mean((2, 3)): inference with batch norm folded into weight and bias.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bias (C_out,) or None; activation "none", "relu" or
    "relu6". Returns (N, C_out). Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_pool, x, weight, bias, activation)


def _describe(x, weight, bias=None, activation="none"):
    return Convolution("pointwise_pool", x, weight, bias=bias, activation=activation)


def _fake(*args):
    c = _describe(*args)
    batch, out_channels, _, _ = check_pointwise(c, pooled=True)
    return c.x.new_empty_strided((batch, out_channels), (out_channels, 1))


def _setup_context(ctx, inputs, output):
    c = _describe(*inputs)
    ctx.save_for_backward(c.x, c.weight, c.bias)
    ctx.activation = c.activation


def _backward(ctx, grad, wanted):
    x, weight, bias = ctx.saved_tensors
    batch, _, height, width = x.shape
    grad = (grad / (height * width))[:, :, None, None].expand(batch, weight.shape[0], height, width)
    # The pooled output does not tell which pixels the activation cut off.
    out = None if ctx.activation == "none" else torch.ops.effnet.pointwise(x, weight, bias, None, ctx.activation)
    return convolution_backward(_describe(x, weight, bias, ctx.activation), grad, out, wanted)


register("pointwise_pool", fake=_fake, setup_context=_setup_context, backward=_backward)
