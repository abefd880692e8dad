"""Batch norm folded into the convolution before it: the weight and bias that the ops without batch norm take."""

import torch
from torch import Tensor

from .registration import call, register
from .rules import check_fold_batch_norm


def fold_batch_norm(
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    bn_mean: Tensor,
    bn_var: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    taps_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """(weight * scale, bn_bias - bn_mean * scale) with scale = bn_weight / sqrt(bn_var + eps), so that conv(x, weight) with
    batch norm is conv(x, folded weight) + folded bias.

    weight (C_out, C_in, k_h, k_w) or (C_out, C_in), read through any strides; vectors (C_out,). dtype of the folded weight:
    weight's (None), or float16 or bfloat16 where weight is float32, or any where it is float64. The folded bias is float32,
    with a float64 weight float64. Results are rounded once, as if computed in float64. The folded weight is contiguous; with
    taps_first, for a depthwise one (C, 1, k_h, k_w), it lies as taps_first() lays it. Differentiable, though meant for
    inference; autocast leaves it alone. Errors: see effnet_aot.ops.
    """
    return call(torch.ops.effnet.fold_batch_norm, weight, bn_weight, bn_bias, bn_mean, bn_var, eps, dtype, taps_first)


def _fake(weight, *batch_norm_and_options):
    dtype, strides = check_fold_batch_norm("fold_batch_norm", weight, *batch_norm_and_options)
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return weight.new_empty_strided(weight.shape, strides, dtype=dtype), weight.new_empty_strided(weight.shape[:1], (1,), dtype=bias_dtype)


def _setup_context(ctx, inputs, output):
    weight, bn_weight, _, bn_mean, bn_var, ctx.eps, *_ = inputs
    ctx.save_for_backward(weight, bn_weight, bn_mean, bn_var)
    ctx.dtypes = [t.dtype for t in inputs[:5]]


def _backward(ctx, grad_weight, grad_bias, wanted):
    weight, bn_weight, bn_mean, bn_var = (t.double() for t in ctx.saved_tensors)
    grad_weight, grad_bias = grad_weight.double(), grad_bias.double()
    inverse = (bn_var + ctx.eps).rsqrt()
    scale = bn_weight * inverse
    grad_scale = (grad_weight * weight).flatten(1).sum(1) - grad_bias * bn_mean
    grads = {
        "weight": grad_weight * scale.view(-1, *[1] * (weight.dim() - 1)),
        "bn_weight": grad_scale * inverse,
        "bn_bias": grad_bias,
        "bn_mean": -grad_bias * scale,
        "bn_var": grad_scale * scale * inverse * inverse * -0.5,
    }
    return {name: grad.to(dtype) for (name, grad), dtype in zip(grads.items(), ctx.dtypes) if name in wanted}


register("fold_batch_norm", fake=_fake, setup_context=_setup_context, backward=_backward, autocast=False)
