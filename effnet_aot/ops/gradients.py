"""The backward of the ops, composed of ATen, for out = activation(batch_norm(y) + bias + residual), y = conv(x).

With g = grad * activation'(out), the mask being read off the output, and rstd = 1 / sqrt(var + eps):

    residual: g                      bias, bn_bias: sum g
    y:        g * bn_weight * rstd   bn_mean:       -bn_weight * rstd * sum g
    bn_weight: rstd * sum g (y - mean)
    bn_var:    -bn_weight * rstd^3 / 2 * sum g (y - mean)

Sums run over batch, height and width, in float32 for half precision. y is not kept: it is computed again when bn_weight
or bn_var want a gradient, which they do not when batch norm is frozen.
"""

import torch
from torch import Tensor

from .rules import Convolution, ExpandDepthwise, Mbconv, StemMbconv

aten = torch.ops.aten


def mask(grad: Tensor, out: Tensor | None, activation: str) -> Tensor:
    """grad where the activation passes it. At the bounds, and for NaN, as PyTorch's relu and relu6 have it."""
    if activation == "relu":
        return aten.threshold_backward(grad, out, 0)
    if activation == "relu6":
        return aten.hardtanh_backward(grad, out, 0.0, 6.0)
    return grad


def convolution_backward(c: Convolution, grad: Tensor, out: Tensor | None, wanted: set[str]) -> dict[str, Tensor]:
    """Gradients of the arguments named in `wanted`. `out` is None when there is no activation."""
    grads: dict[str, Tensor] = {}
    g = mask(grad, out, c.activation)
    grads["residual"] = g

    weight = c.weight if c.weight.dim() == 4 else c.weight[:, :, None, None]
    groups = c.x.shape[1] // weight.shape[1]
    left, right, top, bottom = c.padding
    symmetric = left == right and top == bottom
    x = c.x if symmetric else aten.constant_pad_nd(c.x, list(c.padding))
    window = (list(c.stride), [top, left] if symmetric else [0, 0], [1, 1], False, [0, 0], groups)

    wide = torch.float32 if g.dtype in (torch.float16, torch.bfloat16) else g.dtype
    total = g.sum((0, 2, 3), dtype=wide) if wanted & {"bias", "bn_bias", "bn_mean"} else None
    if "bias" in wanted:
        grads["bias"] = total.to(c.bias.dtype)
    if c.batch_norm is not None:
        bn = c.batch_norm
        gamma, rstd = bn.weight.to(wide), torch.rsqrt(bn.var.to(wide) + bn.eps)
        scale = gamma * rstd
        if "bn_bias" in wanted:
            grads["bn_bias"] = total.to(bn.bias.dtype)
        if "bn_mean" in wanted:
            grads["bn_mean"] = (-scale * total).to(bn.mean.dtype)
        if wanted & {"bn_weight", "bn_var"}:
            y = aten.convolution(x, weight, None, *window)
            moment = (g * (y - bn.mean.to(wide)[:, None, None])).sum((0, 2, 3))
            grads["bn_weight"] = (rstd * moment).to(bn.weight.dtype)
            grads["bn_var"] = (-0.5 * scale * rstd * rstd * moment).to(bn.var.dtype)
        g = (g * scale[:, None, None]).to(g.dtype)

    if wanted & {"x", "weight"}:
        needs = ["x" in wanted, "weight" in wanted, False]
        grad_x, grad_weight, _ = aten.convolution_backward(g, x, weight, None, *window, needs)
        if needs[0]:
            _, _, height, width = c.x.shape
            grads["x"] = grad_x if symmetric else grad_x[:, :, top : top + height, left : left + width]
        if needs[1]:
            grads["weight"] = grad_weight.reshape(c.weight.shape)
    return grads


def step_backward(name: str, step: Convolution, grad: Tensor, out: Tensor | None, wanted: set[str], below: bool) -> dict[str, Tensor]:
    """Gradients of a block's step by the block's names; x's too, when the steps below need it."""
    own = {key: f"{name}_{key}" for key in ("weight", "bias")}
    found = convolution_backward(step, grad, out, {key for key in own if own[key] in wanted} | ({"x"} if below else set()))
    return {own.get(key, key): value for key, value in found.items()}


def expanded_map(c: ExpandDepthwise | Mbconv) -> Tensor:
    return c.x if c.expand_weight is None else torch.ops.effnet.pointwise(c.x, c.expand_weight, c.expand_bias, None, c.activation)


def below_depthwise(c: ExpandDepthwise | Mbconv, wanted: set[str]) -> bool:
    return "x" in wanted or (c.expand_weight is not None and bool(wanted & {"expand_weight", "expand_bias"}))


def expand_depthwise_backward(c: ExpandDepthwise | Mbconv, grad: Tensor, expanded: Tensor, filtered: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """Of a block's first two steps. `grad` is the one of the filtered map."""
    shown = c.activation != "none"
    grads = step_backward("depthwise", c.depthwise(expanded), grad, filtered if shown else None, wanted, below_depthwise(c, wanted))
    if below_depthwise(c, wanted) and c.expand_weight is not None:
        grads |= step_backward("expand", c.expand(c.x), grads["x"], expanded if shown else None, wanted, "x" in wanted)
    return grads


def mbconv_backward(c: Mbconv, grad: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """Gradients of the arguments named in `wanted`. The maps between the steps are not kept: they are computed again."""
    expanded = expanded_map(c)
    filtered = torch.ops.effnet.depthwise(expanded, c.depthwise_weight, c.depthwise_bias, c.stride, c.padding, c.activation)
    below = below_depthwise(c, wanted) or bool(wanted & {"depthwise_weight", "depthwise_bias"})
    grads = step_backward("project", c.project(filtered), grad, None, wanted, below)
    if below:
        grads |= expand_depthwise_backward(c, grads["x"], expanded, filtered, wanted) | {"residual": grads["residual"]}
    return grads


def stem_mbconv_backward(c: StemMbconv, grad: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """The same for a stem and the block on its map."""
    stem_map = torch.ops.effnet.conv(c.x, c.stem_weight, c.stem_bias, c.stem_stride, c.stem_padding, c.stem_activation, c.memory_format)
    names = {"x": "x", "stem_weight": "weight", "stem_bias": "bias"}
    below = {name for name in names if name in wanted}
    grads = mbconv_backward(c.block(stem_map), grad, wanted - below | ({"x"} if below else set()))
    if below:
        out = None if c.stem_activation == "none" else stem_map
        found = convolution_backward(c.stem(), grads.pop("x"), out, {names[name] for name in below})
        grads |= {name: found[names[name]] for name in below}
    return grads


def pool_backward(grad: Tensor, height: int, width: int) -> Tensor:
    """Of the mean over height and width."""
    return (grad / (height * width))[:, :, None, None].expand(*grad.shape, height, width)


def linear_backward(x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """Gradients of the arguments named in `wanted`, for out = x @ weight.T + bias."""
    grads = {}
    if "x" in wanted:
        grads["x"] = grad @ weight
    if "weight" in wanted:
        grads["weight"] = grad.t() @ x
    if "bias" in wanted:
        wide = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else grad.dtype
        grads["bias"] = grad.sum(0, dtype=wide).to(bias.dtype)
    return grads
