"""Pointwise (1x1) convolutions: expand (+ ReLU6), project (+ residual), head (+ ReLU)."""

import torch
from torch import Tensor

from .registration import call, register_convolution
from .rules import BatchNorm, Convolution, check_pointwise, empty_image


def pointwise_bn(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, bn_mean: Tensor, bn_var: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor:
    """batch_norm(conv2d(x, weight), bn_mean, bn_var, bn_weight, bn_bias, eps=eps) + residual, with running statistics.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bn_* (C_out,); residual like the result or None.
    Returns (N, C_out, H, W). Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_bn, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, residual)


def pointwise_bn_relu(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, bn_mean: Tensor, bn_var: Tensor, eps: float = 1e-5
) -> Tensor:
    """relu(batch_norm(conv2d(x, weight), bn_mean, bn_var, bn_weight, bn_bias, eps=eps)), with running statistics.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bn_* (C_out,). Returns (N, C_out, H, W). Dtypes,
    layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_bn_relu, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps)


def pointwise_bn_relu6(
    x: Tensor, weight: Tensor, bn_weight: Tensor, bn_bias: Tensor, bn_mean: Tensor, bn_var: Tensor, eps: float = 1e-5
) -> Tensor:
    """relu6(batch_norm(conv2d(x, weight), bn_mean, bn_var, bn_weight, bn_bias, eps=eps)), with running statistics.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bn_* (C_out,). Returns (N, C_out, H, W). Dtypes,
    layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise_bn_relu6, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(conv2d(x, weight, bias) + residual): inference with batch norm folded into weight and bias.

    x (N, C_in, H, W); weight (C_out, C_in, 1, 1) or (C_out, C_in); bias (C_out,) or None; residual like the result or
    None; activation "none", "relu" or "relu6". Returns (N, C_out, H, W). Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.pointwise, x, weight, bias, residual, activation)


def _check(c: Convolution) -> Tensor:
    return empty_image(c, check_pointwise(c))


def _batch_norm_call(op: str, activation: str):
    def describe(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps=1e-5, residual=None):
        return Convolution(op, x, weight, BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, eps), residual=residual, activation=activation)

    return describe


def _folded_call(x, weight, bias=None, residual=None, activation="none"):
    return Convolution("pointwise", x, weight, bias=bias, residual=residual, activation=activation)


register_convolution("pointwise_bn", _check, _batch_norm_call("pointwise_bn", "none"))
register_convolution("pointwise_bn_relu", _check, _batch_norm_call("pointwise_bn_relu", "relu"))
register_convolution("pointwise_bn_relu6", _check, _batch_norm_call("pointwise_bn_relu6", "relu6"))
register_convolution("pointwise", _check, _folded_call)
