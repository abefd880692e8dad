"""Full convolutions: the stem, 3 channels to 32, 3x3, stride 2."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .registration import call, register_convolution
from .rules import BatchNorm, Convolution, check_conv, empty_image


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    bn_mean: Tensor,
    bn_var: Tensor,
    eps: float = 1e-5,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """relu(batch_norm(conv2d(pad(x, padding), weight, stride=stride), bn_mean, bn_var, bn_weight, bn_bias, eps=eps)), with
    running statistics.

    x (N, C_in, H, W); weight (C_out, C_in, k_h, k_w); bn_* (C_out,); stride or (vertical, horizontal); padding
    (left, right, top, bottom). Returns (N, C_out, H', W'), H' = (H + top + bottom - k_h) // stride + 1. Dtypes, layouts
    and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.conv_bn_relu, x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, stride, padding)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
    activation: str = "none",
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """activation(conv2d(pad(x, padding), weight, bias, stride)): inference with batch norm folded in.

    x (N, C_in, H, W); weight (C_out, C_in, k_h, k_w); bias (C_out,) or None; stride or (vertical, horizontal); padding
    (left, right, top, bottom); activation "none", "relu" or "relu6"; memory_format of the result: torch.channels_last,
    torch.contiguous_format, or None for x's. Returns (N, C_out, H', W'), H' = (H + top + bottom - k_h) // stride + 1.
    Dtypes, layouts and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.conv, x, weight, bias, stride, padding, activation, memory_format)


def _check(c: Convolution) -> Tensor:
    return empty_image(c, check_conv(c))


def _batch_norm_call(x, weight, bn_weight, bn_bias, bn_mean, bn_var, eps=1e-5, stride=(2, 2), padding=(1, 1, 1, 1)):
    bn = BatchNorm(bn_weight, bn_bias, bn_mean, bn_var, eps)
    return Convolution("conv_bn_relu", x, weight, bn, activation="relu", stride=stride, padding=padding)


def _folded_call(x, weight, bias=None, stride=(2, 2), padding=(1, 1, 1, 1), activation="none", memory_format=None):
    return Convolution("conv", x, weight, bias=bias, activation=activation, stride=stride, padding=padding, memory_format=memory_format)


register_convolution("conv_bn_relu", _check, _batch_norm_call)
register_convolution("conv", _check, _folded_call)
