"""How these networks begin: a dense convolution and an MBConv block without expansion, with batch norm folded in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .gradients import stem_mbconv_backward
from .registration import call, register
from .rules import StemMbconv, check_pointwise, check_stem_mbconv, empty_image


def stem_mbconv(
    x: Tensor,
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stem_stride: int | Sequence[int] = 2,
    stem_padding: int | Sequence[int] = 1,
    stem_activation: str = "relu",
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    activation: str = "relu6",
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """mbconv(conv(x, stem_weight, stem_bias, stem_stride, stem_padding, stem_activation, memory_format), None, None,
    depthwise_weight, depthwise_bias, project_weight, project_bias, None, stride, padding, activation), whose first map is the
    network's largest.

    x (N, C_in, H, W); stem_weight (C, C_in, k_h, k_w); depthwise_weight (C, 1, k, k), k = 3 or 5, fastest when taps_first()
    arranged it; project_weight (C_out, C, 1, 1) or (C_out, C); biases (C,), (C,), (C_out,) or None, the last two of one dtype;
    stem_stride or (vertical, horizontal); stride 1 or 2, or (vertical, horizontal); paddings (left, right, top, bottom);
    memory_format of the result: torch.channels_last, torch.contiguous_format, or None for x's. Returns (N, C_out, H', W'). In
    half precision an infinite value of the stem's map may act as the largest finite number. Dtypes, layouts and errors: see
    effnet_aot.ops.
    """
    weights = (stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    return call(torch.ops.effnet.stem_mbconv, x, *weights, stem_stride, stem_padding, stem_activation, stride, padding, activation, memory_format)


def decomposed(
    x, stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias, stem_stride=2, stem_padding=1, stem_activation="relu",
    stride=1, padding=1, activation="relu6", memory_format=None,
):  # fmt: skip
    """The same by the ops of the three steps."""
    ops = torch.ops.effnet
    x = ops.conv(x, stem_weight, stem_bias, stem_stride, stem_padding, stem_activation, memory_format)
    x = ops.depthwise(x, depthwise_weight, depthwise_bias, stride, padding, activation)
    return ops.pointwise(x, project_weight, project_bias)


def _fake(*args):
    project = check_stem_mbconv(StemMbconv("stem_mbconv", *args))
    return empty_image(project, check_pointwise(project))


def _setup_context(ctx, inputs, output):
    c = StemMbconv("stem_mbconv", *inputs)
    ctx.save_for_backward(*c[1:8])
    ctx.call = c._replace(**dict.fromkeys(c._fields[1:8]))


def _backward(ctx, grad, wanted):
    c = ctx.call._replace(**dict(zip(StemMbconv._fields[1:8], ctx.saved_tensors)))
    return stem_mbconv_backward(c, grad, wanted)


register("stem_mbconv", fake=_fake, setup_context=_setup_context, backward=_backward)
