"""The head: pointwise convolution, activation and global average pool in one op."""

from collections.abc import Callable

import torch
from torch import Tensor

from .gradients import convolution_backward, pool_backward
from .registration import call, register
from .rules import BatchNorm, Convolution, check_pointwise


def pointwise_bn_relu_pool(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, bn_mean: Tensor, bn_var: Tensor, eps: float = 1e-5
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight), bn_mean, bn_var, bn_weight, bn_bias, eps=eps)).mean((2, 3)), with running statistics.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bn_* (C_out,). Returns (N, C_out). Dtypes, layouts
    and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_bn_relu_pool, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps)


def pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(conv2d(x, weight, bias)).mean((2, 3)): inference with batch norm folded into weight and bias.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bias (C_out,) or None; activation "none", "relu" or
    "relu6". Returns (N, C_out). Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_pool, x, weight, bias, activation)


def _batch_norm_call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps=1e-5):
    return Convolution("pointwise_bn_relu_pool", x, weight, BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, eps), activation="relu")


def _folded_call(x, weight, bias=None, activation="none"):
    return Convolution("pointwise_pool", x, weight, bias=bias, activation=activation)


def _unpooled(c: Convolution) -> Tensor:
    if c.batch_norm:
        return torch.ops.effnet.pointwise_bn_relu(c.x, c.weight, *c.batch_norm)
    return torch.ops.effnet.pointwise(c.x, c.weight, c.bias, None, c.activation)


def _register(name: str, describe: Callable[..., Convolution]) -> None:
    def fake(*args):
        c = describe(*args)
        batch, out_channels, _, _ = check_pointwise(c, pooled=True)
        return c.x.new_empty_strided((batch, out_channels), (out_channels, 1))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*(i if isinstance(i, Tensor) else None for i in inputs))
        ctx.rest = [None if isinstance(i, Tensor) else i for i in inputs]

    def backward(ctx, grad, wanted):
        c = describe(*(rest if saved is None else saved for saved, rest in zip(ctx.saved_tensors, ctx.rest)))
        # The pooled output does not tell which pixels the activation cut off.
        return convolution_backward(c, pool_backward(grad, *c.x.shape[2:]), None if c.activation == "none" else _unpooled(c), wanted)

    register(name, fake=fake, setup_context=setup_context, backward=backward)


_register("pointwise_bn_relu_pool", _batch_norm_call)
_register("pointwise_pool", _folded_call)
