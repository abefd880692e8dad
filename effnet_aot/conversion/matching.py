"""Chains of nodes become layers:

    [pad] -> convolution -> [batch norm] -> [+ residual] -> [activation] -> [global average -> [flatten]]
    linear -> [batch norm]

A layer takes the next node when that is the only one to use its value, and stops at the first that it cannot take. Batch
norm is folded in float64.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, fx

from ..fold import bias_dtype, fold_batch_norm, stored
from . import layers, vocabulary
from .trace import Trace
from .vocabulary import same_shape, size, value

# The kernel for dense convolutions gathers its input and is meant for pictures; more channels than this belong to cuDNN.
MAX_STEM_CHANNELS = 16


class Unmapped(Exception):
    """Why a node does not map."""


@dataclass
class Match:
    """A layer, and the chain of nodes that it computes. Merged padding may have other uses and is not in the chain."""

    op: str
    name: str
    chain: list[fx.Node]
    x: fx.Node
    residual: fx.Node | None
    layer: layers.Layer
    multiply_adds: int  # for one image
    padding: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[fx.Node]:
        return self.padding + self.chain


def match(traced: Trace) -> tuple[list[Match], dict[fx.Node, str]]:
    """The layers of a graph, and for nodes that might have been (part of) one the reason why they are not."""
    matches, reasons, taken, names = [], {}, set(), Names(traced)
    for node in traced.graph.nodes:
        if node in taken or node in traced.constants or node.op != "call_function":
            continue
        try:
            if (conv := vocabulary.convolution(node)) is not None:
                found = grow_convolution(node, conv, traced, taken)
            elif (linear := vocabulary.linear(node)) is not None:
                found = grow_linear(node, linear, traced)
            else:
                continue
        except Unmapped as e:
            reasons[node] = str(e)
            continue
        found.name = names.new(node)
        matches.append(found)
        taken.update(found.chain)
    for node in traced.graph.nodes:
        if node not in taken and node.op == "call_function":
            reasons.setdefault(node, why_alone(node))
    return matches, reasons


def grow_convolution(node: fx.Node, conv: vocabulary.Convolution, traced: Trace, taken: set[fx.Node]) -> Match:
    x, padding, merged = conv.x, conv.padding, []
    while (pad := vocabulary.padding(x)) is not None:
        merged.insert(0, x)
        x, padding = pad[0], tuple(a + b for a, b in zip(pad[1], padding))

    weight = constant(conv.weight, "weight", traced)
    weight = weight if weight.dim() == 4 else weight[:, :, None, None]
    op = convolution_op(value(x), weight, conv, padding)
    folding = Folding(weight, None if conv.bias is None else constant(conv.bias, "bias", traced), conv.groups)
    if conv.batch_norm is not None:
        folding.fold(conv.batch_norm, traced)
    residual, activation, pooled = conv.residual, conv.activation, conv.pool

    chain = [node]
    while (user := only_user(chain[-1])) is not None and not pooled:
        if user in taken:
            break  # an addition, from its other side
        plain = residual is None and activation == "none"
        if (norm := vocabulary.batch_norm(user)) is not None and plain and is_foldable(norm, chain[-1], traced):
            folding.fold(norm, traced)
        elif (added := vocabulary.addition(user)) is not None and plain and op == "pointwise" and added[0] is not added[1]:
            residual = added[added[0] is chain[-1]]
        elif (name := vocabulary.activation(user)) is not None and activation == "none":
            activation = name
        elif vocabulary.global_pool(user) and op == "pointwise" and residual is None:
            pooled = True
        else:
            break
        chain.append(user)
    if pooled:
        op = "pointwise_pool"
        flat = value(chain[-1]).shape[:2]
        if (user := only_user(chain[-1])) is not None and vocabulary.reshape(user) and same_shape(value(user), flat):
            chain.append(user)

    weight, bias = folding.result()
    images, _, *pixels = map(size, value(x if conv.pool else node).shape)
    multiply_adds = weight.numel() * images * math.prod(pixels) // traced.batch
    if op in ("conv", "depthwise"):
        layer = {"conv": layers.Conv, "depthwise": layers.Depthwise}[op](weight, bias, conv.stride, padding, activation)
    else:
        layer = {"pointwise": layers.Pointwise, "pointwise_pool": layers.PointwisePool}[op](weight, bias, activation)
    return Match(op, "", chain, x, residual, layer, multiply_adds, merged)


def convolution_op(x: Tensor, weight: Tensor, conv: vocabulary.Convolution, padding: tuple[int, ...]) -> str:
    check_dtype(x)
    in_channels, (out_channels, _, *kernel) = x.shape[1], weight.shape
    shape = "x".join(map(str, kernel))
    if any(d > 1 and k > 1 for d, k in zip(conv.dilation, kernel)):
        raise Unmapped(f"dilation {conv.dilation}")
    if conv.groups == in_channels == out_channels and (in_channels > 1 or kernel in ([3, 3], [5, 5])):
        if kernel not in ([3, 3], [5, 5]) or max(conv.stride) > 2:
            raise Unmapped(f"depthwise {shape} with stride {conv.stride}: only 3x3 and 5x5 with stride 1 or 2 are built")
        return "depthwise"
    if conv.groups != 1:
        raise Unmapped(f"{conv.groups} groups of {in_channels} channels to {out_channels}: neither dense nor depthwise")
    if kernel == [1, 1] and conv.stride == (1, 1) and not any(padding):
        return "pointwise"
    if in_channels > MAX_STEM_CHANNELS:
        raise Unmapped(f"dense {shape} with stride {conv.stride} from {in_channels} channels: that kernel is made for stems, up to {MAX_STEM_CHANNELS} channels")
    return "conv"


def grow_linear(node: fx.Node, linear: vocabulary.Linear, traced: Trace) -> Match:
    check_dtype(value(linear.x))
    if value(linear.x).dim() != 2:
        raise Unmapped(f"a linear layer on {value(linear.x).dim()} dimensions, not 2")
    weight = constant(linear.weight, "weight", traced)
    folding = Folding(weight.t() if linear.transposed else weight, None if linear.bias is None else constant(linear.bias, "bias", traced))
    chain = [node]
    while (user := only_user(chain[-1])) is not None and (norm := vocabulary.batch_norm(user)) is not None and is_foldable(norm, chain[-1], traced):
        folding.fold(norm, traced)
        chain.append(user)
    multiply_adds = weight.numel() * size(value(linear.x).shape[0]) // traced.batch
    return Match("linear", "", chain, linear.x, None, layers.Linear(*folding.result()), multiply_adds)


class Folding:
    """A layer's weight and bias while batch norms are folded into them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int = 1):
        self.dtype, self.shape, self.groups = weight.dtype, weight.shape, groups
        self.weight = weight.double().reshape(len(weight), -1, 1, 1)
        self.bias = None if bias is None else bias.double()

    def fold(self, norm: vocabulary.BatchNorm, traced: Trace) -> None:
        mean, var, scale, shift = (traced.constants.get(n) for n in (norm.mean, norm.var, norm.weight, norm.bias))
        mean = mean.double() if self.bias is None else mean.double() - self.bias
        scale = torch.ones_like(mean) if scale is None else scale
        shift = torch.zeros_like(mean) if shift is None else shift
        bn = SimpleNamespace(running_mean=mean, running_var=var, weight=scale, bias=shift, eps=norm.eps)
        self.weight, self.bias = fold_batch_norm(SimpleNamespace(weight=self.weight, groups=1), bn, torch.float64)

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Tensors of their own, of which the weight is rounded once."""
        weight = self.weight.reshape(self.shape).to(self.dtype, memory_format=torch.contiguous_format, copy=True)
        return stored(weight, self.groups), None if self.bias is None else self.bias.to(bias_dtype(self.dtype), copy=True)


def is_foldable(norm: vocabulary.BatchNorm, x: fx.Node, traced: Trace) -> bool:
    vectors = (norm.mean, norm.var, norm.weight, norm.bias)
    return norm.x is x and not norm.training and all(v is None or v in traced.constants for v in vectors)


def constant(node: fx.Node, name: str, traced: Trace) -> Tensor:
    if node not in traced.constants:
        raise Unmapped(f"its {name} depends on the image")
    return traced.constants[node]


def check_dtype(x: Tensor) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) and (x.dtype != torch.float64 or x.device.type != "cpu"):
        raise Unmapped(f"{x.dtype} on {x.device.type}")


def only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def why_alone(node: fx.Node) -> str:
    """Why a node is part of no layer."""
    if (norm := vocabulary.batch_norm(node)) is not None:
        if norm.training:
            return "normalises with the batch's own statistics: without running statistics, or in training mode"
        return "can only be folded into a convolution or linear layer that maps and whose result nothing else uses"
    if vocabulary.activation(node) is not None:
        return "must follow a convolution that maps, and be the only one to use its result"
    if node.target is torch.ops.aten.add.Tensor:
        return "is no residual: that is added to the result of a 1x1 convolution, in its shape, and nothing else uses that result"
    if vocabulary.global_pool(node):
        return "must follow a 1x1 convolution without residual, and be the only one to use its result"
    if vocabulary.padding(node) is not None:
        return "must be followed by convolutions that map, and by nothing else"
    return "is not in the vocabulary"


def module_stack(node: fx.Node) -> tuple[str, str]:
    """Path ("features.1.conv") and class name of the innermost module that made a call."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    return path, (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1]


class Names:
    """Names for the layers, after the modules that they come from. Flat ones: to look a module up below others, and they
    below others, takes more of a call's time than the layers do."""

    def __init__(self, traced: Trace):
        self.used = {*dir(fx.GraphModule(torch.nn.Module(), fx.Graph())), *(node.name for node in traced.constants)}

    def new(self, node: fx.Node) -> str:
        path, _ = module_stack(node)
        stem = name = path.replace(".", "_") or node.name
        count = 1
        while name in self.used:
            count += 1
            name = f"{stem}_{count}"
        self.used.add(name)
        return name
