"""The classifier: a linear layer on (rows, in_features)."""

import torch
from torch import Tensor

from .gradients import linear_backward
from .registration import call, register
from .rules import check_linear


def linear_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(x, weight, bias) = x @ weight.T + bias.

    x (rows, in_features); weight (out_features, in_features); bias (out_features,). Returns (rows, out_features),
    contiguous. Dtypes and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.linear_bias, x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear(x, weight, bias) = x @ weight.T + bias, the bias optional.

    x (rows, in_features); weight (out_features, in_features); bias (out_features,) or None. Returns
    (rows, out_features), contiguous. Dtypes and errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.linear, x, weight, bias)


def _fake(op: str):
    def fake(x, weight, bias=None):
        rows, out_features = check_linear(op, x, weight, bias)
        return x.new_empty_strided((rows, out_features), (out_features, 1))

    return fake


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad, wanted):
    return linear_backward(*ctx.saved_tensors, grad, wanted)


for _op in ("linear_bias", "linear"):
    register(_op, fake=_fake(_op), setup_context=_setup_context, backward=_backward)
