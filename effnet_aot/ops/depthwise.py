"""Depthwise convolutions, 3x3 or 5x5, with padding given for each side. The border of x is zero, not the activation of a
bias: x is what the expand step made of the image, activated."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import call, register_convolution
from .rules import BatchNorm, Convolution, check_depthwise, empty_image


def depthwise_bn_relu6(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    bn_mean: Tensor,
    bn_var: Tensor,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """relu6(batch_norm(conv2d(pad(x, padding), weight, stride=stride, groups=C), bn_mean, bn_var, bn_weight, bn_bias, eps=eps)),
    with running statistics.

    x (N, C, H, W); weight (C, 1, k, k), k = 3 or 5; bn_* (C,); stride 1 or 2, or (vertical, horizontal); padding
    (left, right, top, bottom). Returns (N, C, H', W'), H' = (H + top + bottom - k) // stride + 1. Dtypes, layouts and
    errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.depthwise_bn_relu6, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """activation(conv2d(pad(x, padding), weight, bias, stride, groups=C)): inference with batch norm folded in.

    x (N, C, H, W); weight (C, 1, k, k), k = 3 or 5; bias (C,) or None; stride 1 or 2, or (vertical, horizontal); padding
    (left, right, top, bottom); activation "none", "relu" or "relu6". Returns (N, C, H', W'),
    H' = (H + top + bottom - k) // stride + 1. Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.depthwise, x, weight, bias, stride, padding, activation)


def _check(c: Convolution) -> Tensor:
    return empty_image(c, check_depthwise(c))


def _batch_norm_call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps=1e-5, stride=(1, 1), padding=(1, 1, 1, 1)):
    bn = BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, eps)
    return Convolution("depthwise_bn_relu6", x, weight, bn, activation="relu6", stride=stride, padding=padding)


def _folded_call(x, weight, bias=None, stride=(1, 1), padding=(1, 1, 1, 1), activation="none"):
    return Convolution("depthwise", x, weight, bias=bias, activation=activation, stride=stride, padding=padding)


register_convolution("depthwise_bn_relu6", _check, _batch_norm_call)
register_convolution("depthwise", _check, _folded_call)
