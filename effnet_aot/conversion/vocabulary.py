"""What one node of an exported graph means. The same network comes in several spellings (conv2d or convolution, batch_norm or
its decomposed form, relu6 as hardtanh or clamp, this package's own ops): each reader knows those of one notion, returns
None for any other node, and looks at no neighbours."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


class BatchNorm(NamedTuple):
    """(x - mean) / sqrt(var + eps) * weight + bias; weight and bias may be None. training: mean and var are x's own."""

    x: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    mean: fx.Node | None
    var: fx.Node | None
    eps: float
    training: bool = False


class Convolution(NamedTuple):
    """The convolution, and what this package's ops do besides."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    batch_norm: BatchNorm | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    pool: bool = False


class Linear(NamedTuple):
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool  # whether the weight is (in_features, out_features)


def arguments(node: fx.Node) -> dict:
    """All arguments of a call by name, defaults included."""
    schema = node.target._schema.arguments
    values = {a.name: a.default_value for a in schema if a.has_default_value()}
    return values | dict(zip((a.name for a in schema), node.args)) | node.kwargs


def value(node: fx.Node):
    """The fake tensor, or symbolic number, that torch.export saw."""
    return node.meta.get("val")


def same_shape(a: Tensor, b) -> bool:
    return len(a.shape) == len(b) and all(statically_known_true(x == y) for x, y in zip(a.shape, b))


def size(n) -> int:
    """A number, of which torch.export may only know what it was for the example."""
    return n if isinstance(n, int) else n.node.hint


def is_image(node) -> bool:
    return isinstance(node, fx.Node) and isinstance(value(node), Tensor) and value(node).dim() == 4


def _pair(sizes):
    if isinstance(sizes, int):
        return (sizes, sizes)
    return tuple(sizes) * (2 // len(sizes))


def _own(node: fx.Node):
    """(kind, batch norm?, activation, pool?) of a call of this package's ops."""
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    match = re.fullmatch(r"effnet::(conv|pointwise|depthwise|linear)(_bn)?(?:_(relu6?))?(_pool)?(?:_bias)?", name)
    return match and match.groups()


def convolution(node: fx.Node) -> Convolution | None:
    if node.target in (aten.conv2d.default, aten.conv2d.padding, aten.convolution.default):
        a = arguments(node)
        x, weight = a["input"], a["weight"]
        if a.get("transposed") or not is_image(x):
            return None
        stride, dilation, padding = _pair(a["stride"]), _pair(a["dilation"]), a["padding"]
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, value(weight).shape[2:])]
            top, left = (t // 2 for t in total)
            padding = (left, total[1] - left, top, total[0] - top)
        else:
            vertical, horizontal = (0, 0) if padding == "valid" else _pair(padding)
            padding = (horizontal, horizontal, vertical, vertical)
        return Convolution(x, weight, a["bias"], stride, padding, dilation, a["groups"])

    kind, has_batch_norm, activation, pool = _own(node) or ("linear", None, None, None)
    if kind == "linear":
        return None
    a = arguments(node)
    x = a["x"]
    padding = a.get("padding", 0)
    padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding) * (4 // len(padding))
    norm = BatchNorm(None, *(a[f"bn_{name}"] for name in ("weight", "bias", "mean", "var")), a["eps"]) if has_batch_norm else None
    return Convolution(
        x, a["weight"], a.get("bias"), _pair(a.get("stride", 1)), padding, (1, 1), value(x).shape[1] if kind == "depthwise" else 1,
        norm, a.get("residual"), activation or a.get("activation", "none"), bool(pool),
    )  # fmt: skip


def linear(node: fx.Node) -> Linear | None:
    if node.target is aten.linear.default or (_own(node) or [None])[0] == "linear":
        a = arguments(node)
        return Linear(a.get("input", a.get("x")), a["weight"], a["bias"], transposed=False)
    if node.target is aten.addmm.default:
        a = arguments(node)
        plain = a["beta"] == 1 and a["alpha"] == 1 and value(a["self"]).dim() == 1
        return Linear(a["mat1"], a["mat2"], a["self"], transposed=True) if plain else None
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight = node.args
        return Linear(x, weight, None, transposed=True) if value(weight).dim() == 2 else None
    return None


def batch_norm(node: fx.Node) -> BatchNorm | None:
    if node.target is not aten.batch_norm.default:
        return None
    a = arguments(node)
    training = a["training"] or a["running_mean"] is None
    return BatchNorm(a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], a["eps"], training)


def activation(node: fx.Node) -> str | None:
    """ "relu" or "relu6". """
    if node.target in (aten.relu.default, aten.relu6.default):
        return node.target._schema.name.split("::")[1]
    if node.target in (aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default):
        a = arguments(node)
        bounds = (a.get("min_val", a.get("min")), a.get("max_val", a.get("max")))
        return {(0, 6): "relu6", (0, None): "relu"}.get(bounds)
    return None


def addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Of two tensors that nothing is broadcast in."""
    if node.target is not aten.add.Tensor:
        return None
    a = arguments(node)
    x, y = a["self"], a["other"]
    same = is_image(x) and is_image(y) and same_shape(value(x), value(y).shape) and value(x).dtype == value(y).dtype
    return (x, y) if same and a["alpha"] == 1 else None


def padding(node: fx.Node) -> tuple[fx.Node, tuple[int, int, int, int]] | None:
    """With zeros, of height and width: (left, right, top, bottom)."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return None
    a = arguments(node)
    amounts = tuple(a["pad"]) + (0,) * (4 - len(a["pad"]))
    zeros = a.get("mode", "constant") == "constant" and not a["value"]
    fixed = all(isinstance(p, int) and p >= 0 for p in amounts) and not any(amounts[4:])
    return (a["self"], amounts[:4]) if is_image(a["self"]) and zeros and fixed else None


def global_pool(node: fx.Node) -> bool:
    """The mean over height and width."""
    x = node.args[0] if node.args else None
    if not is_image(x):
        return False
    a = arguments(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target is aten.mean.dim:
        return a["dim"] is not None and {d % 4 for d in a["dim"]} == {2, 3} and a["dtype"] in (None, value(x).dtype)
    if node.target in (aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default):
        return tuple(a["output_size"]) == (1, 1)
    if node.target is aten.avg_pool2d.default:
        return _pair(a["kernel_size"]) == tuple(value(x).shape[2:]) and not any(a["padding"]) and a["divisor_override"] is None
    return False


RESHAPES = {
    aten.flatten.using_ints, aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unflatten.int,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
}  # fmt: skip


def reshape(node: fx.Node) -> bool:
    """The same numbers in the same order."""
    return node.target in RESHAPES


DROPOUTS = {
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.feature_dropout_.default,
    aten.alpha_dropout.default, aten.alpha_dropout_.default, aten.feature_alpha_dropout.default, aten.feature_alpha_dropout_.default,
}  # fmt: skip
COPIES = {
    aten.clone.default, aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default,
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default,
    aten.slice.Tensor, aten.expand.default,
}  # fmt: skip


def identity(node: fx.Node) -> fx.Node | None:
    """The argument whose values a call returns unchanged, in another layout perhaps."""
    if node.target in DROPOUTS:
        a = arguments(node)
        return None if a["train"] and a["p"] > 0 else node.args[0]
    x = node.args[0] if node.args else None
    before, after = (value(n) if isinstance(n, fx.Node) else None for n in (x, node))
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if not same_shape(before, after.shape) or (before.dtype, before.device) != (after.dtype, after.device):
        return None
    return x if node.target in COPIES or reshape(node) or padding(node) else None
